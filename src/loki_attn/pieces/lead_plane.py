"""The lead plane: a few coordinates of every key, in tiles beside rows that stay untouched."""

from typing import Final, final

import torch
from torch import Tensor

from loki_attn.cache import LayerCache
from loki_attn.row_format import LeadFormat
from loki_attn.tiles import CODE_KINDS, Kind, tile_dtype
from loki_attn.types import Lead

LEAD: Final = "lead"
LEAD_SCALE: Final = "lead_scale"
PLANE_DTYPES: Final[tuple[Kind, ...]] = ("int8", "int4", "bf16", "fp32")
_BITS: Final[dict[Kind, int]] = {"int8": 8, "int4": 4}


@final
class LeadPlane:
    """How keys become the rows of a lead plane, and how queries meet them.

    Args:
        key_map: float32 [kv_heads, head_dim, rank]: keys to coordinates.
        query_map: float32 [kv_heads, head_dim, rank]: queries to coordinates.
        kind: What a coordinate is stored as.
    """

    def __init__(self, key_map: Tensor, query_map: Tensor, kind: Kind) -> None:
        """Keep the maps; they move to the device where they are used."""
        self._key_map = key_map.contiguous()
        self._query_map = query_map.contiguous()
        self._kind = kind
        self._scales = LEAD_SCALE if kind in CODE_KINDS else None

    def narrowed(self, heads: Tensor) -> "LeadPlane":
        """Return the plane of some of the KV heads, int64 [kv_heads]."""
        return LeadPlane(
            self._key_map[heads.to(self._key_map.device)],
            self._query_map[heads.to(self._query_map.device)],
            self._kind,
        )

    def planes(self, key: Tensor) -> dict[str, Tensor]:
        """Encode the coordinates of keys [batch, kv_heads, tokens, head_dim]."""
        lead = map_keys(key, self.format(key.device).key_map)
        if self._scales is None:
            return {LEAD: lead.to(tile_dtype(self._kind))}
        codes, scales = quantise_rows(lead, _BITS[self._kind])
        return {LEAD: codes, self._scales: scales}

    def tiled(self) -> dict[str, Kind]:
        """Return which planes are tiles."""
        return {LEAD: self._kind}

    def format(self, device: torch.device) -> LeadFormat:
        """Return how keys become rows, with the map on this device."""
        self._key_map = self._key_map.to(device)
        return LeadFormat(LEAD, self._scales, self._key_map)

    def lead(self, cache: LayerCache) -> Lead:
        """Return the plane of a cache, with its scales and the map of the query."""
        tiles = cache.tiles(LEAD)
        scales = cache.plane(self._scales) if self._scales else None
        self._query_map = self._query_map.to(tiles.data.device)
        return Lead(tiles, scales, self._query_map)

    def row_bytes(self, cache: LayerCache) -> int:
        """Bytes of one row of one KV head, its scale included."""
        return cache.row_bytes(LEAD, *([self._scales] if self._scales else []))


def map_keys(key: Tensor, key_map: Tensor) -> Tensor:
    """Map keys to coordinates.

    Args:
        key: [batch, kv_heads, tokens, head_dim].
        key_map: float32 [kv_heads, head_dim, rank].

    Returns:
        [batch, kv_heads, tokens, rank], float32 or wider.
    """
    wide = torch.promote_types(key.dtype, torch.float32)
    return key.to(wide) @ key_map.to(wide)


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
