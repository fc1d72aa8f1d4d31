"""Append: from a request to the one launch that writes all of it."""

import torch
from torch import Tensor

from loki_attn.kernels.backends import Unserved
from loki_attn.kernels.triton import device, tuning
from loki_attn.kernels.triton.jit_append import append_rows
from loki_attn.kernels.triton.request import LeadForm, lead_form, power_of_two, same_dtype, served
from loki_attn.tiles import TILE_ROWS
from loki_attn.types import AppendRequest, Lead

_PER_LINE = {"int8": 4, "int4": 8, "bf16": 2, "fp32": 1}


@device.within_means
def append(request: AppendRequest, pages: Tensor | None = None) -> bool:
    """Write new rows, their positions and their lead in one launch; see `cache.LayerCache.append`.

    Args:
        request: What goes where.
        pages: int32 [batch, most_pages]: the pages of each batch row, where the storage is one of
            pages, [pages, kv_heads, page_rows, ...]; `start` is then an int64 tensor [batch].
    """
    key, value, keys, values = request.key, request.value, request.keys, request.values
    tokens = key.shape[2]
    if tokens == 0 or key.requires_grad or value.requires_grad:
        return False
    served(key, value, keys, values)
    same_dtype(key, keys, values)
    form = _lead(request)
    _check_room(request, form, pages)
    with device.on(keys):
        _write(request, form, pages)
    return True


def _write(request: AppendRequest, form: LeadForm | None, pages: Tensor | None) -> None:
    """Launch the kernel."""
    key, value, keys, values = request.key, request.value, request.keys, request.values
    batch, kv_heads, tokens, dim = key.shape
    lead = None if form is None else form.plane
    scales, positions, start = request.lead_scales, request.positions, request.start
    lines, per = (0, 1) if form is None else (form.lines, _PER_LINE[form.kind])
    padded = power_of_two(max(lines, 16 // per)) * per
    cut = tuning.APPEND
    append_rows[(batch * kv_heads, -(-tokens // cut.block))](
        keys, *keys.stride()[:3], values, *values.stride()[:3],
        keys if lead is None else lead, *(0, 0) if form is None else form.strides[:2],
        keys if scales is None else scales, *(0, 0) if scales is None else scales.stride()[:2],
        keys if positions is None else positions,
        *(0, 0) if positions is None else positions.stride()[:2],
        key, *key.stride()[:3], value, *value.stride()[:3],
        keys if request.key_map is None else request.key_map,
        start if isinstance(start, Tensor) else keys, _stride_of(start),
        tokens, 0 if isinstance(start, Tensor) else start, request.first_position,
        _room(request, form, pages), keys if pages is None else pages,
        0 if pages is None else pages.stride(0),
        KV_HEADS=kv_heads, DIM=dim, DP=power_of_two(max(dim, 16)), VALUE_DIM=value.shape[3],
        VP=power_of_two(max(value.shape[3], 16)), KIND="none" if form is None else form.kind,
        LINES=lines, LP=padded // per, PER=per,
        RANK=0 if form is None else form.rank, BLOCK=cut.block,
        PAGE=0 if pages is None else keys.shape[2], HELD=isinstance(start, Tensor),
        POSITIONED=positions is not None, PRECISION=device.mapping_precision(),
        STEP=tuning.map_block(padded), **cut.launch,
    )  # fmt: skip


def _lead(request: AppendRequest) -> LeadForm | None:
    """The lead as the kernel takes it; None where nothing ranks the rows beside the rows."""
    if request.lead is None or request.key_map is None:
        return None
    key_map, (_, kv_heads, _, dim) = request.key_map, request.key.shape
    if key_map.shape != (kv_heads, dim, request.lead.rank) or key_map.dtype != torch.float32:
        raise Unserved(f"the map {list(key_map.shape)} does not fit the keys")
    if not key_map.is_contiguous():
        raise Unserved("the map is not contiguous")
    return lead_form(Lead(request.lead, request.lead_scales))


def _check_room(request: AppendRequest, form: LeadForm | None, pages: Tensor | None) -> None:
    """Check that storage fits the rows, and has room where that is known without waiting."""
    batch, kv_heads, tokens, dim = request.key.shape
    keys, values, start = request.keys, request.values, request.start
    known = keys.shape[0] if pages is None else pages.shape[0]
    fits = (known, keys.shape[1], keys.shape[3]) == (batch, kv_heads, dim)
    if not fits or values.shape[:3] != keys.shape[:3] or values.shape[3] != request.value.shape[3]:
        raise Unserved(f"storage {list(keys.shape)} does not fit rows {list(request.key.shape)}")
    positions, scales = request.positions, request.lead_scales
    if positions is not None and (positions.dtype != torch.int32 or positions.stride(2) != 1):
        raise Unserved(f"positions are contiguous int32, got {positions.dtype}")
    if scales is not None and (scales.dtype != torch.float16 or scales.stride(2) != 1):
        raise Unserved(f"scales are contiguous float16, got {scales.dtype}")
    if pages is not None and (not isinstance(start, Tensor) or keys.shape[2] % TILE_ROWS):
        raise Unserved(f"pages of {keys.shape[2]} rows are appended to at device positions only")
    room = _room(request, form, pages)
    if not isinstance(start, Tensor) and (start < 0 or start + tokens > room):
        raise Unserved(f"rows {start} to {start + tokens} have no room among {room}")


def _room(request: AppendRequest, form: LeadForm | None, pages: Tensor | None) -> int:
    """Rows that one batch row may hold."""
    if pages is not None:
        return pages.shape[1] * request.keys.shape[2]
    room = request.keys.shape[2]
    return room if form is None else min(room, form.plane.shape[2] * TILE_ROWS)


def _stride_of(start: int | Tensor) -> int:
    """From one batch row's start to the next; 0 where all share one."""
    return start.stride(0) if isinstance(start, Tensor) and start.numel() > 1 else 0
