"""The search, on landscapes whose answer is known."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loki_attn.errors import InputError
from loki_attn.tune.search import search
from loki_attn.tune.space import candidates, covering

SPACE = candidates((8, 16, 32), (64, 96, 128, 192, 256), ((), (0,), (0, 1)))
COVERS = covering(SPACE)


def monotone(seed):
    """Random errors that never grow with exactness, and costs that mostly do."""
    draw = np.random.default_rng(seed)
    gains, prices = draw.exponential(size=(2, len(SPACE)))
    errors = 40 * np.exp(-8 * COVERS @ gains / gains.sum())
    return COVERS @ prices * draw.uniform(0.8, 1.25, len(SPACE)), errors


def run(costs, errors, *, expected=None, most=10_000, confirm=lambda _: True):
    asked = []

    def judge(place):
        asked.append(place)
        return float(errors[place])

    found = search(
        list(costs),
        list(np.ones(len(costs)) if expected is None else expected),
        COVERS,
        judge,
        confirm=confirm,
        more=lambda measured: measured < most,
    )
    assert list(found.measured) == asked
    assert len(set(asked)) == len(asked)
    return found


@given(seed=st.integers(0, 10_000), scale=st.floats(0.01, 20))
def test_finds_the_cheapest_within_the_bound_of_any_monotone_landscape(seed, scale):
    costs, errors = monotone(seed)
    errors = errors * scale
    found = run(costs, errors, expected=errors)
    within = costs[errors <= 1]
    assert found.open == 0
    assert (found.best is None) == (len(within) == 0)
    if found.best is not None:
        assert costs[found.best] == within.min()


@given(seed=st.integers(0, 10_000), most=st.integers(0, 12))
def test_never_returns_one_beyond_the_bound_nor_measures_more_than_allowed(seed, most):
    draw = np.random.default_rng(seed)
    costs, errors = monotone(seed)[0], draw.exponential(size=len(SPACE)) * 2
    found = run(costs, errors, most=most)
    assert len(found.measured) <= most
    if found.best is not None:
        assert errors[found.best] <= 1
        assert found.confirmed[found.best]
    if most == 0:
        assert found.best is None
        assert found.open == found.frontier > 0


@given(seed=st.integers(0, 10_000))
def test_a_misleading_estimate_changes_the_order_not_the_answer(seed):
    costs, errors = monotone(seed)
    told, misled = run(costs, errors, expected=errors), run(costs, errors, expected=1 / errors)
    assert told.best == misled.best


def test_the_same_twice_is_the_same():
    costs, errors = monotone(3)
    assert run(costs, errors) == run(costs, errors)


def test_one_ladder_is_bisected():
    """Along one ladder cost and exactness grow together: logarithmically many are measured."""
    size, limit = 128, 77
    ladder = np.tri(size, dtype=bool)
    asked = []

    def judge(place):
        asked.append(place)
        return 2.0 if place < limit else 0.5

    found = search(
        range(size), [1.0] * size, ladder, judge, confirm=lambda _: True, more=lambda _: True
    )
    assert (found.best, found.frontier) == (limit, size)
    assert len(asked) <= 9


def test_a_good_estimate_saves_measurements():
    spent = {"good": 0, "none": 0}
    for seed in range(20):
        costs, errors = monotone(seed)
        spent["good"] += len(run(costs, errors, expected=errors).measured)
        spent["none"] += len(run(costs, errors).measured)
    assert spent["good"] < spent["none"]


def test_where_the_best_is_not_confirmed_the_next_is_taken():
    costs, errors = monotone(5)
    first = run(costs, errors).best
    refused = {place for place in range(len(SPACE)) if costs[place] <= costs[first]}
    found = run(costs, errors, confirm=lambda place: place not in refused)
    assert found.confirmed[first] is False
    assert found.best not in refused
    assert found.confirmed[found.best] is True
    left = [costs[p] for p in range(len(SPACE)) if errors[p] <= 1 and p not in refused]
    # What is less exact than the refused one counts as refused as well.
    assert costs[found.best] >= min(left)


def test_nothing_is_returned_where_nothing_is_confirmed():
    costs, errors = monotone(5)
    found = run(costs, errors, confirm=lambda _: False)
    assert found.best is None
    assert found.open == 0
    assert not any(found.confirmed.values())


def test_one_that_another_beats_in_both_orders_is_never_measured():
    costs, errors = monotone(8)
    found = run(costs, errors)
    for place in found.measured:
        better = COVERS[:, place] & (costs <= costs[place])
        assert list(np.flatnonzero(better)) == [place]
    assert found.frontier < len(SPACE)


def test_equal_candidates_do_not_beat_each_other_away():
    found = search(
        [1.0, 1.0],
        [1.0, 1.0],
        np.ones((2, 2), dtype=bool),
        lambda _: 0.5,
        confirm=lambda _: True,
        more=lambda _: True,
    )
    assert (found.best, found.frontier) == (0, 1)


@pytest.mark.parametrize(("costs", "expected"), [([], []), ([1.0], [1.0, 2.0])])
def test_refusals(costs, expected):
    with pytest.raises(InputError, match="A search needs candidates with a cost"):
        search(
            costs,
            expected,
            np.ones((1, 1), dtype=bool),
            lambda _: 1.0,
            confirm=lambda _: True,
            more=lambda _: True,
        )
