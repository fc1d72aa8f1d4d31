"""Moments: mean and spread of vectors, gathered piece by piece in a cache's memory."""

from typing import Final

import torch
from torch import Tensor

from loki_attn.cache import LayerCache

COUNT: Final = "moment_count"
MEAN: Final = "moment_mean"
SPREAD: Final = "moment_spread"


def add_moments(cache: LayerCache, rows: Tensor, counted: Tensor) -> None:
    """Add vectors to the mean and to the sum of squares about it.

    Pieces are merged about their own means (Chan, Golub and LeVeque 1983), because queries may have
    means that are large beside their spread.

    Args:
        cache: Its memory gets a count [batch, kv_heads, 1], a mean [batch, kv_heads, group, dim]
            and a spread [batch, kv_heads, group, dim, dim], all float32.
        rows: float32 [batch, kv_heads, group, n, dim].
        counted: bool [batch, kv_heads, n]: vectors that count; others may be NaN.
    """
    weight = counted[:, :, None, :, None]
    rows = torch.where(weight, rows, 0.0)
    new = counted.sum(-1, dtype=torch.float32)[..., None]
    mean = rows.sum(3) / new.clamp(min=1)[..., None]
    apart = torch.where(weight, rows - mean[:, :, :, None], 0.0)
    spread = apart.mT @ apart
    held = cache.memory.get(COUNT)
    if held is not None:
        total = (held + new).clamp(min=1)
        step = mean - cache.memory[MEAN]
        mean = cache.memory[MEAN] + step * (new / total)[..., None]
        between = step[..., None] * step[..., None, :]
        spread = spread + cache.memory[SPREAD] + between * (held * new / total)[..., None, None]
        new = held + new
    cache.memory[COUNT], cache.memory[MEAN], cache.memory[SPREAD] = new, mean, spread


def moments(cache: LayerCache) -> tuple[Tensor, Tensor]:
    """Return the mean [batch, kv_heads, group, dim] and covariance [..., dim, dim] so far."""
    count = cache.memory[COUNT].clamp(min=1)[..., None, None]
    return cache.memory[MEAN], cache.memory[SPREAD] / count
