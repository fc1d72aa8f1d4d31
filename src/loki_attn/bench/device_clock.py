"""The clock of a device that works on its own: rounds of steps, recorded once, replayed in turns.

A processor is timed step by step; a device is not, because starting a step costs more than many a
step. So a contender's steps of all layers are recorded as one graph, and what its replay takes is
shared out among them. What cannot be recorded is started step by step between the same two events.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Final, Protocol, final

from loki_attn.bench.clock import Advance, Measured, Times
from loki_attn.bench.contenders import Contender

GRAPH: Final = "graph replay"
EVENTS: Final = "events"
_MOST_REPLAYS: Final = 100
_COPIES: Final = 4
_EAGER_SAMPLES: Final = 3

Replay = Callable[[], Any]
"""Starts the recorded work again; what it computes is written to where it was before."""


class Uncapturable(Exception):
    """Work that a graph cannot hold; the text says why."""


class Stopwatch(Protocol):
    """What the clock needs of a device.

    Attributes:
        sample_bytes: What a sample touches at the least, by formula, so that starting and stopping
            it does not count.
    """

    sample_bytes: int

    def capture(self, work: Callable[[], Any]) -> tuple[Replay, Any]:
        """Record work; returns its replay, and what the work returned, written by each replay.

        Raises:
            Uncapturable: If the work waits for the device, or does what no graph can hold.
        """

    def begin(self) -> None:
        """Note the time at which the device comes to what is started next."""

    def elapsed_ns(self) -> float:
        """Wait for the device; nanoseconds that it took since `begin`."""

    def copy(self) -> int:
        """Start one large copy within the device's memory; bytes read and written."""


@final
@dataclass(frozen=True)
class Stage:
    """One stage of a contender, ready to be timed.

    Attributes:
        name: Of the stage.
        replay: Starts its steps of all layers.
        replays: How often a sample does so.
        timed_by: `GRAPH` or `EVENTS`.
        why_not: Why no graph holds it; empty where one does.
    """

    name: str
    replay: Replay
    replays: int
    timed_by: str
    why_not: str = ""


@final
@dataclass(frozen=True)
class Recorded:
    """A contender whose rounds are recorded.

    Attributes:
        name: Of the contender.
        stages: In their order.
        steps: Steps of one round, one for each layer.
        eager_us: Microseconds per step where every step is started on its own.
        result: What the timed work gave for layer 0, to be judged.
    """

    name: str
    stages: tuple[Stage, ...]
    steps: int
    eager_us: float
    result: Any


def record(contender: Contender, layers: int, watch: Stopwatch) -> Recorded:
    """Run a contender on every layer, record its stages, and replay them once.

    Args:
        contender: Whose steps; what they raise is passed on.
        layers: Layers that it has.
        watch: The device.

    Returns:
        The contender with the result of a replay: what is judged is what is timed.
    """
    # Layer 0 comes last: whoever writes into buffers of its own leaves there what is judged.
    inputs: list[Any] = [*range(1, layers), 0]
    stages: list[Stage] = []
    eager_us, result = 0.0, None
    for (name, step), touched in zip(contender.stages, contender.touched_bytes, strict=True):
        work = _round(step, inputs)
        work()
        eager_us += _eager_us(work, layers, watch)
        stage, result = _stage(name, work, touched * layers, watch)
        stages.append(stage)
        if len(stages) < len(contender.stages):
            inputs = [step(value) for value in inputs]
    return Recorded(contender.name, tuple(stages), layers, eager_us, result)


def measure_recorded(
    recorded: Sequence[Recorded],
    watch: Stopwatch,
    *,
    repeats: int,
    warm_up: int,
    advance: Advance,
) -> Measured:
    """Time recorded contenders in turns, one sample each; the first to go changes.

    Args:
        recorded: Who competes.
        watch: The device.
        repeats: Rounds that count.
        warm_up: Rounds before them that do not.
        advance: Told of every turn.
    """
    found: dict[tuple[str, str], list[float]] = {}
    speeds: list[float] = []
    done = 0
    for turn in range(warm_up + repeats):
        counts = turn >= warm_up
        speed = _copy_bytes_per_s(watch)
        if counts:
            speeds.append(speed)
        first = turn % len(recorded)
        for own in (*recorded[first:], *recorded[:first]):
            for stage in own.stages:
                sample = _sample(stage, own.steps, watch)
                if counts:
                    found.setdefault((own.name, stage.name), []).append(sample)
            done += 1
            advance(done, own.name)
    return Measured({key: Times.of(values) for key, values in found.items()}, median(speeds))


def _round(step: Callable[[Any], Any], inputs: Sequence[Any]) -> Callable[[], Any]:
    """One step of every layer; returns what the last one gave and lets go of the others."""

    def work() -> Any:
        for value in inputs[:-1]:
            step(value)
        return step(inputs[-1])

    return work


def _stage(
    name: str, work: Callable[[], Any], touched_bytes: int, watch: Stopwatch
) -> tuple[Stage, Any]:
    replays = min(_MOST_REPLAYS, max(1, -(-watch.sample_bytes // max(1, touched_bytes))))
    try:
        replay, result = watch.capture(work)
    except Uncapturable as why:
        # Steps that are started one by one take so long that one round is a sample.
        return Stage(name, work, 1, EVENTS, str(why)), work()
    # Recording computes nothing: the result is there after a replay, and not before.
    watch.begin()
    replay()
    watch.elapsed_ns()
    return Stage(name, replay, replays, GRAPH), result


def _eager_us(work: Callable[[], Any], steps: int, watch: Stopwatch) -> float:
    samples = []
    for _ in range(_EAGER_SAMPLES):
        watch.begin()
        work()
        samples.append(watch.elapsed_ns() / steps / 1000)
    return median(samples)


def _sample(stage: Stage, steps: int, watch: Stopwatch) -> float:
    """Nanoseconds per step."""
    watch.begin()
    for _ in range(stage.replays):
        stage.replay()
    return watch.elapsed_ns() / (stage.replays * steps)


def _copy_bytes_per_s(watch: Stopwatch) -> float:
    watch.begin()
    moved = sum(watch.copy() for _ in range(_COPIES))
    return moved / watch.elapsed_ns() * 1e9
