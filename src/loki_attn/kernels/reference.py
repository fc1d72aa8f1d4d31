"""The oracle of every op, in plain torch. It exists once and no fast path imports it.

Bytes read are stated per KV head of one decode step over T rows; b is the element size.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from loki_attn.errors import InputError, unknown_name
from loki_attn.tiles import CODE_KINDS, Tiles
from loki_attn.types import (
    AppendRequest,
    AttentionCall,
    AttentionOutput,
    GroupReduce,
    Lead,
    Reading,
    Selection,
)

NEG_INF = float("-inf")
_QUERY_BLOCK = 256
_HAMMING_BLOCK_BYTES = 1 << 23
_LARGEST_CODE = 127
_SMALLEST_NORMAL = torch.finfo(torch.float32).smallest_normal


def append(request: AppendRequest) -> bool:
    """Write new rows, their positions and their lead in one pass.

    Returns:
        Whether everything was written. Here never: the plain path of the cache is the reference.
    """
    del request
    return False


def step(  # noqa: PLR0913 - what scoring, choosing and attending take together
    query: Tensor,
    rows_query: Tensor,
    keys: Tensor,
    values: Tensor,
    lead: Lead,
    reading: Reading,
    how: GroupReduce,
    call: AttentionCall,
    visible: Tensor | None,
) -> tuple[Tensor, Selection] | None:
    """Score, choose and attend in one pass, for one query token.

    Args:
        query: [batch, heads, 1, head_dim], as the model made it; `lead` maps it.
        rows_query: The same in the space of the stored keys.
        keys: [batch, kv_heads, T, head_dim].
        values: [batch, kv_heads, T, value_dim].
        lead: What ranks the rows.
        reading: How much is read.
        how: How the query heads of a group agree.
        call: Scaling, soft-cap, sink logits.
        visible: None for all rows, or bool [batch or 1, 1, 1, T].

    Returns:
        [batch, heads, 1, value_dim] in the query's dtype and what was read, or None where there is
        no fused form. Here there is none: the straight line of `attention.decode` is the reference.
    """
    del query, rows_query, keys, values, lead, reading, how, call, visible
    return None


def score(
    query: Tensor, plane: Tensor | Tiles, scales: Tensor | None, call: AttentionCall
) -> Tensor:
    """Logits of every row from its leading coordinates (arXiv 2406.02542, algorithm 1).

    Reads T * r plane elements and T scales. A query meets tiles in their own precision: codes meet
    codes, in an exact integer product, and bfloat16 meets bfloat16. It meets plain rows unrounded.

    Args:
        query: [batch, heads, q_len, r], the leading coordinates of the mapped query.
        plane: [batch, kv_heads, T, r], or tiles of such rows.
        scales: None, or float [batch, kv_heads, T]: factor of each row, which codes need.
        call: Scaling and soft-cap of the logits.

    Returns:
        float32 [batch, heads, q_len, T]: scaled (and capped) logits.
    """
    if not isinstance(plane, Tiles):
        logits = _grouped_matmul(query, plane, call.scaling)
    elif plane.kind in CODE_KINDS:
        logits = _score_codes(query, plane, call.scaling)
    else:
        rounded = query.to(torch.bfloat16).to(query.dtype) if plane.kind == "bf16" else query
        logits = _grouped_matmul(rounded, plane.rows(), call.scaling)
    if scales is not None:
        grouped = logits.view(*scales.shape[:2], -1, scales.shape[2])
        grouped.mul_(scales.to(logits.dtype)[:, :, None])
    return _cap(logits, call.softcap)


def reduce_group(
    logits: Tensor, num_kv_heads: int, how: GroupReduce, visible: Tensor | None, call: AttentionCall
) -> Tensor:
    """Let the query heads of a group agree on one score per row.

    Args:
        logits: float32 [batch, heads, q_len, T].
        num_kv_heads: KV heads that the heads share.
        how: "softmax_sum" adds the heads' soft-max weights, "softmax_max" takes the largest of
            them; "sum" adds their scores, "max" takes the largest; "none" leaves every query head
            alone.
        visible: None, or bool broadcastable to [batch, 1, q_len, T]: rows a query may see.
        call: Its sink logits join the soft-max denominator.

    Returns:
        float32 [batch, kv_heads (heads for "none"), q_len, T].
    """
    batch, heads, q_len, seq = logits.shape
    if how == "none" or heads == num_kv_heads:
        return logits
    if how.startswith("softmax"):
        logits = estimated_weights(logits, visible, call)
    grouped = logits.view(batch, num_kv_heads, heads // num_kv_heads, q_len, seq)
    return grouped.sum(2) if how.endswith("sum") else grouped.amax(2)


def estimated_weights(logits: Tensor, visible: Tensor | None, call: AttentionCall) -> Tensor:
    """Soft-max weights of the visible rows; invisible rows get 0, unseeing queries all 0."""
    if visible is not None:
        logits = logits.masked_fill(~visible, NEG_INF)
    weights, total, _ = _soft_max(logits.clone() if visible is None else logits, call.sink_logits)
    return weights.div_(total[..., None])


def protect(visible: Tensor, sinks: int, recents: int) -> Tensor:
    """Mark the first `sinks` and the last `recents` visible rows of every query.

    Args:
        visible: bool [..., q_len, T].
        sinks: How many of the first visible rows.
        recents: How many of the last visible rows.

    Returns:
        bool of the same shape.
    """
    rank = visible.cumsum(-1)
    return visible & ((rank <= sinks) | (rank > rank[..., -1:] - recents))


def choose_mask(scores: Tensor, counts: Tensor, visible: Tensor, forced: Tensor) -> Tensor:
    """Mark the `counts` best rows of each query; ties go to the lower row.

    Args:
        scores: float32 [batch, rows, q_len, T]; NaN ranks last among the visible.
        counts: int64 broadcastable to [batch, rows, q_len], at most the visible rows.
        visible: bool broadcastable to `scores`.
        forced: bool broadcastable to `scores`: rows marked first.

    Returns:
        bool [batch, rows, q_len, T] with exactly `counts` marks per query.
    """
    lowest = torch.finfo(scores.dtype).min
    # Forced rows above the largest finite score, invisible rows below the lowest one.
    place = torch.where(forced, float("inf"), 0.0).masked_fill(~visible, NEG_INF)
    ranked = torch.nan_to_num(scores, nan=lowest, posinf=-lowest, neginf=lowest) + place
    counts = counts.expand(ranked.shape[:-1])
    if int(counts.max()) == 0:
        return torch.zeros_like(ranked, dtype=torch.bool)
    last = _nth_best(ranked, counts.clamp(min=1))[..., None]
    chosen = ranked >= last
    surplus = chosen.sum(-1) > counts
    if bool(surplus.any()):
        chosen[surplus] = _break_ties(ranked[surplus], last[surplus], counts[surplus])
    return chosen


def mass_counts(weights: Tensor, forced: Tensor, mass: float) -> Tensor:
    """Size of the smallest set, forced rows first, whose estimated mass reaches `mass`.

    Args:
        weights: float32 [batch, rows, q_len, T], each row's share; rows need not sum to 1.
        forced: bool broadcastable to `weights`.
        mass: Share of each query's total to reach, in (0, 1].

    Returns:
        int64 [batch, rows, q_len].
    """
    share = weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
    order = share.masked_fill(forced, float("inf")).sort(dim=-1, descending=True, stable=True)
    reached = share.gather(-1, order.indices).double().cumsum(-1)
    goal = mass * (1 - 1e-9)
    return (reached < goal).sum(-1).clamp(max=weights.shape[-1] - 1) + 1


def choose(scores: Tensor, counts: Tensor, visible: Tensor, forced: Tensor) -> Selection:
    """The rows that `choose_mask` marks, as ascending indices, for one query per head.

    Args:
        scores: float32 [batch, rows, 1, T].
        counts: int64 broadcastable to [batch, rows, 1].
        visible: bool broadcastable to `scores`.
        forced: bool broadcastable to `scores`.
    """
    mask = choose_mask(scores, counts, visible, forced)[:, :, 0]
    counted = mask.sum(-1)
    most = max(int(counted.max()), 1)
    slot = mask.cumsum(-1) - 1
    indices = counted.new_full((*mask.shape[:2], most + 1), -1)
    rows = torch.arange(mask.shape[-1], device=mask.device).expand_as(mask)
    indices.scatter_(2, slot.masked_fill(~mask, most), rows)
    return Selection(indices[..., :most].contiguous(), counted)


def attend(
    query: Tensor, keys: Tensor, values: Tensor, selection: Selection, call: AttentionCall
) -> AttentionOutput:
    """Exact attention of one query token to the selected rows.

    Reads k * (head_dim + value_dim) elements for a shared selection, up to group times that for
    one selection per query head.

    Args:
        query: [batch, heads, 1, head_dim].
        keys: [batch, kv_heads, T, head_dim].
        values: [batch, kv_heads, T, value_dim].
        selection: One index row per KV head, or one per query head.
        call: Scaling, soft-cap, sink logits.

    Returns:
        The output in the query's dtype and the log-sum-exp of the rows that were read.
    """
    if query.shape[2] != 1:
        raise InputError(
            f"attend takes one query token, got {query.shape[2]}; attend_masked takes more."
        )
    chosen = selection.indices.clamp(min=0)
    used = (selection.indices >= 0)[:, :, None]
    return _attend(query, _gather_rows(keys, chosen), _gather_rows(values, chosen), used, call)


def attend_masked(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, call: AttentionCall
) -> AttentionOutput:
    """Exact attention of any number of queries to the rows that a mask marks.

    Reads all T rows; it defines what is computed, not how fast.

    Args:
        query: [batch, heads, q_len, head_dim].
        keys: [batch, kv_heads, T, head_dim].
        values: [batch, kv_heads, T, value_dim].
        mask: None for all, or bool [batch or 1, kv_heads or heads or 1, q_len, T].
        call: Scaling, soft-cap, sink logits.
    """
    return _attend(query, keys, values, mask, call)


def dense(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    visible: Tensor | None,
    call: AttentionCall,
    *,
    causal: bool,
) -> Tensor:
    """Dense attention through torch's fused kernel where it can express the call.

    Reads T * (head_dim + value_dim) elements.

    Args:
        query: [batch, heads, q_len, head_dim].
        keys: [batch, kv_heads, T, head_dim].
        values: [batch, kv_heads, T, value_dim].
        visible: None, or bool broadcastable to [batch, heads, q_len, T].
        call: Scaling, soft-cap, sink logits.
        causal: With `visible` None: the queries are the last q_len rows and see no later row.

    Returns:
        [batch, heads, q_len, value_dim] in the query's dtype.
    """
    q_len, seq = query.shape[2], keys.shape[2]
    plain = call.softcap is None and call.sink_logits is None
    if visible is None and causal and q_len > 1 and not (plain and q_len == seq):
        visible = causal_mask(q_len, seq, query.device)
    if not plain:
        return _dense_blocks(query, keys, values, visible, call)
    if q_len == 1:
        return _dense_step(query, keys, values, visible, call)
    out = functional.scaled_dot_product_attention(
        query,
        keys,
        values,
        attn_mask=visible,
        is_causal=visible is None and causal,
        scale=call.scaling,
        enable_gqa=query.shape[1] != keys.shape[1],
    )
    if visible is None and (not causal or bool(torch.isfinite(out).all())):
        return out
    if visible is None:
        visible = causal_mask(q_len, seq, query.device)
    return _without_leaks(out, query, keys, values, visible, call)


def dense_column_sums(
    query: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None, call: AttentionCall
) -> tuple[Tensor, Tensor]:
    """Dense attention of one query token, and what every row received of it.

    Args:
        query: [batch, heads, 1, head_dim].
        keys: [batch, kv_heads, T, head_dim].
        values: [batch, kv_heads, T, value_dim].
        visible: None, or bool [batch or 1, 1, 1, T].
        call: Scaling, soft-cap, sink logits.

    Returns:
        [batch, heads, 1, value_dim] in the query's dtype, and float32 [batch, kv_heads, T]: the
        soft-max weights of each row, summed over the query heads of its group.
    """
    logits = _cap(_grouped_matmul(query, keys, call.scaling), call.softcap)
    weights = estimated_weights(logits, visible, call)
    sums = weights.view(*keys.shape[:2], -1, keys.shape[2]).sum(2)
    return attend_masked(query, keys, values, visible, call).output, sums.float()


def column_sums(
    query: Tensor,
    keys: Tensor,
    visible: Tensor | None,
    call: AttentionCall,
    *,
    window: int | None = None,
    bias: Tensor | None = None,
    how: Literal["sum", "max"] = "sum",
) -> Tensor:
    """What every row receives of the queries' attention, without the matrix of their weights.

    Reads T * head_dim elements, once per block of queries, and holds the weights of one block. H2O
    (arXiv 2306.14048), SnapKV (2404.14469), TOVA (2401.06104), KVzip (2505.23416) start from it.

    Args:
        query: [batch, heads, q_len, head_dim]; without `visible` the last q_len of the T rows.
        keys: [batch, kv_heads, T, head_dim].
        visible: None for causal, or bool [batch or 1, kv_heads or 1, q_len, T].
        call: Scaling, soft-cap, and sink logits, which join the denominator.
        window: Only the last `window` queries count; None, or more than there are, for all.
        bias: None, or float [batch, kv_heads, T], added to the capped logits (arXiv 2403.09054).
        how: Whether a row gets the sum of its weights over the queries, or the largest.

    Returns:
        float32 [batch, heads, T]: 0 for rows that nobody sees; a query that sees nothing adds 0.

    Raises:
        InputError: If causal queries outnumber the rows, the window is empty, or shapes differ.
        UnknownNameError: If `how` is not known.
    """
    _check_columns(query, keys, visible, window, bias, how)
    q_len, seq = query.shape[2], keys.shape[2]
    wide = torch.promote_types(query.dtype, torch.float32)
    keys, bias = keys.to(wide), None if bias is None else bias.to(wide)
    sums = query.new_zeros(*query.shape[:2], seq, dtype=wide)
    for start in range(0 if window is None else max(q_len - window, 0), q_len, _QUERY_BLOCK):
        stop = min(start + _QUERY_BLOCK, q_len)
        last = seq if visible is not None else seq - q_len + stop
        seen = None if visible is None else visible[:, :, start:stop]
        if seen is None:
            seen = causal_mask(stop - start, last, query.device)
        rows = None if bias is None else bias[:, :, :last]
        weights = _weights(query[:, :, start:stop], keys[:, :, :last], seen, rows, call)
        known = sums[:, :, :last]
        if how == "sum":
            known += weights.sum(2)
        else:
            known.copy_(torch.maximum(known, weights.amax(2)))
    return sums.float()


def hamming(query_codes: Tensor, codes: Tensor) -> Tensor:
    """How many bits of a query's code differ from those of every row (HATA, arXiv 2506.02572).

    Reads T * words * 4 bytes.

    Args:
        query_codes: int32 [batch, heads, q_len, words], 32 bits to a word.
        codes: int32 [batch, kv_heads, T, words].

    Returns:
        float32 [batch, heads, q_len, T], whole numbers from 0 to 32 * words.

    Raises:
        InputError: If the codes are not int32 or do not fit each other.
    """
    batch, heads, q_len, words = query_codes.shape
    kv_heads, seq = codes.shape[1:3]
    _check_shape("codes", codes, (batch,), (kv_heads,), (seq,), (words,))
    if query_codes.dtype != torch.int32 or codes.dtype != torch.int32:
        raise InputError(f"Codes are int32, got {query_codes.dtype} and {codes.dtype}.")
    asked = query_codes.contiguous().view(torch.uint8)
    held = codes.contiguous().view(torch.uint8)[:, :, None, None]
    out = query_codes.new_empty(batch, heads, q_len, seq, dtype=torch.float32)
    block = max(1, _HAMMING_BLOCK_BYTES // max(1, batch * heads * seq * words * 4))
    for start in range(0, q_len, block):
        part = asked[:, :, start : start + block]
        grouped = part.view(batch, kv_heads, heads // kv_heads, -1, 1, words * 4)
        found = _set_bits(grouped ^ held).sum(-1, dtype=torch.int32)
        out[:, :, start : start + block] = found.view(batch, heads, -1, seq)
    return out


def causal_mask(q_len: int, seq: int, device: torch.device) -> Tensor:
    """Bool [1, 1, q_len, seq]: query i is row seq - q_len + i; it sees itself and the past."""
    last = torch.arange(seq - q_len, seq, device=device)[:, None]
    return (torch.arange(seq, device=device)[None] <= last)[None, None]


def _check_columns(
    query: Tensor,
    keys: Tensor,
    visible: Tensor | None,
    window: int | None,
    bias: Tensor | None,
    how: str,
) -> None:
    (batch, _, q_len, _), (kv_heads, seq) = query.shape, keys.shape[1:3]
    if how not in {"sum", "max"}:
        raise unknown_name("reduction over queries", how, ("sum", "max"))
    if window is not None and window < 1:
        raise InputError(f"window must be at least 1, or None for all queries; got {window}.")
    if visible is None and q_len > seq:
        raise InputError(f"{q_len} causal queries came with {seq} rows; pass fewer, or a mask.")
    _check_shape("visible", visible, (batch, 1), (kv_heads, 1), (q_len,), (seq,))
    _check_shape("bias", bias, (batch,), (kv_heads,), (seq,))


def _check_shape(name: str, tensor: Tensor | None, *sizes: tuple[int, ...]) -> None:
    """Check that a tensor has one of some sizes in every dimension."""
    shape = () if tensor is None else tensor.shape
    fits = len(shape) == len(sizes) and all(map(tuple.__contains__, sizes, shape))
    if tensor is not None and not fits:
        wanted = ", ".join(" or ".join(map(str, dict.fromkeys(fit))) for fit in sizes)
        raise InputError(f"{name} must have the shape [{wanted}], got {list(shape)}.")


def _weights(
    query: Tensor, keys: Tensor, visible: Tensor, bias: Tensor | None, call: AttentionCall
) -> Tensor:
    """Soft-max weights [batch, heads, q_len, T] of the visible rows, with a bias per row."""
    logits = _cap(_grouped_matmul(query, keys, call.scaling), call.softcap)
    if bias is not None:
        _by_chooser(logits, bias).add_(bias[:, :, None, None])
    _by_chooser(logits, visible).masked_fill_(~visible[:, :, None], NEG_INF)
    weights, total, _ = _soft_max(logits, call.sink_logits)
    return weights.div_(total[..., None])


def _set_bits(numbers: Tensor) -> Tensor:
    """How many bits of each byte are set: sums of neighbours of 1, 2 and 4 bits."""
    numbers = (numbers & 0x55) + ((numbers >> 1) & 0x55)
    numbers = (numbers & 0x33) + ((numbers >> 2) & 0x33)
    return (numbers & 0x0F) + (numbers >> 4)


def _dense_step(
    query: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None, call: AttentionCall
) -> Tensor:
    """One query token: the group's heads become query rows, so that a row is read once."""
    batch, heads, _, dim = query.shape
    kv_heads = keys.shape[1]
    grouped = query.reshape(batch, kv_heads, heads // kv_heads, dim)
    out = functional.scaled_dot_product_attention(
        grouped, keys, values, attn_mask=visible, scale=call.scaling
    )
    out = out.reshape(batch, heads, 1, values.shape[3])
    return out if visible is None else _without_leaks(out, query, keys, values, visible, call)


def _dense_blocks(
    query: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None, call: AttentionCall
) -> Tensor:
    """What the fused kernel cannot express, a block of queries at a time to bound the memory."""
    blocks = []
    for start in range(0, query.shape[2], _QUERY_BLOCK):
        block = slice(start, start + _QUERY_BLOCK)
        seen = None if visible is None else visible[:, :, block]
        blocks.append(attend_masked(query[:, :, block], keys, values, seen, call).output)
    return torch.cat(blocks, 2)


def _without_leaks(
    out: Tensor, query: Tensor, keys: Tensor, values: Tensor, visible: Tensor, call: AttentionCall
) -> Tensor:
    """Redo what the fused kernel spoilt: it lets NaN and infinity through its mask."""
    if bool(torch.isfinite(out).all()):
        return out.masked_fill(~visible.any(-1, keepdim=True), 0.0)
    return _dense_blocks(query, keys, values, visible, call)


def _score_codes(query: Tensor, plane: Tiles, scaling: float) -> Tensor:
    """The query becomes int8 codes, too, with one scale per head and token.

    The product of codes is exact: float32 holds every integer up to 1040 * 127 * 127.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    scale = query.to(wide).abs().amax(-1, keepdim=True) / _LARGEST_CODE
    scale = scale.masked_fill(scale < _SMALLEST_NORMAL, 1.0)
    codes = torch.round(query.to(wide) / scale)
    return _grouped_matmul(codes, plane.rows(), 1.0).mul_(scale * scaling)


def _nth_best(ranked: Tensor, counts: Tensor) -> Tensor:
    """The counts-th largest of each row [..., T], without sorting more than counts differ."""
    most, least = int(counts.max()), int(counts.min())
    best = torch.topk(ranked, most, dim=-1, sorted=False).values
    tail = torch.topk(best, most - least + 1, dim=-1, largest=False).values
    return tail.gather(-1, (most - counts)[..., None])[..., 0]


def _break_ties(ranked: Tensor, last: Tensor, counts: Tensor) -> Tensor:
    """Mark the rows above `last`, then the lowest ones equal to it, `counts` in all."""
    above, tied = ranked > last, ranked == last
    missing = (counts - above.sum(-1))[..., None]
    return above | (tied & (tied.cumsum(-1) <= missing))


def _attend(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, call: AttentionCall
) -> AttentionOutput:
    """Soft-max attention in float32 (float64 stays); keys may have kv_heads or heads heads."""
    logits = _cap(_grouped_matmul(query, keys, call.scaling), call.softcap)
    if mask is not None:
        logits = _by_chooser(logits, mask).masked_fill_(~mask[:, :, None], NEG_INF)
        logits = logits.view(*query.shape[:3], keys.shape[2])
    weights, total, lse = _soft_max(logits, call.sink_logits)
    out = _weighted_sum(weights, values, mask) / total[..., None]
    return AttentionOutput(out.to(query.dtype), lse)


def _weighted_sum(weights: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Weigh values; rows that a query does not read cannot spoil it, whatever they hold."""
    batch, heads, q_len, seq = weights.shape
    rows = weights.view(batch, values.shape[1], -1, seq)
    out = (rows @ values.to(rows.dtype)).view(batch, heads, q_len, -1)
    if mask is None or bool(torch.isfinite(out).all()):
        return out
    sound = torch.isfinite(values)
    out = (rows @ values.masked_fill(~sound, 0.0).to(rows.dtype)).view_as(out)
    spoilt = (~sound.all(-1)).repeat_interleave(heads // values.shape[1], 1)[:, :, None]
    read = _by_chooser(spoilt.expand(-1, -1, q_len, -1), mask) & mask[:, :, None]
    return out.masked_fill(read.any(-1).view(batch, heads, q_len, 1), float("nan"))


def _by_chooser(rows: Tensor, mask: Tensor) -> Tensor:
    """View [batch, heads, ...] as [batch, choosers, heads / choosers, ...], as `mask` chooses."""
    return rows.view(rows.shape[0], mask.shape[1], -1, *rows.shape[2:])


def _grouped_matmul(query: Tensor, keys: Tensor, scaling: float) -> Tensor:
    """Return scaling * q.k, float32 or wider [batch, heads, q_len, T]; groups share keys."""
    batch, heads, q_len, dim = query.shape
    wide = torch.promote_types(query.dtype, torch.float32)
    rows = query.to(wide).reshape(batch, keys.shape[1], -1, dim)
    logits = (rows @ keys.to(wide).transpose(2, 3)).view(batch, heads, q_len, keys.shape[2])
    return logits.mul_(scaling)


def _cap(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def _soft_max(logits: Tensor, sink_logits: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Soft-max in parts, overwriting `logits`: weights = exponentials / total, log-sum-exp.

    Where every logit is -inf the weights are 0, the total is 1 and the log-sum-exp is -inf.
    """
    peak = logits.amax(-1)
    sinks = None if sink_logits is None else sink_logits.to(logits.dtype)[:, None]
    if sinks is not None:
        peak = torch.maximum(peak, sinks)
    peak = peak.masked_fill(peak == NEG_INF, 0.0)
    weights = logits.sub_(peak[..., None]).exp_()
    total = weights.sum(-1)
    if sinks is not None:
        total = total + torch.exp(sinks - peak)
    log_sum_exp = peak + total.log()
    return weights, total.masked_fill(total == 0, 1.0), log_sum_exp


def _gather_rows(rows: Tensor, indices: Tensor) -> Tensor:
    """Rows [batch, kv_heads, T, dim] at indices [batch, kv_heads or heads, k], row by row."""
    batch, heads, picked = indices.shape
    group = heads // rows.shape[1]
    out = rows.new_empty(batch, heads, picked, rows.shape[3])
    for b in range(batch):
        for h in range(heads):
            torch.index_select(rows[b, h // group], 0, indices[b, h], out=out[b, h])
    return out
