"""RULER's scores: which references an answer contains."""

import re
from collections.abc import Sequence
from typing import Final

_CONTROL: Final = re.compile(r"[\x00-\x1f]")


def recall_all(text: str, references: Sequence[str]) -> float:
    """Return the share of the references that an answer contains, in any case.

    Args:
        text: The answer.
        references: What a right answer contains; at least one.

    Returns:
        From 0 to 1.

    Source: `string_match_all` of RULER, arXiv 2404.06654.
    """
    return sum(_found(text, references)) / len(references)


def recall_any(text: str, references: Sequence[str]) -> float:
    """Return 1 if an answer contains one of the references, in any case, else 0.

    Args:
        text: The answer.
        references: What a right answer may contain; at least one.

    Returns:
        0 or 1.

    Source: `string_match_part` of RULER, arXiv 2404.06654.
    """
    return float(max(_found(text, references)))


def _found(text: str, references: Sequence[str]) -> list[bool]:
    answer = _CONTROL.sub("\n", text.strip()).strip().lower()
    return [reference.lower() in answer for reference in references]
