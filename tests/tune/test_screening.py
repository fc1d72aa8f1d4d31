"""Screening: what one forward tells, and what is concluded from it."""

import math

import pytest

from loki_attn.evaluate.fidelity import fidelity
from loki_attn.evaluate.journal import Journal
from loki_attn.evaluate.protocol import Contender
from loki_attn.tune.screening import Screen, coarse, screen
from loki_attn.tune.space import Candidate

SEEN = Screen(
    {
        (8, "int8"): {64: {0: 0.4, 1: 0.1}, 256: {0: 0.1, 1: 0.0}},
        (8, "int4"): {64: {0: 0.5, 1: 0.9}, 256: {0: 0.3, 1: 0.6}},
    }
)


def expected(top_k, plane="int8", dense=()):
    return SEEN.expected(Candidate(rank=8, plane_dtype=plane, top_k=top_k, dense_layers=dense))


def test_coarse_amounts_keep_both_ends():
    assert coarse((1, 2, 3, 4, 5, 6, 7)) == (1, 5, 7)
    assert coarse((1, 2, 3, 4, 5)) == (1, 5)
    assert coarse((3,)) == (3,)


def test_a_loss_is_the_mean_over_layers():
    assert expected(64) == pytest.approx(0.25)
    assert expected(256, "int4") == pytest.approx(0.45)


def test_dense_layers_lose_nothing():
    assert expected(64, dense=(0,)) == pytest.approx(0.05)
    assert expected(64, dense=(0, 1)) > 0


def test_between_two_amounts_logarithms_go_straight():
    assert expected(128, "int4") == pytest.approx((math.sqrt(0.15) + math.sqrt(0.54)) / 2)


def test_a_bf16_plane_is_taken_to_lose_what_int8_does():
    assert expected(64, "bf16") == expected(64, "int8")


def test_the_worst_layer_comes_first():
    assert SEEN.worst() == (1, 0)


def test_losses_are_the_squared_errors_of_fidelity(tiny):
    lm, basis = tiny
    ids = [7 + place * 13 % 80 for place in range(96)]
    found = screen(lm, ids, basis, (4, 8), (8, 24), queries=8, journal=Journal())
    assert found.screened == 2 * 2 * 2
    one = Candidate(rank=8, plane_dtype="int8", top_k=8)
    contender = Contender(name="one", policy=one.policy(96), basis=basis)
    (row,) = fidelity(lm, ids, [contender], windows=1, window_tokens=96, queries=8)
    errors = row.metrics["layers"]["output_error"]
    assert [found.losses[8, "int8"][8][layer] for layer in (0, 1)] == pytest.approx(
        [error**2 for error in errors]
    )
    assert found.expected(one) == pytest.approx(sum(error**2 for error in errors) / 2)
