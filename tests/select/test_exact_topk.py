"""Exact top-k: the upper bound of every ranking."""

import pytest
import torch

from loki_attn import attention
from loki_attn.budget import Budget
from loki_attn.cache import LayerCache
from loki_attn.policy import Policy
from loki_attn.select.exact_topk import ExactTopK
from loki_attn.testing import layer_shape, plain_weights, random_rows
from loki_attn.types import AttentionCall

SHAPE = layer_shape(6, 2, 32)
CALL = AttentionCall(scaling=32**-0.5)


def decode(how, query, key, value, call=CALL, **amount):
    policy = Policy(select=ExactTopK(), budget=Budget(**amount), group_reduce=how)
    layer = attention.bind(policy, SHAPE, 1, None)
    cache = LayerCache(layer.selector)
    cache.append(key, value)
    return attention.decode(query, cache, layer, call)[1].indices


@pytest.mark.parametrize("how", ["none", "max", "softmax_sum"])
def test_it_reads_the_rows_with_the_largest_weights(how):
    query, key, value = (t.double() for t in random_rows(SHAPE, 60, batch=2))
    weights = plain_weights(query, key, None, CALL)[:, :, 0]
    logits = (query @ key.repeat_interleave(3, 1).mT)[:, :, 0]
    expected = {
        "none": weights,
        "max": logits.unflatten(1, (2, 3)).amax(2),
        "softmax_sum": weights.unflatten(1, (2, 3)).sum(2),
    }[how]
    best = expected.topk(9).indices.sort(-1).values
    assert torch.equal(decode(how, query, key, value, top_k=9), best)


@pytest.mark.parametrize("how", ["none", "softmax_sum"])
def test_a_constant_shift_of_all_keys_changes_nothing(how):
    """q.mean is one number per query head; only comparing heads by raw logits would see it."""
    query, key, value = random_rows(SHAPE, 60)
    mine = decode(how, query, key, value, top_k=9)
    assert torch.equal(mine, decode(how, query, key + 0.75, value, top_k=9))


@pytest.mark.parametrize("how", ["none", "max"])
def test_positive_scaling_of_the_query_changes_nothing(how):
    query, key, value = random_rows(SHAPE, 60)
    mine = decode(how, query, key, value, top_k=9)
    assert torch.equal(mine, decode(how, query * 3.0, key, value, top_k=9))
    other = decode(how, query, key, value, AttentionCall(scaling=1.0), top_k=9)
    assert torch.equal(mine, other)


def test_softcap_keeps_the_order():
    query, key, value = random_rows(SHAPE, 60)
    capped = AttentionCall(scaling=CALL.scaling, softcap=5.0)
    mine = decode("none", query, key, value, top_k=9)
    assert torch.equal(mine, decode("none", query, key, value, capped, top_k=9))


def test_scoring_reads_whole_keys():
    layer = attention.bind(Policy(select=ExactTopK()), SHAPE, 1, None)
    cache = LayerCache(layer.selector)
    cache.append(*random_rows(SHAPE, 9, dtype=torch.bfloat16)[1:])
    assert layer.selector.score_bytes(cache) == 32 * 2


def test_the_keys_themselves_lead():
    layer = attention.bind(Policy(select=ExactTopK()), SHAPE, 1, None)
    cache = LayerCache(layer.selector)
    cache.append(*random_rows(SHAPE, 9)[1:])
    lead = layer.selector.lead(cache)
    assert lead.plane.data_ptr() == cache.keys.data_ptr()
    assert lead.plane.shape == cache.keys.shape
    assert (lead.scales, lead.query_map) == (None, None)
