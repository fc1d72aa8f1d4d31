"""The straight line beyond the contract: blocks, masks with gaps, dense thresholds, binding."""

from dataclasses import replace

import pytest
import torch

from loki_attn import attention
from loki_attn.cache import LayerCache
from loki_attn.errors import BudgetError, PolicyError
from loki_attn.policy import preset
from loki_attn.testing import layer_shape, plain_attention, random_rows, tiny_basis
from loki_attn.types import AttentionCall

SHAPE = layer_shape(4, 2, 16)
CALL = AttentionCall(scaling=0.25)


def filled(layer, key, value):
    cache = LayerCache(layer.selector)
    cache.append(key, value)
    return cache


@pytest.mark.parametrize("q_len", [1, 63, 64, 65, 200])
def test_blocks_of_queries_leave_no_seam(q_len):
    """Against one row at a time with an explicit mask, which knows no blocks."""
    query, key, value = random_rows(SHAPE, 220, q_len=q_len)
    layer = attention.bind(preset("exact-topk", top_k=9, sinks=1, recents=2), SHAPE, 1, None)
    cache = filled(layer, key, value)
    whole = attention.every_query(query, cache, layer, CALL)
    for row in {0, q_len // 2, q_len - 1}:
        seq = 220 - q_len + row + 1
        alone = attention.every_query(query[:, :, row : row + 1], cache.prefix(seq), layer, CALL)
        torch.testing.assert_close(whole[:, :, row : row + 1], alone)


def test_a_mask_with_gaps():
    """What no query may see is not read, wherever it lies; rows behind the last query count."""
    draw = torch.Generator().manual_seed(1)
    query, key, value = random_rows(SHAPE, 100, q_len=80, batch=2)
    visible = torch.rand(2, 1, 80, 100, generator=draw) < 0.3
    visible[:, :, 7] = False
    layer = attention.bind(preset("exact-topk", fraction=1.0), SHAPE, 1, None)
    cache = filled(layer, key, value)
    out = attention.every_query(query, cache, layer, CALL, visible)
    torch.testing.assert_close(out, plain_attention(query, key, value, visible, CALL))
    torch.testing.assert_close(attention.dense(query, cache, layer, CALL, visible), out)


def test_nothing_visible_at_all():
    query, key, value = random_rows(SHAPE, 5, q_len=3)
    layer = attention.bind(preset("exact-topk", top_k=4, sinks=0), SHAPE, 1, None)
    visible = torch.zeros(1, 1, 3, 5, dtype=torch.bool)
    out = attention.every_query(query, filled(layer, key, value), layer, CALL, visible)
    assert bool((out == 0).all())


@pytest.mark.parametrize("special", [float("-inf"), 1e-42, 1e30])
def test_strange_keys(special):
    """Logits of -inf, denormal or huge: still finite output, still a full choice."""
    query, key, value = random_rows(SHAPE, 40)
    query = query.abs()
    key[:, :, 5:9] = special
    layer = attention.bind(preset("exact-topk", top_k=8, sinks=1), SHAPE, 1, None)
    out, selection = attention.decode(query, filled(layer, key, value), layer, CALL)
    assert bool(torch.isfinite(out).all())
    assert bool((selection.counts == 8).all())


def test_binding_looks_up_the_layer():
    policy = preset("exact-topk", top_k=200, per_layer=(200, 300), dense_layers=(0,))
    first, second = (
        attention.bind(policy, replace(SHAPE, index=index), 2, None) for index in range(2)
    )
    assert first.budget.reads_everything
    assert second.budget.top_k == 300
    with pytest.raises(BudgetError, match="2 amounts for 3 layers"):
        attention.bind(policy, SHAPE, 3, None)


def test_binding_takes_the_layer_of_the_basis():
    with pytest.raises(PolicyError, match="needs a basis for layer 0"):
        attention.bind(preset("loki"), SHAPE, 1, None)
    assert attention.bind(preset("loki"), SHAPE, 1, tiny_basis(SHAPE)).group_reduce == "softmax_sum"
    # A method without a basis ignores one, even of another model.
    attention.bind(preset("exact-topk"), SHAPE, 1, tiny_basis(layer_shape(2, 1, 8)))
