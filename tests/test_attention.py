"""The straight line beyond the contract: blocks, masks with gaps, dense thresholds, binding."""

from dataclasses import replace

import pytest
import torch

from loki_attn import attention
from loki_attn.cache import LayerCache
from loki_attn.errors import BudgetError, PolicyError
from loki_attn.kernels import reference
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


class FusedStep:
    """A backend with a fused step: the reference otherwise; it keeps what it was asked."""

    def __init__(self, answer):
        self.answer, self.asked = answer, []

    def __getattr__(self, name):
        return getattr(reference, name)

    def step(self, *asked):
        self.asked.append(asked)
        return self.answer


@pytest.mark.parametrize("masked", [False, True])
def test_a_fused_step_is_asked_first(monkeypatch, masked):
    query, key, value = random_rows(SHAPE, 40, batch=2)
    policy = preset("loki", top_k=9, sinks=1, recents=2, min_k=3)
    layer = attention.bind(policy, SHAPE, 1, tiny_basis(SHAPE))
    cache = filled(layer, key, value)
    visible = None
    if masked:
        visible = torch.ones(2, 1, 1, 40, dtype=torch.bool)
        visible[1, ..., :35] = False
    expected = attention.decode(query, cache, layer, CALL, visible)

    kernels = FusedStep(expected)
    monkeypatch.setattr(attention, "ops", lambda: kernels)
    got = attention.decode(query, cache, layer, CALL, visible)
    assert got is expected
    (asked,) = kernels.asked
    assert asked[0] is asked[1] is query
    assert asked[2].data_ptr() == cache.keys.data_ptr()
    assert asked[3].data_ptr() == cache.values.data_ptr()
    assert asked[4].plane.kind == "int8"
    assert (asked[5].sinks, asked[5].recents, asked[5].floor) == (1, 2, 3)
    assert asked[6:8] == ("softmax_sum", CALL)
    assert asked[8] is visible
    counts = asked[5].counts
    assert (counts.tolist() if masked else counts) == ([9, 5] if masked else 9)

    kernels.answer = None
    out, selection = attention.decode(query, cache, layer, CALL, visible)
    torch.testing.assert_close(out, expected[0])
    assert torch.equal(selection.indices, expected[1].indices)


def test_a_method_with_its_own_score_is_never_fused(monkeypatch):
    query, key, value = random_rows(SHAPE, 40)
    layer = attention.bind(preset("exact-topk", top_k=9, sinks=1, recents=2), SHAPE, 1, None)
    cache = filled(layer, key, value)
    kernels = FusedStep("taken")
    monkeypatch.setattr(attention, "ops", lambda: kernels)
    assert attention.decode(query, cache, layer, CALL) == "taken"
    monkeypatch.setattr(type(layer.selector), "lead", lambda self, cache: None)
    monkeypatch.setattr(type(layer.selector), "score", lambda self, query, cache, call: None)
    _, selection = attention.decode(query, cache, layer, CALL)
    assert selection.indices[0, 0].tolist() == [0, *range(32, 40)]


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
