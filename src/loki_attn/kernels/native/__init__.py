"""The ops in C++ for CPUs, through a plain C interface (native/loki_attn.h).

Each op serves one query token per batch row (`column_sums` and `hamming` any number), in float32,
bfloat16 or float16; what it does not serve it refuses with `Unserved` before anything is done.
Bytes read are those of the reference, without its copies: a lead plane is streamed once for all
heads of a group, and only chosen rows are touched.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from loki_attn.kernels.backends import Unserved
from loki_attn.kernels.native import packing
from loki_attn.kernels.native.library import (
    check,
    describe,
    follow_threads,
    isa,
    isas,
    last_isa,
    library,
    read_bandwidth,
    set_isa,
    threads,
)
from loki_attn.kernels.native.place import find_library, why_missing
from loki_attn.tiles import TILE_ROWS, Tiles
from loki_attn.types import (
    AppendRequest,
    AttentionCall,
    AttentionOutput,
    GroupReduce,
    Lead,
    Reading,
    Selection,
)

__all__ = [
    "append", "attend", "choose", "column_sums", "dense", "dense_column_sums", "describe",
    "hamming", "isa", "isas", "last_isa", "mass_counts", "read_bandwidth", "score", "set_isa",
    "step", "threads", "why_not",
]  # fmt: skip

_UNPAGED = (0, 0, 0, 0)
_NO_LEAD = (0, 0, *packing.NOTHING, 0, 0, 0, 0, 0, 0, 0, 0, 0)
_NO_CHOICE = (0, 0, 0.0, 0, 0, 0, 0, 0)


def why_not() -> str | None:
    """Why the kernels cannot run here, None if they can.

    Raises:
        LokiAttnError: If the environment asks for an instruction set or a number of threads that
            cannot be had; what was asked for is never replaced silently.
    """
    if find_library() is None:
        return why_missing()
    try:
        library()
    except OSError as error:
        return f"its library cannot be loaded: {error}"
    threads()
    return None


def score(
    query: Tensor, plane: Tensor | Tiles, scales: Tensor | None, call: AttentionCall
) -> Tensor:
    """Logits of every row from its leading coordinates; see `reference.score`."""
    if scales is not None and not isinstance(plane, Tiles):
        raise Unserved("it knows scales of tiles only, and plain rows came with some")
    rows = _lead_fields(plane)
    batch, kv_heads, seq, rank = _plane_sizes(plane)
    heads = _heads(query, kv_heads)
    packing.fits("the query", query, batch, heads, 1, rank)
    out = torch.empty(batch, heads, 1, seq)
    fields = packing.CALL.pack(
        batch, kv_heads, heads // kv_heads, seq, *_UNPAGED,
        *packing.NOTHING, *packing.NOTHING, 0, 0, 0, 0,
        call.scaling, call.softcap or 0.0, 0, 0, 0,
        _kind(plane), rank, *rows, *packing.scales_of(scales, batch, kv_heads, seq),
        *packing.query_of("the query", query), 0, packing.REDUCES["max"],
        *_NO_CHOICE, 0, 0, 0, 0, 0, 0, out.data_ptr(), 0,
    )  # fmt: skip
    lib = library()
    follow_threads(lib)
    check(lib.loki_score(fields))
    return out


def mass_counts(weights: Tensor, forced: Tensor, mass: float) -> Tensor:
    """Size of the smallest set that reaches a mass; see `reference.mass_counts`."""
    batch, choosers, seq = _single(weights)
    shape = (batch, choosers, 1, seq)
    counts = torch.empty(batch, choosers, 1, dtype=torch.int64)
    marks, mark_fields = _marks(forced, shape)
    fields = packing.CHOOSE.pack(
        batch, choosers, seq, *_score_fields(weights), 0, 0, 0, *mark_fields,
        0, mass, 0, 0, counts.data_ptr(),
    )  # fmt: skip
    _run_choose(fields)
    del marks
    return counts


def choose(scores: Tensor, counts: Tensor, visible: Tensor, forced: Tensor) -> Selection:
    """The best rows as ascending indices; see `reference.choose`."""
    batch, choosers, seq = _single(scores)
    shape = (batch, choosers, 1, seq)
    wanted = counts.to(torch.int64).expand(shape[:3]).contiguous()
    seen, seen_fields = _marks(visible, shape)
    marks, mark_fields = _marks(forced, shape)
    most = min(max(int(wanted.max()), 1), seq)
    indices = torch.empty(batch, choosers, most, dtype=torch.int64)
    found = torch.empty(batch, choosers, dtype=torch.int64)
    fields = packing.CHOOSE.pack(
        batch, choosers, seq, *_score_fields(scores), *seen_fields, *mark_fields,
        wanted.data_ptr(), 0.0, indices.data_ptr(), most, found.data_ptr(),
    )  # fmt: skip
    _run_choose(fields)
    del seen, marks
    return Selection(indices, found)


def attend(
    query: Tensor, keys: Tensor, values: Tensor, selection: Selection, call: AttentionCall
) -> AttentionOutput:
    """Exact attention to the selected rows; see `reference.attend`."""
    indices = selection.indices.to(torch.int64).contiguous()
    counts = selection.counts.to(torch.int64).contiguous()
    choosers = query.shape[1] if indices.shape[1] != keys.shape[1] else keys.shape[1]
    packing.fits("indices", indices, keys.shape[0], choosers, indices.shape[2])
    packing.fits("counts", counts, *indices.shape[:2])
    how: GroupReduce = "none" if indices.shape[1] != keys.shape[1] else "max"
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    chosen = (lse.data_ptr(), 0, indices.data_ptr(), indices.shape[2], counts.data_ptr(), 0)
    out = _read(library().loki_attend, query, keys, values, None, call, how, chosen)
    return AttentionOutput(out, lse)


def dense(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    visible: Tensor | None,
    call: AttentionCall,
    *,
    causal: bool,
) -> Tensor:
    """Dense attention of one query token; see `reference.dense`."""
    del causal  # the only query is the last row
    run = library().loki_dense
    return _read(run, query, keys, values, visible, call, "max", (0, 0, 0, 0, 0, 0))


def dense_column_sums(
    query: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None, call: AttentionCall
) -> tuple[Tensor, Tensor]:
    """Dense attention with what each row received; see `reference.dense_column_sums`."""
    sums = torch.empty(keys.shape[:3])
    results = (0, sums.data_ptr(), 0, 0, 0, 0)
    run = library().loki_dense
    out = _read(run, query, keys, values, visible, call, "max", results)
    return out, sums


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
    """What every row receives of the attention of many queries; see `reference.column_sums`."""
    batch, kv_heads, seq, dim = keys.shape
    heads, q_len = _heads(query, kv_heads), query.shape[2]
    packing.fits("the query", query, batch, heads, q_len, dim)
    counted = q_len if window is None else min(window, q_len)
    if how not in {"sum", "max"} or counted < 1 or (visible is None and q_len > seq):
        raise Unserved(f"it knows no {how!r} of {counted} among {q_len} queries on {seq} rows")
    kept, seen = packing.matrix_mask_of(visible, (batch, kv_heads, q_len, seq))
    sink, sink_pointer = packing.sinks_of(call.sink_logits, heads)
    moved, bias_fields = packing.bias_of(bias, batch, kv_heads, seq)
    out = torch.empty(batch, heads, seq)
    fields = packing.COLUMNS.pack(
        batch, kv_heads, heads // kv_heads, seq, q_len, counted,
        *packing.rows_of("keys", keys), *packing.queries_of("the query", query),
        call.scaling, call.softcap or 0.0, sink_pointer, *seen, *bias_fields,
        how == "max", out.data_ptr(),
    )  # fmt: skip
    lib = library()
    follow_threads(lib)
    check(lib.loki_column_sums(fields))
    del kept, sink, moved
    return out


def hamming(query_codes: Tensor, codes: Tensor) -> Tensor:
    """How many bits of the codes of queries and rows differ; see `reference.hamming`."""
    batch, kv_heads, seq, words = codes.shape
    heads, q_len = _heads(query_codes, kv_heads), query_codes.shape[2]
    packing.fits("the query", query_codes, batch, heads, q_len, words)
    out = torch.empty(batch, heads, q_len, seq)
    fields = packing.HAMMING.pack(
        batch, kv_heads, heads // kv_heads, seq, q_len, words,
        *packing.codes_of("the query", query_codes), *packing.codes_of("codes", codes),
        out.data_ptr(),
    )  # fmt: skip
    lib = library()
    follow_threads(lib)
    check(lib.loki_hamming(fields))
    return out


def step(  # noqa: PLR0913 - what its three parts take together
    query: Tensor,
    rows_query: Tensor,
    keys: Tensor,
    values: Tensor,
    lead: Lead,
    reading: Reading,
    how: GroupReduce,
    call: AttentionCall,
    visible: Tensor | None,
    *,
    stages: Tensor | None = None,
) -> tuple[Tensor, Selection] | None:
    """Score, choose and attend in one call; see `reference.step` and `attention.decode`.

    Args beyond those of the reference:
        stages: int64 [3]: nanoseconds spent on scoring, choosing and attending are added to it,
            those of all threads together.
    """
    if lead.plane is None:
        if reading.counts is None:
            return None  # nothing is estimated: the straight line says what is wrong
        how = "max"  # all query heads of a group read the same rows
    if how not in packing.REDUCES:
        return None
    batch, kv_heads, heads, seq = _sizes(rows_query, keys, values)
    kept, seen = packing.visible_of(visible, batch, seq)
    sink, sink_pointer = packing.sinks_of(call.sink_logits, heads)
    packing.fits("the query", query, batch, heads, 1, query.shape[3])
    map_pointer, rank, lead_fields = _step_lead(lead, query, keys)
    wanted, count, most = _wanted(reading, batch, seq)
    choosers = heads if how == "none" else kv_heads
    out = rows_query.new_empty(batch, heads, 1, values.shape[3])
    indices = torch.empty(batch, choosers, most, dtype=torch.int64)
    counts = torch.empty(batch, choosers, dtype=torch.int64)
    fields = packing.CALL.pack(
        batch, kv_heads, heads // kv_heads, seq, *_UNPAGED,
        *packing.rows_of("keys", keys), *packing.rows_of("values", values),
        *packing.query_of("the query", rows_query),
        call.scaling, call.softcap or 0.0, sink_pointer, *seen,
        _kind(lead.plane), rank, *lead_fields,
        *packing.scales_of(lead.scales, batch, kv_heads, seq),
        *packing.query_of("the query", query), map_pointer, packing.REDUCES[how],
        0 if wanted is None else wanted.data_ptr(), count, reading.mass or 0.0,
        reading.cap or 0, reading.floor, reading.dense_below, reading.sinks, reading.recents,
        out.data_ptr(), 0, 0, indices.data_ptr(), most, counts.data_ptr(), 0,
        0 if stages is None else stages.data_ptr(),
    )  # fmt: skip
    lib = library()
    follow_threads(lib)
    check(lib.loki_step(fields))
    del kept, sink
    if reading.counts is None:
        indices = indices[..., : max(int(counts.max()), 1)].contiguous()
    return out, Selection(indices, counts)


def append(request: AppendRequest) -> bool:
    """Write new rows, their positions and their lead; see `cache.LayerCache.append`."""
    key, value = request.key, request.value
    batch, kv_heads, tokens, dim = key.shape
    start, positions = request.start, request.positions
    if isinstance(start, Tensor) or positions is None:
        return False  # storage of fixed capacity: the plain path writes it
    if tokens == 0 or key.requires_grad or value.requires_grad:
        return False
    capacity = request.keys.shape[2]
    _check_room(request, start, positions, capacity)
    lead: packing.Fields = packing.NOTHING
    scales: packing.Fields = (0, 0, 0)
    rank = key_map = 0
    if request.lead is not None and request.key_map is not None:
        lead, rank = packing.tiles_of(request.lead), request.lead.rank
        key_map = _map_pointer(request.key_map, kv_heads, dim, rank)
        scales = packing.scales_of(request.lead_scales, batch, kv_heads, capacity)
    fields = packing.APPEND.pack(
        batch, kv_heads, tokens, start, 0, 0, 0,
        *packing.rows_of("keys", key), *packing.rows_of("values", value),
        *packing.rows_of("stored keys", request.keys),
        *packing.rows_of("stored values", request.values),
        key_map, rank, *lead, *scales,
        positions.data_ptr(), positions.stride(0) * 4, positions.stride(1) * 4,
        request.first_position,
    )  # fmt: skip
    lib = library()
    follow_threads(lib)
    check(lib.loki_append(fields))
    return True


def _check_room(request: AppendRequest, start: int, positions: Tensor, capacity: int) -> None:
    """Check that all storage fits the new rows and has room for them."""
    batch, kv_heads, tokens, dim = request.key.shape
    value_dim, end = request.value.shape[3], start + tokens
    packing.fits("values", request.value, batch, kv_heads, tokens, value_dim)
    packing.fits("stored keys", request.keys, batch, kv_heads, capacity, dim)
    packing.fits("stored values", request.values, batch, kv_heads, capacity, value_dim)
    packing.fits("positions", positions, batch, kv_heads, capacity)
    if positions.dtype != torch.int32 or positions.stride(2) != 1 or not positions.is_cpu:
        raise Unserved(f"positions are contiguous int32 on the CPU, got {positions.dtype}")
    lead = request.lead
    if lead is not None and lead.data.shape[:2] != request.key.shape[:2]:
        raise Unserved(f"the lead has tiles for {list(lead.data.shape[:2])}, not for the keys")
    room = capacity if lead is None else min(capacity, lead.data.shape[2] * TILE_ROWS)
    if start < 0 or end > room:
        raise Unserved(f"rows {start} to {end} have no room among {room}")


def _read(
    run: Callable[[bytes], int],
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    visible: Tensor | None,
    call: AttentionCall,
    how: GroupReduce,
    results: packing.Fields,
) -> Tensor:
    """Attend to rows that are not chosen here."""
    batch, kv_heads, heads, seq = _sizes(query, keys, values)
    kept, seen = packing.visible_of(visible, batch, seq)
    sink, sink_pointer = packing.sinks_of(call.sink_logits, heads)
    out = query.new_empty(batch, heads, 1, values.shape[3])
    lead_part = (*_NO_LEAD[:-1], packing.REDUCES[how])
    fields = packing.CALL.pack(
        batch, kv_heads, heads // kv_heads, seq, *_UNPAGED,
        *packing.rows_of("keys", keys), *packing.rows_of("values", values),
        *packing.query_of("the query", query),
        call.scaling, call.softcap or 0.0, sink_pointer, *seen,
        *lead_part, *_NO_CHOICE, out.data_ptr(), *results, 0,
    )  # fmt: skip
    follow_threads(library())
    check(run(fields))
    del kept, sink
    return out


def _run_choose(fields: bytes) -> None:
    lib = library()
    follow_threads(lib)
    check(lib.loki_choose(fields))


def _heads(query: Tensor, kv_heads: int) -> int:
    """Query heads, which must share the KV heads evenly."""
    heads = query.shape[1]
    if kv_heads == 0 or heads % kv_heads:
        raise Unserved(f"{heads} query heads cannot share {kv_heads} KV heads")
    return heads


def _sizes(query: Tensor, keys: Tensor, values: Tensor) -> tuple[int, int, int, int]:
    """Batch, KV heads, query heads and rows of tensors that fit each other."""
    batch, kv_heads, seq, dim = keys.shape
    heads = _heads(query, kv_heads)
    packing.fits("the query", query, batch, heads, 1, dim)
    packing.fits("values", values, batch, kv_heads, seq, values.shape[3])
    return batch, kv_heads, heads, seq


def _single(scores: Tensor) -> tuple[int, int, int]:
    """Sizes of scores of one query token."""
    batch, choosers, q_len, seq = scores.shape
    if q_len != 1 or scores.dtype != torch.float32 or not scores.is_cpu:
        raise Unserved(
            f"it chooses for one query token by float32 scores on the CPU, got {q_len} tokens and "
            f"{scores.dtype} on {scores.device}"
        )
    return batch, choosers, seq


def _score_fields(scores: Tensor) -> packing.Fields:
    if scores.stride(3) != 1 and scores.shape[3] > 1:
        raise Unserved(f"scores must be contiguous rows, got strides {scores.stride()}")
    return scores.data_ptr(), scores.stride(0) * 4, scores.stride(1) * 4


def _marks(marks: Tensor, shape: tuple[int, int, int, int]) -> tuple[Tensor, packing.Fields]:
    """A broadcastable mask as bytes per chooser: the tensor to keep alive, and its fields."""
    if marks.dtype != torch.bool or not marks.is_cpu:
        raise Unserved(f"a mask is bool on the CPU, got {marks.dtype} on {marks.device}")
    spread = marks.expand(shape)
    if spread.stride(3) != 1:
        spread = marks.contiguous().expand(shape)
    if spread.stride(3) != 1 and shape[3] > 1:
        spread = spread.contiguous()
    return spread, (spread.data_ptr(), spread.stride(0), spread.stride(1))


def _kind(plane: Tensor | Tiles | None) -> int:
    if plane is None:
        return packing.RECENCY
    return packing.TILES if isinstance(plane, Tiles) else packing.ROWS


def _lead_fields(plane: Tensor | Tiles) -> packing.Fields:
    if isinstance(plane, Tiles):
        return packing.tiles_of(plane)
    return packing.rows_of("the plane", plane)


def _plane_sizes(plane: Tensor | Tiles) -> tuple[int, int, int, int]:
    """Batch, KV heads, rows and coordinates."""
    if isinstance(plane, Tiles):
        return plane.data.shape[0], plane.data.shape[1], plane.length, plane.rank
    return plane.shape[0], plane.shape[1], plane.shape[2], plane.shape[3]


def _step_lead(lead: Lead, query: Tensor, keys: Tensor) -> tuple[int, int, packing.Fields]:
    """Address of the query map, rank, and fields of the plane, which has a row for each key."""
    if lead.plane is None:
        return 0, 0, packing.NOTHING
    *held, rank = _plane_sizes(lead.plane)
    kv_heads, dim = keys.shape[1], keys.shape[3]
    if held != list(keys.shape[:3]):
        raise Unserved(f"the plane must have rows {list(keys.shape[:3])} like the keys, got {held}")
    if lead.query_map is not None:
        if query.shape[3] != dim:
            raise Unserved(f"it maps queries of {dim} coordinates, got {query.shape[3]}")
        return _map_pointer(lead.query_map, kv_heads, dim, rank), rank, _lead_fields(lead.plane)
    if query.shape[3] < rank:
        raise Unserved(f"a query of {query.shape[3]} coordinates cannot rank by {rank}")
    return 0, rank, _lead_fields(lead.plane)


def _map_pointer(mapping: Tensor, kv_heads: int, dim: int, rank: int) -> int:
    packing.fits("a map", mapping, kv_heads, dim, rank)
    if mapping.dtype != torch.float32 or not mapping.is_contiguous() or not mapping.is_cpu:
        raise Unserved(f"maps are contiguous float32 on the CPU, got {mapping.dtype}")
    return mapping.data_ptr()


def _wanted(reading: Reading, batch: int, seq: int) -> tuple[Tensor | None, int, int]:
    """Counts per batch row to keep alive, the common count, and the most rows of any."""
    if reading.counts is None:
        most = seq if reading.cap is None else min(max(reading.cap, reading.floor), seq)
        return None, 0, max(most, min(reading.dense_below, seq), 1)
    if isinstance(reading.counts, int):
        return None, reading.counts, min(reading.counts, seq)
    wanted = reading.counts.reshape(-1).to(torch.int64).expand(batch).contiguous()
    return wanted, 0, min(max(int(wanted.max()), 1), seq)
