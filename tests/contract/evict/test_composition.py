"""Evictions beside selections, as records, and in the account of the attention that is left."""

import pytest
import torch

from loki_attn.cache import LayerCache
from loki_attn.errors import PolicyError
from loki_attn.policy import Policy
from loki_attn.select.loki import Loki
from loki_attn.testing import layer_shape, plain_attention, plain_weights, random_rows

SHAPE = layer_shape(4, 2, 16)
SEQ = 40
CAPACITY = 13


def part(rows, start, end):
    return [one[:, :, start:end] for one in rows]


def mask_of(driven, seen):
    """The tokens that are held, bool [batch, kv_heads, seen]."""
    mask = torch.zeros(2, 2, seen, dtype=torch.bool)
    for b, row in enumerate(driven.positions()):
        for h, head in enumerate(row):
            mask[b, h, head] = True
    return mask


def test_dense_attention_is_that_to_kept_and_dropped_rows_by_mass(evict_case):
    """The next query attends exactly to what is left: U14, and the bound U15."""
    if evict_case.moves:
        return  # its keys stand elsewhere; its own tests say where
    rows = random_rows(SHAPE, SEQ + 1, batch=2, q_len=SEQ + 1, seed=6)
    driven = evict_case.driven(SHAPE, capacity=CAPACITY)
    driven.prompt(*part(rows, 0, SEQ))
    mask = mask_of(driven, SEQ)
    out = driven.attend(*part(rows, SEQ, SEQ + 1)).double()
    query, key, value = (one.double() for one in rows)
    query, call = query[:, :, -1:], driven.call
    held = torch.cat([mask, torch.ones(2, 2, 1, dtype=torch.bool)], 2)
    held = held.repeat_interleave(2, 1)[:, :, None]
    kept = (plain_weights(query, key, None, call) * held).sum(-1, keepdim=True)
    dense = plain_attention(query, key, value, None, call)
    dropped = plain_attention(query, key, value, ~held, call)
    torch.testing.assert_close(kept * out + (1 - kept) * dropped, dense, rtol=1e-5, atol=1e-6)
    largest = value.norm(dim=-1).amax(-1)[..., None, None].repeat_interleave(2, 1)
    assert bool(((out - dense).norm(dim=-1, keepdim=True) <= 2 * (1 - kept) * largest + 1e-6).all())


def test_a_policy_survives_json(evict_case):
    for keep in (
        {"capacity": 20, "keep_first": 1, "burst": 4, "whole_layers": (0, -1)},
        {"keep_share": 0.25, "keep_last": 5, "when": "prompt"},
    ):
        policy = evict_case.policy(Loki(rank=4), **keep)
        assert Policy.from_json(policy.to_json()) == policy


@pytest.mark.parametrize("steps", [0, 4])
def test_planes_are_those_of_a_fresh_cache_of_the_survivors(evict_case, steps):
    """Loki on top of an eviction: U18 and U26."""
    rows = random_rows(SHAPE, SEQ + steps, batch=2, q_len=SEQ + steps, seed=7)
    if evict_case.moves:
        with pytest.raises(PolicyError, match="planes that the selection keeps"):
            evict_case.driven(SHAPE, select=Loki(rank=4), capacity=CAPACITY).prompt(*rows)
        return
    driven = evict_case.driven(SHAPE, select=Loki(rank=4), capacity=CAPACITY)
    driven.prompt(*part(rows, 0, SEQ))
    for step in range(SEQ, SEQ + steps):
        driven.attend(*part(rows, step, step + 1))
    for shard in driven.rows:
        cache = shard.cache
        fresh = LayerCache(cache.row_format)
        fresh.append(cache.keys, cache.values)
        assert fresh._storage.keys() <= cache._storage.keys()
        if "lead" not in cache._storage:
            continue  # heads that read all they hold have no index
        difference = cache.plane("lead").int() - fresh.plane("lead").int()
        assert int(difference.abs().max()) <= 1
        torch.testing.assert_close(cache.plane("lead_scale"), fresh.plane("lead_scale"))


def test_reading_all_that_is_left_is_the_eviction_alone(evict_case):
    """U25: a selection with the full budget changes neither outputs nor what stays."""
    if evict_case.moves:
        return
    rows = random_rows(SHAPE, SEQ + 4, batch=2, q_len=SEQ + 4, seed=8)
    alone = evict_case.driven(SHAPE, capacity=CAPACITY)
    both = evict_case.driven(SHAPE, select=Loki(rank=16, plane_dtype="fp32"), capacity=CAPACITY)
    alone.prompt(*part(rows, 0, SEQ))
    both.prompt(*part(rows, 0, SEQ))
    assert alone.positions() == both.positions()
    for step in range(SEQ, SEQ + 4):
        new = part(rows, step, step + 1)
        torch.testing.assert_close(both.attend(*new, how="decode"), alone.attend(*new))
        assert alone.positions() == both.positions()


def test_keys_in_another_basis_are_judged_alike_or_refused(evict_case):
    """Products, norms and cosines do not change in an orthogonal basis; rotations do."""
    rotated = Loki(layout="rotated", rank=4)
    if evict_case.evict.moves_keys:
        with pytest.raises(PolicyError, match="stores keys in another basis"):
            evict_case.driven(SHAPE, select=rotated, capacity=CAPACITY)
        return
    rows = random_rows(SHAPE, SEQ, batch=2, q_len=SEQ, seed=9)
    plain = evict_case.driven(SHAPE, capacity=CAPACITY)
    turned = evict_case.driven(SHAPE, select=rotated, capacity=CAPACITY)
    plain.prompt(*rows)
    turned.prompt(*rows)
    assert turned.positions() == plain.positions()
