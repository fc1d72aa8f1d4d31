"""Statistics: intervals against published figures, simulated coverage, and laws of their own."""

import math

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from loki_attn.errors import InputError
from loki_attn.statistics import Interval, mean_interval, paired_interval, wilson

Z = 1.959963984540054
NUMBERS = st.lists(st.floats(-1e3, 1e3).map(lambda x: round(x, 3)), min_size=2, max_size=30)
ROUNDING = 1e-9


@st.composite
def grouped(draw):
    """Values with a group for each, at least two groups."""
    values = draw(NUMBERS)
    groups = [draw(st.integers(0, 5)) for _ in values]
    assume(len(set(groups)) > 1)
    return values, groups


@pytest.mark.parametrize(
    ("hits", "trials", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_gives_the_published_intervals(hits, trials, low, high):
    """Newcombe, Statistics in Medicine 17 (1998) 857, table I, the score method."""
    assert wilson(hits, trials) == pytest.approx((low, high), abs=5e-5)


@given(trials=st.integers(1, 5000), share=st.floats(0, 1))
@example(trials=1, share=0.0)
@example(trials=1, share=1.0)
def test_ends_of_wilson_are_the_shares_that_the_score_test_just_accepts(trials, share):
    hits = round(share * trials)
    for end in wilson(hits, trials):
        assert 0.0 <= end <= 1.0
        distance = abs(hits / trials - end)
        assert distance == pytest.approx(Z * math.sqrt(end * (1 - end) / trials), abs=1e-7)


@given(trials=st.integers(1, 500), share=st.floats(0, 1))
def test_wilson_mirrors_and_is_never_a_point(trials, share):
    hits = round(share * trials)
    low, high = wilson(hits, trials)
    assert low < high
    assert low <= hits / trials <= high
    assert wilson(trials - hits, trials) == pytest.approx((1 - high, 1 - low), abs=1e-12)
    assert (low == 0.0) == (hits == 0)
    assert (high == 1.0) == (hits == trials)


def test_yes_or_no_that_stands_alone_gets_wilson_and_nothing_else_does():
    assert mean_interval([1.0, 0, True, 1]) == Interval(0.75, *wilson(3, 4), "wilson")
    assert mean_interval([1, 1, 0], [7, 3, 5]).method == "wilson"
    assert mean_interval([1, 1, 0], [7, 7, 5]).method == "bootstrap"
    assert mean_interval([1, 0.5, 0]).method == "bootstrap"
    assert mean_interval([1.0]) == Interval(1.0, *wilson(1, 1), "wilson")


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_wilson_covers_the_truth_as_often_as_it_says(share):
    draw = np.random.default_rng(5)
    samples = (draw.random((2000, 60)) < share).astype(float)
    covered = np.mean([_holds(mean_interval(list(sample)), share) for sample in samples])
    assert 0.92 <= covered <= 0.98


def test_a_sure_thing_is_covered_always_and_never_a_point():
    """Of 30 in 30, the lower end is 30 / (30 + z^2)."""
    interval = mean_interval([1.0] * 30)
    assert interval == Interval(1.0, pytest.approx(30 / (30 + Z * Z)), 1.0, "wilson")


def test_the_bootstrap_covers_the_truth_as_often_as_it_says():
    """Exponential observations, which are skew, of mean 1."""
    draw = np.random.default_rng(6)
    samples = draw.exponential(size=(250, 60))
    covered = np.mean([_holds(mean_interval(list(sample)), 1.0) for sample in samples])
    assert 0.90 <= covered <= 0.99


def test_clusters_are_covered_where_single_observations_would_not_be():
    """8 observations of a group share most of their deviation."""
    draw = np.random.default_rng(7)
    groups = [group for group in range(40) for _ in range(8)]
    together, alone, wider = [], [], []
    for _ in range(80):
        values = np.repeat(draw.normal(size=40), 8) + 0.3 * draw.normal(size=320)
        clustered, naive = mean_interval(values, groups), mean_interval(values)
        together.append(_holds(clustered, 0.0))
        alone.append(_holds(naive, 0.0))
        wider.append(_width(clustered) / _width(naive))
    assert 0.90 <= np.mean(together) <= 0.99
    assert np.mean(alone) < 0.70
    assert min(wider) > 1.8


@given(case=grouped())
def test_a_mean_lies_in_its_interval(case):
    values, groups = case
    interval = mean_interval(values, groups)
    assert interval.mean == pytest.approx(math.fsum(values) / len(values), abs=ROUNDING)
    assert interval.low <= interval.mean + ROUNDING
    assert interval.mean <= interval.high + ROUNDING
    if interval.method == "bootstrap":
        assert min(values) - ROUNDING <= interval.low <= interval.high <= max(values) + ROUNDING
    else:
        assert 0 <= interval.low <= interval.high <= 1


@given(case=grouped(), shift=st.floats(2, 50), scale=st.floats(0.01, 50))
def test_a_bootstrap_moves_and_stretches_with_its_values(case, shift, scale):
    values, groups = case
    before = mean_interval(values, groups)
    after = mean_interval([scale * value + shift for value in values], groups)
    assume(before.method == after.method == "bootstrap")
    wanted = [scale * end + shift for end in (before.mean, before.low, before.high)]
    assert [after.mean, after.low, after.high] == pytest.approx(wanted, rel=1e-9, abs=1e-6)


@given(case=grouped())
def test_a_bootstrap_mirrors_within_its_noise(case):
    """Quantiles are taken evenly from both ends, so a sign turns the interval round."""
    values, groups = case
    plus, minus = mean_interval(values, groups), mean_interval([-v for v in values], groups)
    assume(plus.method == minus.method == "bootstrap")
    assert (-minus.high, -minus.low) == pytest.approx((plus.low, plus.high), abs=1e-6)


@given(case=grouped(), names=st.permutations(range(6)))
def test_groups_are_told_apart_whatever_their_numbers(case, names):
    values, groups = case
    renamed = [1000 * names[group] - 7 for group in groups]
    assert mean_interval(values, groups) == mean_interval(values, renamed)
    assert paired_interval(values, values[::-1], groups) == paired_interval(
        values, values[::-1], renamed
    )


@given(case=grouped())
def test_the_same_twice(case):
    values, groups = case
    np.random.seed(1)  # noqa: NPY002 - the global generator must not matter
    first = mean_interval(values, groups)
    np.random.seed(2)  # noqa: NPY002
    assert mean_interval(values, groups) == first
    assert mean_interval(np.array(values), np.array(groups)) == first
    assert paired_interval(values, [0.5] * len(values), groups, seed=3) == paired_interval(
        values, [0.5] * len(values), groups, seed=3
    )


def test_the_seed_is_that_of_the_resamples():
    values = list(np.random.default_rng(0).normal(size=20))
    ends = {(mean_interval(values, seed=s).low, mean_interval(values, seed=s).high) for s in (0, 1)}
    assert len(ends) == 2
    assert len({mean_interval(values, seed=seed).mean for seed in (0, 1)}) == 1


def test_every_group_is_drawn_whole():
    """Of two groups, a resample holds one twice or each once: the ends are the groups' means."""
    interval = mean_interval([0.0, 0.5, 4.0], [1, 1, 2])
    assert interval == Interval(1.5, 0.25, 4.0, "bootstrap")


def test_observations_count_alike_whatever_the_size_of_their_group():
    """30 groups of nine ones and 30 of a single zero: the mean of the groups' means is 0.5."""
    groups = [group for group in range(30) for _ in range(9)] + list(range(30, 60))
    interval = mean_interval([1.0] * 270 + [0.0] * 30, groups)
    assert interval.mean == 0.9
    assert 0.8 < interval.low < 0.9 < interval.high < 0.96


def test_one_group_has_no_interval():
    for values, groups in (([0.2, 0.4], [3, 3]), ([0.3], None), ([1.0, 0.0], [0, 0])):
        interval = mean_interval(values, groups)
        assert interval.mean == pytest.approx(sum(values) / len(values))
        assert math.isnan(interval.low)
        assert math.isnan(interval.high)
        assert interval.method == "bootstrap"
    assert math.isnan(paired_interval([0.2, 0.4], [0.1, 0.4], [3, 3]).low)


@given(case=grouped(), other=NUMBERS)
def test_a_paired_interval_is_that_of_the_differences(case, other):
    values, groups = case
    reference = (other * len(values))[: len(values)]
    differences = [a - b for a, b in zip(values, reference, strict=True)]
    plain = mean_interval(differences, groups)
    assume(plain.method == "bootstrap")
    assert paired_interval(values, reference, groups) in (
        plain,
        Interval(0.0, *_unseen(len(set(groups))), "rule of three"),
    )


def test_pairs_that_vary_together_have_a_narrow_difference():
    draw = np.random.default_rng(8)
    shared = draw.normal(size=50)
    ours, theirs = shared + 0.01 * draw.normal(size=50), shared
    paired = paired_interval(list(ours), list(theirs))
    assert _width(paired) < 0.05 * _width(mean_interval(list(ours)))


@given(hits=st.lists(st.booleans(), min_size=1, max_size=200))
def test_pairs_of_yes_or_no_that_never_differ_follow_the_rule_of_three(hits):
    """At the upper end, seeing no difference has a chance of just 5 %."""
    interval = paired_interval(hits, hits)
    assert (interval.mean, interval.method) == (0.0, "rule of three")
    assert -interval.low == interval.high
    assert (1 - interval.high) ** len(hits) == pytest.approx(0.05)


def test_the_rule_of_three_is_nearly_three_in_n_and_counts_groups():
    assert paired_interval([1.0] * 300, [1.0] * 300).high == pytest.approx(3 / 300, rel=0.01)
    grouped_pairs = paired_interval([1, 0] * 10, [1, 0] * 10, [g for g in range(5) for _ in "four"])
    assert grouped_pairs == Interval(0.0, *_unseen(5), "rule of three")


def test_other_pairs_that_never_differ_are_equal():
    assert paired_interval([0.5, 3.0], [0.5, 3.0]) == Interval(0.0, 0.0, 0.0, "bootstrap")


def test_yes_or_no_that_differs_once_is_resampled():
    interval = paired_interval([1, 1, 1, 0], [1, 1, 0, 0])
    assert (interval.mean, interval.low, interval.method) == (0.25, 0.0, "bootstrap")
    assert interval.high >= 0.5


@pytest.mark.parametrize(
    ("values", "groups", "message"),
    [
        ([], None, "A mean needs at least one observation, got none."),
        ([0.1, math.nan], None, "Every observation must be a finite number; at least one is not."),
        ([math.inf, 0.1], None, "Every observation must be a finite number"),
        ([0.1, 0.2, 0.3], [0, 1], "3 observations need as many groups, got 2."),
    ],
)
def test_refusals(values, groups, message):
    with pytest.raises(InputError, match=message):
        mean_interval(values, groups)
    with pytest.raises(InputError, match=message):
        paired_interval(values, values, groups)
    with pytest.raises(InputError, match=message):
        paired_interval([0.0] * len(values), values, groups)


def test_pairs_of_different_lengths_are_refused():
    with pytest.raises(InputError, match=r"come in pairs, got 2 and 3\."):
        paired_interval([1, 2], [1, 2, 3])


def _holds(interval, truth):
    return interval.low <= truth <= interval.high


def _width(interval):
    return interval.high - interval.low


def _unseen(count):
    share = 1 - 0.05 ** (1 / count)
    return pytest.approx(-share), pytest.approx(share)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_groups_that_all_agree_do_not_shrink_to_a_point(share):
    """Nine right answers of three contexts say as much as three right answers, and no more."""
    grouped = mean_interval([share] * 9, [0, 0, 0, 1, 1, 1, 2, 2, 2])
    alone = mean_interval([share] * 3)
    assert (grouped.low, grouped.high, grouped.method) == (alone.low, alone.high, "wilson")
    assert grouped.low < grouped.high


def test_pairs_that_all_differ_do_not_shrink_to_a_point():
    better = paired_interval([1.0] * 6, [0.0] * 6, [0, 0, 1, 1, 2, 2])
    low, high = wilson(3, 3)
    assert (better.mean, better.low, better.high) == (1.0, low, high)
    worse = paired_interval([0.0] * 6, [1.0] * 6, [0, 0, 1, 1, 2, 2])
    assert (worse.mean, worse.low, worse.high) == (-1.0, -high, -low)


def test_shares_that_do_not_differ_may_still():
    same = paired_interval([0.25, 0.5, 1.0], [0.25, 0.5, 1.0])
    assert same.method == "rule of three"
    assert same.high == -same.low == pytest.approx(1 - 0.05 ** (1 / 3))
