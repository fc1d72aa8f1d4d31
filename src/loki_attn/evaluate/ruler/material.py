"""Material: the words, values, sentences and noise that contexts are made of."""

import random
import re
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from typing import Final
from uuid import UUID

from loki_attn import texts
from loki_attn.errors import InputError

# Five short sentences that say nothing, again and again.
NOISE: Final = (
    "The kettle is warm.",
    "The road is long.",
    "The lamp is lit.",
    "Off we went.",
    "Home and away again.",
)
# The commonest words of English are poor names for things: "that", "with", "there".
_COMMONEST_WORDS: Final = 150
_RARE_COUNT: Final = 3
_INNER_MARKS: Final = " ,;:.-\u2013\u2014"
# Keeps the words of one sentence together: no end after the title of a person.
_SENTENCE_END: Final = re.compile(
    r"(?:(?<=[.!?])|(?<=[.!?][\"'\u201d\u2019)]))(?<!\bMr\.)(?<!\bMrs\.)(?<!\bDr\.)(?<!\bSt\.)\s+"
    r"(?=[\"'\u201c\u2018(]?[A-Z])"
)


@lru_cache(maxsize=1)
def words() -> tuple[str, ...]:
    """Return plain lower-case words of 4 to 9 letters from a packaged text, sorted."""
    found = re.findall(r"(?<![\w'\u2019-])[a-z]{4,9}(?![\w'\u2019-])", texts.load("calibration"))
    counted = sorted(Counter(found).items(), key=lambda pair: (-pair[1], pair[0]))
    kept = [word for word, count in counted[_COMMONEST_WORDS:] if count >= _RARE_COUNT]
    return tuple(sorted(kept))


@lru_cache(maxsize=4)
def sentences(haystack: str) -> tuple[str, ...]:
    """Return the sentences of a text, each on one line.

    Args:
        haystack: The text.

    Raises:
        InputError: If there is no text.
    """
    found = tuple(one for one in _SENTENCE_END.split(" ".join(haystack.split())) if one)
    if not found:
        raise InputError("The haystack is empty; expected public-domain text to hide needles in")
    return found


def stretch(draw: random.Random, haystack: str, num_words: int) -> list[str]:
    """Return the sentences of a random stretch of a text, the last cut short if need be.

    Args:
        draw: Chooses where the stretch starts.
        haystack: The text; starts again at its end.
        num_words: How long the stretch is.
    """
    source = sentences(haystack)
    place = draw.randrange(len(source))
    taken: list[str] = []
    while num_words > 0:
        spoken = source[place % len(source)].split()
        taken.append(cut(spoken, num_words))
        num_words -= len(spoken)
        place += 1
    return taken


def cut(spoken: list[str], num_words: int) -> str:
    """Return a sentence, or its first words with a full stop after them.

    Args:
        spoken: The words of the sentence.
        num_words: How many there may be, at least 1.
    """
    if len(spoken) <= num_words:
        return " ".join(spoken)
    return " ".join(spoken[:num_words]).rstrip(_INNER_MARKS) + "."


def key_words(draw: random.Random) -> Iterator[str]:
    """Yield pairs of words such as harbour-lantern, none twice, without end."""
    seen: set[str] = set()
    while True:
        pair = "-".join(draw.sample(words(), 2))
        if pair not in seen:
            seen.add(pair)
            yield pair


def numbers(draw: random.Random, digits: int) -> Iterator[str]:
    """Yield numbers of so many digits, none twice."""
    seen: set[int] = set()
    while True:
        number = draw.randrange(10 ** (digits - 1), 10**digits)
        if number not in seen:
            seen.add(number)
            yield str(number)


def uuids(draw: random.Random) -> Iterator[str]:
    """Yield random UUIDs of version 4, without end."""
    while True:
        yield str(UUID(int=draw.getrandbits(128), version=4))


def letters(draw: random.Random, alphabet: str, length: int) -> Iterator[str]:
    """Yield random strings over an alphabet, none twice."""
    seen: set[str] = set()
    while True:
        made = "".join(draw.choices(alphabet, k=length))
        if made not in seen:
            seen.add(made)
            yield made
