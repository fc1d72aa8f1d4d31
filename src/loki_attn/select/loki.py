"""Loki: rank the rows in a few leading coordinates of a calibrated basis, attend exactly.

Paper: Loki: Low-rank Keys for Efficient Sparse Attention
arXiv: 2406.02542
What it does: maps keys and queries by a basis per layer and KV head that keeps every logit, ranks
    all rows with the first `rank` coordinates, attends to the best k with all coordinates.
What we do differently: a basis mixed of query-and-key balanced and PCA columns, fitted per KV
    head after RoPE; one choice per group of query heads; sinks and recents that are always read;
    and a quantised lead plane beside untouched rows. `layout="rotated"` with an orthogonal basis
    is the published form.
Bytes read per decode step: per KV head, T * (rank + 2) with an int8 plane (T * (rank / 2 + 2) in
    int4, T * rank * 2 in bf16, T * rank * 4 in fp32, T * rank * b as the prefix of rotated rows),
    and k * (head_dim + value_dim) * b. A plane's bytes per row are rounded up to a multiple of 4.
State per token: rank + 2 bytes per KV head with an int8 plane, rank / 2 + 2 in int4, 2 * rank in
    bf16, 4 * rank in fp32, rounded up alike; 0 when rotated.
"""

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass
from typing import ClassVar, Final, Literal, final

import torch
from torch import Tensor

from loki_attn.basis import LayerBasis
from loki_attn.cache import KEY, LayerCache
from loki_attn.errors import PolicyError, unknown_name
from loki_attn.pieces import ranks
from loki_attn.pieces.lead_plane import LEAD as LEAD
from loki_attn.pieces.lead_plane import LEAD_SCALE as LEAD_SCALE
from loki_attn.pieces.lead_plane import PLANE_DTYPES, LeadPlane, map_keys
from loki_attn.pieces.lead_plane import quantise_rows as quantise_rows
from loki_attn.row_format import LeadFormat
from loki_attn.select.base import Select, Selector, map_query
from loki_attn.tiles import Kind
from loki_attn.types import LayerShape, Lead

_LAYOUTS: Final = ("planes", "rotated")
_ORTHOGONAL_TOLERANCE: Final = 1e-3
_LEAST_RANK: Final = 32


@final
@dataclass(frozen=True, kw_only=True)
class Loki(Select):
    """Rank by low-rank logits.

    Attributes:
        rank: Leading coordinates that rank the rows: a whole number of them, or a share of head_dim
            below 1 as a float; None for a quarter of head_dim, but at least 32.
        layout: "planes" keeps rows untouched beside a contiguous lead plane, "rotated" stores
            keys in the basis, their prefix being the lead.
        plane_dtype: "int8" or "int4" with a float16 scale per row, "bf16" or "fp32"; for "planes"
            only. A query is rounded like the plane to rank the rows, never to attend to them.
    """

    method: ClassVar[str] = "loki"
    needs_basis: ClassVar[bool] = True
    rank: int | float | None = None
    layout: Literal["planes", "rotated"] = "planes"
    plane_dtype: Literal["int8", "int4", "bf16", "fp32"] = "int8"

    def __post_init__(self) -> None:
        """Refuse values that no layer could serve."""
        if self.rank is not None:
            ranks.require_rank(self.rank)
        if self.layout not in _LAYOUTS:
            raise unknown_name("layout", self.layout, _LAYOUTS)
        if self.plane_dtype not in PLANE_DTYPES:
            raise unknown_name("plane_dtype", self.plane_dtype, PLANE_DTYPES)

    def coordinates(self, head_dim: int) -> int:
        """Return the rank in coordinates, for keys of `head_dim` elements."""
        if self.rank is None:
            return min(head_dim, max(_LEAST_RANK, head_dim // 4))
        return ranks.coordinates(self.rank, head_dim)

    def bind(
        self,
        shape: LayerShape,
        basis: LayerBasis | None = None,
        profile: Mapping[str, Tensor] | None = None,
    ) -> Selector:
        """Bind to a layer with its basis."""
        del profile
        if basis is None:
            raise PolicyError(
                f"Loki needs a basis for layer {shape.index}; calibrate one with "
                "`loki-attn calibrate` or loki_attn.calibrate(model, ...), and pass basis=."
            )
        expected = (shape.num_kv_heads, shape.head_dim, shape.head_dim)
        if tuple(basis.key_map.shape) != expected:
            raise PolicyError(
                f"Layer {shape.index} needs maps [kv_heads, head_dim, head_dim] = {expected}, "
                f"the basis has {tuple(basis.key_map.shape)}: it belongs to another model."
            )
        rank = self.coordinates(shape.head_dim)
        if self.layout == "planes":
            maps = (basis.key_map[..., :rank], basis.query_map[..., :rank])
            return _PlanesSelector(LeadPlane(*maps, self.plane_dtype))
        if (basis.key_map - basis.query_map).abs().max() > _ORTHOGONAL_TOLERANCE:
            raise PolicyError(
                "layout='rotated' stores keys in the basis and needs an orthogonal one (pca, "
                "random, identity); use layout='planes' or fit kind='pca'."
            )
        return _RotatedSelector(basis, rank)


@final
class _PlanesSelector(Selector):
    """Rows untouched, beside tiles of their leading coordinates."""

    def __init__(self, plane: LeadPlane) -> None:
        self._plane = plane

    def narrowed(self, heads: Tensor) -> Selector:
        """The plane of these heads."""
        return _PlanesSelector(self._plane.narrowed(heads))

    def planes(self, key: Tensor) -> dict[str, Tensor]:
        """Encode the leading coordinates of new keys."""
        return self._plane.planes(key)

    def tiled(self) -> dict[str, Kind]:
        """The lead plane."""
        return self._plane.tiled()

    def lead_format(self, device: torch.device) -> LeadFormat:
        """Its map, on the device where it is needed."""
        return self._plane.format(device)

    def lead(self, cache: LayerCache) -> Lead:
        """The lead plane and its scales."""
        return self._plane.lead(cache)

    def score_bytes(self, cache: LayerCache) -> int:
        """The lead plane and its scales."""
        return self._plane.row_bytes(cache)


@final
class _RotatedSelector(Selector):
    """Keys in the basis; their prefix is the lead."""

    def __init__(self, basis: LayerBasis, rank: int) -> None:
        self._key_map = basis.key_map.contiguous()
        self._query_map = basis.query_map.contiguous()
        self._lead_map = basis.query_map[..., :rank].contiguous()
        self._rank = rank

    def narrowed(self, heads: Tensor) -> Selector:
        """The maps of these heads."""
        other = copy(self)
        other._key_map = self._key_map[heads.to(self._key_map.device)]
        other._query_map = self._query_map[heads.to(self._query_map.device)]
        other._lead_map = self._lead_map[heads.to(self._lead_map.device)]
        return other

    def rows(self, key: Tensor) -> Tensor:
        """Keys in the basis, rounded to the model's dtype."""
        self._key_map = self._key_map.to(key.device)
        return map_keys(key, self._key_map).to(key.dtype)

    def query_rows(self, query: Tensor) -> Tensor:
        """The query in the basis."""
        self._query_map = self._query_map.to(query.device)
        return map_query(query, self._query_map).to(query.dtype)

    def lead(self, cache: LayerCache) -> Lead:
        """The prefix of the stored rows."""
        keys = cache.keys
        self._lead_map = self._lead_map.to(keys.device)
        return Lead(keys[..., : self._rank], None, self._lead_map)

    def score_bytes(self, cache: LayerCache) -> int:
        """The prefix of a key row."""
        return cache.row_bytes(KEY) * self._rank // cache.keys.shape[3]
