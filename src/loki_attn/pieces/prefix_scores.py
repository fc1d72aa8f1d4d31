"""Prefix scores: what the last queries of a prompt attend to before their own rows, pooled."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from loki_attn.cache import LayerCache
from loki_attn.kernels import ops
from loki_attn.pieces.packing import Packing, real_rows
from loki_attn.pieces.queries import recent_queries, window_sums
from loki_attn.pieces.reduction import Reduction, over_group
from loki_attn.types import AttentionCall


def prefix_scores(
    cache: LayerCache,
    call: AttentionCall,
    valid: Tensor | None,
    *,
    window: int,
    kernel: int,
    pooling: Literal["avg", "max"],
    reduce: Reduction,
) -> Tensor:
    """Sum the last queries' attention per row, over the group, pooled (arXiv 2404.14469).

    Rows of the window itself, which stay in any case, are left out of the pooling: their own
    scores say nothing of the rows before them.

    Args:
        cache: The layer's rows and their recent queries, those of its last rows.
        call: Scaling, soft-cap, sink logits.
        valid: None, or bool [batch, kv_heads or 1, length]: rows that are no padding.
        window: Last queries that judge.
        kernel: Neighbours that are pooled, an odd number; 1 pools nothing.
        pooling: "avg" or "max".
        reduce: How the query heads of a group agree.

    Returns:
        float32 [batch, kv_heads, length].
    """
    received = window_sums(cache, call, valid, window=window)
    scores = over_group(received, cache.keys.shape[1], reduce)
    # Neighbours are real ones, wherever padding stands.
    packing = Packing.of(valid)
    packed = packing.pack(scores)
    real = packing.pack(real_rows(valid, scores.shape, scores.device))
    judges = ops().protect(real[:, :, None], 0, min(window, recent_queries(cache).shape[2]))
    prefix = real & ~judges[:, :, 0]
    pooled = pool_rows(packed.masked_fill(~prefix, 0.0), prefix.to(packed), kernel, pooling)
    return packing.unpack(torch.where(prefix, pooled, packed))


def pool_rows(scores: Tensor, real: Tensor, kernel: int, pooling: Literal["avg", "max"]) -> Tensor:
    """Pool scores over neighbours; neither the ends nor padding count.

    An average is over the rows that are there (`count_include_pad` is off), so a row is judged
    alike at the start of a prompt and behind the padding of a batch.

    Args:
        scores: float32 [batch, heads, length], 0 for padding.
        real: float32 [batch, heads, length]: 1 for rows, 0 for padding.
        kernel: An odd number of rows.
        pooling: "avg" or "max".

    Returns:
        float32 [batch, heads, length].
    """
    if kernel == 1 or scores.shape[-1] == 0:
        return scores
    pad = kernel // 2
    if pooling == "max":
        return functional.max_pool1d(scores, kernel, 1, pad)
    sums, counts = (
        functional.pad(rows, (pad, pad)).unfold(-1, kernel, 1).sum(-1) for rows in (scores, real)
    )
    return sums / counts.clamp(min=1)
