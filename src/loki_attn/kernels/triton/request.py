"""What a fused decode step is asked for, checked once."""

from dataclasses import dataclass
from typing import Final, final

import torch
from torch import Tensor

from loki_attn.kernels.backends import Unserved
from loki_attn.kernels.triton import device
from loki_attn.tiles import CODE_KINDS, TILE_ROWS, Tiles
from loki_attn.types import AttentionCall, GroupReduce, Lead

FLOATS: Final = {torch.float16, torch.bfloat16, torch.float32}
_MOST_GROUP: Final = 64
_MOST_DIM: Final = 256


@final
@dataclass(frozen=True, kw_only=True)
class Held:
    """Where the rows of a batch lie and how many each batch row holds.

    Attributes:
        keys: [batch, kv_heads, capacity, head_dim], or [pages, kv_heads, page_rows, head_dim].
        values: The same with value_dim.
        pages: int32 [batch, most_pages]: the pages of each batch row in order; None where rows do
            not lie in pages. The lead plane and its scales lie in the same pages.
        lengths: int32 or int64 [batch or 1] on the device: rows of each batch row; None where all
            rows count.
    """

    keys: Tensor
    values: Tensor
    pages: Tensor | None = None
    lengths: Tensor | None = None

    @property
    def page_rows(self) -> int:
        """Rows of a page; 0 without pages."""
        return 0 if self.pages is None else self.keys.shape[2]

    @property
    def capacity(self) -> int:
        """Rows that one batch row may hold."""
        return self.keys.shape[2] * (1 if self.pages is None else self.pages.shape[1])


def batch_of(query: Tensor, held: Held) -> int:
    """Batch rows; the sizes of everything must fit them.

    Raises:
        Unserved: If something does not fit.
    """
    batch, heads, q_len, dim = query.shape
    keys, values, pages = held.keys, held.values, held.pages
    known = keys.shape[0] if pages is None else pages.shape[0]
    if q_len != 1 or known != batch or keys.shape[:3] != values.shape[:3] or keys.shape[3] != dim:
        raise Unserved(
            f"queries {list(query.shape)} do not fit keys {list(keys.shape)} and values "
            f"{list(values.shape)}"
        )
    kv_heads = keys.shape[1]
    if kv_heads == 0 or heads % kv_heads or heads // kv_heads > _MOST_GROUP:
        raise Unserved(f"{heads} query heads cannot share {kv_heads} KV heads, {_MOST_GROUP} each")
    if max(dim, values.shape[3]) > _MOST_DIM:
        raise Unserved(f"rows of {max(dim, values.shape[3])} elements are longer than {_MOST_DIM}")
    if held.page_rows % TILE_ROWS:
        raise Unserved(f"pages hold whole tiles of {TILE_ROWS} rows, not {held.page_rows} rows")
    return batch


def served(*tensors: Tensor | None) -> None:
    """Refuse tensors that no kernel reads.

    Raises:
        Unserved: If a device or a dtype is not served, or the elements of a row lie apart.
    """
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.device.type not in device.device_types():
            wanted = device.device_types()[0]
            raise Unserved(f"it serves {wanted} tensors, not {tensor.device.type} ones")
        if tensor.dtype not in FLOATS:
            raise Unserved(f"it reads float16, bfloat16 and float32, not {tensor.dtype}")
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise Unserved("the elements of a row do not lie side by side")


def check_lead(lead: Lead, device: torch.device) -> None:
    """Refuse a lead that lies elsewhere, or otherwise than kernels read it.

    Raises:
        Unserved: If its plane, its scales or its map do.
    """
    plane = lead.plane.data if isinstance(lead.plane, Tiles) else lead.plane
    for name, part in (("plane", plane), ("scale", lead.scales), ("map", lead.query_map)):
        if part is not None and part.device != device:
            raise Unserved(f"the {name} of the lead lies on {part.device}, the rows on {device}")
    scales, query_map = lead.scales, lead.query_map
    if scales is not None and scales.dtype != torch.float16:
        raise Unserved(f"scales are float16, got {scales.dtype}")
    if query_map is not None and (
        query_map.dtype != torch.float32 or not query_map.is_contiguous()
    ):
        raise Unserved(f"the query's map is contiguous float32; got {query_map.dtype}")


def mask_of(mask: Tensor | None, batch: int, held: Held) -> Tensor | None:
    """The mask as kernels read it, row by row.

    Raises:
        Unserved: If it is not bool [batch or 1, capacity].
    """
    if mask is None:
        return None
    if mask.dtype != torch.bool or mask.shape not in ((1, held.capacity), (batch, held.capacity)):
        raise Unserved(
            f"a mask is bool [{batch} or 1, {held.capacity}], not {mask.dtype} {list(mask.shape)}"
        )
    return mask if mask.stride(1) == 1 else mask.contiguous()


def same_dtype(query: Tensor, keys: Tensor, values: Tensor) -> None:
    """Refuse queries and rows of different dtypes.

    Raises:
        Unserved: If they differ.
    """
    if not query.dtype == keys.dtype == values.dtype:
        raise Unserved(f"{query.dtype} queries met {keys.dtype} keys and {values.dtype} values")


@final
@dataclass(frozen=True)
class Choosers:
    """Who chooses: KV heads for their groups, or query heads for themselves.

    Attributes:
        count: Choosers of a batch row.
        share: Choosers that read one KV head.
        heads: Query heads of a chooser.
    """

    count: int
    share: int
    heads: int

    @classmethod
    def of(cls, heads: int, kv_heads: int, how: GroupReduce) -> "Choosers":
        """Who chooses under a rule of agreement."""
        group = heads // kv_heads
        return cls(heads, group, 1) if how == "none" else cls(kv_heads, 1, group)


@final
@dataclass(frozen=True)
class LeadForm:
    """The lead as kernels take it.

    Attributes:
        kind: "int8", "int4", "bf16", "fp32" for tiles, "rows" for plain rows.
        plane: The words of tiles, int32, or the rows.
        strides: Of batch row (or page), KV head and row; those of tiles in words, without rows.
        rank: Coordinates.
        lines: Lines of a tile, 0 for plain rows.
    """

    kind: str
    plane: Tensor
    strides: tuple[int, int, int]
    rank: int
    lines: int

    @property
    def padded_rank(self) -> int:
        """Coordinates with those that fill the last line, in the powers of two of a kernel."""
        per = {"int8": 4, "int4": 8, "bf16": 2}.get(self.kind, 1)
        wide = max(self.lines * per, self.rank, 16)
        return power_of_two(wide)


def lead_form(lead: Lead) -> LeadForm:
    """Describe a lead.

    Raises:
        Unserved: If its memory is not laid out as kernels read it, or codes come without scales.
    """
    plane, scales = lead.plane, lead.scales
    if isinstance(plane, Tiles):
        data = plane.data
        if (scales is not None) != (plane.kind in CODE_KINDS):
            given = "no scales" if scales is None else "scales"
            raise Unserved(f"it multiplies codes, and only codes, by scales: {plane.kind}, {given}")
        if scales is not None and scales.stride(-1) != 1 and scales.shape[-1] > 1:
            raise Unserved("the scales of a head do not lie side by side")
        if data.device.type not in device.device_types():
            raise Unserved(f"its lead plane lies on {data.device.type}")
        if data.numel() and not data[0, 0].is_contiguous():
            raise Unserved("the tiles of a head do not lie side by side")
        words = data.view(torch.int32)
        strides = (words.stride(0), words.stride(1), 0)
        return LeadForm(plane.kind, words, strides, plane.rank, data.shape[3])
    if plane is None:
        raise Unserved("ranking by recency needs no kernel")
    served(plane)
    batch, head, row = plane.stride()[:3]
    return LeadForm("rows", plane, (batch, head, row), plane.shape[3], 0)


def sink_logits_of(call: AttentionCall, heads: int, like: Tensor) -> Tensor | None:
    """The sink logits, float32 [heads] on the device.

    Raises:
        Unserved: If there is not one for each head.
    """
    if call.sink_logits is None:
        return None
    if call.sink_logits.shape != (heads,):
        raise Unserved(f"sink logits {list(call.sink_logits.shape)} are not those of {heads} heads")
    return call.sink_logits.to(like.device, torch.float32).contiguous()


def power_of_two(size: int) -> int:
    """The least power of two that is at least `size`."""
    return 1 << max(size - 1, 0).bit_length()
