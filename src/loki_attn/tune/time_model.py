"""The time model: what a step will take, from its bytes and a few measured steps.

Bytes alone do not order policies: rows that lie apart are read more slowly than a plane that is
read in one go, and every selecting layer has a price of its own. So each of them has its own rate.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np

from loki_attn.errors import InputError
from loki_attn.evaluate.byte_model import StepBytes


@final
@dataclass(frozen=True, kw_only=True)
class Sample:
    """One measured policy.

    Attributes:
        plane_dtype: What its lead plane is stored as.
        step: The bytes of its step.
        step_us: What a step took, in microseconds.
    """

    plane_dtype: str
    step: StepBytes
    step_us: float


@final
@dataclass(frozen=True, kw_only=True)
class TimeModel:
    """Predicts whole steps of one model at one context.

    Attributes:
        dense_us: A step with dense attention.
        layer_us: A selecting layer, less the dense layer that it replaces and without its bytes.
        chosen_us: A byte of the chosen rows.
        scored_us: A byte that ranking reads, by plane dtype.
    """

    dense_us: float
    layer_us: float
    chosen_us: float
    scored_us: Mapping[str, float]

    def step_us(self, plane_dtype: str, step: StepBytes) -> float:
        """Predict a step, in microseconds.

        Args:
            plane_dtype: One that was measured.
            step: The bytes of the step.
        """
        return (
            self.dense_us
            + step.selecting_layers * self.layer_us
            + step.chosen * self.chosen_us
            + step.scored * self.scored_us[plane_dtype]
        )


def fit_times(samples: Sequence[Sample], dense_us: float, least_us: float) -> TimeModel:
    """Fit the rates to measured policies, by least squares.

    Args:
        samples: Of the same context; together they differ in rank, in top_k and in plane dtype.
        dense_us: A step with dense attention.
        least_us: What a byte takes at the full speed of memory: no rate of a byte is below it,
            whatever noise says, so that of two policies that read alike in kind the one that reads
            less is predicted to be faster.

    Returns:
        The model.

    Raises:
        InputError: If there is no sample, or one of them selects in no layer.
    """
    if not samples or any(sample.step.selecting_layers < 1 for sample in samples):
        raise InputError(
            f"Rates need measured policies that select, got {len(samples)} samples; lower top_k."
        )
    planes = sorted({sample.plane_dtype for sample in samples})
    counts = np.array(
        [
            [
                sample.step.selecting_layers,
                sample.step.chosen,
                *(sample.step.scored * (sample.plane_dtype == plane) for plane in planes),
            ]
            for sample in samples
        ],
        dtype=float,
    )
    added = np.array([sample.step_us - dense_us for sample in samples])
    layer_us, chosen_us, *scored_us = _fit(counts, added, least_us)
    return TimeModel(
        dense_us=dense_us,
        layer_us=layer_us,
        chosen_us=chosen_us,
        scored_us=dict(zip(planes, scored_us, strict=True)),
    )


def _fit(counts: "np.ndarray", added: "np.ndarray", least: float) -> list[float]:
    """Least squares; rates but the first are at least `least`, one fixed there after another."""
    rates = np.full(counts.shape[1], least)
    free = list(range(counts.shape[1]))
    while True:
        # Scaled, since bytes are many and layers few.
        scale = np.maximum(np.abs(counts[:, free]).max(0), 1.0)
        fixed = [place for place in range(counts.shape[1]) if place not in free]
        rest = added - counts[:, fixed] @ rates[fixed]
        rates[free] = np.linalg.lstsq(counts[:, free] / scale, rest, rcond=None)[0] / scale
        low = [place for place in free if place > 0 and rates[place] < least]
        if not low:
            return [float(rate) for rate in rates]
        lowest = min(low, key=lambda place: rates[place])
        free.remove(lowest)
        rates[lowest] = least
