"""A score of lm-eval with its interval, from the samples where they were logged."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, final

import numpy as np

from loki_attn.statistics import mean_interval

_Z: Final = 1.959963984540054  # of the normal distribution, for 95 %
_SAME: Final = 1e-9
_NUMBER: Final = (int, float, np.number, np.bool_)
# From the mean log-likelihood (per document, word or byte) to what lm-eval reports.
_REPORTED: Final[tuple[Callable[[float], float], ...]] = (
    lambda mean: mean,
    lambda mean: math.exp(-mean),
    lambda mean: -mean / math.log(2),
)


@final
@dataclass(frozen=True)
class Score:
    """One number of lm-eval.

    Attributes:
        value: What lm-eval reports.
        interval: Its 95 % ends, or None where neither samples nor stderr give one.
        n: Documents behind it.
    """

    value: float
    interval: tuple[float, float] | None
    n: int


def observations(samples: Iterable[Mapping[str, Any]], metric: str, name: str) -> list[Any]:
    """What a metric was for each document, under one of lm-eval's filters."""
    return [one[metric] for one in samples if one["filter"] == name and metric in one]


def score(value: float, stderr: object, own: Sequence[Any], documents: int) -> Score:
    """Give a score its interval.

    Args:
        value: What lm-eval reports.
        stderr: Its standard error, or what lm-eval puts where there is none.
        own: The metric of each document: numbers, or (log-likelihood, weight) for perplexities per
            word or byte; none where samples were not logged.
        documents: How many documents there are, where `own` does not say.

    Returns:
        The score. Samples are used only where they reproduce the value: an aggregation that is
        neither a mean nor a perplexity falls back to the standard error.
    """
    n = len(own) or documents
    pairs = _pairs(own)
    interval = None if pairs is None else _from_samples(value, pairs)
    if interval is None and isinstance(stderr, int | float) and math.isfinite(stderr):
        interval = value - _Z * stderr, value + _Z * stderr
    return Score(value, interval, n)


def _pairs(own: Sequence[Any]) -> "np.ndarray | None":
    """Observations as float64 [n, 2], sums and weights; None where they are something else."""
    pairs = [tuple(one) if isinstance(one, list | tuple) else (one, 1.0) for one in own]
    numbers = all(len(p) == 2 and all(isinstance(x, _NUMBER) for x in p) for p in pairs)
    return np.asarray(pairs, dtype=np.float64) if pairs and numbers else None


def _from_samples(value: float, pairs: "np.ndarray") -> tuple[float, float] | None:
    """Interval of a ratio of sums, through the mean of its linearised terms.

    References:
        Efron and Tibshirani 1993 (bootstrap); Cochran 1977, section 6 (linearised ratio).
    """
    sums, weights = pairs.T
    if not np.isfinite(pairs).all() or weights.sum() <= 0:
        return None
    ratio = float(sums.sum() / weights.sum())
    terms = sums
    if bool((weights != 1).any()):
        terms = ratio + (sums - ratio * weights) / weights.mean()
    for reported in _REPORTED:
        if math.isclose(_or_infinite(reported, ratio), value, rel_tol=_SAME, abs_tol=_SAME):
            found = mean_interval(terms.tolist())
            ends = sorted(_or_infinite(reported, end) for end in (found.low, found.high))
            return (ends[0], ends[1]) if all(map(math.isfinite, ends)) else None
    return None


def _or_infinite(reported: Callable[[float], float], mean: float) -> float:
    try:
        return reported(mean)
    except OverflowError:
        return math.inf
