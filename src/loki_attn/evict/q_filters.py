"""Q-Filters: keep the rows whose keys lie along the direction that queries share.

Paper: Q-Filters: Leveraging QK Geometry for Efficient KV Cache Compression
arXiv: 2503.02812
What it does: queries of a head lie to one side along one direction, the leading singular direction
    of a calibration text's queries; a key's coordinate along it estimates the attention that it
    will get of queries to come, and the rows with the largest stay.
What we do differently: one direction per KV head, of all queries of its group together. Its sign is
    that of the mean query, so larger is better; with the opposite sign the same is written as -k.f.
    Keys that are stored in a basis are refused: the filter is for keys as the model makes them.
Bytes read per decode step: per KV head, capacity * (head_dim + value_dim) * b.
State per token: none; per KV head and layer, head_dim * 4 bytes of the profile.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, final

import torch
from torch import Tensor

from loki_attn.cache import LayerCache
from loki_attn.errors import InputError, PolicyError
from loki_attn.evict.base import Evict, Evictor, Needs, Place
from loki_attn.types import AttentionCall

PRESETS: Final = {
    "q-filters": {
        "select": {"method": "dense"},
        "evict": {"method": "q_filters"},
        "keep": {"capacity": 2048},
    }
}
FILTER: Final = "query_filter"


@final
@dataclass(frozen=True, kw_only=True)
class QFilters(Evict):
    """Score by the coordinate of the key along the direction of the queries."""

    method: ClassVar[str] = "q_filters"
    needs: ClassVar[Needs] = "a profile"
    moves_keys: ClassVar[bool] = True
    needs_profile: ClassVar[bool] = True

    @classmethod
    def calibrator(cls) -> "FilterCalibrator":
        """Return what makes the profile."""
        return FilterCalibrator()

    def bind(self, place: Place) -> Evictor:
        """Bind to a layer.

        Raises:
            PolicyError: If there is no profile with the layer's filters, or they do not fit.
        """
        if place.profile is None or FILTER not in place.profile:
            raise PolicyError(
                f"Q-Filters need a profile with {FILTER!r}; make one with "
                "`loki-attn profile --method q_filters`."
            )
        filters, shape = place.profile[FILTER], place.shape
        if tuple(filters.shape) != (shape.num_kv_heads, shape.head_dim):
            raise PolicyError(
                f"Layer {shape.index} has {shape.num_kv_heads} KV heads of {shape.head_dim}, but "
                f"the profile's filters are {tuple(filters.shape)}; it is of another model."
            )
        return _QFilters(filters)


@final
class _QFilters(Evictor):
    def __init__(self, filters: Tensor) -> None:
        self._filters = filters

    def scores(self, cache: LayerCache, call: AttentionCall, valid: Tensor | None) -> Tensor:
        """Coordinate of every key along its head's filter."""
        del call, valid
        filters = self._filters.to(cache.keys.device, torch.float32)
        return torch.matmul(cache.keys.float(), filters[None, :, :, None])[..., 0]

    def narrowed(self, heads: Tensor) -> Evictor:
        """The same, with the filters of these KV heads."""
        return _QFilters(self._filters[heads.to(self._filters.device)])


@final
@dataclass
class FilterCalibrator:
    """A calibrator: sums the queries of every KV head, and their squares, over windows of text.

    Attributes:
        squares: Per layer, float64 [kv_heads, head_dim, head_dim].
        sums: Per layer, float64 [kv_heads, head_dim].
    """

    squares: dict[int, Tensor] = field(default_factory=dict)
    sums: dict[int, Tensor] = field(default_factory=dict)

    @property
    def settings(self) -> Mapping[str, Any]:
        """There are none."""
        return {}

    def observe(self, layer_index: int, query: Tensor, key: Tensor) -> None:
        """Add the queries of one layer.

        Args:
            layer_index: The layer.
            query: [batch, heads, tokens, head_dim], after RoPE.
            key: [batch, kv_heads, tokens, head_dim], after RoPE; only its heads count.
        """
        kv_heads, dim = key.shape[1], query.shape[3]
        grouped = query.double().reshape(query.shape[0], kv_heads, -1, dim)
        rows = grouped.transpose(0, 1).reshape(kv_heads, -1, dim)
        self.squares[layer_index] = self.squares.get(layer_index, 0) + rows.mT @ rows
        self.sums[layer_index] = self.sums.get(layer_index, 0) + rows.sum(1)

    def finish(self) -> dict[int, dict[str, Tensor]]:
        """Return per layer the filters, float32 [kv_heads, head_dim], of length 1.

        Raises:
            InputError: If nothing was observed.
        """
        if not self.squares:
            raise InputError("Q-Filters learn from queries, and none were observed; give text.")
        return {i: {FILTER: _directions(s, self.sums[i])} for i, s in self.squares.items()}


def _directions(squares: Tensor, sums: Tensor) -> Tensor:
    """Leading directions of the queries, to the side where their mean lies."""
    leading = torch.linalg.eigh(squares).eigenvectors[..., -1]
    along = (leading * sums).sum(-1, keepdim=True)
    # A mean of exactly 0 has no side; keep the sign that there is.
    side = torch.where(along < 0, -1.0, 1.0)
    directions: Tensor = (leading * side).float().cpu()
    return directions
