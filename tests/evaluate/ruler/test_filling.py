"""Filling: within the room, nearly full, and few encodings."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loki_attn.evaluate.ruler.filling import most_units


def count_calls(cost):
    calls = []

    def counted(units):
        calls.append(units)
        return cost(units)

    return counted, calls


@given(
    st.integers(0, 500),
    st.floats(0.2, 40),
    st.integers(1, 20_000),
    st.integers(1, 60),
)
def test_what_is_found_fits_and_is_nearly_full_or_followed_by_too_much(
    fixed, per_unit, room, least
):
    def cost(units):
        return fixed + int(units * per_unit)

    found = most_units(cost, room, least)
    if cost(least) > room:
        assert found is None
    else:
        assert found >= least
        assert cost(found) <= room
        assert cost(found) >= 0.975 * room or cost(found + 1) > room


@given(st.lists(st.integers(0, 30), min_size=400, max_size=400), st.integers(50, 3000))
def test_units_of_uneven_cost_fill_the_room_as_well(costs, room):
    def cost(units):
        return sum(costs[: min(units, 400)]) + max(units - 400, 0) * 10

    found = most_units(cost, room, 1)
    if found is not None:
        assert cost(found) <= room
        assert cost(found) >= 0.975 * room or cost(found + 1) > room


@pytest.mark.parametrize("room", [997, 10_000, 131_072])
def test_proportional_costs_take_few_encodings(room):
    cost, calls = count_calls(lambda units: 180 + 7 * units)
    assert cost(most_units(cost, room, 5)) > 0.97 * room
    assert len(calls) <= 6


def test_a_tokenizer_that_swallows_text_ends_the_search():
    cost, calls = count_calls(lambda units: 0)
    assert most_units(cost, 100, 1) <= 1000
    assert len(calls) < 20
