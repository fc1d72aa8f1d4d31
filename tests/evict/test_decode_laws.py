"""What every method that evicts while decoding promises."""

import itertools

import pytest
import torch
from stepping import visible_of, walk

from loki_attn.policy import preset
from loki_attn.rope import Rope
from loki_attn.testing import DrivenLayer, layer_shape, random_rows

SHAPE = layer_shape(6, 2, 16)
ROPE = Rope(frequencies=10000.0 ** -(torch.arange(8) / 8))
WINDOW = "evict.window"
METHODS = {
    "h2o": {"capacity": 16},
    "h2o-normalised": {"capacity": 16, "normalise": True},
    "keyformer": {"capacity": 16},
    "corm": {"queries": 4, WINDOW: 4},
    "tova": {"capacity": 16},
    "rkv": {"capacity": 16, "burst": 4},
    "streaming-keep": {"capacity": 16},
    "streaming-slot": {"capacity": 16},
}


def policy_of(name, **more):
    return preset(name.removesuffix("-normalised"), **{**METHODS[name], **more})


def sharp(rows):
    """Rows whose queries attend to few of them."""
    return rows[0] * 4, rows[1], rows[2]


@pytest.fixture(params=METHODS)
def name(request):
    """Every one of them."""
    return request.param


def test_dropped_tokens_never_return_and_rows_stay_in_order(name):
    rows = sharp(random_rows(SHAPE, 45, batch=2, q_len=45))
    _, held, _ = walk(policy_of(name), SHAPE, rows, 30, rope=ROPE)
    assert any(len(head) < 45 for head in held[-1][0])
    for step, (before, after) in enumerate(itertools.pairwise(held)):
        for b in range(2):
            for h in range(2):
                kept = after[b][h]
                assert set(kept) <= {*before[b][h], 30 + step}
                assert kept == sorted(set(kept))


@pytest.mark.parametrize("name", sorted(METHODS.keys() - {"corm"}))  # which has none
def test_a_capacity_is_never_exceeded_after_a_forward(name):
    rows = sharp(random_rows(SHAPE, 40, batch=2, q_len=40))
    layer, held, _ = walk(policy_of(name), SHAPE, rows, 30, chunks=(20,), rope=ROPE)
    room = layer.layer.eviction.budget.burst
    assert {len(head) for step in held for row in step for head in row} <= set(range(16, 17 + room))


def test_a_batch_row_is_judged_as_if_alone(name):
    rows = sharp(random_rows(SHAPE, 38, batch=3, q_len=38))
    _, together, outs = walk(policy_of(name), SHAPE, rows, 30, rope=ROPE)
    for b in range(3):
        alone = walk(policy_of(name), SHAPE, [part[b : b + 1] for part in rows], 30, rope=ROPE)
        assert [step[b] for step in together] == [step[0] for step in alone[1]]
        torch.testing.assert_close(outs[b : b + 1], alone[2])


def test_padding_on_the_left_changes_nothing_whatever_it_holds(name):
    # Without a burst: when it is full is a matter of the batch, padding included.
    rows = sharp(random_rows(SHAPE, 40, batch=4, q_len=40))
    pad, valid = 11, torch.ones(4, 40, dtype=torch.bool)
    valid[1:, :pad] = False
    for part in rows[1:]:
        for b, rubbish in enumerate((float("nan"), float("inf"), 1e9), start=1):
            part[b, :, :pad] = rubbish
    policy = policy_of(name, burst=0)
    _, held, outs = walk(policy, SHAPE, rows, 30, valid=valid, rope=ROPE)
    short = [part[1:, :, pad:] for part in rows]
    _, alone, own = walk(policy, SHAPE, short, 30 - pad, rope=ROPE)
    for step, truth in zip(held, alone, strict=True):
        for b in range(3):
            kept = [[p - pad for p in head if p >= pad] for head in step[b + 1]]
            assert kept == truth[b]
    torch.testing.assert_close(outs[1:, :, pad:], own, rtol=1e-4, atol=1e-5)


def test_chunks_of_a_prompt_are_judged_together_if_asked_for(name):
    rows = sharp(random_rows(SHAPE, 40, batch=2, q_len=40))
    policy = policy_of(name, when="prompt")
    once = walk(policy, SHAPE, rows, 36, rope=ROPE)
    split = walk(policy, SHAPE, rows, 36, chunks=(3, 20, 33), rope=ROPE)
    assert split[1][3:] == once[1]


def test_rows_that_are_dropped_were_attended_to_by_the_call_that_drops_them(name):
    rows = sharp(random_rows(SHAPE, 40, q_len=40))
    _, _, outs = walk(policy_of(name), SHAPE, rows, 40, rope=ROPE)
    assert torch.equal(outs, walk(preset("dense"), SHAPE, rows, 40)[2])


def test_rows_that_stay_are_bit_identical(name):
    rows = sharp(random_rows(SHAPE, 40, q_len=40))
    layer, held, _ = walk(policy_of(name), SHAPE, rows, 30, rope=ROPE)
    moved = 4 if name == "streaming-slot" else 0
    for shard in layer.rows:
        heads = range(2) if shard.heads is None else shard.heads.tolist()
        for own, head in enumerate(heads):
            kept = held[-1][0][head][moved:]
            assert torch.equal(shard.cache.keys[0, own, moved:], rows[1][0, head, kept])
            assert torch.equal(shard.cache.values[0, own, moved:], rows[2][0, head, kept])


def test_rows_are_really_given_back(name):
    rows = sharp(random_rows(SHAPE, 600, q_len=600))
    layer, held, _ = walk(policy_of(name), SHAPE, rows, 600, rope=ROPE)
    most = max(len(head) for head in held[-1][0])
    dense = walk(preset("dense"), SHAPE, rows, 600)[0]
    # Storage is in whole tiles of 16 rows; marks and memory are counted.
    assert layer.rows.nbytes() < dense.rows.nbytes() * (most + 32) / 600 * 1.5


def test_unwritten_storage_is_never_read(name, poison):
    rows = sharp(random_rows(SHAPE, 40, q_len=40))
    layer, _, outs = walk(policy_of(name), SHAPE, rows, 25, rope=ROPE)
    assert bool(outs.isfinite().all())
    assert all(bool(shard.cache.keys.isfinite().all()) for shard in layer.rows)


@pytest.mark.parametrize(
    "name", sorted(METHODS.keys() - {"keyformer"})
)  # whose heads differ in noise
def test_permuted_heads_keep_permuted_rows(name):
    rows = sharp(random_rows(SHAPE, 38, q_len=38))
    swapped = [part.reshape(1, 2, -1, *part.shape[2:]).flip(1).reshape(part.shape) for part in rows]
    _, held, _ = walk(policy_of(name), SHAPE, rows, 30, rope=ROPE)
    _, other, _ = walk(policy_of(name), SHAPE, swapped, 30, rope=ROPE)
    assert [step[0][::-1] for step in held] == [step[0] for step in other]


def test_a_forward_of_several_tokens_on_a_filled_cache_is_served(name):
    rows = sharp(random_rows(SHAPE, 60, batch=2, q_len=60))
    driven = DrivenLayer(policy_of(name), SHAPE, rope=ROPE)
    for start, stop in ((0, 30), (30, 31), (31, 45), (45, 46), (46, 60)):
        out = driven.attend(
            *[part[:, :, start:stop] for part in rows],
            visible_of(torch.ones(2, 60, dtype=torch.bool), start, stop),
        )
        assert bool(out.isfinite().all())
    assert all(head[-1] == 59 for row in driven.positions() for head in row) or name == "tova"
