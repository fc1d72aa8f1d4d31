"""On the device: logits of rows from their leading coordinates, and what follows at once."""

import triton
import triton.language as tl

from loki_attn.kernels.triton.jit_rows import (
    BINS,
    FORCED,
    HIDDEN,
    bins_of,
    part_of,
    product,
    protected_rows,
    row_offsets,
    rows_held,
    soft_cap,
    sort_keys,
    tile_offsets,
    visible_rows,
    visible_so_far,
)

_FAR_BELOW = tl.constexpr(-1.0e30)


@triton.jit
def _dot4(words, codes, total, UNSIGNED: tl.constexpr, ASM: tl.constexpr):
    """Total + the product of 4 codes with 4 codes, one instruction on the device."""
    if ASM:
        if UNSIGNED:
            return tl.inline_asm_elementwise(
                "dp4a.u32.s32 $0, $1, $2, $3;", "=r,r,r,r", [words, codes, total],
                dtype=tl.int32, is_pure=True, pack=1,
            )  # fmt: skip
        return tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [words, codes, total],
            dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    up = (24 - 8 * tl.arange(0, 4))[None, None, :]
    ones = (words[:, :, None] << up) >> 24
    if UNSIGNED:
        ones = ones & 255
    return total + tl.sum(ones * ((codes[:, :, None] << up) >> 24), 2)


@triton.jit
def _for_heads(place, DTYPE: tl.constexpr, GP: tl.constexpr, ASM: tl.constexpr):
    """GP numbers that every thread holds, loaded one by one, so that none are exchanged."""
    heads = tl.arange(0, GP)
    if GP > 16 or not ASM:
        return tl.load(place + heads)
    numbers = tl.zeros([GP], DTYPE)
    for head in tl.static_range(GP):
        numbers = tl.where(heads == head, tl.load(place + head), numbers)
    return numbers


@triton.jit
def _code_line(
    total, plane, query, live, place, line, KIND: tl.constexpr, GP: tl.constexpr, ASM: tl.constexpr
):
    """Exact integer products of one line of codes, added to `total` [BLOCK, GP]."""
    words = tl.load(plane + place[:, None] + line * 16, mask=live[:, None], other=0)
    if KIND == "int8":
        codes = _for_heads(query + line * GP, tl.int32, GP, ASM)[None, :]
        return _dot4(words, codes, total, False, ASM)
    low = _for_heads(query + 2 * line * GP, tl.int32, GP, ASM)[None, :]
    high = _for_heads(query + (2 * line + 1) * GP, tl.int32, GP, ASM)[None, :]
    total = _dot4(words & 0x0F0F0F0F, low, total, True, ASM)
    return _dot4((words >> 4) & 0x0F0F0F0F, high, total, True, ASM)


@triton.jit
def _float_line(
    total, plane, query, live, place, line, KIND: tl.constexpr, RANK: tl.constexpr,
    GP: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Products of one line of float coordinates in float32, added to `total` [BLOCK, GP]."""
    words = tl.load(plane + place[:, None] + line * 16, mask=live[:, None], other=0)
    if KIND == "fp32":
        one = words.to(tl.float32, bitcast=True)
        return total + one * _for_heads(query + line * GP, tl.float32, GP, ASM)[None, :]
    one = (words << 16).to(tl.float32, bitcast=True)
    total += one * _for_heads(query + 2 * line * GP, tl.float32, GP, ASM)[None, :]
    # The last line of an odd rank has no second coordinate: its own is 0, and so counts nothing.
    second = tl.minimum(2 * line + 1, RANK - 1)
    one = (words & -65536).to(tl.float32, bitcast=True)
    return total + one * _for_heads(query + second * GP, tl.float32, GP, ASM)[None, :]


@triton.jit
def _products(
    plane, query, live, place, KIND: tl.constexpr, LINES: tl.constexpr, RANK: tl.constexpr,
    GP: tl.constexpr, BLOCK: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Products [BLOCK, GP] of rows in tiles and the query, of codes in int32, else in float32.

    Up to 16 lines are written out, so that all of their loads are in flight at once; more are
    looped over, which compiles and fits into registers.
    """
    CODED: tl.constexpr = KIND == "int8" or KIND == "int4"
    total = tl.zeros([BLOCK, GP], tl.int32 if CODED else tl.float32)
    if LINES <= 16:
        for line in tl.static_range(LINES):
            if CODED:
                total = _code_line(total, plane, query, live, place, line, KIND, GP, ASM)
            else:
                total = _float_line(total, plane, query, live, place, line, KIND, RANK, GP, ASM)
    else:
        for line in range(LINES):
            if CODED:
                total = _code_line(total, plane, query, live, place, line, KIND, GP, ASM)
            else:
                total = _float_line(total, plane, query, live, place, line, KIND, RANK, GP, ASM)
    return total


@triton.jit
def block_logits(
    plane, plane_b, plane_h, plane_t, scales, scales_b, scales_h, query, factors, table, table_b,
    t, live, b, kv, row, softcap,
    KIND: tl.constexpr, LINES: tl.constexpr, RANK: tl.constexpr, RP: tl.constexpr,
    HEADS: tl.constexpr, GP: tl.constexpr, BLOCK: tl.constexpr, PAGE: tl.constexpr,
    PRECISION: tl.constexpr, ASM: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """Logits [BLOCK, GP] of rows t for the heads of one chooser; those of no head are 0."""
    heads = tl.arange(0, GP)
    first_factor = factors + row * 2 * GP
    factor = _for_heads(first_factor, tl.float32, GP, ASM)
    if KIND == "rows":
        offsets = row_offsets(t, live, b, kv, table, table_b, plane_b, plane_h, plane_t, PAGE)
        ranks = tl.arange(0, RP)
        inside = live[:, None] & (ranks < RANK)[None, :]
        rows = tl.load(plane + offsets[:, None] + ranks[None, :], mask=inside, other=0.0)
        there = query + row * RANK * GP + ranks[:, None] * GP + heads[None, :]
        columns = tl.load(there, mask=(ranks < RANK)[:, None], other=0.0)
        rows = rows.to(columns.dtype)
        logits = product(rows, columns, PRECISION, not ASM) * factor[None, :]
    else:
        place = tile_offsets(t, live, b, kv, table, table_b, plane_b, plane_h, LINES * 16, PAGE)
        if KIND == "int8" or KIND == "int4":
            words = query + row * (LINES * (2 if KIND == "int4" else 1)) * GP
            total = _products(plane, words, live, place, KIND, LINES, RANK, GP, BLOCK, ASM)
            whole = total.to(tl.float32)
            if KIND == "int4":
                whole -= _for_heads(first_factor + GP, tl.float32, GP, ASM)[None, :]
            where = row_offsets(t, live, b, kv, table, table_b, scales_b, scales_h, 1, PAGE)
            scale = tl.load(scales + where[:, None], mask=live[:, None], other=0.0)
            logits = whole * factor[None, :] * scale.to(tl.float32)
        else:
            coordinates = query + row * RANK * GP
            whole = _products(plane, coordinates, live, place, KIND, LINES, RANK, GP, BLOCK, ASM)
            logits = whole * factor[None, :]
    if CAPPED:
        logits = soft_cap(logits, softcap)
    return logits


@triton.jit(
    do_not_specialize=[
        "capacity",
        "split_rows",
        "scales_b",
        "scales_h",
        "table_b",
        "mask_b",
        "lengths_b",
    ]
)
def sum_weights(
    stats, plane, plane_b, plane_h, plane_t, scales, scales_b, scales_h, query, factors,
    table, table_b, lengths, lengths_b, mask, mask_b, capacity, split_rows, softcap,
    CHOOSERS: tl.constexpr, SHARE: tl.constexpr, HEADS: tl.constexpr, GP: tl.constexpr,
    KIND: tl.constexpr, LINES: tl.constexpr, RANK: tl.constexpr, RP: tl.constexpr,
    BLOCK: tl.constexpr, PAGE: tl.constexpr, MASKED: tl.constexpr, RAGGED: tl.constexpr,
    PRECISION: tl.constexpr, ASM: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """Per head, the peak of a split's logits and the sum of their exponentials below it.

    Grid: batch * choosers, splits. `stats` is float32 [rows, splits, 2, GP]. Every lane keeps a
    peak and a sum of its own, so that lanes meet only once.
    """
    split = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64)
    b = row // CHOOSERS
    kv = (row % CHOOSERS) // SHARE
    held = rows_held(b, lengths, lengths_b, capacity, RAGGED)
    peak = tl.full([BLOCK, GP], _FAR_BELOW, tl.float32)
    total = tl.zeros([BLOCK, GP], tl.float32)
    first, last = part_of(split, held, split_rows, BLOCK)
    for start in range(first, last, BLOCK):
        t = start + tl.arange(0, BLOCK)
        live = visible_rows(t, b, held, mask, mask_b, MASKED)
        logits = block_logits(
            plane, plane_b, plane_h, plane_t, scales, scales_b, scales_h, query, factors,
            table, table_b, t, live, b, kv, row, softcap, KIND, LINES, RANK, RP, HEADS, GP,
            BLOCK, PAGE, PRECISION, ASM, CAPPED,
        )  # fmt: skip
        logits = tl.where(live[:, None], logits, float("-inf"))
        # Of the two factors exp(peak - higher) and exp(logit - higher), one is always 1.
        fade = tl.exp(-tl.abs(logits - peak))
        total = tl.where(logits > peak, total * fade + 1.0, total + fade)
        peak = tl.maximum(peak, logits)
    best = tl.max(peak, 0)
    whole = tl.sum(total * tl.exp(peak - best[None, :]), 0)
    heads = tl.arange(0, GP)
    place = stats + (row * tl.num_programs(1) + split) * 2 * GP
    tl.store(place + heads, best)
    tl.store(place + GP + heads, whole)


@triton.jit
def _log_sum_exp(
    stats, sink_logits, row, head, SP: tl.constexpr, HEADS: tl.constexpr, GP: tl.constexpr,
    SINKS: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp [GP] of each head's logits over all splits, its sink logit included."""
    heads = tl.arange(0, GP)
    splits = tl.arange(0, SP)[:, None]
    place = stats + row * tl.num_programs(1) * 2 * GP + splits * 2 * GP + heads[None, :]
    there = (splits < tl.num_programs(1)) & (heads < GP)[None, :]
    peaks = tl.load(place, mask=there, other=_FAR_BELOW)
    sums = tl.load(place + GP, mask=there, other=0.0)
    peak = tl.max(peaks, 0)
    if SINKS:
        sink = tl.load(sink_logits + head + heads, mask=heads < HEADS, other=_FAR_BELOW)
        peak = tl.maximum(peak, sink.to(tl.float32))
    total = tl.sum(sums * tl.exp(peaks - peak[None, :]), 0)
    if SINKS:
        total += tl.exp(sink.to(tl.float32) - peak)
    return peak + tl.log(tl.where(total != 0, total, 1.0))


@triton.jit(
    do_not_specialize=[
        "capacity",
        "split_rows",
        "sinks",
        "recents",
        "scales_b",
        "scales_h",
        "table_b",
        "mask_b",
        "lengths_b",
        "seen_b",
    ]
)
def rank_rows(
    keys, bins, stats, seen, seen_b, plane, plane_b, plane_h, plane_t, scales, scales_b, scales_h,
    query, factors, table, table_b, lengths, lengths_b, mask, mask_b, sink_logits, capacity,
    split_rows, sinks, recents, softcap,
    CHOOSERS: tl.constexpr, SHARE: tl.constexpr, HEADS: tl.constexpr, GP: tl.constexpr,
    KIND: tl.constexpr, LINES: tl.constexpr, RANK: tl.constexpr, RP: tl.constexpr,
    BLOCK: tl.constexpr, PAGE: tl.constexpr, MASKED: tl.constexpr, RAGGED: tl.constexpr,
    PRECISION: tl.constexpr, ASM: tl.constexpr, CAPPED: tl.constexpr, WEIGHTS: tl.constexpr,
    LARGEST: tl.constexpr, SP: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """Write every row's sort key, int32 [rows, capacity], and a split's counts of bins.

    Grid: batch * choosers, splits. A row's score is the sum over the heads, or the largest, of its
    logits or, with WEIGHTS, of its soft-max weights by the sums of `sum_weights`. With a mask
    `seen` says how many rows of each split are visible. `bins` is int32 [rows, splits, 512].
    Programs go from the last rows to the first: what `sum_weights` read last is still in the cache.
    """
    split = tl.num_programs(1) - 1 - tl.program_id(1)
    row = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    b = row // CHOOSERS
    chooser = row % CHOOSERS
    kv = chooser // SHARE
    held = rows_held(b, lengths, lengths_b, capacity, RAGGED)
    if MASKED:
        before, total = visible_so_far(seen + b * seen_b, split, SP)
    heads = tl.arange(0, GP)
    if WEIGHTS:
        known = _log_sum_exp(stats, sink_logits, row, chooser * HEADS, SP, HEADS, GP, SINKS)
    counted = tl.zeros([BINS], tl.int32)
    first, last = part_of(split, held, split_rows, BLOCK)
    for start in range(first, last, BLOCK):
        t = start + tl.arange(0, BLOCK)
        live = visible_rows(t, b, held, mask, mask_b, MASKED)
        logits = block_logits(
            plane, plane_b, plane_h, plane_t, scales, scales_b, scales_h, query, factors,
            table, table_b, t, live, b, kv, row, softcap, KIND, LINES, RANK, RP, HEADS, GP,
            BLOCK, PAGE, PRECISION, ASM, CAPPED,
        )  # fmt: skip
        real = (heads < HEADS)[None, :]
        if WEIGHTS:
            logits = tl.exp(logits - known[None, :])
        if LARGEST:
            score = tl.max(tl.where(real, logits, float("-inf")), 1)
        else:
            score = tl.sum(tl.where(real, logits, 0.0), 1)
        if MASKED:
            forced, before = protected_rows(live, before, total, sinks, recents)
        else:
            forced = (t < sinks) | (t >= held - recents)
        key = tl.where(forced, FORCED, sort_keys(score))
        key = tl.where(live, key, HIDDEN)
        tl.store(keys + row * capacity + t, key, mask=t < held)
        which = bins_of(key, "weights" if WEIGHTS else "logits")
        counted += tl.histogram(which, BINS, mask=live)
    place = bins + (row * tl.num_programs(1) + split) * BINS
    tl.store(place + tl.arange(0, BINS), counted)


@triton.jit(do_not_specialize=["capacity", "split_rows", "scales_b", "scales_h"])
def score_rows(
    out, plane, plane_b, plane_h, plane_t, scales, scales_b, scales_h, query, factors,
    capacity, split_rows, softcap,
    CHOOSERS: tl.constexpr, SHARE: tl.constexpr, HEADS: tl.constexpr, GP: tl.constexpr,
    KIND: tl.constexpr, LINES: tl.constexpr, RANK: tl.constexpr, RP: tl.constexpr,
    BLOCK: tl.constexpr, PRECISION: tl.constexpr, ASM: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """Write the logits themselves, float32 [rows, HEADS, capacity]. Grid: rows, splits."""
    split = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64)
    b = row // CHOOSERS
    kv = (row % CHOOSERS) // SHARE
    heads = tl.arange(0, GP)
    for start in range(split * split_rows, tl.minimum((split + 1) * split_rows, capacity), BLOCK):
        t = start + tl.arange(0, BLOCK)
        live = t < capacity
        logits = block_logits(
            plane, plane_b, plane_h, plane_t, scales, scales_b, scales_h, query, factors,
            out, 0, t, live, b, kv, row, softcap, KIND, LINES, RANK, RP, HEADS, GP,
            BLOCK, 0, PRECISION, ASM, CAPPED,
        )  # fmt: skip
        place = out + (row * HEADS + heads)[None, :] * capacity + t[:, None]
        tl.store(place, logits, mask=live[:, None] & (heads < HEADS)[None, :])
