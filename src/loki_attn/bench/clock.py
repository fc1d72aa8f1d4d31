"""The clock: contenders take turns, and every sample is one step of one layer that lay cold."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from time import perf_counter_ns
from typing import Any, Final, final

import numpy as np
import torch

from loki_attn.bench.contenders import Contender, Lap
from loki_attn.bench.machine import Reader

STEPS_PER_TURN: Final = 5

Advance = Callable[[int, str], None]
"""Called with the turns done so far and the name of who had the last."""


@final
@dataclass(frozen=True)
class Times:
    """Median and spread of many samples, in microseconds."""

    median_us: float
    p20_us: float
    p80_us: float
    samples: int

    @classmethod
    def of(cls, samples_ns: Sequence[float]) -> "Times":
        """Sum up nanoseconds."""
        low, middle, high = np.percentile(np.asarray(samples_ns) / 1000, [20, 50, 80])
        return cls(float(middle), float(low), float(high), len(samples_ns))


@final
@dataclass(frozen=True)
class Measured:
    """What the rounds gave.

    Attributes:
        times: By contender and stage.
        read_bytes_per_s: The median of the reads of a large buffer between the turns.
    """

    times: Mapping[tuple[str, str], Times]
    read_bytes_per_s: float


def measure(
    contenders: Sequence[Contender],
    layers: int,
    reader: Reader,
    *,
    repeats: int,
    warm_up: int,
    advance: Advance,
) -> Measured:
    """Time the contenders in turns.

    In every round each contender has a turn of a few steps, and memory is read once; the first to
    go changes from round to round. All of them follow one round through the layers, each from where
    the one before stopped: between two visits of a layer, whoever makes them, every other layer was
    visited.

    Args:
        contenders: Who competes.
        layers: Layers that each has.
        reader: Reads memory at full speed.
        repeats: Rounds that count.
        warm_up: Rounds before them that do not.
        advance: Told of every turn.
    """
    found: dict[tuple[str, str], list[int]] = {}
    speeds: list[float] = []
    done, places = 0, cycle(range(layers))
    with torch.inference_mode():
        for turn in range(warm_up + repeats):
            counts = turn >= warm_up
            speed = reader.bytes_per_s()
            if counts:
                speeds.append(speed)
            first = turn % len(contenders)
            for contender in (*contenders[first:], *contenders[:first]):
                samples = _turn(contender, places)
                for stage, values in samples.items() if counts else ():
                    found.setdefault((contender.name, stage), []).extend(values)
                done += 1
                advance(done, contender.name)
    times = {key: Times.of(values) for key, values in found.items()}
    return Measured(times, float(np.median(speeds)))


def _turn(contender: Contender, places: Iterator[int]) -> dict[str, list[int]]:
    """A few steps, each of the next layer; nanoseconds of each stage."""
    samples: dict[str, list[int]] = {name: [] for name, _ in contender.stages}
    for index in islice(places, STEPS_PER_TURN):
        value: Any = index
        for name, stage in contender.stages:
            began = perf_counter_ns()
            value = stage(value)
            taken = perf_counter_ns() - began
            if isinstance(value, Lap):
                value, taken = value.value, value.taken_ns
            samples[name].append(taken)
    return samples
