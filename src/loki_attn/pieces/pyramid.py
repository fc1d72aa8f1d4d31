"""The pyramid: layers near the input keep more rows than those near the output."""

from functools import lru_cache
from typing import Final

import torch
from torch import Tensor

from loki_attn.pieces.sharing import apportion

_REMEMBERED: Final = 64


def pyramid_capacities(
    capacity: Tensor, protected: int, tokens: Tensor, num_layers: int, beta: float
) -> Tensor:
    """Share rows out over layers in an arithmetic progression (arXiv 2406.02069, section 3.2).

    With m = capacity - protected, layer 0 gets 2m - m / beta and the last one m / beta, and the
    protected rows besides. Where layer 0 would get more than there is, both ends move towards m.

    Args:
        capacity: int64 [batch]: rows per KV head, on average over layers.
        protected: Rows of it that every layer keeps in any case.
        tokens: int64 [batch]: tokens there are.
        num_layers: Layers of the model.
        beta: How steep it is, at least 1; 1 gives every layer the same.

    Returns:
        int64 [num_layers, batch], not increasing, whose sum over layers is num_layers * capacity.
    """
    rows = zip(capacity.tolist(), tokens.tolist(), strict=True)
    found = [_pyramid(mean, protected, most, num_layers, beta) for mean, most in rows]
    return torch.tensor(found, dtype=torch.int64, device=capacity.device).T


@lru_cache(maxsize=_REMEMBERED)  # every layer asks for the same
def _pyramid(
    capacity: int, protected: int, tokens: int, num_layers: int, beta: float
) -> tuple[int, ...]:
    mean = capacity - protected
    if mean <= 0 or tokens <= capacity:
        return (capacity,) * num_layers
    first = min(2 * mean - mean / beta, tokens - protected)
    ends = torch.tensor([first, 2 * mean - first], dtype=torch.float64)
    steps = torch.arange(num_layers, dtype=torch.float64) / max(num_layers - 1, 1)
    wishes = protected + (ends[0] + steps * (ends[1] - ends[0]) if num_layers > 1 else ends.mean())
    bounds = torch.full((1, num_layers), protected), torch.full((1, num_layers), tokens)
    shared = apportion(wishes.expand(1, num_layers), torch.tensor([capacity * num_layers]), *bounds)
    return tuple(shared[0].tolist())
