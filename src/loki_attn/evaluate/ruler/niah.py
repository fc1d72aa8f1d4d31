"""Needles in a haystack: one or more magic values of keys, in noise, in prose or among their like.

The eight tasks of section 3.1 of arXiv 2404.06654 (S-NIAH, MK-NIAH, MV-NIAH, MQ-NIAH).
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Final, Literal, final

from loki_attn.evaluate.ruler.draft import Draft, Setting
from loki_attn.evaluate.ruler.material import NOISE, key_words, numbers, stretch, uuids

Kind = Literal["number", "uuid", "word"]

_NEEDLE: Final = "One of the special magic {kind}s for {key} is: {value}."
_VALUE_DIGITS: Final = 7
# Needles of a prose haystack stand at different ones of so many evenly spaced depths.
_DEPTHS: Final = 40


@final
@dataclass(frozen=True, kw_only=True)
class Niah:
    """One of the needle tasks; called, it makes a draft.

    Attributes:
        haystack: "noise" (units are sentences), "essay" (words) or "needles" (needles).
        key: What keys look like.
        value: What values look like.
        keys: Number of keys with needles.
        values: Number of values of each key.
        queries: Number of keys asked for.
    """

    haystack: Literal["noise", "essay", "needles"]
    key: Kind = "word"
    value: Kind = "number"
    keys: int = 1
    values: int = 1
    queries: int = 1

    def __call__(self, draw: random.Random, units: int, setting: Setting) -> Draft:
        """Make a draft with so many units of haystack."""
        some_keys, some_values = _endless(self.key, draw), _endless(self.value, draw)
        held = {key: list(islice(some_values, self.values)) for key in islice(some_keys, self.keys)}
        needles = [self._needle(key, value) for key, of in held.items() for value in of]
        asked = draw.sample(list(held), self.queries)
        draw.shuffle(needles)
        if self.haystack == "essay":
            hidden = _in_prose(draw, needles, stretch(draw, setting.haystack, units))
        else:
            lines = (
                _noise_lines(units)
                if self.haystack == "noise"
                else [self._needle(next(some_keys), next(some_values)) for _ in range(units)]
            )
            hidden = _between_lines(draw, needles, lines)
        return Draft(
            context=self._introduction() + hidden,
            question=self._question(asked),
            references=tuple(value for key in asked for value in held[key]),
        )

    def _needle(self, key: str, value: str) -> str:
        return _NEEDLE.format(kind=self.value, key=key, value=value)

    @property
    def _single(self) -> bool:
        return self.queries * self.values == 1

    def _introduction(self) -> str:
        alone = self.keys * self.values == 1 and self.haystack != "needles"
        what = f"A special magic {self.value} is" if alone else f"Special magic {self.value}s are"
        remember = "it" if alone else "them"
        return (
            f"{what} hidden in the text below. Keep {remember} in mind: you will be asked about "
            f"{remember} after the text.\n"
        )

    def _question(self, asked: list[str]) -> str:
        listed = asked[0] if len(asked) == 1 else f"{', '.join(asked[:-1])}, and {asked[-1]}"
        ask, verb, s = (
            ("What is the", "is", "") if self._single else ("What are all the", "are", "s")
        )
        what = f"special magic {self.value}{s} for {listed} mentioned in the provided text"
        return f"\n{ask} {what}? The {what} {verb}"


def _endless(kind: Kind, draw: random.Random) -> Iterator[str]:
    if kind == "word":
        return key_words(draw)
    return uuids(draw) if kind == "uuid" else numbers(draw, _VALUE_DIGITS)


def _noise_lines(num_sentences: int) -> list[str]:
    said = [NOISE[index % len(NOISE)] for index in range(num_sentences)]
    return [" ".join(said[at : at + len(NOISE)]) for at in range(0, len(said), len(NOISE))]


def _between_lines(draw: random.Random, needles: list[str], lines: list[str]) -> str:
    for needle in needles:
        lines.insert(draw.randint(0, len(lines)), needle)
    return "\n".join(lines)


def _in_prose(draw: random.Random, needles: list[str], prose: list[str]) -> str:
    depths = sorted(draw.sample(range(_DEPTHS), len(needles)))
    for done, (needle, depth) in enumerate(zip(needles, depths, strict=True)):
        # The needles before this one have moved its place.
        prose.insert(done + (len(prose) - done) * depth // (_DEPTHS - 1), needle)
    return " ".join(prose)
