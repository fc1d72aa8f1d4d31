"""The Pareto front: on it stands exactly what nothing beats in cost and quality."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loki_attn.report.pareto import Candidate, pareto_front


def candidates(*points):
    return [Candidate(name=name, cost=c, quality=q) for name, c, q in points]


POINTS = (("a", 1, 9), ("b", 2, 5), ("beaten", 3, 6), ("c", 4, 1))


def test_front_is_cheapest_first_and_without_the_beaten():
    assert pareto_front(candidates(*POINTS), maximise=False) == ["a", "b", "c"]


def test_scores_are_better_high():
    points = [(name, cost, -quality) for name, cost, quality in POINTS]
    assert pareto_front(candidates(*points), maximise=True) == ["a", "b", "c"]


def test_equals_stand_together():
    on = candidates(("one", 1, 2), ("two", 1, 2), ("worse", 1, 3), ("dearer", 2, 2))
    assert pareto_front(on, maximise=False) == ["one", "two"]
    off = candidates(("best", 1, 1), ("one", 2, 2), ("two", 2, 2))
    assert pareto_front(off, maximise=False) == ["best"]


def test_what_is_not_finite_is_left_out():
    points = candidates(("a", 1, math.nan), ("b", math.inf, 1), ("c", 2, 2))
    assert pareto_front(points, maximise=False) == ["c"]
    assert pareto_front([], maximise=True) == []


NUMBERS = st.integers(0, 5)


@given(st.lists(st.tuples(NUMBERS, NUMBERS), max_size=12), st.booleans())
def test_front_is_what_no_other_dominates(points, maximise):
    named = candidates(*((str(at), *point) for at, point in enumerate(points)))
    sign = -1 if maximise else 1

    def beats(one, other):
        better = (one.cost, sign * one.quality), (other.cost, sign * other.quality)
        return all(a <= b for a, b in zip(*better, strict=True)) and better[0] != better[1]

    expected = {c.name for c in named if not any(beats(o, c) for o in named)}
    front = pareto_front(named, maximise=maximise)
    assert set(front) == expected
    costs = {c.name: c.cost for c in named}
    assert [costs[name] for name in front] == sorted(costs[name] for name in front)


@pytest.mark.parametrize("maximise", [True, False])
def test_order_of_arrival_does_not_matter(maximise):
    names = pareto_front(candidates(*POINTS), maximise=maximise)
    assert pareto_front(candidates(*POINTS[::-1]), maximise=maximise) == names
