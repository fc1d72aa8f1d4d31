"""Reductions: from query heads to KV heads, and from KV heads to one judgement for a layer."""

from typing import Literal

from torch import Tensor

Reduction = Literal["mean", "max", "sum"]


def over_group(scores: Tensor, num_kv_heads: int, how: Reduction = "mean") -> Tensor:
    """Reduce scores of query heads [batch, heads, length] to [batch, kv_heads, length]."""
    batch, _, length = scores.shape
    grouped = scores.reshape(batch, num_kv_heads, -1, length)
    if how == "max":
        return grouped.amax(2)
    return grouped.mean(2) if how == "mean" else grouped.sum(2)


def over_layer(scores: Tensor, how: Reduction = "mean") -> Tensor:
    """Give all heads [batch, heads, length] the same scores: their mean, largest or sum."""
    if how == "max":
        one = scores.amax(1, keepdim=True)
    else:
        one = scores.mean(1, keepdim=True) if how == "mean" else scores.sum(1, keepdim=True)
    return one.expand_as(scores)
