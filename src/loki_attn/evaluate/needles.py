"""Needles: one fact at a set depth of a random stretch of a text, and a question about it."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import accumulate
from types import MappingProxyType
from typing import Final, final

from loki_attn.errors import InputError, unknown_name
from loki_attn.evaluate.ruler.filling import most_units
from loki_attn.evaluate.ruler.material import stretch, uuids
from loki_attn.evaluate.ruler.names import listed
from loki_attn.evaluate.samples import Question, Sample

_LEAST_WORDS: Final = 40
# An answer may begin otherwise than expected and still be read.
_SPARE_TOKENS: Final = 8
_DRAWS: Final = 200
_INTRODUCTION: Final = (
    "One sentence that does not belong there is hidden in the text below. Keep it in mind: you "
    "will be asked about it after the text.\n\n"
)
_CITIES: Final = listed(
    "Accra Athens Auckland Belfast Bergen Bogota Bristol Cairo Calcutta Cardiff Dakar Denver "
    "Dublin Geneva Glasgow Hamburg Havana Helsinki Jakarta Karachi Kyoto Lagos Leipzig Lisbon "
    "Madrid Manila Montreal Nairobi Naples Osaka Oslo Prague Quito Riga Rotterdam Santiago Seville "
    "Sofia Stockholm Tallinn Toronto Tunis Utrecht Vienna Warsaw Zagreb Zurich"
)
_GUESTS: Final = listed(
    "Captain Marwick, Mrs. Tolland, the piano tuner, the surveyor, Miss Penrose, the old ferryman, "
    "Doctor Quill, the bookbinder, Major Fenn, the bell founder",
    ", ",
)
_INNS: Final = listed(
    "Blue Heron, Brass Compass, Crooked Oar, Golden Thimble, Hollow Oak, Lame Fiddler, "
    "Seven Bells, Silver Pike, Three Lanterns, White Badger",
    ", ",
)
_MANNERS: Final = listed(
    "baked braised candied chilled grilled pickled poached roasted smoked stewed"
)
_DISHES: Final = listed(
    "artichokes chestnuts dumplings eel figs herring leeks mushrooms oysters parsnips pheasant "
    "quinces rhubarb trout turnips venison"
)


@final
@dataclass(frozen=True, kw_only=True)
class Needle:
    """A sentence to hide, a question about it that begins the answer, and the answer."""

    sentence: str
    question: str
    answer: str


def _number(draw: random.Random) -> Needle:
    key = _five_digits(draw)
    return Needle(
        sentence=f"The pass key is {key}.",
        question="What is the pass key in the text above?\nAnswer: The pass key is",
        answer=key,
    )


def _city(draw: random.Random) -> Needle:
    city, number = draw.choice(_CITIES), _five_digits(draw)
    return Needle(
        sentence=f"The magic number of {city} is {number}.",
        question=f"What is the magic number of {city} in the text above?\nAnswer: The magic number "
        f"of {city} is",
        answer=number,
    )


def _uuid(draw: random.Random) -> Needle:
    code = next(uuids(draw))
    return Needle(
        sentence=f"The seal of the archive reads {code}.",
        question="What does the seal of the archive in the text above read?\nAnswer: The seal of "
        "the archive reads",
        answer=code,
    )


def _sentence(draw: random.Random) -> Needle:
    guest, inn = draw.choice(_GUESTS), draw.choice(_INNS)
    dish = f"{draw.choice(_MANNERS)} {draw.choice(_DISHES)}"
    return Needle(
        sentence=f"At the {inn} that evening, {guest} ordered the {dish} and ate alone.",
        question=f"What did {guest} order at the {inn} in the text above?\nAnswer: At the {inn}, "
        f"{guest} ordered the",
        answer=dish,
    )


KINDS: Final[Mapping[str, Callable[[random.Random], Needle]]] = MappingProxyType(
    {"number": _number, "city": _city, "uuid": _uuid, "sentence": _sentence}
)


def samples(
    kind: str,
    *,
    length_tokens: int,
    depths: Sequence[float],
    per_depth: int,
    encode: Callable[[str], list[int]],
    haystack: str,
    seed: int = 0,
) -> list[Sample]:
    """Make samples with a needle at each of several depths, for one length.

    Args:
        kind: What is hidden, a name from `KINDS`.
        length_tokens: Upper limit of context, question and answer together, in tokens; the
            context is filled nearly up to it.
        depths: Where the needle stands: 0 before the text, 1 after it, else at the end of the
            sentence nearest to that share of the text.
        per_depth: Samples at each depth.
        encode: Tokens of a text.
        haystack: Public-domain text; each sample has a stretch of its own, starting again at the
            beginning where the text ends.
        seed: Of needles and stretches.

    Returns:
        The samples, depth by depth, of one question each.

    Raises:
        UnknownNameError: If there is no such kind.
        InputError: If a depth is outside [0, 1] or comes twice, `per_depth` is negative, the length
            is too small, or the haystack is empty or holds the answers already.
    """
    if kind not in KINDS:
        raise unknown_name("kind of needle", kind, KINDS)
    if wrong := [depth for depth in depths if not 0.0 <= depth <= 1.0]:
        raise InputError(f"depth is {wrong[0]}; expected a share of the text from 0 to 1")
    if len(set(depths)) < len(depths):
        raise InputError(f"depths are {list(depths)}; expected each of them once")
    if per_depth < 0:
        raise InputError(f"per_depth is {per_depth}; expected 0 or more samples at each depth")
    return [
        _sample(kind, length_tokens, float(depth), index, encode, haystack, seed)
        for depth in depths
        for index in range(per_depth)
    ]


def _sample(
    kind: str,
    length_tokens: int,
    depth: float,
    index: int,
    encode: Callable[[str], list[int]],
    haystack: str,
    seed: int,
) -> Sample:
    name = f"{kind}/{length_tokens}/{depth}/{index}"
    needle = _unheard(kind, random.Random(f"{seed}/{name}"), haystack)
    question = Question(
        text=f"\n\nQuestion: {needle.question}",
        references=(needle.answer,),
        max_new_tokens=len(encode(" " + needle.answer)) + _SPARE_TOKENS,
        stop=("\n",),
    )
    hidden = partial(_hide, f"{seed}/{name}/stretch", needle, depth, haystack)
    asked_tokens = len(encode(question.text)) + question.max_new_tokens
    units = most_units(
        lambda num_words: len(encode(hidden(num_words))),
        length_tokens - asked_tokens,
        _LEAST_WORDS,
    )
    if units is None:
        needed = len(encode(hidden(_LEAST_WORDS))) + asked_tokens
        raise InputError(
            f"{length_tokens} tokens are too few for a needle of kind {kind!r}: its smallest "
            f"sample takes {needed}, {question.max_new_tokens} of them for the answer; ask for a "
            "larger length_tokens"
        )
    return Sample(
        name=name,
        context=hidden(units),
        questions=(question,),
        labels={"kind": kind, "length_tokens": length_tokens, "depth": depth},
    )


def _unheard(kind: str, draw: random.Random, haystack: str) -> Needle:
    """A needle whose answer the haystack does not hold anyway."""
    known = _lower(haystack)
    for _ in range(_DRAWS):
        needle = KINDS[kind](draw)
        if needle.answer.lower() not in known:
            return needle
    raise InputError(
        f"The haystack holds the answers of needles of kind {kind!r} already; give another text"
    )


@lru_cache(maxsize=4)
def _lower(haystack: str) -> str:
    return " ".join(haystack.lower().split())


def _hide(tag: str, needle: Needle, depth: float, haystack: str, num_words: int) -> str:
    """Put a needle between two sentences of a stretch of so many words."""
    prose = stretch(random.Random(tag), haystack, num_words)
    ends = list(accumulate(map(len, prose), initial=0))
    place = min(range(len(ends)), key=lambda index: abs(ends[index] - depth * ends[-1]))
    return _INTRODUCTION + " ".join([*prose[:place], needle.sentence, *prose[place:]])


def _five_digits(draw: random.Random) -> str:
    return str(draw.randrange(10_000, 100_000))
