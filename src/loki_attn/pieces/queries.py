"""Recent queries: remembered beside the rows, and what the rows receive of their attention."""

from typing import Final, Literal

import torch
from torch import Tensor

from loki_attn.cache import LayerCache
from loki_attn.kernels import ops
from loki_attn.types import AttentionCall

QUERIES: Final = "recent_queries"


def remember_queries(cache: LayerCache, query: Tensor, window: int) -> None:
    """Keep the last `window` queries in the cache's memory, across forwards.

    Args:
        cache: The layer's rows; its memory gets [batch, kv_heads, group, up to window, head_dim].
        query: [batch, heads, q_len, head_dim] in the space of the stored key rows.
        window: How many are kept.
    """
    last = query[:, :, -window:]
    new = last.reshape(last.shape[0], cache.keys.shape[1], -1, *last.shape[2:])
    held = cache.memory.get(QUERIES)
    if held is not None and new.shape[3] < window:
        new = torch.cat([held[:, :, :, new.shape[3] - window :], new], 3)
    # A copy: a view would keep the whole forward's queries alive.
    cache.memory[QUERIES] = new.clone()


def recent_queries(cache: LayerCache) -> Tensor:
    """The remembered queries as [batch, heads, count, head_dim]; those of the last rows."""
    return cache.memory[QUERIES].flatten(1, 2)


def window_mask(cache: LayerCache, count: int, valid: Tensor | None) -> Tensor | None:
    """What the last `count` queries see: None, or bool [batch, kv_heads or 1, count, length]."""
    if valid is None:
        return None
    causal = ops().causal_mask(count, cache.length, valid.device)
    return causal & valid[:, :, None]


def window_sums(
    cache: LayerCache,
    call: AttentionCall,
    valid: Tensor | None,
    how: Literal["sum", "max"] = "sum",
) -> Tensor:
    """What every row receives of the remembered queries' attention (arXiv 2404.14469, section 4).

    The queries are those of the last rows, which must not have been evicted.

    Args:
        cache: The layer's rows and their recent queries.
        call: Scaling, soft-cap, sink logits.
        valid: None, or bool [batch, kv_heads or 1, length]: rows that are no padding.
        how: Sum or maximum over the queries.

    Returns:
        float32 [batch, heads, length], per query head.
    """
    query = recent_queries(cache)
    query = query[:, :, -cache.length :]
    seen = window_mask(cache, query.shape[2], valid)
    return ops().column_sums(query, cache.keys, seen, call, how=how)
