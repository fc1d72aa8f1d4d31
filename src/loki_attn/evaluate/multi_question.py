"""Several questions about one context: read once, ask each of the untouched cache.

The protocol of SCBench (arXiv 2412.10319) with texts of our own. A method that looks at the query
answers any of the questions; one that decided before it knew them must have guessed.
"""

import random
from collections.abc import Callable, Sequence
from typing import Final

from loki_attn.errors import InputError
from loki_attn.evaluate.samples import Question, Sample

ABOUT: Final = (
    "several lockers and their codes stand at even depths of a public-domain text; every code is "
    "asked for on its own, of the cache as it was after the context; score is 1 where the code "
    "is in the answer's first line"
)
_INTRODUCTION: Final = (
    "The text below mentions some lockers and their codes. Remember them; they are asked for "
    "afterwards.\n\n"
)
_NEEDLE: Final = " The locker of {owner} opens with the code {code}. "
_QUESTION: Final = (
    "\n\nQuestion: which code opens the locker of {owner}?\n"
    "Answer: The locker of {owner} opens with the code"
)
# fmt: off
_OWNERS: Final = (
    "Agatha", "Abigail", "Barnaby", "Beatrice", "Clement", "Cordelia", "Dorothea", "Edmund",
    "Eleanor", "Felix", "Florence", "Gideon", "Harriet", "Hector", "Imogen", "Jasper",
    "Josephine", "Leopold", "Lucinda", "Magnus", "Matilda", "Nathaniel", "Octavia", "Percival",
    "Philippa", "Quentin", "Rosalind", "Rupert", "Sebastian", "Tabitha", "Theodore", "Ursula",
    "Valentine", "Winifred",
)
# fmt: on
_ANSWER_TOKENS: Final = 12
_MARGIN_TOKENS: Final = 8  # joined pieces may take a few tokens more than they do apart


def samples(
    *,
    length_tokens: int,
    count: int,
    questions: int,
    encode: Callable[[str], list[int]],
    decode: Callable[[list[int]], str],
    haystack: str,
    seed: int = 0,
) -> list[Sample]:
    """Make contexts with several needles and a question for each.

    Args:
        length_tokens: Longest context, question and answer together.
        count: Contexts.
        questions: Needles, and questions, in each.
        encode: Tokens of a text.
        decode: Text of tokens.
        haystack: The text around the needles.
        seed: Of owners, codes and stretches.

    Raises:
        InputError: If the needles do not fit, the haystack is too short, or there are more
            questions than owners.
    """
    if not 2 <= questions <= len(_OWNERS) or count < 1:
        raise InputError(
            f"Ask 2 to {len(_OWNERS)} questions of one context or more, got {questions} of {count}."
        )
    source = encode(haystack)
    made = []
    for index in range(count):
        draw = random.Random(f"{seed}/multi-question/{length_tokens}/{index}")
        owners = draw.sample(_OWNERS, questions)
        codes = [str(code) for code in draw.sample(range(10_000, 100_000), questions)]
        needles = [_NEEDLE.format(owner=o, code=c) for o, c in zip(owners, codes, strict=True)]
        asked = [_QUESTION.format(owner=owner) for owner in owners]
        fixed = len(encode(_INTRODUCTION + "".join(needles))) + max(len(encode(q)) for q in asked)
        room = length_tokens - fixed - _ANSWER_TOKENS - _MARGIN_TOKENS * questions
        if room < questions or room >= len(source):
            raise InputError(
                f"{questions} questions about {length_tokens} tokens leave {room} tokens of "
                f"text around the needles; the haystack has {len(source)}. Change the length, the "
                "number of questions or the haystack."
            )
        start = draw.randrange(len(source) - room)
        context = _hide(needles, source[start : start + room], decode)
        made.append(
            Sample(
                name=f"multi-question/{length_tokens}/{index}",
                context=_INTRODUCTION + context,
                questions=tuple(
                    Question(
                        text=question,
                        references=(code,),
                        max_new_tokens=_ANSWER_TOKENS,
                        stop=("\n",),
                    )
                    for question, code in zip(asked, codes, strict=True)
                ),
                labels={"length_tokens": length_tokens},
            )
        )
    return made


def score(sample: Sample, question: Question, text: str) -> float:
    """1 where the code is in the answer."""
    del sample
    return float(question.references[0] in text)


def _hide(needles: Sequence[str], stretch: list[int], decode: Callable[[list[int]], str]) -> str:
    """Put needles between words at even depths of a stretch of tokens."""
    text = decode(stretch)
    words = text.split(" ")
    step = len(words) / len(needles)
    places = [round((index + 0.5) * step) for index in range(len(needles))]
    parts, before = [], 0
    for place, needle in zip(places, needles, strict=True):
        parts += [" ".join(words[before:place]), needle]
        before = place
    return "".join([*parts, " ".join(words[before:])])
