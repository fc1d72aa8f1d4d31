"""Questions about documents: one hop in passages of a text, two hops in a ledger of people.

They stand for the tasks of section 3.4 of arXiv 2404.06654, whose SQuAD and HotpotQA are not ours
to ship.
"""

import random
from functools import lru_cache
from itertools import cycle
from typing import Final

from loki_attn.errors import InputError
from loki_attn.evaluate.ruler.draft import Draft, Setting
from loki_attn.evaluate.ruler.material import cut, sentences
from loki_attn.evaluate.ruler.names import GIVEN_NAMES, SURNAMES, TOWNS, TRADES

_INSTRUCTION: Final = (
    "Answer the question from the documents alone. Give the answer and nothing else.\n\n"
)
_AGAIN: Final = "\n\n" + _INSTRUCTION
_PASSAGE_SENTENCES: Final = 3
_LEAST_WORDS, _MOST_WORDS = 12, 60
_ANSWER_WORDS: Final = 3
_PASSAGE_WORDS: Final = 90
_MARKS: Final = ".,;:!?\"'()-\u2014\u2018\u2019\u201c\u201d"


def quoted_sentence(draw: random.Random, units: int, setting: Setting) -> Draft:
    """Make a draft that asks how a sentence of one of the passages goes on.

    Args:
        draw: The source of chance.
        units: Words of the passages beside the one that is asked about.
        setting: Its haystack is what the passages are of.

    Raises:
        InputError: If no sentence of the haystack can be asked for.
    """
    passages = _passages(setting.haystack)
    order = draw.sample(range(len(passages)), len(passages))
    whole = " ".join(sentences(setting.haystack))
    for place in order:
        if sum(len(one.split()) for one in passages[place]) > _PASSAGE_WORDS:
            continue
        spoken = [one.split() for one in draw.sample(passages[place], len(passages[place]))]
        asked = next((one for one in spoken if _can_be_asked(one, whole)), None)
        if asked is not None:
            order.remove(place)
            break
    else:
        raise InputError(
            f"No sentence of the haystack can be asked for: expected one of {_LEAST_WORDS} to "
            f"{_MOST_WORDS} words whose first half comes once; give a longer text"
        )
    shown = [" ".join(passages[place])]
    for other in cycle(order or [place]):
        if units <= 0:
            break
        spoken_there = " ".join(passages[other]).split()
        shown.append(cut(spoken_there, units))
        units -= len(spoken_there)
    half = len(asked) // 2
    return Draft(
        context=_INSTRUCTION + _numbered(draw, shown),
        question=(
            f'{_AGAIN}Question: In one of the documents a sentence begins with "'
            f'{" ".join(asked[:half])}". Which words come next?\nAnswer: The next words are'
        ),
        references=(_answer(asked),),
    )


def teacher_of(draw: random.Random, units: int, setting: Setting) -> Draft:
    """Make a draft that asks for the town where somebody's teacher was born.

    Args:
        draw: The source of chance.
        units: People, a document each; each has another of them for a teacher.
        setting: Not used.
    """
    del setting
    names = _names(draw, units)
    towns = [draw.choice(TOWNS) for _ in names]
    asked, teacher = 0, 1
    towns[teacher] = draw.choice([town for town in TOWNS if town != towns[asked]])
    ledger = []
    for index, name in enumerate(names):
        taught_by = teacher if index == asked else _other(draw, index, units)
        ledger.append(
            f"{name} was born in {towns[index]} and became a {draw.choice(TRADES)}. The teacher "
            f"of {name} was {names[taught_by]}."
        )
    return Draft(
        context=_INSTRUCTION + _numbered(draw, ledger),
        question=(
            f"{_AGAIN}Question: In which town was the teacher of {names[asked]} born?\n"
            f"Answer: The teacher of {names[asked]} was born in"
        ),
        references=(towns[teacher],),
    )


@lru_cache(maxsize=4)
def _passages(haystack: str) -> tuple[tuple[str, ...], ...]:
    source = sentences(haystack)
    return tuple(
        source[at : at + _PASSAGE_SENTENCES] for at in range(0, len(source), _PASSAGE_SENTENCES)
    )


def _can_be_asked(spoken: list[str], whole: str) -> bool:
    """Whether a sentence has a middle length and its first half comes once in the text."""
    return (
        _LEAST_WORDS <= len(spoken) <= _MOST_WORDS
        and whole.count(" ".join(spoken[: len(spoken) // 2])) == 1
    )


def _answer(spoken: list[str]) -> str:
    half = len(spoken) // 2
    return " ".join(spoken[half : half + _ANSWER_WORDS]).strip(_MARKS)


def _numbered(draw: random.Random, documents: list[str]) -> str:
    draw.shuffle(documents)
    listed = "\n\n".join(
        f"Document {number}:\n{document}" for number, document in enumerate(documents, start=1)
    )
    return f"These are the documents.\n\n{listed}"


def _names(draw: random.Random, count: int) -> list[str]:
    """Different people, each of two given names and a surname."""
    given, surnames = len(GIVEN_NAMES), len(SURNAMES)
    # A second given name is one of the others: Ada Ada would be nobody's.
    drawn = draw.sample(range(given * (given - 1) * surnames), count)
    people = []
    for number in drawn:
        pair, surname = divmod(number, surnames)
        second, first = divmod(pair, given)
        other = GIVEN_NAMES[(first + second + 1) % given]
        people.append(f"{GIVEN_NAMES[first]} {other} {SURNAMES[surname]}")
    return people


def _other(draw: random.Random, index: int, count: int) -> int:
    """Another one of `count` people."""
    return (index + draw.randrange(1, count)) % count
