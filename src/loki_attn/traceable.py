"""Attention in plain torch that a compiler can look into, and that reads no number on the host.

What stands in for kernels where none serves: inside compiled models, and while a graph is captured,
when nobody may wait for the device. Eagerly, `kernels.ops()` is the one to use.
"""

import torch
from torch import Tensor
from torch.nn import functional

from loki_attn.kernels import ops
from loki_attn.select.base import map_query
from loki_attn.tiles import Tiles
from loki_attn.types import AttentionCall, GroupReduce, Lead


def dense(
    query: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None, call: AttentionCall
) -> Tensor:
    """Dense attention that a compiler can look into; eagerly, `ops().dense` is the one to use.

    Args:
        query: [batch, heads, q_len, head_dim].
        keys: [batch, kv_heads, T, head_dim].
        values: [batch, kv_heads, T, value_dim]; rows that are hidden must be finite.
        visible: bool [batch or 1, 1, q_len, T], or None where query i sees rows 0 to i.
        call: Scaling, soft-cap, sink logits.

    Returns:
        [batch, heads, q_len, value_dim] in the query's dtype.
    """
    if call.softcap is None and call.sink_logits is None:
        out = functional.scaled_dot_product_attention(
            query,
            keys,
            values,
            attn_mask=visible,
            is_causal=visible is None,
            scale=call.scaling,
            enable_gqa=query.shape[1] != keys.shape[1],
        )
    else:
        out = _dense_by_hand(query, keys, values, visible, call)
    return out if visible is None else out.masked_fill(~visible.any(-1, keepdim=True), 0.0)


def _dense_by_hand(
    query: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None, call: AttentionCall
) -> Tensor:
    """What the fused kernel of torch cannot express."""
    batch, heads, q_len, dim = query.shape
    kv_heads, seq = keys.shape[1], keys.shape[2]
    wide = torch.promote_types(query.dtype, torch.float32)
    grouped = query.to(wide).reshape(batch, kv_heads, -1, dim)
    logits = (grouped @ keys.to(wide).mT).view(batch, heads, q_len, seq) * call.scaling
    if call.softcap is not None:
        logits = torch.tanh(logits / call.softcap) * call.softcap
    if visible is None:
        visible = torch.ones(q_len, seq, dtype=torch.bool, device=query.device).tril()
    logits = logits.masked_fill(~visible, float("-inf"))
    if call.sink_logits is not None:
        sinks = call.sink_logits.to(wide)[None, :, None, None].expand(batch, -1, q_len, 1)
        logits = torch.cat([logits, sinks], -1)
    weights = logits.softmax(-1)[..., :seq].nan_to_num(0.0)
    out = weights.reshape(batch, kv_heads, -1, seq) @ values.to(wide)
    return out.view(batch, heads, q_len, -1).to(query.dtype)


def scores_of(
    query: Tensor,
    lead: Lead,
    visible: Tensor,
    capacity: int,
    how: GroupReduce,
    kv_heads: int,
    call: AttentionCall,
) -> Tensor:
    """Scores of every slot, for the backends that have no fused step."""
    if lead.plane is None:
        recency = torch.arange(capacity, device=query.device, dtype=torch.float32)
        return recency.expand(query.shape[0], kv_heads, 1, -1)
    rank = lead.plane.rank if isinstance(lead.plane, Tiles) else lead.plane.shape[3]
    mapped = query[..., :rank] if lead.query_map is None else map_query(query, lead.query_map)
    logits = ops().score(mapped, lead.plane, lead.scales, call)
    return ops().reduce_group(logits, kv_heads, how, visible, call)


def best_rows(scores: Tensor, counts: Tensor, visible: Tensor, forced: Tensor, most: int) -> Tensor:
    """The rows that `ops().choose` would name, by ops that read no number on the host.

    Args:
        scores: float32 [batch, choosers, capacity]; NaN ranks last among the visible.
        counts: int64 [batch or 1], at most `most` and the visible rows.
        visible: bool [batch or 1, 1, capacity].
        forced: bool alike: rows that come first.
        most: Width of the result.

    Returns:
        int64 [batch, choosers, most]: rows, best first, ties in their order; -1 beyond the count.
    """
    lowest = torch.finfo(scores.dtype).min
    place = torch.where(forced, float("inf"), 0.0).masked_fill(~visible, float("-inf"))
    ranked = torch.nan_to_num(scores, nan=lowest, posinf=-lowest, neginf=lowest) + place
    order = ranked.sort(dim=-1, descending=True, stable=True).indices[..., :most]
    slots = torch.arange(order.shape[-1], device=order.device)
    return order.masked_fill(slots >= counts[:, None, None], -1)


def attend_rows(
    query: Tensor, keys: Tensor, values: Tensor, indices: Tensor, call: AttentionCall
) -> Tensor:
    """Exact attention to the rows at `indices` [batch, choosers, most], -1 for none."""
    batch, choosers = indices.shape[:2]
    used, rows = indices >= 0, indices.clamp(min=0)
    first = torch.arange(batch, device=rows.device)[:, None, None]
    share = choosers // keys.shape[1]
    head = torch.arange(choosers, device=rows.device)[None, :, None] // share
    seen = used[:, :, None].repeat_interleave(query.shape[1] // choosers, 1)
    return _dense_by_hand(query, keys[first, head, rows], values[first, head, rows], seen, call)
