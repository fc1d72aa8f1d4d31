"""Intervals: which numbers of a row may be printed, and between which bounds they lie."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, final

from loki_attn.statistics import wilson

_Row = Mapping[str, Any]

STATED: Final = "as the row states"
NORMAL: Final = "1.96 standard errors to either side"
WILSON: Final = "Wilson's score interval"

# Counted, timed or read off, never sampled: these need no interval.
_COUNTED_TASKS: Final = {"calibration", "generation", "quiz", "ranks", "spectrum"}
_COUNTED: Final = {"head_dim", "read_bytes_per_token", "selecting_calls", "speedup"}
_COUNTED_ENDS: Final = ("_bytes", "_calls", "_n", "_us", "read_bytes_share")
_COUNTED_STARTS: Final = ("predicted_", "num_")
_SHARES: Final = {"accuracy", "token_accuracy"}
_ERRORS: Final = {"kl_to_dense": "kl_standard_error"}
_BOUNDS: Final = ("_low", "_high")
_Z: Final = 1.96


@final
@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number with its 95 % interval, over how many items, and how the interval came about."""

    value: float
    low: float
    high: float
    n: int
    how: str


def estimate(row: _Row, metric: str) -> Estimate | None:
    """A metric with its interval, or None where the row has no number or no interval for it.

    The bounds are `<metric>_low` and `<metric>_high`; without them, what a standard error or, for a
    share of hits, the count gives.

    Args:
        row: A row of results.
        metric: The metric's name.

    Returns:
        The estimate, or None.
    """
    metrics, n = row["metrics"], int(row["n"])
    value = number(metrics.get(metric))
    if value is None:
        return None
    low, high = (number(metrics.get(metric + end)) for end in _BOUNDS)
    if low is not None and high is not None:
        return Estimate(value=value, low=low, high=high, n=n, how=STATED)
    errors = (f"{metric}_standard_error", _ERRORS.get(metric))
    error = next((e for name in errors if (e := number(metrics.get(name))) is not None), None)
    if error is not None:
        return Estimate(
            value=value, low=value - _Z * error, high=value + _Z * error, n=n, how=NORMAL
        )
    if metric in _SHARES and 0 <= value <= 1:
        return share(value, n)
    return None


def share(value: float, n: int) -> Estimate:
    """A share of n items with Wilson's interval.

    It is also safe for the mean of n values between 0 and 1: no such values vary more than hits and
    misses of the same mean.
    """
    low, high = wilson(round(value * n), n)
    return Estimate(value=value, low=min(low, value), high=max(high, value), n=n, how=WILSON)


def counted(row: _Row, metric: str) -> bool:
    """Whether a metric is counted, not sampled, so that it stands without an interval."""
    task = str(row["task"])
    return (
        task in _COUNTED_TASKS
        or task.startswith("bench ")
        or metric in _COUNTED
        or metric.endswith(_COUNTED_ENDS)
        or metric.startswith(_COUNTED_STARTS)
    )


def measured_names(row: _Row) -> list[str]:
    """Names of a row's numbers, without those that only say how sure another one is."""
    metrics = row["metrics"]
    names = [name for name, value in metrics.items() if number(value) is not None]
    companions = {*_ERRORS.values(), *(f"{name}_standard_error" for name in names)}
    companions |= {name + end for name in names for end in _BOUNDS}
    return [name for name in names if name not in companions]


def number(value: object) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)
