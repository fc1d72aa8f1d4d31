"""On the device: the soft-max sums of many queries, and what every row receives of their weights.

Queries are those that count: the first of them is number 0, whatever came before it.
"""

import triton
import triton.language as tl

from loki_attn.kernels.triton.jit_rows import product, soft_cap


@triton.jit
def _load_rows(place, stride, t, end, DIM: tl.constexpr, DP: tl.constexpr):
    """Rows t of one head, [rows, DP]; zeros from row `end` on."""
    dims = tl.arange(0, DP)
    inside = (t < end)[:, None] & (dims < DIM)[None, :]
    return tl.load(place + t.to(tl.int64)[:, None] * stride + dims[None, :], mask=inside, other=0.0)


@triton.jit
def _logits(
    asked, key, t, bias, bias_t, seq, scaling, softcap,
    BIASED: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Logits [queries, rows] of rows t; whether one is seen is another question."""
    logits = product(asked, tl.trans(key), PRECISION, WIDE) * scaling
    if CAPPED:
        logits = soft_cap(logits, softcap)
    if BIASED:
        extra = tl.load(bias + t.to(tl.int64) * bias_t, mask=t < seq, other=0.0)
        logits += extra.to(tl.float32)[None, :]
    return logits


@triton.jit
def _seen(
    first, start, mask, mask_q, mask_t, counted, seq,
    QUERIES: tl.constexpr, ROWS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Which of the rows from `start` on each of the queries from `first` on sees."""
    beside = tl.arange(0, QUERIES)
    below = tl.arange(0, ROWS)
    last = seq - 1
    if not MASKED:
        last = first + beside + seq - counted
    last = tl.where(first + beside < counted, last, -1)
    seen = (start + below)[None, :] <= last[:, None]
    if MASKED:  # from the corner of the block on, 32 bits count its elements
        corner = mask + tl.cast(first, tl.int64) * mask_q + tl.cast(start, tl.int64) * mask_t
        place = corner + beside[:, None] * mask_q + below[None, :] * mask_t
        seen = seen & (tl.load(place, mask=seen, other=0) != 0)
    return seen


@triton.jit
def _finite_base(peak):
    """What logits are taken relative to: their peak, or 0 where there is none."""
    return tl.where(peak == float("-inf"), 0.0, peak)


@triton.jit(do_not_specialize=["counted", "seq", "splits", "split_rows"])
def sum_queries(
    stats, query, query_b, query_h, query_q, keys, keys_b, keys_h, keys_t,
    mask, mask_b, mask_h, mask_q, mask_t, bias, bias_b, bias_h, bias_t,
    counted, seq, splits, split_rows, scaling, softcap,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, DP: tl.constexpr,
    QUERIES: tl.constexpr, ROWS: tl.constexpr, MASKED: tl.constexpr, BIASED: tl.constexpr,
    CAPPED: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Per query, the peak of its logits of a split of the rows and the sum of their exponentials.

    Grid: query heads of a group * splits * blocks of queries, batch * kv_heads. `stats` is float32
    [batch * heads, splits, 2, counted]. Neighbours read the same keys, and the last queries, which
    see the most rows, come first.
    """
    row = tl.program_id(1).to(tl.int64)
    b = row // KV_HEADS
    kv = row % KV_HEADS
    head = row * GROUP + tl.program_id(0) % GROUP
    place = tl.program_id(0) // GROUP
    split = place % splits
    block = tl.num_programs(0) // (GROUP * splits) - 1 - place // splits
    i = block * QUERIES + tl.arange(0, QUERIES)
    mine = query + b * query_b + (head - b * KV_HEADS * GROUP) * query_h
    asked = _load_rows(mine, query_q, i, counted, DIM, DP)
    held = keys + b * keys_b + kv * keys_h
    mask += b * mask_b + kv * mask_h
    bias += b * bias_b + kv * bias_h
    stop = tl.minimum((split + 1) * split_rows, seq)
    if not MASKED:  # beyond the last row that the last query of the block sees
        stop = tl.minimum(stop, seq - counted + tl.minimum((block + 1) * QUERIES, counted))
    peak = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    for start in range(split * split_rows, stop, ROWS):
        t = start + tl.arange(0, ROWS)
        key = _load_rows(held, keys_t, t, seq, DIM, DP)
        logits = _logits(
            asked, key, t, bias, bias_t, seq, scaling, softcap, BIASED, CAPPED, PRECISION, WIDE
        )
        first = block * QUERIES
        seen = _seen(first, start, mask, mask_q, mask_t, counted, seq, QUERIES, ROWS, MASKED)
        logits = tl.where(seen, logits, float("-inf"))
        higher = tl.maximum(peak, tl.max(logits, 1))
        base = _finite_base(higher)
        total = total * tl.exp(peak - base) + tl.sum(tl.exp(logits - base[:, None]), 1)
        peak = higher
    to = stats + (head * splits + split) * 2 * counted + i
    tl.store(to, peak, mask=i < counted)
    tl.store(to + counted, total, mask=i < counted)


@triton.jit(do_not_specialize=["counted", "splits"])
def settle_sums(
    factors, stats, sink_logits, counted, splits,
    HEADS: tl.constexpr, BLOCK: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """Merge the splits of each query, its sink logit included: what turns logits into weights.

    Grid: blocks of queries, batch * heads. `factors` is float32 [batch * heads, 2, counted]: what
    is taken from a logit, and what its exponential is multiplied by, 0 where nothing is seen.
    """
    row = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first = stats + row * splits * 2 * counted + i
    peak = tl.full([BLOCK], float("-inf"), tl.float32)
    for split in range(splits):
        there = first + split * 2 * counted
        peak = tl.maximum(peak, tl.load(there, mask=i < counted, other=0.0))
    if SINKS:
        sink = tl.load(sink_logits + row % HEADS)
        peak = tl.maximum(peak, sink)
    base = _finite_base(peak)
    total = tl.zeros([BLOCK], tl.float32)
    for split in range(splits):
        there = first + split * 2 * counted
        faded = tl.exp(tl.load(there, mask=i < counted, other=0.0) - base)
        total += faded * tl.load(there + counted, mask=i < counted, other=0.0)
    if SINKS:
        total += tl.exp(sink - base)
    to = factors + row * 2 * counted + i
    tl.store(to, base, mask=i < counted)
    some = total != 0.0
    share = tl.where(some, 1.0 / tl.where(some, total, 1.0), 0.0)
    tl.store(to + counted, share, mask=i < counted)


@triton.jit(do_not_specialize=["counted", "seq"])
def sum_columns(
    out, factors, query, query_b, query_h, query_q, keys, keys_b, keys_h, keys_t,
    mask, mask_b, mask_h, mask_q, mask_t, bias, bias_b, bias_h, bias_t,
    counted, seq, scaling, softcap,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, DP: tl.constexpr,
    QUERIES: tl.constexpr, ROWS: tl.constexpr, MASKED: tl.constexpr, BIASED: tl.constexpr,
    CAPPED: tl.constexpr, LARGEST: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Write what a block of rows receives of every query of a head, float32 [batch * heads, T].

    Grid: query heads of a group * blocks of rows, batch * kv_heads. `factors` is what `settle_sums`
    wrote. Every lane keeps a sum of its own, so that lanes meet only once.
    """
    row = tl.program_id(1).to(tl.int64)
    b = row // KV_HEADS
    kv = row % KV_HEADS
    head = row * GROUP + tl.program_id(0) % GROUP
    block = tl.program_id(0) // GROUP
    t = block * ROWS + tl.arange(0, ROWS)
    key = _load_rows(keys + b * keys_b + kv * keys_h, keys_t, t, seq, DIM, DP)
    mine = query + b * query_b + (head - b * KV_HEADS * GROUP) * query_h
    mask += b * mask_b + kv * mask_h
    bias += b * bias_b + kv * bias_h
    known = factors + head * 2 * counted
    first = 0
    if not MASKED:  # before the query that is the first row of the block
        first = tl.maximum(block * ROWS - (seq - counted), 0)
    received = tl.zeros([QUERIES, ROWS], tl.float32)
    for start in range(first, counted, QUERIES):
        i = start + tl.arange(0, QUERIES)
        asked = _load_rows(mine, query_q, i, counted, DIM, DP)
        base = tl.load(known + i, mask=i < counted, other=0.0)
        share = tl.load(known + counted + i, mask=i < counted, other=0.0)
        logits = _logits(
            asked, key, t, bias, bias_t, seq, scaling, softcap, BIASED, CAPPED, PRECISION, WIDE
        )
        top = block * ROWS
        seen = _seen(start, top, mask, mask_q, mask_t, counted, seq, QUERIES, ROWS, MASKED)
        weights = tl.exp(logits - base[:, None]) * share[:, None]
        # Not by multiplying: what a hidden row holds may be no number.
        weights = tl.where(seen, weights, 0.0)
        if LARGEST:  # what is no number stays none
            received = tl.where((weights > received) | (weights != weights), weights, received)
        else:
            received += weights
    if LARGEST:
        spoilt = tl.max((received != received).to(tl.int32), 0) > 0
        result = tl.where(spoilt, float("nan"), tl.max(received, 0))
    else:
        result = tl.sum(received, 0)
    tl.store(out + head * seq + t, result, mask=t < seq)
