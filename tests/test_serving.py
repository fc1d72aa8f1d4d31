"""Serving: shards answer their own heads, masks go by position, weights are those of logits."""

import pytest
import torch

from loki_attn import attention
from loki_attn.cache import LayerCache
from loki_attn.eviction import Turn
from loki_attn.policy import preset
from loki_attn.serving import rows_of_tokens, serve
from loki_attn.shards import LayerRows
from loki_attn.testing import layer_shape, plain_attention, plain_weights, random_rows
from loki_attn.types import AttentionCall, KeepSet

SHAPE = layer_shape(4, 2, 16)
SINKS = torch.tensor([0.5, -1.0, 2.0, 0.0])
CALL = AttentionCall(scaling=0.25, sink_logits=SINKS)
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def filled(policy, seq=40, batch=2, seed=1):
    layer = attention.bind(policy, SHAPE, 2, None)
    query, key, value = random_rows(SHAPE, seq, batch=batch, seed=seed)
    marks = layer.eviction.evictor.marks() if layer.eviction else None
    rows = LayerRows(
        LayerCache(layer.selector, marks=marks), lambda heads: layer.of(heads).selector
    )
    rows.append(key, value)
    return layer, rows, query, key, value


def ragged(rows):
    """Head 0 keeps rows 0 to 9, head 1 keeps every third."""
    indices = torch.full((2, 2, 14), -1)
    indices[:, 0, :10], indices[:, 1] = torch.arange(10), torch.arange(0, 40, 3)
    rows.keep(KeepSet(indices, torch.tensor([[10, 14]] * 2)))
    seen = torch.zeros(2, 4, 1, 40, dtype=torch.bool)
    seen[:, :2, :, :10], seen[:, 2:, :, ::3] = True, True
    return seen


@pytest.mark.parametrize("how", ["dense", "decode"])
def test_a_ragged_layer_attends_to_what_each_head_holds(how):
    layer, rows, query, key, value = filled(preset("exact-topk", top_k=40, min_k=1))
    seen = ragged(rows)
    out, done = serve(query, Turn(rows=rows), layer, CALL, None, how, always=True)
    expected = plain_attention(query.double(), key.double(), value.double(), seen, CALL)
    torch.testing.assert_close(out.double(), expected, **CLOSE)
    assert [served.shard.cache.length for served in done] == [10, 14]


def test_a_mask_over_tokens_finds_the_rows():
    """Batch row 1 has 6 tokens of padding; of what went, nobody asks."""
    layer, rows, query, key, value = filled(preset("exact-topk", top_k=40, min_k=1))
    seen = ragged(rows)
    visible = torch.ones(2, 1, 1, 40, dtype=torch.bool)
    visible[1, ..., :6] = False
    out, _ = serve(query, Turn(rows=rows), layer, CALL, visible, "decode", always=True)
    expected = plain_attention(query.double(), key.double(), value.double(), seen & visible, CALL)
    torch.testing.assert_close(out.double(), expected, **CLOSE)
    (first, second) = (rows_of_tokens(shard, visible) for shard in rows)
    assert first[1, 0, 0].tolist() == [False] * 6 + [True] * 4
    assert second[1, 0, 0].tolist() == [False] * 2 + [True] * 12


@pytest.mark.parametrize("name", ["dense", "exact-topk", "hata-random"])
def test_weights_are_those_of_logits(name):
    """HATA's scores are no logits: what H2O adds up must be attention all the same."""
    some = {} if name == "dense" else {"top_k": 6, "sinks": 0, "recents": 0, "min_k": 1}
    policy = preset(name, evict="h2o", capacity=60, **some)
    layer, rows, query, key, _ = filled(policy)
    serve(query, Turn(rows=rows), layer, CALL, None, "decode")
    weights = plain_weights(query.double(), key.double(), None, CALL)
    received = weights.view(2, 2, 2, 40).sum(2).float()
    (mark,) = layer.eviction.evictor.marks()
    torch.testing.assert_close(rows.whole.plane(mark), received, **CLOSE)


def test_padding_is_remembered_for_the_eviction_until_a_call_without_a_mask():
    layer, rows, query, _, _ = filled(preset("snapkv", capacity=60))
    turn, visible = Turn(rows=rows), torch.ones(2, 1, 1, 40, dtype=torch.bool)
    visible[0, ..., :3] = False
    serve(query, turn, layer, CALL, visible, "decode")
    assert turn.valid.sum(-1).tolist() == [[37], [40]]
    serve(query, turn, layer, CALL, None, "decode")
    assert turn.valid is None
