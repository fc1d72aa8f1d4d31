"""Loki: rank the rows in a few leading coordinates of a calibrated basis, attend exactly.

Paper: Loki: Low-rank Keys for Efficient Sparse Attention
arXiv: 2406.02542
What it does: maps keys and queries by a basis per layer and KV head that keeps every logit, ranks
    all rows with the first `rank` coordinates, attends to the best k with all coordinates.
What we do differently: a basis mixed of query-and-key balanced and PCA columns, fitted per KV
    head after RoPE; one choice per group of query heads; sinks and recents that are always read;
    and a quantised lead plane beside untouched rows. `layout="rotated"` with an orthogonal basis
    is the published form.
Bytes read per decode step: per KV head, T * (rank + 2) with an int8 plane (T * rank * 2 in bf16,
    T * rank * b as the prefix of rotated rows), and k * (head_dim + value_dim) * b.
State per token: rank + 2 bytes per KV head with an int8 plane, 2 * rank in bf16, 0 when rotated.
"""

from dataclasses import dataclass
from typing import ClassVar, Final, Literal, final

import torch
from torch import Tensor

from loki_attn.basis import LayerBasis
from loki_attn.cache import KEY, LayerCache
from loki_attn.errors import PolicyError, unknown_name
from loki_attn.kernels import ops
from loki_attn.select.base import Select, Selector
from loki_attn.types import AttentionCall, LayerShape

LEAD: Final = "lead"
LEAD_SCALE: Final = "lead_scale"
_PLANE_DTYPES: Final = {"int8": torch.int8, "bf16": torch.bfloat16, "fp32": torch.float32}
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
        plane_dtype: "int8" with a float16 scale per row, "bf16" or "fp32"; for "planes" only.
    """

    method: ClassVar[str] = "loki"
    needs_basis: ClassVar[bool] = True
    rank: int | float | None = None
    layout: Literal["planes", "rotated"] = "planes"
    plane_dtype: Literal["int8", "bf16", "fp32"] = "int8"

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
            return _PlanesSelector(basis, rank, _PLANE_DTYPES[self.plane_dtype])
        if (basis.key_map - basis.query_map).abs().max() > _ORTHOGONAL_TOLERANCE:
            raise PolicyError(
                "layout='rotated' stores keys in the basis and needs an orthogonal one (pca, "
                "random, identity); use layout='planes' or fit kind='pca'."
            )
        return _RotatedSelector(basis, rank)


class _Mapped(Selector):
    """What both layouts share: the maps of the basis, on the device where they are needed."""

    def __init__(self, basis: LayerBasis, columns: int) -> None:
        self._key_map = basis.key_map[..., :columns].contiguous()
        self._query_map = basis.query_map[..., :columns].contiguous()

    def _map_keys(self, key: Tensor) -> Tensor:
        """[batch, kv_heads, tokens, head_dim] -> coordinates, float32 or wider."""
        wide = torch.promote_types(key.dtype, torch.float32)
        self._key_map = self._key_map.to(key.device)
        return key.to(wide) @ self._key_map.to(wide)

    def _map_query(self, query: Tensor) -> Tensor:
        """[batch, heads, q_len, head_dim] -> coordinates alike, each head with its group's."""
        wide = torch.promote_types(query.dtype, torch.float32)
        self._query_map = self._query_map.to(query.device)
        batch, heads, q_len, dim = query.shape
        kv_heads = self._query_map.shape[0]
        rows = query.to(wide).reshape(batch, kv_heads, -1, dim)
        return (rows @ self._query_map.to(wide)).reshape(batch, heads, q_len, -1)


@final
class _PlanesSelector(_Mapped):
    def __init__(self, basis: LayerBasis, rank: int, dtype: torch.dtype) -> None:
        super().__init__(basis, rank)
        self._dtype = dtype

    def planes(self, key: Tensor) -> dict[str, Tensor]:
        """Encode the leading coordinates of new keys."""
        lead = self._map_keys(key)
        if self._dtype != torch.int8:
            return {LEAD: lead.to(self._dtype)}
        codes, scales = quantise_rows(lead)
        return {LEAD: codes, LEAD_SCALE: scales}

    def score(self, query: Tensor, cache: LayerCache, call: AttentionCall) -> Tensor:
        """Logits from the lead plane."""
        scales = cache.plane(LEAD_SCALE) if self._dtype == torch.int8 else None
        return ops().score(self._map_query(query), cache.plane(LEAD), scales, call)

    def score_bytes(self, cache: LayerCache) -> int:
        """The lead plane and its scales."""
        names = (LEAD, LEAD_SCALE) if self._dtype == torch.int8 else (LEAD,)
        return cache.row_bytes(*names)


@final
class _RotatedSelector(_Mapped):
    def __init__(self, basis: LayerBasis, rank: int) -> None:
        super().__init__(basis, basis.key_map.shape[-1])
        self._rank = rank

    def rows(self, key: Tensor) -> Tensor:
        """Keys in the basis, rounded to the model's dtype."""
        return self._map_keys(key).to(key.dtype)

    def query_rows(self, query: Tensor) -> Tensor:
        """The query in the basis."""
        return self._map_query(query).to(query.dtype)

    def score(self, query: Tensor, cache: LayerCache, call: AttentionCall) -> Tensor:
        """Logits from the prefix of the stored rows."""
        lead = self._map_query(query)[..., : self._rank]
        return ops().score(lead, cache.keys[..., : self._rank], None, call)

    def score_bytes(self, cache: LayerCache) -> int:
        """The prefix of a key row."""
        return cache.row_bytes(KEY) * self._rank // cache.keys.shape[3]


def _require_rank(rank: object) -> None:
    if rank is None or (type(rank) is int and rank >= 1):
        return
    if not isinstance(rank, float) or not 0 < rank < 1:
        raise PolicyError(
            "rank must be a whole number of coordinates >= 1, or a share of head_dim between 0 "
            f"and 1 as a float, got {rank!r}."
        )


def quantise_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise every row to int8 with one scale.

    Args:
        rows: float [..., r].

    Returns:
        int8 codes [..., r] in -127..127 and float16 scales [...]; codes * scale is within half a
        scale of the row (rows beyond float16's range are clipped to 127 * 65504).
    """
    limit = torch.finfo(torch.float16)
    peak = rows.abs().amax(-1)
    scales = (peak / 127).clamp(min=limit.smallest_normal, max=limit.max).to(torch.float16)
    codes = torch.round(rows / scales.to(rows.dtype)[..., None])
    return codes.clamp(-127, 127).to(torch.int8), scales
