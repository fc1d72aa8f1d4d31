"""The time model: rates found again, and no rate that noise could turn round."""

import pytest

from loki_attn.errors import InputError
from loki_attn.evaluate.byte_model import StepBytes
from loki_attn.tune.time_model import Sample, fit_times

DENSE_US, LAYER_US, CHOSEN_US = 900.0, -4.0, 2e-3
SCORED_US = {"int8": 1e-3, "int4": 1.5e-3, "bf16": 4e-3}
# (plane, bytes of ranking, bytes of chosen rows): what a tuning measures.
PROBES = [
    ("int8", 10_000, 8_000),
    ("int8", 10_000, 90_000),
    ("int4", 30_000, 8_000),
    ("int8", 60_000, 8_000),
    ("bf16", 120_000, 8_000),
]


def step(scored, chosen, layers=10):
    return StepBytes(scored=scored, chosen=chosen, whole=0, dense=10**6, selecting_layers=layers)


def true_us(plane, scored, chosen, layers=10):
    return DENSE_US + layers * LAYER_US + scored * SCORED_US[plane] + chosen * CHOSEN_US


def fitted(noise=lambda _: 0.0, least_us=1e-6):
    samples = [
        Sample(plane_dtype=p, step=step(s, c), step_us=true_us(p, s, c) + noise(i))
        for i, (p, s, c) in enumerate(PROBES)
    ]
    return fit_times(samples, DENSE_US, least_us)


@pytest.mark.parametrize("plane", SCORED_US)
@pytest.mark.parametrize("layers", [1, 7, 10])
def test_rates_are_found_again(plane, layers):
    model = fitted()
    predicted = model.step_us(plane, step(33_000, 21_000, layers))
    assert predicted == pytest.approx(true_us(plane, 33_000, 21_000, layers), rel=1e-6)


def test_no_layer_selecting_is_dense():
    assert fitted().step_us("int8", step(0, 0, 0)) == DENSE_US


@pytest.mark.parametrize("bad", range(len(PROBES)))
@pytest.mark.parametrize("size", [-300.0, 300.0])
def test_reading_more_never_takes_less_whatever_noise_says(bad, size):
    model = fitted(lambda i: size if i == bad else 0.0, least_us=5e-4)
    assert min(model.chosen_us, *model.scored_us.values()) >= 5e-4 * (1 - 1e-9)
    for plane in SCORED_US:
        base = model.step_us(plane, step(20_000, 20_000))
        assert model.step_us(plane, step(30_000, 20_000)) > base
        assert model.step_us(plane, step(20_000, 30_000)) > base


def test_one_sample_is_met_with_all_rates_at_the_least():
    sample = Sample(plane_dtype="int8", step=step(1000, 1000), step_us=905.0)
    model = fit_times([sample], DENSE_US, 1e-3)
    assert model.step_us("int8", sample.step) == pytest.approx(905.0)
    assert min(model.chosen_us, model.scored_us["int8"]) >= 1e-3


@pytest.mark.parametrize(
    "samples", [[], [Sample(plane_dtype="int8", step=step(0, 0, 0), step_us=1.0)]]
)
def test_refusals(samples):
    with pytest.raises(InputError, match="Rates need measured policies that select"):
        fit_times(samples, DENSE_US, 1e-3)
