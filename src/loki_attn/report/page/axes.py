"""Axes: from numbers to places on a line, with ticks that people would choose."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, final

_FEW_TICKS: Final = 5
_MANY_TICKS: Final = 8
_KIBI: Final = 1024


@final
@dataclass(frozen=True, kw_only=True)
class Axis:
    """A range of numbers laid out on a line.

    Attributes:
        name: What is measured, with its unit.
        low: At the start of the line.
        high: At its end.
        ticks: Numbers that are marked, each with its text.
        log: Whether equal ratios take equal lengths.
    """

    name: str
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    log: bool = False

    def place(self, value: float) -> float:
        """Where a number lies, from 0 to 1; what lies beyond an end is put there."""
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(max(value, low))
        return min(max((value - low) / (high - low), 0.0), 1.0)


def linear(
    values: Sequence[float],
    name: str,
    *,
    within: tuple[float, float] | None = None,
    form: Callable[[float], str] = "{:g}".format,
) -> Axis:
    """An axis of equal steps that spans the values with room to spare.

    Args:
        values: What has to be on it.
        name: Its name.
        within: Ends that it never goes beyond, such as 0 and 1 for a share.
        form: How a tick is written.

    Returns:
        The axis; its ends are ticks but where they would go beyond.
    """
    low, high = min(values), max(values)
    span = high - low or abs(high) or 1.0
    step = _step(span / _FEW_TICKS)
    first, last = math.floor(low / step - 0.05), math.ceil(high / step + 0.05)
    places = [round(at * step, 10) for at in range(first, last + 1)]
    start, end = places[0], places[-1]
    if within:
        start, end = max(start, within[0]), min(end, within[1])
    if start == end:
        start, end = start - step, end + step
    ticks = tuple((place, form(place)) for place in places if start <= place <= end)
    return Axis(name=name, low=start, high=end, ticks=ticks)


def logarithmic(
    values: Sequence[float],
    name: str,
    *,
    form: Callable[[float], str] = "{:g}".format,
    ceiling: float | None = None,
) -> Axis:
    """An axis of equal ratios around the values above zero, ticks at 1, 2, 5 or fewer a decade."""
    positive = [value for value in values if value > 0] or [1.0]
    low, high = min(positive) / 1.25, max(positive) * 1.25
    if ceiling is not None:
        high = min(high, ceiling)
    decades = math.log10(high / low)
    if decades < 0.5:
        low, high = low / 1.5, min(high * 1.5, ceiling or math.inf)
    subs = (1, 2, 5) if decades < 1.8 else (1, 3) if decades < 2.6 else (1,)
    every = 2 if decades > 6 else 1
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    places = [sub * 10.0**power for power in powers if power % every == 0 for sub in subs]
    ticks = tuple((place, form(place)) for place in places if low <= place <= high * 1.0001)
    return Axis(name=name, low=low, high=high, ticks=ticks, log=True)


def doublings(values: Sequence[float], name: str) -> Axis:
    """An axis of equal ratios whose ticks are the values themselves, or every second of them."""
    places = sorted(set(values))
    low, high = places[0], places[-1]
    if low == high:
        low, high = low / 2, high * 2
    every = math.ceil(len(places) / _MANY_TICKS)
    # Counted from the largest, which is what people look for.
    ticks = tuple((place, tokens(place)) for place in places[::-1][::every][::-1])
    return Axis(name=name, low=low, high=high, ticks=ticks, log=True)


def tokens(count: float) -> str:
    """A number of tokens: 4,096 is 4k."""
    whole = int(count)
    halves = whole >= _KIBI and whole % (_KIBI // 2) == 0
    return f"{whole / _KIBI:g}k" if halves else f"{whole:,}"


def percent(value: float) -> str:
    """A share: 0.125 is 12.5 %."""
    return f"{100 * value:.3g} %"


def duration(microseconds: float) -> str:
    """A time in the unit that fits."""
    for size, unit in ((1e6, "s"), (1e3, "ms")):
        if microseconds >= size:
            return f"{microseconds / size:.3g} {unit}"
    return f"{microseconds:.3g} µs"


def _step(rough: float) -> float:
    size = 10.0 ** math.floor(math.log10(rough))
    return next(size * nice for nice in (1, 2, 2.5, 5, 10) if size * nice >= rough * 0.999)
