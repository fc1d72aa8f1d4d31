"""The clock of a device: what is recorded, who goes when, and what a sample is shared out to."""

import pytest

from loki_attn.bench.contenders import Contender
from loki_attn.bench.device_clock import (
    EVENTS,
    GRAPH,
    Uncapturable,
    measure_recorded,
    record,
)


class Scripted:
    """A device on which every step takes as long as it says, and a recording computes nothing."""

    sample_bytes = 1000

    def __init__(self, refuses=()):
        self.now = self.began = 0
        self.speeds = iter([1, 1, 5, 2, 4, 3] * 9)
        self.refuses, self.recording, self.log = refuses, False, []

    def step(self, name, takes):
        def run(value):
            if self.recording:
                self.played.append((name, takes))
                if name in self.refuses:
                    raise Uncapturable(f"{name} waits")
                return ["unwritten"]
            self.log.append((name, value))
            self.now += takes
            return [name, value]

        return run

    def capture(self, work):
        self.recording, self.played = True, []
        try:
            result = work()
        finally:
            self.recording = False
        played = self.played

        def replay():
            self.now += sum(takes for _, takes in played)
            self.log.append(("replay", len(played)))
            result[:] = ["replayed", played[0][0]]

        return replay, result

    def begin(self):
        self.began = self.now

    def elapsed_ns(self):
        return self.now - self.began

    def copy(self):
        self.now += 100
        return 100 * next(self.speeds)


def contender(device, name, takes, stages=("",), touched=100):
    steps = [(stage, device.step(name + stage, takes)) for stage in stages]
    touches = (touched,) * len(stages)
    return Contender(name=name, kind="torch", stages=tuple(steps), touched_bytes=touches)


def measured(device, recorded, repeats=4, warm_up=0, told=None):
    def advance(done, name):
        if told is not None:
            told.append((done, name))

    return measure_recorded(recorded, device, repeats=repeats, warm_up=warm_up, advance=advance)


def test_a_step_costs_its_share_of_a_replay():
    device = Scripted()
    found = [record(contender(device, name, ns), 5, device) for name, ns in (("a", 7), ("b", 40))]
    times = measured(device, found).times
    assert times["a", ""].median_us == pytest.approx(0.007)
    assert times["b", ""].median_us == pytest.approx(0.040)
    assert times["a", ""].samples == 4
    assert [own.eager_us for own in found] == pytest.approx([0.007, 0.040])


def test_contenders_take_turns_and_the_first_changes():
    device, told = Scripted(), []
    found = [record(contender(device, name, 1), 2, device) for name in "abc"]
    measured(device, found, repeats=3, warm_up=1, told=told)
    assert "".join(name for _, name in told) == "abc" + "bca" + "cab" + "abc"
    assert [done for done, _ in told] == list(range(1, 13))


def test_the_speed_is_the_median_of_copies_between_the_turns_that_count():
    device = Scripted()
    device.speeds = iter([9] * 4 + [1] * 4 + [3] * 4 + [2] * 4)
    found = [record(contender(device, "a", 1), 2, device)]
    assert measured(device, found, repeats=3, warm_up=1).read_bytes_per_s == pytest.approx(2e9)


@pytest.mark.parametrize(("touched", "replays"), [(100, 2), (1000, 1), (30, 7), (0, 100)])
def test_a_sample_replays_until_enough_was_touched(touched, replays):
    device = Scripted()
    (stage,) = record(contender(device, "a", 1, touched=touched), 5, device).stages
    assert (stage.replays, stage.timed_by) == (replays, GRAPH)
    device.log.clear()
    measured(device, [record(contender(device, "a", 1, touched=touched), 5, device)], repeats=1)
    # One more was replayed to be judged.
    assert device.log.count(("replay", 5)) == replays + 1


def test_what_is_judged_is_what_a_replay_wrote():
    device = Scripted()
    assert record(contender(device, "a", 1), 3, device).result == ["replayed", "a"]


def test_layer_0_comes_last_so_that_kept_buffers_hold_what_is_judged():
    device = Scripted(refuses={"a"})
    kept = []

    def into_kept(index):
        device.step("a", 1)(index)
        kept[:] = [index]
        return kept

    own = Contender(name="a", kind="torch", stages=(("", into_kept),), touched_bytes=(1,))
    assert record(own, 4, device).result == [0]


def test_what_no_graph_holds_is_started_step_by_step():
    device = Scripted(refuses={"a"})
    found = record(contender(device, "a", 3), 4, device)
    (stage,) = found.stages
    assert (stage.timed_by, stage.why_not, stage.replays) == (EVENTS, "a waits", 1)
    assert found.result == ["a", 0]
    device.log.clear()
    times = measured(device, [found], repeats=2).times["a", ""]
    assert device.log == [("a", index) for index in (1, 2, 3, 0)] * 2
    assert (times.median_us, times.samples) == (pytest.approx(0.003), 2)


def test_stages_are_recorded_apart_each_on_what_the_one_before_gave():
    device = Scripted(refuses={"ay"})
    found = record(contender(device, "a", 2, stages=("x", "y", "z")), 3, device)
    assert [stage.timed_by for stage in found.stages] == [GRAPH, EVENTS, GRAPH]
    seen = [value for name, value in device.log if name == "az"]
    assert seen[:3] == [["ay", ["ax", index]] for index in (1, 2, 0)]
    assert found.result == ["replayed", "az"]
    assert set(measured(device, [found]).times) == {("a", "x"), ("a", "y"), ("a", "z")}
    assert found.eager_us == pytest.approx(0.006)


def test_what_a_step_raises_is_its_own():
    def broken(index):
        raise ValueError(index)

    own = Contender(name="a", kind="torch", stages=(("", broken),), touched_bytes=(1,))
    with pytest.raises(ValueError, match="1"):
        record(own, 2, Scripted())
