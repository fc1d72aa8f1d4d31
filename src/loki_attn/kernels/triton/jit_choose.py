"""On the device: the k best of rows by their sort keys, exactly, ties to the lower row.

Three launches whose only meeting points are their ends: counts of bins per split (written while
rows are scored), the rows that reach the k-th best's bin, compacted in order, and the exact choice
among those few.
"""

import triton
import triton.language as tl

from loki_attn.kernels.triton.jit_rows import (
    BINS,
    FORCED,
    HIDDEN,
    bins_of,
    part_of,
    protected_rows,
    rows_held,
    sort_keys,
    visible_rows,
    visible_so_far,
)

_CHUNK = tl.constexpr(8)


@triton.jit(do_not_specialize=["mask_b", "lengths_b", "capacity", "split_rows"])
def count_visible(
    seen,
    mask,
    mask_b,
    lengths,
    lengths_b,
    capacity,
    split_rows,
    BLOCK: tl.constexpr,
    UNIT: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """How many rows of each split are visible: int32 [masks, splits]. Grid: masks, splits."""
    b = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    held = rows_held(b, lengths, lengths_b, capacity, RAGGED)
    first, last = part_of(split, held, split_rows, UNIT)
    count = 0
    for start in range(first, last, BLOCK):
        t = start + tl.arange(0, BLOCK)
        live = visible_rows(t, b, held, mask, mask_b, True) & (t < last)
        count += tl.sum(live.to(tl.int32), 0)
    tl.store(seen + b * tl.num_programs(1) + split, count)


@triton.jit(
    do_not_specialize=[
        "counts_b", "seen_b", "mask_b", "lengths_b", "capacity", "split_rows", "sinks", "wanted"
    ]
)  # fmt: skip
def mark_recent(
    keys, bins, seen, seen_b, counts, counts_b, lengths, lengths_b, mask, mask_b, capacity,
    split_rows, sinks, wanted, CHOOSERS: tl.constexpr, BLOCK: tl.constexpr, SP: tl.constexpr,
    MASKED: tl.constexpr, RAGGED: tl.constexpr, COUNTED: tl.constexpr,
):  # fmt: skip
    """Sort keys for reading by recency: sinks and the last rows, as many as are wanted in all.

    Grid: batch * choosers, splits. With a mask `seen` comes from `count_visible`.
    """
    split = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64)
    b = row // CHOOSERS
    if COUNTED:
        wanted = tl.load(counts + b * counts_b).to(tl.int32)
    recents = tl.maximum(wanted - sinks, 0)
    held = rows_held(b, lengths, lengths_b, capacity, RAGGED)
    if MASKED:
        before, total = visible_so_far(seen + b * seen_b, split, SP)
    counted = 0
    first, last = part_of(split, held, split_rows, BLOCK)
    for start in range(first, last, BLOCK):
        t = start + tl.arange(0, BLOCK)
        live = visible_rows(t, b, held, mask, mask_b, MASKED)
        if MASKED:
            read, before = protected_rows(live, before, total, sinks, recents)
        else:
            read = live & ((t < sinks) | (t >= held - recents))
        tl.store(keys + row * capacity + t, tl.where(read, FORCED, HIDDEN), mask=t < held)
        counted += tl.sum(read.to(tl.int32), 0)
    which = tl.arange(0, BINS)
    place = bins + (row * tl.num_programs(1) + split) * BINS
    tl.store(place + which, tl.where(which == BINS - 1, counted, 0))


@triton.jit(
    do_not_specialize=[
        "scores_b", "scores_c", "visible_b", "visible_c", "forced_b", "forced_c", "capacity",
        "split_rows",
    ]
)  # fmt: skip
def order_scores(
    keys, bins, scores, scores_b, scores_c, visible, visible_b, visible_c, forced, forced_b,
    forced_c, capacity, split_rows, CHOOSERS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Turn scores of any kind into sort keys and counts of bins. Grid: rows, splits."""
    split = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64)
    b = row // CHOOSERS
    c = row % CHOOSERS
    counted = tl.zeros([BINS], tl.int32)
    for start in range(split * split_rows, tl.minimum((split + 1) * split_rows, capacity), BLOCK):
        t = start + tl.arange(0, BLOCK)
        there = t < capacity
        score = tl.load(scores + b * scores_b + c * scores_c + t, mask=there, other=0.0)
        seen = tl.load(visible + b * visible_b + c * visible_c + t, mask=there, other=0)
        first = tl.load(forced + b * forced_b + c * forced_c + t, mask=there, other=0)
        key = tl.where(first != 0, FORCED, sort_keys(score.to(tl.float32)))
        key = tl.where(seen != 0, key, HIDDEN)
        tl.store(keys + row * capacity + t, key, mask=there)
        counted += tl.histogram(bins_of(key, "exponent"), BINS, mask=there & (seen != 0))
    place = bins + (row * tl.num_programs(1) + split) * BINS
    tl.store(place + tl.arange(0, BINS), counted)


@triton.jit
def _lowest_bin(total, wanted):
    """The highest bin at which `wanted` rows lie, or in the bins above it; and how many do."""
    at_least = tl.sum(total, 0) - tl.cumsum(total, 0) + total
    return tl.maximum(tl.sum((at_least >= wanted).to(tl.int32), 0) - 1, 0)


@triton.jit(do_not_specialize=["capacity", "split_rows", "wanted", "counts_b", "lengths_b"])
def compact(
    list_rows, list_keys, listed, keys, bins, counts, counts_b, wanted, lengths, lengths_b,
    capacity, split_rows, CHOOSERS: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr,
    UNIT: tl.constexpr, COUNTED: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """List, in order, the rows that reach the bin of the k-th best, with their keys.

    Grid: rows, splits. Each program reads the counts of all splits, so it knows where its own part
    of the list begins. `listed` is int32 [rows]: how long the list is.
    """
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    row = tl.program_id(0).to(tl.int64)
    if COUNTED:
        wanted = tl.load(counts + (row // CHOOSERS) * counts_b).to(tl.int32)
    which = tl.arange(0, BINS)
    total = tl.zeros([BINS], tl.int32)
    before = tl.zeros([BINS], tl.int32)
    for first in range(0, splits, _CHUNK):
        of = first + tl.arange(0, _CHUNK)
        place = bins + (row * splits + of)[:, None] * BINS + which[None, :]
        part = tl.load(place, mask=(of < splits)[:, None], other=0)
        total += tl.sum(part, 0)
        before += tl.sum(tl.where((of < split)[:, None], part, 0), 0)
    lowest = _lowest_bin(total, wanted)
    held = rows_held(row // CHOOSERS, lengths, lengths_b, capacity, RAGGED)
    at = tl.sum(tl.where(which >= lowest, before, 0), 0)
    if split == 0:
        tl.store(listed + row, tl.sum(tl.where(which >= lowest, total, 0), 0))
    first, last = part_of(split, held, split_rows, UNIT)
    for start in range(first, last, BLOCK):
        t = start + tl.arange(0, BLOCK)
        key = tl.load(keys + row * capacity + t, mask=t < last, other=HIDDEN)
        taken = (key != HIDDEN) & (bins_of(key, KIND) >= lowest)
        slot = at + tl.cumsum(taken.to(tl.int32), 0) - 1
        tl.store(list_rows + row * capacity + slot, t, mask=taken)
        tl.store(list_keys + row * capacity + slot, key, mask=taken)
        at += tl.sum(taken.to(tl.int32), 0)


@triton.jit
def _key_digits(keys, shift: tl.constexpr):
    """Digits of keys as unsigned numbers: those from `shift` bits up."""
    return ((keys.to(tl.uint32, bitcast=True) ^ 0x80000000) >> shift).to(tl.int32, bitcast=True)


@triton.jit(do_not_specialize=["capacity", "wanted", "most", "counts_b"])
def refine(
    indices, found, list_rows, list_keys, listed, counts, counts_b, wanted, capacity, most,
    CHOOSERS: tl.constexpr, BLOCK: tl.constexpr, COUNTED: tl.constexpr,
):  # fmt: skip
    """Choose exactly: find the k-th largest key digit by digit, then take rows in order.

    Grid: rows. `indices` is int64 [rows, most], padded with -1, `found` int64 [rows].
    """
    row = tl.program_id(0).to(tl.int64)
    if COUNTED:
        wanted = tl.load(counts + (row // CHOOSERS) * counts_b).to(tl.int32)
    length = tl.load(listed + row)
    wanted = tl.minimum(wanted, length)
    digits = tl.arange(0, 256)
    known = 0
    missing = wanted
    for place in tl.static_range(4):
        counted = tl.zeros([256], tl.int32)
        for start in range(0, length, BLOCK):
            slot = start + tl.arange(0, BLOCK)
            key = tl.load(list_keys + row * capacity + slot, mask=slot < length, other=0)
            upper = _key_digits(key, 24 - 8 * place)
            fits = slot < length
            if place > 0:
                fits = fits & ((upper >> 8) & 0xFFFFFF == known & 0xFFFFFF)
            counted += tl.histogram(upper & 255, 256, mask=fits)
        at_least = tl.sum(counted, 0) - tl.cumsum(counted, 0) + counted
        digit = tl.maximum(tl.sum((at_least >= missing).to(tl.int32), 0) - 1, 0)
        missing -= tl.sum(tl.where(digits > digit, counted, 0), 0)
        known = (known << 8) | digit
    last = known ^ HIDDEN
    at = 0
    tied = 0
    for start in range(0, length, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        there = slot < length
        key = tl.load(list_keys + row * capacity + slot, mask=there, other=HIDDEN)
        t = tl.load(list_rows + row * capacity + slot, mask=there, other=0)
        equal = there & (key == last)
        rank = tied + tl.cumsum(equal.to(tl.int32), 0)
        taken = there & ((key > last) | (equal & (rank <= missing)))
        to = at + tl.cumsum(taken.to(tl.int32), 0) - 1
        tl.store(indices + row * most + to, t.to(tl.int64), mask=taken & (to < most))
        at += tl.sum(taken.to(tl.int32), 0)
        tied += tl.sum(equal.to(tl.int32), 0)
    for start in range(0, most, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        tl.store(
            indices + row * most + slot,
            tl.full([BLOCK], -1, tl.int64),
            mask=(slot >= at) & (slot < most),
        )
    tl.store(found + row, tl.minimum(at, most).to(tl.int64))
