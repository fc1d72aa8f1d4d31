"""On the device: new rows and their lead, written in one pass."""

import triton
import triton.language as tl

from loki_attn.kernels.triton.jit_rows import narrowed, round_half_even, row_offsets, tile_offsets

_SMALLEST_SCALE = tl.constexpr(6.103515625e-05)
_LARGEST_SCALE = tl.constexpr(65504.0)


@triton.jit
def _pack_lead(lead, live, scale_to, KIND: tl.constexpr, PER: tl.constexpr, LP: tl.constexpr,
               RANK: tl.constexpr, RP: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Coordinates [BLOCK, RP] as words [BLOCK, LP] of the plane; stores the scales of codes."""
    inner = tl.arange(0, PER)
    if KIND == "int8" or KIND == "int4":
        largest = 127.0 if KIND == "int8" else 7.0
        scale = tl.div_rn(tl.max(tl.abs(lead), 1), tl.full([BLOCK], largest, tl.float32))
        scale = tl.minimum(tl.maximum(scale, _SMALLEST_SCALE), _LARGEST_SCALE)
        scale = narrowed(scale, tl.float16)
        tl.store(scale_to, scale, mask=live)
        wide = tl.broadcast_to(scale.to(tl.float32)[:, None], [BLOCK, RP])
        codes = round_half_even(tl.div_rn(lead, wide))
        codes = tl.minimum(tl.maximum(codes, -largest), largest).to(tl.int32)
        if KIND == "int8":
            pieces = codes & 255
            shift = 8 * inner
        else:
            real = (tl.arange(0, RP) < RANK)[None, :]
            pieces = tl.where(real, codes, 0) + 8
            shift = (inner % 4) * 8 + (inner // 4) * 4
    elif KIND == "bf16":
        pieces = narrowed(lead, tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        shift = 16 * inner
    else:
        pieces = lead.to(tl.int32, bitcast=True)
        shift = 0 * inner
    return tl.sum(pieces.reshape(BLOCK, LP, PER) << shift[None, None, :], 2)


@triton.jit(
    do_not_specialize=[
        "tokens",
        "start",
        "first_position",
        "room",
        "scales_b",
        "scales_h",
        "positions_b",
        "positions_h",
        "held_b",
        "table_b",
    ]
)
def append_rows(
    keys, keys_b, keys_h, keys_t, values, values_b, values_h, values_t, plane, plane_b, plane_h,
    scales, scales_b, scales_h, positions, positions_b, positions_h, key, key_b, key_h, key_t,
    value, value_b, value_h, value_t, key_map, held, held_b, tokens, start, first_position, room,
    table, table_b,
    KV_HEADS: tl.constexpr, DIM: tl.constexpr, DP: tl.constexpr, VALUE_DIM: tl.constexpr,
    VP: tl.constexpr, KIND: tl.constexpr, LINES: tl.constexpr, LP: tl.constexpr,
    PER: tl.constexpr, RANK: tl.constexpr, BLOCK: tl.constexpr, PAGE: tl.constexpr,
    HELD: tl.constexpr, POSITIONED: tl.constexpr, PRECISION: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Write rows behind those held: keys, values, positions, and the lead with its scales.

    Grid: batch * kv_heads, blocks of tokens. With HELD, how many rows are held is read from the
    device, int64 [batch or 1]; nobody on the host knows then whether there is room, so what has
    none is not written.
    """
    row = tl.program_id(0).to(tl.int64)
    b = row // KV_HEADS
    h = row % KV_HEADS
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if HELD:
        start = tl.load(held + b * held_b).to(tl.int32)
    t = start + i
    live = (i < tokens) & (t < room)
    dims = tl.arange(0, DP)
    columns = tl.arange(0, VP)
    here = live[:, None] & (dims < DIM)[None, :]
    source = key + b * key_b + h * key_h + i.to(tl.int64)[:, None] * key_t + dims[None, :]
    new = tl.load(source, mask=here, other=0.0)
    to = row_offsets(t, live, b, h, table, table_b, keys_b, keys_h, keys_t, PAGE)
    tl.store(keys + to[:, None] + dims[None, :], new, mask=here)
    there = live[:, None] & (columns < VALUE_DIM)[None, :]
    source = (
        value + b * value_b + h * value_h + i.to(tl.int64)[:, None] * value_t + columns[None, :]
    )
    to = row_offsets(t, live, b, h, table, table_b, values_b, values_h, values_t, PAGE)
    tl.store(values + to[:, None] + columns[None, :], tl.load(source, mask=there), mask=there)
    if POSITIONED:
        stored = positions + b * positions_b + h * positions_h + t
        tl.store(stored, first_position + i, mask=live)
    if KIND != "none":
        RP: tl.constexpr = LP * PER
        ranks = tl.arange(0, RP)
        lead = tl.zeros([BLOCK, RP], tl.float32)
        first = key + b * key_b + h * key_h + i.to(tl.int64)[:, None] * key_t
        matrix = key_map + h * DIM * RANK
        for begin in range(0, DIM, STEP):
            part = begin + tl.arange(0, STEP)
            inside = live[:, None] & (part < DIM)[None, :]
            some = tl.load(first + part[None, :], mask=inside, other=0.0).to(tl.float32)
            kept = (part < DIM)[:, None] & (ranks < RANK)[None, :]
            place = matrix + part[:, None] * RANK + ranks[None, :]
            maps = tl.load(place, mask=kept, other=0.0)
            lead += tl.dot(some, maps, input_precision=PRECISION)
        scale_to = scales + row_offsets(t, live, b, h, table, table_b, scales_b, scales_h, 1, PAGE)
        words = _pack_lead(lead, live, scale_to, KIND, PER, LP, RANK, RP, BLOCK)
        to = tile_offsets(t, live, b, h, table, table_b, plane_b, plane_h, LINES * 16, PAGE)
        lines = tl.arange(0, LP)
        fits = live[:, None] & (lines < LINES)[None, :]
        tl.store(plane + to[:, None] + lines[None, :] * 16, words, mask=fits)
