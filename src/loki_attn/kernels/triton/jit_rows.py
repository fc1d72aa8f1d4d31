"""On the device: where rows lie, which of them a query sees, and how scores become sortable."""

import triton
import triton.language as tl
from triton import knobs

# The keys that scores are sorted by: int32, in the order of the floats they stand for.
HIDDEN = tl.constexpr(-2147483648)
FORCED = tl.constexpr(2147483647)
BINS = tl.constexpr(512)
# Bins of soft-max weights: 16 to an octave, the uppermost at 8.
_BIN_SHIFT = tl.constexpr(19)
_TOP_WEIGHT = tl.constexpr(0x41000000)
_LARGEST = tl.constexpr(3.4028234663852886e38)
# The interpreter's cast to bfloat16 drops bits instead of rounding them.
_CUTS_OFF = tl.constexpr(knobs.runtime.interpret)
# Adding and taking away 1.5 * 2**23 rounds half to even, as torch.round does.
_ROUNDER = tl.constexpr(12582912.0)


@triton.jit
def row_offsets(t, live, b, h, table, table_b, stride_b, stride_h, stride_t, PAGE: tl.constexpr):
    """Offsets of rows t of one head, in elements; in pages of PAGE rows `stride_b` is a page's."""
    if PAGE == 0:
        return b * stride_b + h * stride_h + t.to(tl.int64) * stride_t
    page = tl.load(table + b * table_b + t // PAGE, mask=live, other=0).to(tl.int64)
    return page * stride_b + h * stride_h + (t % PAGE).to(tl.int64) * stride_t


@triton.jit
def tile_offsets(
    t, live, b, h, table, table_b, stride_b, stride_h, WORDS: tl.constexpr, PAGE: tl.constexpr
):
    """Offsets of the first words of rows t, in words of 4 bytes; the next line is 16 words on."""
    if PAGE == 0:
        return b * stride_b + h * stride_h + (t // 16).to(tl.int64) * WORDS + t % 16
    page = tl.load(table + b * table_b + t // PAGE, mask=live, other=0).to(tl.int64)
    within = t % PAGE
    return page * stride_b + h * stride_h + (within // 16) * WORDS + within % 16


@triton.jit
def rows_held(b, lengths, lengths_b, capacity, RAGGED: tl.constexpr):
    """How many rows a batch row holds."""
    if RAGGED:
        return tl.minimum(tl.load(lengths + b * lengths_b).to(tl.int32), capacity)
    return capacity


@triton.jit
def part_of(split, held, split_rows, UNIT: tl.constexpr):
    """The first row of a split and the first one behind it.

    The rows held are shared out in whole units, so that storage that is not full yet leaves no
    program idle; `split_rows` is what a split has of full storage.
    """
    splits = tl.num_programs(1)
    each = (held + splits * UNIT - 1) // (splits * UNIT) * UNIT
    each = tl.minimum(each, split_rows)
    return split * each, tl.minimum((split + 1) * each, held)


@triton.jit
def visible_rows(t, b, held, mask, mask_b, MASKED: tl.constexpr):
    """Which of the rows t exist and may be seen."""
    live = t < held
    if MASKED:
        live = live & (tl.load(mask + b * mask_b + t, mask=live, other=0) != 0)
    return live


@triton.jit
def visible_so_far(seen, split, SP: tl.constexpr):
    """How many rows are visible before a split, and in all: from the counts of every split."""
    of = tl.arange(0, SP)
    counts = tl.load(seen + of, mask=of < tl.num_programs(1), other=0)
    return tl.sum(tl.where(of < split, counts, 0), 0), tl.sum(counts, 0)


@triton.jit
def protected_rows(live, before, total, sinks, recents):
    """Which of a block's rows are among the first or the last visible ones, and how many it has."""
    count = tl.sum(live.to(tl.int32), 0)
    forced = live & (count < 0)  # none
    if (before < sinks) | (before + count > total - recents):
        rank = before + tl.cumsum(live.to(tl.int32), 0)
        forced = live & ((rank <= sinks) | (rank > total - recents))
    return forced, before + count


@triton.jit
def soft_cap(x, cap):
    """Cap * tanh(x / cap), to float32 precision; small arguments by the series of tanh."""
    x = x / cap
    square = x * x
    series = 1.0 + square * (
        -0.3333333333333333
        + square
        * (0.13333333333333333 + square * (-0.05396825396825397 + square * 0.02186948853615520))
    )
    size = tl.abs(x)
    far = 1.0 - 2.0 / (tl.exp(2.0 * size) + 1.0)
    return cap * tl.where(size < 0.3, x * series, tl.where(x < 0, -far, far))


@triton.jit
def narrowed(x, DTYPE: tl.constexpr):
    """Round float32 to a dtype, half to even; to bfloat16 by hand where the cast cuts off."""
    if DTYPE == tl.bfloat16 and _CUTS_OFF:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)
    return x.to(DTYPE)


@triton.jit
def product(a, b, PRECISION: tl.constexpr, WIDE: tl.constexpr):
    """The product of two blocks in float32; WIDE where bfloat16 products are not known."""
    if WIDE:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision=PRECISION)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def round_half_even(x):
    """The nearest whole number of floats below 2**22 in size."""
    return (x + _ROUNDER) - _ROUNDER


@triton.jit
def sort_keys(scores):
    """int32 in the order of float32 scores; equal scores get equal keys, NaN that of the lowest."""
    lowest = -_LARGEST
    scores = tl.where(scores == scores, scores, lowest)
    scores = tl.minimum(tl.maximum(scores, lowest), _LARGEST)
    scores = tl.where(scores == 0.0, 0.0, scores)  # minus zero equals zero
    bits = scores.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def bins_of(keys, KIND: tl.constexpr):
    """A bin in 0..511 that never falls as keys rise: where the k-th best is looked for first.

    Weights are told apart by their octave, logits by an even grid from -64 to 64, other scores by
    their exponent. What lies outside shares the outermost bins: that costs time, never exactness.
    """
    if KIND == "weights":
        lowest = _TOP_WEIGHT - ((BINS - 1) << _BIN_SHIFT)
        kept = tl.minimum(tl.maximum(keys, lowest), _TOP_WEIGHT)
        return (kept - lowest) >> _BIN_SHIFT
    if KIND == "logits":
        bits = keys ^ ((keys >> 31) & 0x7FFFFFFF)
        scores = tl.where(keys == FORCED, 64.0, bits.to(tl.float32, bitcast=True))
        return tl.minimum(tl.maximum((scores + 64.0) * 4.0, 0.0), 511.0).to(tl.int32)
    return (keys >> 23) + 256
