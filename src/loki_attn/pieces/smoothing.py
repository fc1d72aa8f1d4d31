"""Smoothing: a row is judged together with its neighbours, because clusters of rows matter."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional


def pool(scores: Tensor, kernel: int, how: Literal["avg", "max"]) -> Tensor:
    """Pool scores [batch, heads, length] over `kernel` neighbours, an odd number; 1 does nothing.

    Rows beyond the ends do not count: an average at the end is over fewer rows.
    """
    if kernel == 1:
        return scores
    pad = kernel // 2
    if how == "max":
        return functional.max_pool1d(scores, kernel, 1, pad)
    return functional.avg_pool1d(scores, kernel, 1, pad, count_include_pad=False)


def unit_scores(scores: Tensor, size: int, how: Literal["mean", "best_half"] = "mean") -> Tensor:
    """Judge every `size` consecutive rows as one: [batch, heads, length] -> the same shape.

    Args:
        scores: float32 [batch, heads, length]; the last unit may be short.
        size: Rows of a unit.
        how: The mean of a unit's scores, or of the better half of them (rounded up).
    """
    length = scores.shape[-1]
    short = -length % size
    padded = functional.pad(scores, (0, short), value=float("nan"))
    padded = padded.reshape(*scores.shape[:-1], -1, size)
    if how == "best_half":
        ranked = padded.nan_to_num(nan=float("-inf")).sort(-1, descending=True).values
        held = (~padded.isnan()).sum(-1, keepdim=True)
        best = torch.arange(size, device=scores.device) < (held + 1) // 2
        judged = ranked.masked_fill(~best, 0.0).sum(-1) / ((held[..., 0] + 1) // 2)
    else:
        judged = padded.nanmean(-1)
    return judged.repeat_interleave(size, -1)[..., :length]
