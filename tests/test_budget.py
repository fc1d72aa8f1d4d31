"""Budget: counts, tables, thresholds and what is refused."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from loki_attn.budget import Budget
from loki_attn.errors import BudgetError


def counts(budget, *visible):
    return budget.counts(torch.tensor(visible)).tolist()


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (Budget(), [0, 1, 10, 1000]),
        (Budget(top_k=20), [0, 1, 10, 20]),
        (Budget(top_k=20, dense_below=1000), [0, 1, 10, 1000]),
        (Budget(top_k=20, dense_below=999), [0, 1, 10, 20]),
        (Budget(fraction=0.25), [0, 1, 3, 250]),
        (Budget(fraction=0.25, min_k=7), [0, 1, 7, 250]),
        (Budget(fraction=0.001, sinks=4, recents=5), [0, 1, 9, 9]),
        (Budget(fraction=1.0), [0, 1, 10, 1000]),
    ],
    ids=str,
)
def test_counts(budget, expected):
    assert counts(budget, 0, 1, 10, 1000) == expected


@given(
    amount=st.one_of(
        st.just({}),
        st.builds(lambda k: {"top_k": k}, st.integers(40, 3000)),
        st.builds(lambda f: {"fraction": f}, st.floats(1e-6, 1.0)),
    ),
    sinks=st.integers(0, 9),
    recents=st.integers(0, 20),
    min_k=st.integers(1, 40),
    dense_below=st.integers(0, 300),
    visible=st.integers(0, 100_000),
)
@example({"fraction": 0.07}, 0, 0, 1, 0, 100)
@example({"fraction": 0.28}, 0, 0, 1, 0, 25)
def test_one_count_is_what_the_counts_are(amount, sinks, recents, min_k, dense_below, visible):
    budget = Budget(**amount, sinks=sinks, recents=recents, min_k=min_k, dense_below=dense_below)
    for rows in (visible, min(visible, dense_below), dense_below + 1):
        count = budget.count(rows)
        assert type(count) is int
        assert [count] == counts(budget, rows)


def test_a_reading_without_a_mask_is_a_number():
    budget = Budget(fraction=0.25, sinks=2, recents=3, min_k=4, dense_below=7)
    reading = budget.reading(100, None)
    assert (reading.counts, reading.sinks, reading.recents) == (25, 2, 3)
    assert (reading.mass, reading.cap, reading.floor, reading.dense_below) == (None, None, 5, 7)
    assert budget.reading(7, None).counts == 7


def test_a_reading_with_a_mask_counts_what_is_visible():
    visible = torch.zeros(3, 1, 1, 100, dtype=torch.bool)
    visible[0], visible[1, ..., 40:60] = True, True
    reading = Budget(fraction=0.25, min_k=3).reading(100, visible)
    assert reading.counts.dtype == torch.int64
    assert reading.counts.tolist() == [25, 5, 0]
    assert Budget(top_k=30).reading(100, visible[1:2]).counts.tolist() == [20]


def test_a_reading_of_a_mass_leaves_the_counts_to_the_scores():
    reading = Budget(mass=0.5, cap=30, sinks=4, recents=5, min_k=2, dense_below=9).reading(9, None)
    assert reading.counts is None
    assert (reading.mass, reading.cap, reading.floor, reading.dense_below) == (0.5, 30, 9, 9)


@given(percent=st.integers(1, 100), visible=st.integers(1, 20_000))
@example(percent=7, visible=100)
@example(percent=28, visible=25)
def test_a_fraction_rounds_up_but_not_for_a_rounding_error(percent, visible):
    exact = math.ceil(Fraction(percent, 100) * visible)
    assert counts(Budget(fraction=percent / 100), visible) == [exact]


@given(
    amount=st.sampled_from([{"top_k": 30}, {"fraction": 0.4}, {"fraction": 1.0}, {}]),
    min_k=st.integers(1, 30),
    dense_below=st.integers(0, 80),
    seq=st.integers(1, 120),
)
def test_is_dense_is_what_the_counts_say(amount, min_k, dense_below, seq):
    """Never dense by mistake; and dense whenever amount, minimum and threshold say so."""
    budget = Budget(**amount, min_k=min_k, dense_below=dense_below)
    if budget.is_dense(seq):
        assert counts(budget, seq) == [seq]
    elif "top_k" in amount:
        assert counts(budget, seq)[0] < seq


def test_mass_has_no_fixed_counts():
    with pytest.raises(BudgetError, match="no fixed counts"):
        counts(Budget(mass=0.5), 3)
    with pytest.raises(BudgetError, match="no fixed counts"):
        Budget(mass=0.5).count(3)
    assert not Budget(mass=0.5).is_dense(10)
    assert Budget(mass=1.0).is_dense(10)
    assert not Budget(mass=1.0, cap=3).is_dense(10)


def test_layers():
    budget = Budget(top_k=9, dense_layers=(0, -1), per_layer=(7, 8, 9, 10))
    assert budget.for_layer(0, 4).reads_everything
    assert budget.for_layer(3, 4).reads_everything
    assert budget.for_layer(1, 4) == Budget(top_k=8)
    assert budget.for_layer(2, 4) == Budget(top_k=9)
    share = Budget(fraction=0.5, per_layer=(0.5, 0.25))
    assert share.for_layer(1, 2) == Budget(fraction=0.25)
    mass = Budget(mass=0.5, cap=9, per_layer=(0.5, 0.9), dense_layers=(0,))
    assert mass.for_layer(1, 2) == Budget(mass=0.9, cap=9)
    assert mass.for_layer(0, 2) == Budget()


@pytest.mark.parametrize(
    "budget",
    [Budget(), Budget(top_k=9, sinks=1, per_layer=(9, 8), dense_layers=(-1,)), Budget(mass=0.5)],
)
def test_json(budget):
    assert Budget.from_json(budget.to_json()) == budget
    assert Budget().to_json() == {}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_k": 0}, "top_k must be a whole number of tokens >= 1, got 0"),
        ({"top_k": -3}, "got -3"),
        ({"top_k": True}, "got True"),
        ({"top_k": 2.0}, "got 2.0"),
        ({"top_k": math.nan}, "got nan"),
        ({"fraction": 0.0}, r"fraction must lie in \(0, 1\], got 0.0; use top_k for tokens"),
        ({"fraction": 1.5}, r"fraction must lie in \(0, 1\], got 1.5"),
        ({"fraction": -0.1}, "got -0.1"),
        ({"fraction": math.nan}, "got nan"),
        ({"fraction": math.inf}, "got inf"),
        ({"fraction": True}, "fraction must be a number"),
        ({"fraction": "half"}, "got 'half'"),
        ({"mass": 0}, r"mass must lie in \(0, 1\], got 0"),
        ({"mass": 2}, "got 2"),
        ({"mass": 0.5, "cap": 0}, "cap must be a whole number"),
        ({"cap": 5}, "cap bounds a mass budget"),
        ({"top_k": 5, "fraction": 0.5}, "one amount, got top_k and fraction"),
        ({"sinks": -1}, "sinks must be a whole number of tokens >= 0"),
        ({"recents": False}, "recents must be a whole number"),
        ({"min_k": 0}, "min_k must be a whole number of tokens >= 1"),
        ({"dense_below": 1.5}, "dense_below must be a whole number"),
        ({"top_k": 9, "sinks": 4, "recents": 6}, r"less than sinks \+ recents = 4 \+ 6, .* 10"),
        ({"mass": 0.5, "cap": 9, "recents": 10}, r"cap=9 is less than sinks \+ recents = 0 \+ 10"),
        ({"top_k": 9, "min_k": 10}, "top_k=9 is less than min_k=10; raise top_k or lower min_k"),
        ({"mass": 0.5, "cap": 9, "min_k": 10}, "cap=9 is less than min_k=10"),
        ({"per_layer": (3,)}, "give one of them too"),
        ({"top_k": 5, "per_layer": (5, 0)}, "got 0"),
        ({"top_k": 5, "recents": 4, "per_layer": (5, 3)}, "top_k=3 is less than sinks"),
        ({"fraction": 0.5, "per_layer": (0.5, 1.5)}, "got 1.5"),
        ({"dense_layers": ("first",)}, "dense_layers takes layer indices, got 'first'"),
        ({"dense_layers": (True,)}, "dense_layers takes layer indices, got True"),
    ],
    ids=str,
)
def test_what_no_query_could_obey_is_refused(fields, message):
    with pytest.raises(BudgetError, match=message):
        Budget(**fields)


def test_what_does_not_fit_the_model_is_refused():
    with pytest.raises(BudgetError, match=r"dense_layers names \[4, -5\].* 0 to 3"):
        Budget(dense_layers=(0, 4, -5)).for_layer(0, 4)
    with pytest.raises(BudgetError, match="per_layer has 2 amounts for 4 layers; give one per"):
        Budget(top_k=1, per_layer=(1, 2)).for_layer(0, 4)
