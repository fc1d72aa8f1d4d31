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

from dataclasses import dataclass
from typing import ClassVar, Final, Literal, final

import torch
from torch import Tensor

from loki_attn.basis import LayerBasis
from loki_attn.cache import KEY, LayerCache, LeadFormat
from loki_attn.errors import PolicyError, unknown_name
from loki_attn.select.base import Select, Selector, map_query
from loki_attn.tiles import CODE_KINDS, Kind, tile_dtype
from loki_attn.types import LayerShape, Lead

LEAD: Final = "lead"
LEAD_SCALE: Final = "lead_scale"
_PLANE_DTYPES: Final[tuple[Kind, ...]] = ("int8", "int4", "bf16", "fp32")
_BITS: Final[dict[Kind, int]] = {"int8": 8, "int4": 4}
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
        _require_rank(self.rank)
        if self.layout not in _LAYOUTS:
            raise unknown_name("layout", self.layout, _LAYOUTS)
        if self.plane_dtype not in _PLANE_DTYPES:
            raise unknown_name("plane_dtype", self.plane_dtype, _PLANE_DTYPES)

    def coordinates(self, head_dim: int) -> int:
        """Return the rank in coordinates, for keys of `head_dim` elements."""
        if self.rank is None:
            return min(head_dim, max(_LEAST_RANK, head_dim // 4))
        return max(1, round(self.rank * head_dim)) if isinstance(self.rank, float) else self.rank

    def bind(self, shape: LayerShape, basis: LayerBasis | None) -> Selector:
        """Bind to a layer with its basis."""
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
        if rank > shape.head_dim:
            raise PolicyError(f"rank={rank} is above head_dim={shape.head_dim}; lower it.")
        if self.layout == "planes":
            return _PlanesSelector(basis, rank, self.plane_dtype)
        if (basis.key_map - basis.query_map).abs().max() > _ORTHOGONAL_TOLERANCE:
            raise PolicyError(
                "layout='rotated' stores keys in the basis and needs an orthogonal one (pca, "
                "random, identity); use layout='planes' or fit kind='pca'."
            )
        return _RotatedSelector(basis, rank)


@final
class _PlanesSelector(Selector):
    """Rows untouched, beside tiles of their leading coordinates."""

    def __init__(self, basis: LayerBasis, rank: int, kind: Kind) -> None:
        self._key_map = basis.key_map[..., :rank].contiguous()
        self._query_map = basis.query_map[..., :rank].contiguous()
        self._kind = kind
        self._scales = LEAD_SCALE if kind in CODE_KINDS else None

    def planes(self, key: Tensor) -> dict[str, Tensor]:
        """Encode the leading coordinates of new keys."""
        lead = _map_keys(key, self.lead_format(key.device).key_map)
        if self._scales is None:
            return {LEAD: lead.to(tile_dtype(self._kind))}
        codes, scales = quantise_rows(lead, _BITS[self._kind])
        return {LEAD: codes, self._scales: scales}

    def tiled(self) -> dict[str, Kind]:
        """The lead plane."""
        return {LEAD: self._kind}

    def lead_format(self, device: torch.device) -> LeadFormat:
        """Its map, on the device where it is needed."""
        self._key_map = self._key_map.to(device)
        return LeadFormat(LEAD, self._scales, self._key_map)

    def lead(self, cache: LayerCache) -> Lead:
        """The lead plane and its scales."""
        tiles = cache.tiles(LEAD)
        scales = cache.plane(self._scales) if self._scales else None
        self._query_map = self._query_map.to(tiles.data.device)
        return Lead(tiles, scales, self._query_map)

    def score_bytes(self, cache: LayerCache) -> int:
        """The lead plane and its scales."""
        return cache.row_bytes(LEAD, *([self._scales] if self._scales else []))


@final
class _RotatedSelector(Selector):
    """Keys in the basis; their prefix is the lead."""

    def __init__(self, basis: LayerBasis, rank: int) -> None:
        self._key_map = basis.key_map.contiguous()
        self._query_map = basis.query_map.contiguous()
        self._lead_map = basis.query_map[..., :rank].contiguous()
        self._rank = rank

    def rows(self, key: Tensor) -> Tensor:
        """Keys in the basis, rounded to the model's dtype."""
        self._key_map = self._key_map.to(key.device)
        return _map_keys(key, self._key_map).to(key.dtype)

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


def _map_keys(key: Tensor, key_map: Tensor) -> Tensor:
    """[batch, kv_heads, tokens, head_dim] -> coordinates, float32 or wider."""
    wide = torch.promote_types(key.dtype, torch.float32)
    return key.to(wide) @ key_map.to(wide)


def _require_rank(rank: object) -> None:
    if rank is None or (type(rank) is int and rank >= 1):
        return
    if not isinstance(rank, float) or not 0 < rank < 1:
        raise PolicyError(
            "rank must be a whole number of coordinates >= 1, or a share of head_dim between 0 "
            f"and 1 as a float, got {rank!r}."
        )


def quantise_rows(rows: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
    """Quantise every row to codes with one scale.

    Args:
        rows: float [..., r].
        bits: 8 for codes in -127..127, 4 for codes in -7..7.

    Returns:
        int8 codes [..., r] and float16 scales [...]; codes * scale is within half a scale of the
        row (rows beyond the largest code * 65504 are clipped to it).
    """
    largest = 2 ** (bits - 1) - 1
    limit = torch.finfo(torch.float16)
    peak = rows.abs().amax(-1)
    scales = (peak / largest).clamp(min=limit.smallest_normal, max=limit.max).to(torch.float16)
    codes = torch.round(rows / scales.to(rows.dtype)[..., None])
    return codes.clamp(-largest, largest).to(torch.int8), scales
