"""What a figure shows, in words short enough to be listened to."""

from collections.abc import Sequence
from typing import Final

from loki_attn.report.tables import Best

ALT_LIMIT: Final = 600
_CUT: Final = "..."

Value = tuple[str, float, str]
"""Whose it is, the number, and the number as written."""


def alt_text(kind: str, title: str, full: Sequence[str], short: Sequence[str]) -> str:
    """The full sentences if they are few, else the short ones; below the limit in any case."""
    for sentences in (full, short):
        text = " ".join((f"{kind}. {title}.", *sentences))
        if len(text) < ALT_LIMIT:
            return text
    return text[: ALT_LIMIT - len(_CUT) - 1].rsplit(" ", 1)[0] + _CUT


def extremes(values: Sequence[Value], best: Best = None) -> str:
    """The two ends of many values, called best and worst where one end is good."""
    low, high = (pick(values, key=lambda value: value[1]) for pick in (min, max))
    if best is None:
        return f"lowest {_one(low)}, highest {_one(high)}"
    first, last = (low, high) if best == "low" else (high, low)
    return f"best {_one(first)}, worst {_one(last)}"


def _one(value: Value) -> str:
    return f"{value[0]} ({value[2]})"
