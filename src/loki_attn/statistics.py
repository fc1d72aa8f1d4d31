"""Statistics: means with intervals that say how they were made."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, final

import numpy as np

from loki_attn.errors import InputError

LEVEL: Final = 0.95
RESAMPLES: Final = 2000
_Z: Final = 1.959963984540054  # of the normal distribution, for LEVEL


@final
@dataclass(frozen=True)
class Interval:
    """A mean and the interval that holds the true one with 95 % confidence.

    Attributes:
        mean: The mean.
        low: Lower end.
        high: Upper end.
        method: "bootstrap", "wilson" or "rule of three".
    """

    mean: float
    low: float
    high: float
    method: str


def mean_interval(
    values: Sequence[float], groups: Sequence[int] | None = None, *, seed: int = 0
) -> Interval:
    """Estimate a mean.

    Observations of 0 and 1 that stand alone get Wilson's score interval, which does not shrink to a
    point where all agree; so do shares that are all the same, with groups as its trials. All else
    gets a percentile bootstrap over groups: observations of one group (the tokens of a stretch of
    text, the questions of a context) are drawn together, because they are not independent.

    Args:
        values: The observations.
        groups: A number per observation, equal for those that belong together; None where every one
            stands alone.
        seed: Of the resamples.

    Returns:
        The mean with its interval; the ends are nan for a single group that is no yes or no.

    Raises:
        InputError: If there are no values, one is not finite, or `groups` has another length.

    References:
        Wilson 1927 (the score interval); Efron and Tibshirani 1993, chapter 13 (percentile
        bootstrap), and Field and Welsh 2007 (resampling clusters).
    """
    data, labels = _checked(values, groups)
    mean, groups_count = float(data.mean()), int(labels.max()) + 1
    binary = bool(np.isin(data, (0.0, 1.0)).all())
    same = bool((data == data[0]).all()) and 0 <= data[0] <= 1
    if (same and (binary or groups_count > 1)) or (binary and groups_count == len(data)):
        return Interval(mean, *wilson(mean * groups_count, groups_count), "wilson")
    return Interval(mean, *_bootstrap(data, labels, seed), "bootstrap")


def paired_interval(
    values: Sequence[float],
    reference: Sequence[float],
    groups: Sequence[int] | None = None,
    *,
    seed: int = 0,
) -> Interval:
    """Estimate the mean difference of two measurements of the same items.

    Args:
        values: The observations.
        reference: What they are compared with, item by item.
        groups: As in `mean_interval`.
        seed: Of the resamples.

    Returns:
        The mean of values - reference. Where no pair of shares differs, a bootstrap would give a
        point; the interval is then that of the groups that may still differ, by the rule of three
        in its exact form, 1 - 0.05 ** (1 / n). Where all differ by one, it is Wilson's.

    Raises:
        InputError: As `mean_interval`, or if the two differ in length.
    """
    if len(values) != len(reference):
        raise InputError(
            f"Paired observations come in pairs, got {len(values)} and {len(reference)}."
        )
    ours, labels = _checked(values, groups)
    theirs, _ = _checked(reference, groups)
    difference = ours - theirs
    mean, groups_count = float(difference.mean()), int(labels.max()) + 1
    shares = bool(((ours >= 0) & (ours <= 1) & (theirs >= 0) & (theirs <= 1)).all())
    if shares and not difference.any():
        unseen = 1 - (1 - LEVEL) ** (1 / groups_count)
        return Interval(0.0, -unseen, unseen, "rule of three")
    if shares and abs(mean) == 1.0:
        low, high = wilson(groups_count, groups_count)
        return Interval(mean, *((low, high) if mean > 0 else (-high, -low)), "wilson")
    return Interval(mean, *_bootstrap(difference, labels, seed), "bootstrap")


def wilson(hits: float, trials: int) -> tuple[float, float]:
    """Return Wilson's score interval of a share, at 95 %.

    Args:
        hits: How many of the trials succeeded; a part of one where trials are shares.
        trials: How many there were, at least 1.
    """
    share, z2 = hits / trials, _Z * _Z
    middle = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = _Z * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2)) / (1 + z2 / trials)
    # At the ends the formula gives the ends, but for rounding.
    return (
        max(0.0, middle - half) if hits else 0.0,
        min(1.0, middle + half) if hits < trials else 1.0,
    )


def _checked(
    values: Sequence[float], groups: Sequence[int] | None
) -> "tuple[np.ndarray, np.ndarray]":
    data = np.asarray(values, dtype=np.float64)
    if data.ndim != 1 or not len(data):
        raise InputError("A mean needs at least one observation, got none.")
    if not np.isfinite(data).all():
        raise InputError("Every observation must be a finite number; at least one is not.")
    if groups is None:
        return data, np.arange(len(data))
    if len(groups) != len(data):
        raise InputError(f"{len(data)} observations need as many groups, got {len(groups)}.")
    # Numbered as they come, so that what the groups are called does not move the resamples.
    _, first, labels = np.unique(np.asarray(groups), return_index=True, return_inverse=True)
    return data, first.argsort().argsort()[labels]


def _bootstrap(data: "np.ndarray", labels: "np.ndarray", seed: int) -> tuple[float, float]:
    """Percentiles of the mean over resampled groups."""
    count = int(labels.max()) + 1
    if count < 2:
        return math.nan, math.nan
    sums = np.bincount(labels, weights=data, minlength=count)
    sizes = np.bincount(labels, minlength=count).astype(np.float64)
    draws = np.random.default_rng(seed).integers(count, size=(RESAMPLES, count))
    means = sums[draws].sum(1) / sizes[draws].sum(1)
    low, high = np.quantile(means, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return float(low), float(high)
