"""Axes: every value lies on them, ticks lie within, and people could read them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loki_attn.report.page.axes import doublings, duration, linear, logarithmic, percent, tokens

FINITE = st.floats(-1e6, 1e6).map(lambda value: round(value, 6))


@given(st.lists(FINITE, min_size=1, max_size=9))
def test_linear_axis_holds_all_values(values):
    axis = linear(values, "x")
    assert axis.low <= min(values)
    assert axis.high >= max(values)
    assert 2 <= len(axis.ticks) <= 9
    assert all(0 <= axis.place(value) <= 1 for value in values)


@pytest.mark.parametrize(
    ("values", "within"),
    [([0, 64], (0, 64)), ([0, 29], (0, 29)), ([0.93, 1], (0, 1)), ([1], (0, 1))],
)
def test_bounds_cut_ticks_but_never_values(values, within):
    axis = linear(values, "x", within=within)
    assert within[0] <= axis.low <= min(values)
    assert max(values) <= axis.high <= within[1]
    assert all(axis.low <= place <= axis.high for place, _ in axis.ticks)


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=9))
def test_logarithmic_axis_holds_all_values_and_has_ticks(values):
    axis = logarithmic(values, "x")
    assert axis.low < min(values) <= max(values) < axis.high
    assert 1 <= len(axis.ticks) <= 16
    assert all(axis.low <= place <= axis.high * 1.001 for place, _ in axis.ticks)


def test_what_lies_beyond_is_put_at_the_end():
    assert logarithmic([0.1, 1], "x").place(-3.0) == 0.0
    assert linear([0, 1], "x").place(7.0) == 1.0


def test_doublings_end_at_the_largest():
    axis = doublings([2.0**at for at in range(9, 20)], "context")
    assert axis.ticks[-1] == (2.0**19, "512k")
    assert len(axis.ticks) <= 8
    assert doublings([4096], "context").place(4096) == pytest.approx(0.5)


def test_numbers_are_written_short():
    assert [tokens(n) for n in (512, 1536, 4096, 1000, 131072)] == [
        "512",
        "1.5k",
        "4k",
        "1,000",
        "128k",
    ]
    assert [duration(t) for t in (90, 1500.0, 2.5e6)] == ["90 µs", "1.5 ms", "2.5 s"]
    assert percent(0.125) == "12.5 %"
