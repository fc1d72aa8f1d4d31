"""Many queries at once: what rows receive of their attention, and how far codes lie apart."""

from typing import Final, Literal

import torch
from torch import Tensor

from loki_attn.kernels.backends import Unserved
from loki_attn.kernels.triton import device, tuning
from loki_attn.kernels.triton.jit_columns import settle_sums, sum_columns, sum_queries
from loki_attn.kernels.triton.jit_hamming import count_bits
from loki_attn.kernels.triton.request import power_of_two, served, sink_logits_of
from loki_attn.types import AttentionCall

_MOST_DIM: Final = 256
_MOST_WORDS: Final = 256
# Blocks have at most 128 queries and 128 rows.
_MOST_MASK_STRIDE: Final = 2**31 // 128


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
    """What every row receives of the queries' attention; see `reference.column_sums`.

    Three launches: the soft-max sums of each query, over splits of the rows where few queries
    count; their merging; the rows, each by one program that goes through the queries in order. In
    memory lie 8 bytes per query, head and split, never a weight.
    """
    counted = _counted(query, keys, visible, window, how)
    _check_extras(query, keys, visible, bias)
    heads, q_len = query.shape[1:3]
    sink_logits = sink_logits_of(call, heads, query)
    # From here on there are no other queries.
    query = query[:, :, q_len - counted :]
    with device.on(keys):
        if visible is not None:
            visible = visible[:, :, q_len - counted :]
        return _sum(query, keys, visible, bias, call, sink_logits, how)


def hamming(query_codes: Tensor, codes: Tensor) -> Tensor:
    """How many bits of the codes of queries and rows differ; see `reference.hamming`."""
    _check_codes(query_codes, codes)
    batch, heads, q_len, words = query_codes.shape
    kv_heads, seq = codes.shape[1:3]
    asked = heads // kv_heads * q_len
    padded = power_of_two(words)
    cut = tuning.hamming_cut(padded)
    out = torch.empty((batch, heads, q_len, seq), dtype=torch.float32, device=codes.device)
    grid = (-(-seq // cut.block), batch * kv_heads, -(-asked // tuning.HAMMING_QUERIES))
    with device.on(codes):
        count_bits[grid](
            out, query_codes, *query_codes.stride()[:3], codes, *codes.stride()[:3],
            asked, q_len, seq, KV_HEADS=kv_heads, GROUP=heads // kv_heads, WORDS=words, WP=padded,
            QUERIES=tuning.HAMMING_QUERIES, BLOCK=cut.block, **cut.launch,
        )  # fmt: skip
    return out


def _sum(
    query: Tensor,
    keys: Tensor,
    visible: Tensor | None,
    bias: Tensor | None,
    call: AttentionCall,
    sink_logits: Tensor | None,
    how: str,
) -> Tensor:
    """Launch the kernels; every query counts."""
    (batch, heads, counted, dim), (kv_heads, seq) = query.shape, keys.shape[1:3]
    group, size = heads // kv_heads, keys.element_size()
    plain = visible is None and bias is None
    by_query = tuning.query_pane(counted, dim, size, masked=visible is not None)
    by_row = tuning.row_pane(counted, dim, size, plain=plain)
    blocks = -(-counted // by_query.queries)
    busy = device.programs_wanted(keys.device) // 2
    splits, split_rows = tuning.splits_of(
        seq, batch * heads * blocks, by_query.rows, busy, tuning.MERGED_SPLITS
    )
    stats = query.new_empty((batch * heads, splits, 2, counted), dtype=torch.float32)
    factors = query.new_empty((batch * heads, 2, counted), dtype=torch.float32)
    out = query.new_empty((batch, heads, seq), dtype=torch.float32)
    given = (
        query, *query.stride()[:3], keys, *keys.stride()[:3], *_mask_of(visible, batch, keys),
        *_bias_of(bias, keys),
    )  # fmt: skip
    how_many = {"KV_HEADS": kv_heads, "GROUP": group, "DIM": dim, "DP": power_of_two(max(dim, 16))}
    kind = {
        "MASKED": visible is not None, "BIASED": bias is not None,
        "CAPPED": call.softcap is not None, "PRECISION": device.mapping_precision(),
        "WIDE": device.interpreted(),
    }  # fmt: skip
    sum_queries[(group * splits * blocks, batch * kv_heads)](
        stats, *given, counted, seq, splits, split_rows, call.scaling, call.softcap or 1.0,
        **how_many, QUERIES=by_query.queries, ROWS=by_query.rows, **kind,
        **by_query.launch,
    )  # fmt: skip
    settle_sums[(-(-counted // tuning.SETTLE.block), batch * heads)](
        factors, stats, factors if sink_logits is None else sink_logits, counted, splits,
        HEADS=heads, BLOCK=tuning.SETTLE.block, SINKS=sink_logits is not None,
        **tuning.SETTLE.launch,
    )  # fmt: skip
    sum_columns[(group * -(-seq // by_row.rows), batch * kv_heads)](
        out, factors, *given, counted, seq, call.scaling, call.softcap or 1.0,
        **how_many, QUERIES=by_row.queries, ROWS=by_row.rows, LARGEST=how == "max", **kind,
        **by_row.launch,
    )  # fmt: skip
    return out


def _mask_of(visible: Tensor | None, batch: int, keys: Tensor) -> tuple[Tensor | int, ...]:
    """The mask and its four strides, 0 where heads or batch rows share it."""
    if visible is None:
        return keys, 0, 0, 0, 0
    spread = visible.expand(batch, keys.shape[1], -1, -1)
    return spread, *spread.stride()


def _bias_of(bias: Tensor | None, keys: Tensor) -> tuple[Tensor | int, ...]:
    """The bias and its three strides."""
    return (keys, 0, 0, 0) if bias is None else (bias, *bias.stride())


def _counted(
    query: Tensor, keys: Tensor, visible: Tensor | None, window: int | None, how: str
) -> int:
    """How many queries count; what is asked must be something that is known.

    Raises:
        Unserved: If it is not, or the sizes or dtypes of queries and keys do not fit.
    """
    _same_heads(query, keys)
    served(query, keys)
    batch, _, q_len, dim = query.shape
    kv_heads, seq = keys.shape[1:3]
    counted = q_len if window is None else min(window, q_len)
    if how not in {"sum", "max"} or counted < 1 or (visible is None and q_len > seq):
        raise Unserved(f"it knows no {how!r} of {counted} among {q_len} queries on {seq} rows")
    if query.dtype != keys.dtype:
        raise Unserved(f"{query.dtype} queries met {keys.dtype} keys")
    if dim > _MOST_DIM:
        raise Unserved(f"rows of {dim} elements are longer than {_MOST_DIM}")
    if visible is not None:
        _check_mask(visible, (batch, kv_heads, q_len, seq))
    return counted


def _check_mask(visible: Tensor, shape: tuple[int, int, int, int]) -> None:
    """Check that a mask says of every query and row whether one sees the other.

    Raises:
        Unserved: If it does not, or lies so far apart that 32 bits do not count a block of it.
    """
    if not _is_mask(visible, shape):
        batch, kv_heads, q_len, seq = shape
        raise Unserved(
            f"a mask is bool [{batch} or 1, {kv_heads} or 1, {q_len}, {seq}], not "
            f"{visible.dtype} {list(visible.shape)}"
        )
    steps = [visible.stride(place) for place in (2, 3) if visible.shape[place] > 1]
    if sum(steps) >= _MOST_MASK_STRIDE:
        raise Unserved(f"the elements of the mask lie {max(steps)} bytes apart")


def _is_mask(visible: Tensor, shape: tuple[int, int, int, int]) -> bool:
    """Whether it is bool [batch or 1, kv_heads or 1, q_len, T]."""
    fits = visible.dtype == torch.bool and visible.ndim == 4
    return fits and all(
        size == whole or (place < 2 and size == 1)
        for place, (size, whole) in enumerate(zip(visible.shape, shape, strict=True))
    )


def _check_extras(query: Tensor, keys: Tensor, visible: Tensor | None, bias: Tensor | None) -> None:
    """Check the bias, where everything lies, and that nobody asks for gradients.

    Raises:
        Unserved: If something of it is not served.
    """
    if bias is not None:
        if bias.shape != keys.shape[:3]:
            raise Unserved(f"a bias {list(bias.shape)} is not one for each of the rows")
        served(bias[..., None])
    _one_device(keys, query, visible, bias)
    tensors = (query, keys, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise Unserved("it has no gradients, and one is asked for")


def _same_heads(query: Tensor, rows: Tensor) -> None:
    """Check that queries and rows have batch rows, heads and elements that fit, and some of each.

    Raises:
        Unserved: If they do not.
    """
    fits = query.ndim == rows.ndim == 4 and 0 not in (*query.shape, *rows.shape)
    if fits:
        (batch, heads, _, size), (known, kv_heads, _, wanted) = query.shape, rows.shape
        fits = batch == known and heads % kv_heads == 0 and size == wanted
    if not fits:
        raise Unserved(f"queries {list(query.shape)} do not fit rows {list(rows.shape)}")


def _one_device(first: Tensor, *others: Tensor | None) -> None:
    """Check that everything lies together.

    Raises:
        Unserved: If something lies elsewhere.
    """
    for tensor in others:
        if tensor is not None and tensor.device != first.device:
            raise Unserved(f"something lies on {tensor.device}, and the rows on {first.device}")


def _check_codes(query_codes: Tensor, codes: Tensor) -> None:
    """Check codes of queries and rows.

    Raises:
        Unserved: If they do not fit, are no int32 words side by side, or lie elsewhere.
    """
    _same_heads(query_codes, codes)
    if codes.device.type not in device.device_types():
        wanted = device.device_types()[0]
        raise Unserved(f"it serves {wanted} tensors, not {codes.device.type} ones")
    _one_device(codes, query_codes)
    for words in (query_codes, codes):
        if words.dtype != torch.int32 or (words.stride(3) != 1 and words.shape[3] > 1):
            raise Unserved(f"codes are int32 words side by side, got {words.dtype}")
    if codes.shape[3] > _MOST_WORDS:
        raise Unserved(f"codes of {codes.shape[3]} words are longer than {_MOST_WORDS}")
