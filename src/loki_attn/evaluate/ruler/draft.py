"""Drafts: one sample of a task before its length is settled."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import final


@final
@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a draft is made of.

    Attributes:
        haystack: Public-domain text.
        length_tokens: The length aimed for; some tasks choose their counts by it.
    """

    haystack: str
    length_tokens: int


@final
@dataclass(frozen=True, kw_only=True)
class Draft:
    """A prompt in its two parts, and what a right answer contains."""

    context: str
    question: str
    references: tuple[str, ...]


# Takes a fresh source of chance, the amount of what fills the context, and the setting.
Make = Callable[[random.Random, int, Setting], Draft]
