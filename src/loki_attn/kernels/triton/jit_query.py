"""On the device: the query in the coordinates that rank rows, rounded as the plane is."""

import triton
import triton.language as tl

from loki_attn.kernels.triton.jit_rows import narrowed, round_half_even

_SMALLEST_NORMAL = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def map_query(
    out,
    factors,
    query,
    query_b,
    query_h,
    query_map,
    scaling,
    CHOOSERS: tl.constexpr,
    SHARE: tl.constexpr,
    HEADS: tl.constexpr,
    GP: tl.constexpr,
    HP: tl.constexpr,
    DIM: tl.constexpr,
    RANK: tl.constexpr,
    RP: tl.constexpr,
    KIND: tl.constexpr,
    MAPPED: tl.constexpr,
    WORDS: tl.constexpr,
    PRECISION: tl.constexpr,
    STEP: tl.constexpr,
):
    """Write the leading coordinates of the heads that choose together.

    Grid: batch * choosers. A chooser is a KV head, or a query head where each chooses alone; SHARE
    choosers read one KV head. For planes of codes `out` is int32 [rows, WORDS, GP], 4 codes to a
    word, else [rows, RANK, GP] in its own dtype. `factors` is float32 [rows, 2, GP]: what a product
    is multiplied by, and 8 times the sum of the codes, which int4 planes are off by.
    """
    row = tl.program_id(0)
    b = (row // CHOOSERS).to(tl.int64)
    chooser = row % CHOOSERS
    heads = tl.arange(0, HP)
    ranks = tl.arange(0, RP)
    place = query + b * query_b + (chooser * HEADS + heads).to(tl.int64)[:, None] * query_h
    if MAPPED:
        first = query_map + (chooser // SHARE).to(tl.int64) * DIM * RANK
        lead = tl.zeros([HP, RP], tl.float32)
        for start in range(0, DIM, STEP):
            dims = start + tl.arange(0, STEP)
            inside = (heads < HEADS)[:, None] & (dims < DIM)[None, :]
            rows = tl.load(place + dims[None, :], mask=inside, other=0.0).to(tl.float32)
            kept = (dims < DIM)[:, None] & (ranks < RANK)[None, :]
            there = first + dims[:, None] * RANK + ranks[None, :]
            columns = tl.load(there, mask=kept, other=0.0)
            lead += tl.dot(rows, columns, input_precision=PRECISION)
    else:
        inside = (heads < HEADS)[:, None] & (ranks < RANK)[None, :]
        lead = tl.load(place + ranks[None, :], mask=inside, other=0.0).to(tl.float32)
    held = heads < GP
    first_factor = factors + row.to(tl.int64) * 2 * GP
    if KIND == "int8" or KIND == "int4":
        scale = tl.div_rn(tl.max(tl.abs(lead), 1), tl.full([HP], 127.0, tl.float32))
        scale = tl.where(scale < _SMALLEST_NORMAL, 1.0, scale)
        # A head with NaN or infinity has no codes: its scores become NaN, and no others.
        spoilt = tl.max((lead - lead != 0.0).to(tl.int32), 1) > 0
        lead = tl.where(spoilt[:, None], 0.0, lead)
        scale = tl.where(spoilt, 1.0, scale)
        factor = tl.where(spoilt, float("nan"), scale * scaling)
        wide = tl.broadcast_to(scale[:, None], [HP, RP])
        codes = round_half_even(tl.div_rn(lead, wide)).to(tl.int32)
        spread = (codes & 255).reshape(HP, RP // 4, 4) << (8 * tl.arange(0, 4))[None, None, :]
        packed = tl.sum(spread, 2)
        words = tl.arange(0, RP // 4)
        first = out + row.to(tl.int64) * WORDS * GP
        there = held[:, None] & (words < WORDS)[None, :]
        tl.store(first + words[None, :] * GP + heads[:, None], packed, mask=there)
        tl.store(first_factor + heads, factor, mask=held)
        tl.store(first_factor + GP + heads, tl.sum(codes, 1).to(tl.float32) * 8.0, mask=held)
    else:
        if KIND == "bf16":
            lead = narrowed(lead, tl.bfloat16).to(tl.float32)
        first = out + row.to(tl.int64) * RANK * GP
        there = held[:, None] & (ranks < RANK)[None, :]
        value = narrowed(lead, out.dtype.element_ty)
        tl.store(first + ranks[None, :] * GP + heads[:, None], value, mask=there)
        tl.store(first_factor + heads, tl.full([HP], 0.0, tl.float32) + scaling, mask=held)
