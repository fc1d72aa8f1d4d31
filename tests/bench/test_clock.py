"""The clock: who goes when, and what counts."""

import time

import pytest

from loki_attn.bench.clock import Times, measure
from loki_attn.bench.contenders import Contender


class StillReader:
    """Reads at a speed that is known."""

    def __init__(self):
        self.speeds = iter([1e9, 5.0, 3.0, 4.0])

    def bytes_per_s(self):
        return next(self.speeds)


def noting(name, log, stages=("",)):
    def step(value):
        log.append((name, value))
        return value

    return Contender(
        name=name,
        kind="torch",
        stages=tuple((stage, step) for stage in stages),
        touched_bytes=(1,) * len(stages),
    )


def test_contenders_take_turns_and_the_first_changes():
    log, told = [], []
    contenders = [noting("a", log), noting("b", log), noting("c", log, ("x", "y"))]
    found = measure(
        contenders,
        3,
        StillReader(),
        repeats=3,
        warm_up=1,
        advance=lambda done, name: told.append((done, name)),
    )
    order = "".join(name for _, name in told)
    assert order == "abc" + "bca" + "cab" + "abc"
    assert [done for done, _ in told] == list(range(1, 13))
    # One round through the layers, whoever steps.
    assert log[:5] == [("a", 0), ("a", 1), ("a", 2), ("a", 0), ("a", 1)]
    assert log[5:10] == [("b", 2), ("b", 0), ("b", 1), ("b", 2), ("b", 0)]
    assert log[10:14] == [("c", 1), ("c", 1), ("c", 2), ("c", 2)]
    assert set(found.times) == {("a", ""), ("b", ""), ("c", "x"), ("c", "y")}
    assert all(times.samples == 3 * 5 for times in found.times.values())
    assert found.read_bytes_per_s == 4.0


def test_the_warm_up_does_not_count():
    slept = []

    def slow_at_first(value):
        if len(slept) < 5:
            time.sleep(0.05)
        slept.append(value)
        return value

    contender = Contender(name="a", kind="torch", stages=(("", slow_at_first),), touched_bytes=(1,))
    found = measure([contender], 1, StillReader(), repeats=1, warm_up=1, advance=lambda *_: None)
    assert found.times["a", ""].median_us < 50_000


def test_times_are_microseconds_of_the_middle_and_two_fifths():
    times = Times.of([1000 * value for value in (5, 1, 3, 2, 4, 6)])
    assert (times.median_us, times.p20_us, times.p80_us) == pytest.approx((3.5, 2.0, 5.0))
    assert times.samples == 6
