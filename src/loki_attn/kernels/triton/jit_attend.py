"""On the device: exact attention to rows that an index list names, split over the list."""

import triton
import triton.language as tl

from loki_attn.kernels.triton.jit_rows import narrowed, product, row_offsets, soft_cap

_FAR_BELOW = tl.constexpr(-1.0e30)


@triton.jit
def _finish(total, peak, acc, sink_logits, head, heads, HEADS: tl.constexpr, SINKS: tl.constexpr):
    """The weighted mean and the log-sum-exp, with the sink logit in the denominator."""
    if SINKS:
        sink = tl.load(sink_logits + head + heads, mask=heads < HEADS, other=_FAR_BELOW)
        higher = tl.maximum(peak, sink.to(tl.float32))
        acc = acc * tl.exp(peak - higher)[:, None]
        total = total * tl.exp(peak - higher) + tl.exp(sink.to(tl.float32) - higher)
        peak = higher
    some = total != 0  # NaN is not nothing
    whole = tl.where(some, total, 1.0)
    return acc / whole[:, None], tl.where(some, peak + tl.log(whole), float("-inf"))


@triton.jit(do_not_specialize=["most", "split_rows", "table_b"])
def attend_rows(
    out, sums, query, query_b, query_h, keys, keys_b, keys_h, keys_t, values, values_b, values_h,
    values_t, table, table_b, indices, found, sink_logits, most, split_rows, scaling, softcap,
    CHOOSERS: tl.constexpr, SHARE: tl.constexpr, HEADS: tl.constexpr, HP: tl.constexpr,
    DIM: tl.constexpr, DP: tl.constexpr, VALUE_DIM: tl.constexpr, VP: tl.constexpr,
    BLOCK: tl.constexpr, PAGE: tl.constexpr, PRECISION: tl.constexpr, CAPPED: tl.constexpr,
    SINKS: tl.constexpr, WHOLE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Attend to a split of the list of each chooser.

    Grid: batch * choosers, splits. WHOLE: there is one split, and `out` is the output
    [batch, heads, VALUE_DIM] with `sums` its log-sum-exp [batch, heads]; otherwise `out` is float32
    [batch * heads, splits, VALUE_DIM] and `sums` float32 [batch * heads, splits], means of splits
    and their log-sum-exp, for `merge`.
    """
    split = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64)
    b = row // CHOOSERS
    chooser = row % CHOOSERS
    kv = chooser // SHARE
    heads = tl.arange(0, HP)
    dims = tl.arange(0, DP)
    columns = tl.arange(0, VP)
    mine = query + b * query_b + (chooser * HEADS + heads)[:, None] * query_h
    inside = (heads < HEADS)[:, None] & (dims < DIM)[None, :]
    asked = tl.load(mine + dims[None, :], mask=inside, other=0.0)
    count = tl.load(found + row).to(tl.int32)
    peak = tl.full([HP], _FAR_BELOW, tl.float32)
    total = tl.zeros([HP], tl.float32)
    acc = tl.zeros([HP, VP], tl.float32)
    for start in range(split * split_rows, tl.minimum((split + 1) * split_rows, count), BLOCK):
        slot = start + tl.arange(0, BLOCK)
        live = slot < count
        t = tl.load(indices + row * most + slot, mask=live, other=0)
        at = row_offsets(t, live, b, kv, table, table_b, keys_b, keys_h, keys_t, PAGE)
        there = live[:, None] & (dims < DIM)[None, :]
        key = tl.load(keys + at[:, None] + dims[None, :], mask=there, other=0.0)
        logits = product(asked, tl.trans(key), PRECISION, WIDE) * scaling
        if CAPPED:
            logits = soft_cap(logits, softcap)
        logits = tl.where(live[None, :], logits, float("-inf"))
        higher = tl.maximum(peak, tl.max(logits, 1))
        weights = tl.exp(logits - higher[:, None])
        fade = tl.exp(peak - higher)
        at = row_offsets(t, live, b, kv, table, table_b, values_b, values_h, values_t, PAGE)
        there = live[:, None] & (columns < VALUE_DIM)[None, :]
        value = tl.load(values + at[:, None] + columns[None, :], mask=there, other=0.0)
        acc = acc * fade[:, None]
        acc += product(narrowed(weights, value.dtype), value, PRECISION, WIDE)
        total = total * fade + tl.sum(weights, 1)
        peak = higher
    if WHOLE:
        mean, log_sum = _finish(total, peak, acc, sink_logits, chooser * HEADS, heads, HEADS, SINKS)
        first = row * HEADS + heads
    else:
        some = total != 0  # NaN is not nothing
        whole = tl.where(some, total, 1.0)
        mean = acc / whole[:, None]
        log_sum = tl.where(some, peak + tl.log(whole), _FAR_BELOW)
        first = (row * HEADS + heads) * tl.num_programs(1) + split
    tl.store(sums + first, log_sum, mask=heads < HEADS)
    there = (heads < HEADS)[:, None] & (columns < VALUE_DIM)[None, :]
    to = out + first[:, None] * VALUE_DIM + columns[None, :]
    tl.store(to, narrowed(mean, out.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["splits"])
def merge(
    out, log_sums, parts, sums, sink_logits, splits, HEADS: tl.constexpr, SP: tl.constexpr,
    VALUE_DIM: tl.constexpr, VP: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """Merge the splits of one head: weigh their means by their log-sum-exp. Grid: batch * heads."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SP)
    columns = tl.arange(0, VP)
    known = tl.load(sums + row * splits + split, mask=split < splits, other=_FAR_BELOW)
    peak = tl.max(known, 0)
    if SINKS:
        sink = tl.load(sink_logits + row % HEADS).to(tl.float32)
        peak = tl.maximum(peak, sink)
    weights = tl.where(known != _FAR_BELOW, tl.exp(known - peak), 0.0)
    total = tl.sum(weights, 0)
    place = parts + (row * splits + split)[:, None] * VALUE_DIM + columns[None, :]
    there = (split < splits)[:, None] & (columns < VALUE_DIM)[None, :]
    part = tl.load(place, mask=there, other=0.0)
    acc = tl.sum(tl.where((weights != 0)[:, None], part * weights[:, None], 0.0), 0)
    if SINKS:
        total += tl.exp(sink - peak)
    some = total != 0  # NaN is not nothing
    whole = tl.where(some, total, 1.0)
    to = out + row * VALUE_DIM + columns
    tl.store(to, narrowed(acc / whole, out.dtype.element_ty), mask=columns < VALUE_DIM)
    tl.store(log_sums + row, tl.where(some, peak + tl.log(whole), float("-inf")))
