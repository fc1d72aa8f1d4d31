"""Serving: one attention call of a layer, shard by shard, and what goes after it.

A layer whose heads hold different numbers of rows is a few ordinary caches; each answers its own
heads. What an eviction must learn from a call it learns here, and what it drops goes afterwards.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from loki_attn import attention
from loki_attn.attention import LayerPolicy
from loki_attn.cache import LayerCache
from loki_attn.evict.base import Attended
from loki_attn.eviction import LayerEviction, Turn, observe
from loki_attn.kernels import ops
from loki_attn.shards import LayerRows, Shard
from loki_attn.types import AttentionCall, Selection

How = Literal["dense", "decode", "every_query"]


@final
@dataclass(frozen=True, eq=False)
class Served:
    """What one shard did in one call.

    Attributes:
        shard: Its rows.
        layer: The policy of its heads.
        how: Whether it read everything, or chose for one token or for every query.
        selection: What a single token read, None for everything.
        scored: Whether rows were ranked, rather than a choice read again.
    """

    shard: Shard
    layer: LayerPolicy
    how: How
    selection: Selection | None = None
    scored: bool = False


def rows_for(layer: LayerPolicy, reserve_tokens: int = 0) -> LayerRows:
    """Return a layer without rows yet, which stores them as its policy wants them.

    Args:
        layer: The bound policy.
        reserve_tokens: Rows to allocate at the first append.
    """
    marks = {} if layer.eviction is None else layer.eviction.evictor.marks()
    cache = LayerCache(layer.selector, reserve_tokens=reserve_tokens, marks=marks)
    return LayerRows(cache, lambda heads: layer.of(heads).selector, layer.parts)


def serve(
    query: Tensor,
    turn: Turn,
    layer: LayerPolicy,
    call: AttentionCall,
    visible: Tensor | None,
    how: How,
    *,
    always: bool = False,
) -> tuple[Tensor, list[Served]]:
    """Answer one attention call; its rows are already appended.

    Args:
        query: [batch, heads, q_len, head_dim].
        turn: The layer's rows.
        layer: The bound policy.
        call: What the model asks of the attention.
        visible: None where query i sees itself and all tokens before it, or bool
            [batch or 1, 1, q_len, tokens seen].
        how: What to do where the budget is not the whole context.
        always: Select even there.

    Returns:
        [batch, heads, q_len, value_dim] in the query's dtype, and what every shard did.
    """
    turn.valid = None if visible is None else visible[:, 0, -1:]
    turn.call = call
    parts = list(_serve_shards(query, turn, layer, call, visible, how, always=always))
    done = [served for served, _ in parts]
    if len(parts) == 1:
        return parts[0][1], done
    whole = parts[0][1].new_empty(*query.shape[:3], parts[0][1].shape[3])
    for served, out in parts:
        served.shard.into_queries(out, whole, layer.shape.num_kv_heads)
    return whole, done


def _serve_shards(
    query: Tensor,
    turn: Turn,
    layer: LayerPolicy,
    call: AttentionCall,
    visible: Tensor | None,
    how: How,
    *,
    always: bool,
) -> Iterator[tuple[Served, Tensor]]:
    for shard in turn.rows:
        own = layer.of(shard.heads)
        asked = shard.of_queries(query, layer.shape.num_kv_heads)
        asks = _asks(call, shard, layer.shape.num_kv_heads)
        seen = None if visible is None else rows_of_tokens(shard, visible)
        whole = own.budget.is_dense(shard.cache.length) and not always
        todo: How = "dense" if whole else how
        yield _serve_shard(asked, shard, own, asks, seen, todo, layer.eviction, turn)


def _serve_shard(
    query: Tensor,
    shard: Shard,
    layer: LayerPolicy,
    call: AttentionCall,
    visible: Tensor | None,
    how: How,
    eviction: LayerEviction | None,
    turn: Turn,
) -> tuple[Served, Tensor]:
    """Answer one shard's heads, and let the eviction learn from it."""
    cache, selection, scored, weights = shard.cache, None, False, None
    weigh = eviction is not None and eviction.evictor.wants_weights and query.shape[2] == 1
    if how == "every_query":
        out = attention.every_query(query, cache, layer, call, visible)
    elif how == "dense":
        out, weights = _dense(query, cache, layer, call, visible, weigh=weigh)
    elif weigh or layer.reuse_above is not None:
        out, selection, logits = attention.decode_weighing(query, cache, layer, call, visible)
        scored = logits is not None
        if weigh and layer.estimates_mass:
            weights = _weights(logits, query, cache, call, visible)
    else:
        out, selection = attention.decode(query, cache, layer, call, visible)
        scored = True
    if eviction is not None:
        rows_query = layer.selector.query_rows(query)
        attended = Attended(query=rows_query, call=call, visible=visible, weights=weights)
        observe(eviction, turn, shard, attended)
    return Served(shard, layer, how, selection, scored), out


def rows_of_tokens(shard: Shard, visible: Tensor) -> Tensor:
    """What a shard's rows are of a mask over tokens.

    Args:
        shard: The rows.
        visible: bool [batch or 1, 1, q_len, tokens seen].

    Returns:
        bool [batch or 1, 1, q_len, rows], or [batch, kv_heads, q_len, rows] where rows went.
    """
    own, cache = shard.of_rows(visible), shard.cache
    if cache.length == cache.seen:
        return own
    places = cache.positions.long()[:, :, None]
    spread = own.expand(places.shape[0], places.shape[1], -1, -1)
    return spread.gather(3, places.expand(-1, -1, spread.shape[2], -1))


def _dense(
    query: Tensor,
    cache: LayerCache,
    layer: LayerPolicy,
    call: AttentionCall,
    visible: Tensor | None,
    *,
    weigh: bool,
) -> tuple[Tensor, Tensor | None]:
    """Read everything; with the rows' weights where they come at no cost."""
    if not weigh or (visible is not None and visible.shape[1] > 1):
        return attention.dense(query, cache, layer, call, visible), None
    rows_query = layer.selector.query_rows(query)
    return ops().dense_column_sums(rows_query, cache.keys, cache.values, visible, call)


def _weights(
    logits: Tensor | None,
    query: Tensor,
    cache: LayerCache,
    call: AttentionCall,
    visible: Tensor | None,
) -> Tensor | None:
    """The rows' estimated weights, summed over the group: float32 [batch, kv_heads, length]."""
    if logits is None:
        return None
    if visible is not None and visible.shape[1] > 1:
        visible = visible.repeat_interleave(query.shape[1] // visible.shape[1], 1)
    weights = ops().estimated_weights(logits, visible, call)
    batch, kv_heads = cache.keys.shape[:2]
    return weights.view(batch, kv_heads, -1, cache.length).sum(2)


def _asks(call: AttentionCall, shard: Shard, num_kv_heads: int) -> AttentionCall:
    """The call as a shard's heads ask it: sink logits are per query head."""
    if call.sink_logits is None or shard.heads is None:
        return call
    sinks = call.sink_logits.view(num_kv_heads, -1)[shard.heads.to(call.sink_logits.device)]
    return AttentionCall(
        scaling=call.scaling, softcap=call.softcap, sink_logits=torch.flatten(sinks)
    )
