"""The straight line: append, score, choose, attend. One layer, one forward, plain torch.

    k, v        --append-->  LayerCache: rows and side planes
    q, planes   --score--->  estimated logits   [batch, heads, q_len, seq]
    logits      --choose-->  Selection          [batch, kv_heads, k]
    q, rows     --attend-->  output             [batch, heads, q_len, head_dim]

This file is the documentation of a decode step and its end-to-end oracle; the integrations call
these functions. A backend may do a decode step in one kernel, and must then choose and return what
the line below does.
"""

from dataclasses import dataclass, replace
from typing import Final, final

import torch
from torch import Tensor

from loki_attn.basis import Basis
from loki_attn.budget import Budget
from loki_attn.cache import LayerCache
from loki_attn.kernels import ops
from loki_attn.policy import Policy
from loki_attn.select.base import Selector
from loki_attn.types import AttentionCall, GroupReduce, LayerShape, Selection

# Small enough that a block's logits stay in the processor's cache.
_QUERY_BLOCK: Final = 64


@final
@dataclass(frozen=True, kw_only=True)
class LayerPolicy:
    """A policy bound to one layer: its selector, its own budget, its way to agree in a group."""

    shape: LayerShape
    selector: Selector
    budget: Budget
    group_reduce: GroupReduce


def bind(policy: Policy, shape: LayerShape, num_layers: int, basis: Basis | None) -> LayerPolicy:
    """Bind a policy to one layer.

    Raises:
        PolicyError: If the method needs a basis that is missing or does not fit.
        BudgetError: If the budget names layers that the model has not.
    """
    layer_basis = basis.layer(shape.index) if basis and policy.select.needs_basis else None
    return LayerPolicy(
        shape=shape,
        selector=policy.select.bind(shape, layer_basis),
        budget=policy.budget.for_layer(shape.index, num_layers),
        group_reduce=policy.group_reduce,
    )


def dense(
    query: Tensor,
    cache: LayerCache,
    layer: LayerPolicy,
    call: AttentionCall,
    visible: Tensor | None,
) -> Tensor:
    """Dense attention over the cache, whatever space its rows are stored in."""
    rows_query = layer.selector.query_rows(query)
    return ops().dense(rows_query, cache.keys, cache.values, visible, call, causal=True)


def select(
    query: Tensor, cache: LayerCache, layer: LayerPolicy, call: AttentionCall, visible: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Score the rows and settle how many each query reads.

    Args:
        query: [batch, heads, q_len, head_dim], as the model made it.
        cache: The layer's rows.
        layer: The bound policy.
        call: What the model asks of the attention.
        visible: bool [batch or 1, 1, q_len, seq].

    Returns:
        What `ops().choose` needs: scores [batch, kv_heads or heads, q_len, seq], counts, forced.
    """
    budget, kernels, how = layer.budget, ops(), layer.group_reduce
    kv_heads = layer.shape.num_kv_heads
    forced = kernels.protect(visible, budget.sinks, budget.recents)
    logits = layer.selector.score(query, cache, call)
    if logits is None:
        scores = torch.arange(cache.length, device=query.device, dtype=torch.float32)
        scores = scores.expand(query.shape[0], kv_heads, query.shape[2], -1)
    else:
        scores = kernels.reduce_group(logits, kv_heads, how, visible, call)
    if budget.mass is None or logits is None:
        return scores, budget.counts(visible.sum(-1)), forced
    weights = scores
    if how != "softmax_sum" or logits.shape[1] == kv_heads:
        # Shares of the rows among themselves: sink logits, which are per query head, cancel.
        weights = kernels.estimated_weights(scores, visible, replace(call, sink_logits=None))
    counts = kernels.mass_counts(weights.masked_fill(~visible, 0.0), forced, budget.mass)
    return scores, budget.clamp(counts, visible.sum(-1)), forced


def decode(
    query: Tensor,
    cache: LayerCache,
    layer: LayerPolicy,
    call: AttentionCall,
    visible: Tensor | None = None,
) -> tuple[Tensor, Selection]:
    """One sparse decode step of one layer; the new row is already appended.

    Args:
        query: [batch, heads, 1, head_dim].
        cache: The layer's rows, the query's own included.
        layer: The bound policy.
        call: What the model asks of the attention.
        visible: None for all rows, or bool [batch or 1, 1, 1, seq].

    Returns:
        [batch, heads, 1, value_dim] in the query's dtype, and what was read.
    """
    rows_query = layer.selector.query_rows(query)
    at_once = _at_once(query, rows_query, cache, layer, call, visible)
    if at_once is not None:
        return at_once
    if visible is None:
        visible = torch.ones(1, 1, 1, cache.length, dtype=torch.bool, device=query.device)
    scores, counts, forced = select(query, cache, layer, call, visible)
    selection = ops().choose(scores, counts, visible, forced)
    return ops().attend(rows_query, cache.keys, cache.values, selection, call).output, selection


def _at_once(
    query: Tensor,
    rows_query: Tensor,
    cache: LayerCache,
    layer: LayerPolicy,
    call: AttentionCall,
    visible: Tensor | None,
) -> tuple[Tensor, Selection] | None:
    """The whole decode step in one kernel, where the method and the kernels have such a form."""
    lead = layer.selector.lead(cache)
    if lead is None:
        return None
    reading = layer.budget.reading(cache.length, visible)
    return ops().step(
        query,
        rows_query,
        cache.keys,
        cache.values,
        lead,
        reading,
        layer.group_reduce,
        call,
        visible,
    )


def every_query(
    query: Tensor,
    cache: LayerCache,
    layer: LayerPolicy,
    call: AttentionCall,
    visible: Tensor | None = None,
) -> Tensor:
    """Let each query row of a multi-token forward select for itself (evaluation; not faster).

    Args:
        query: [batch, heads, q_len, head_dim], the last q_len rows of the cache.
        cache: The layer's rows, the queries' own included.
        layer: The bound policy.
        call: What the model asks of the attention.
        visible: None for causal, or bool [batch or 1, 1, q_len, seq].

    Returns:
        [batch, heads, q_len, value_dim] in the query's dtype.
    """
    kernels = ops()
    if visible is None:
        visible = kernels.causal_mask(query.shape[2], cache.length, query.device)
    rows_query = layer.selector.query_rows(query)
    blocks = []
    for start in range(0, query.shape[2], _QUERY_BLOCK):
        block = slice(start, start + _QUERY_BLOCK)
        seen = visible[:, :, block]
        # No row behind the last visible one matters to this block.
        rows = cache.prefix(_last_visible(seen) + 1)
        seen = seen[..., : rows.length]
        scores, counts, forced = select(query[:, :, block], rows, layer, call, seen)
        mask = kernels.choose_mask(scores, counts, seen, forced)
        part = kernels.attend_masked(rows_query[:, :, block], rows.keys, rows.values, mask, call)
        blocks.append(part.output)
    return torch.cat(blocks, 2)


def _last_visible(visible: Tensor) -> int:
    """The last row that any query sees, 0 where none sees any."""
    seen = visible.flatten(0, 2).any(0)
    return int(seen.nonzero().max()) if bool(seen.any()) else 0
