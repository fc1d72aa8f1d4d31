"""The assertion can fail, and the textbook is right."""

import pytest
import torch

from loki_attn.policy import preset
from loki_attn.testing import (
    DrivenLayer,
    assert_within_budget,
    layer_shape,
    plain_attention,
    plain_reference,
    random_rows,
    spectral_basis,
    tiny_basis,
)
from loki_attn.types import AttentionCall

TRUTH = torch.tensor([1.0, 2.0], dtype=torch.float64)
EPS = torch.finfo(torch.float32).eps


def test_the_budget_is_two_reference_errors_and_one_rounding():
    reference = torch.tensor([1.0, 2.001])
    error = float(reference[1].double() - 2)
    inside = torch.tensor([1.0, 2.0 + 2 * error])
    assert_within_budget(inside, reference, TRUTH)
    outside = torch.tensor([1.0, 2.0 + 2 * error + 8 * EPS])
    with pytest.raises(AssertionError, match=r"largest error 2\.00.e-03, allowed 2\.00.e-03"):
        assert_within_budget(outside, reference, TRUTH)


@pytest.mark.parametrize(
    ("out", "reference", "truth", "message"),
    [
        (torch.tensor([1.0, float("nan")]), TRUTH.float(), TRUTH, "kernel's result is not finite"),
        (TRUTH.float(), TRUTH.float(), TRUTH * float("inf"), "truth is not finite"),
        (TRUTH.float(), TRUTH.float(), TRUTH.float(), "truth is float64"),
        (TRUTH.half(), TRUTH.float(), TRUTH, "dtypes differ"),
        (TRUTH.float()[:1], TRUTH.float(), TRUTH, "shapes differ"),
    ],
)
def test_what_cannot_be_compared(out, reference, truth, message):
    with pytest.raises(AssertionError, match=message):
        assert_within_budget(out, reference, truth)


def test_the_textbook_against_sums_by_hand():
    shape = layer_shape(4, 2, 3)
    query, key, value = (t.double() for t in random_rows(shape, 3))
    out = plain_attention(query, key, value, None, AttentionCall(scaling=0.5))
    for head in range(4):
        weights = [
            float(torch.exp(0.5 * (query[0, head, 0] * key[0, head // 2, row]).sum()))
            for row in range(3)
        ]
        expected = sum(w * value[0, head // 2, row] for row, w in enumerate(weights)) / sum(weights)
        torch.testing.assert_close(out[0, head, 0], expected)


def test_the_reference_is_the_worst_of_several_orders():
    shape = layer_shape(2, 1, 32)
    query, key, value = random_rows(shape, 50)
    call = AttentionCall(scaling=1.0)
    truth = plain_attention(query.double(), key.double(), value.double(), None, call)
    errors = [
        float(
            (plain_reference(query, key, value, None, call, truth, n).double() - truth).abs().max()
        )
        for n in (1, 8)
    ]
    assert errors[0] <= errors[1] < 1e-4


def test_random_rows_have_the_spectrum_that_the_basis_shows():
    shape = layer_shape(4, 2, 16)
    _, key, _ = random_rows(shape, 20_000, decay=2.0, seed=3)
    variance = (key @ spectral_basis(shape, 3).layer(0).key_map).var(2)[0]
    expected = torch.arange(1.0, 17) ** -2
    torch.testing.assert_close(variance, expected.expand(2, -1), rtol=0.1, atol=0)
    assert not torch.equal(*tiny_basis(shape).layer(0).key_map)


def test_a_driven_layer_attends_evicts_and_tells_what_is_left():
    shape = layer_shape(4, 2, 8)
    query, key, value = random_rows(shape, 31, batch=2, q_len=31)
    driven = DrivenLayer(preset("knorm", capacity=10), shape)
    assert driven.evict() == 0
    out = driven.prompt(*(rows[:, :, :30] for rows in (query, key, value)), chunks=(7, 20))
    assert out.shape == (2, 4, 30, 8)
    assert [[len(head) for head in row] for row in driven.positions()] == [[10, 10]] * 2
    held = driven.positions()
    step = driven.attend(*(rows[:, :, 30:] for rows in (query, key, value)))
    mask = torch.zeros(2, 2, 1, 31, dtype=torch.bool)
    for b, row in enumerate(held):
        for h, head in enumerate(row):
            mask[b, h, 0, [*head, 30]] = True
    seen = mask.repeat_interleave(2, 1)
    expected = plain_attention(query[:, :, 30:], key, value, seen, driven.call)
    torch.testing.assert_close(step, expected)
    assert driven.positions() == [[[*head, 30] for head in row] for row in held]
