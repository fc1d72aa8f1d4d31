"""Storage of fixed size, and its decode step and append as ops that a compiler does not look into.

A static cache has room for `capacity` rows from the start; how many of them are written is a tensor
on the device, and a mask hides the others. So nothing waits for the device, nothing grows, and one
compiled graph serves every step. `torch.ops.loki_attn.step` and `.append` are the two opaque ops;
their bodies call the same kernels as the straight line of `attention.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, Self, cast, final

import torch
from torch import Tensor

from loki_attn.attention import LayerPolicy
from loki_attn.cache import LayerCache
from loki_attn.kernels import ops
from loki_attn.pieces.lead_plane import map_keys, quantise_rows
from loki_attn.row_format import RowFormat
from loki_attn.select.base import Selector
from loki_attn.tiles import CODE_KINDS, TILE_ROWS, Kind, Tiles, tile_dtype, tiles_shape, to_columns
from loki_attn.traceable import attend_rows, best_rows, scores_of
from loki_attn.types import AppendRequest, AttentionCall, GroupReduce, Lead, Reading

Ranks = Literal["fp32", "bf16", "int8", "int4", "keys", "recency"]
"""What ranks the rows: tiles of a kind, the first coordinates of the stored keys, or nothing."""

_CODE_BITS: Final = {"int8": 8, "int4": 4}
# Rows that are encoded at once where a filled cache is taken over.
_BLOCK_ROWS: Final = 4096


@final
@dataclass(frozen=True, eq=False)
class StaticRows:
    """The rows of one layer in storage of fixed size, and what ranks them.

    Attributes:
        keys: [batch, kv_heads, capacity, head_dim], in the space of the policy's rows.
        values: [batch, kv_heads, capacity, value_dim].
        by: What ranks the rows.
        rank: Coordinates that rank a row.
        plane: Data of the tiles, as in `Tiles`, with room for whole tiles; None without any.
        scales: float16 [batch, kv_heads, capacity]: factor of each row's codes; None without codes.
        key_map: float32 [kv_heads, head_dim, rank]: keys to the plane; None without one.
        query_map: float32 [kv_heads, head_dim, rank]; None where the query itself ranks.
    """

    keys: Tensor
    values: Tensor
    by: Ranks
    rank: int
    plane: Tensor | None
    scales: Tensor | None
    key_map: Tensor | None
    query_map: Tensor | None

    @property
    def capacity(self) -> int:
        """Rows that fit."""
        return self.keys.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        held = (self.keys, self.values, self.plane, self.scales)
        return sum(tensor.nbytes for tensor in held if tensor is not None)

    def changed(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Return rows whose storage was changed as a whole: another batch, a copy."""
        return replace(
            self,
            keys=change(self.keys),
            values=change(self.values),
            plane=None if self.plane is None else change(self.plane),
            scales=None if self.scales is None else change(self.scales),
        )


def why_not_static(layer: LayerPolicy) -> str | None:
    """Say why a layer's policy cannot be served from storage of fixed size; None if it can.

    Args:
        layer: The bound policy.

    Returns:
        The reason, to be read after "because".
    """
    selector = type(layer.selector)
    if layer.eviction is not None:
        return "it evicts rows, and rows of fixed storage never move"
    if layer.budget.mass is not None:
        return "a mass budget reads as many rows as the scores say, which no fixed graph can"
    if layer.reuse_above is not None:
        return "reuse_above decides at every step whether to choose anew"
    own = [name for name in ("score", "always", "finish") if _redefines(selector, name)]
    if not _redefines(selector, "lead") or own or layer.selector.page_rows():
        return "its method does not rank rows by a lead, the one form that has a fixed graph"
    return None


def static_rows(selector: Selector, keys: Tensor, values: Tensor, *, filled: bool) -> StaticRows:
    """Return the rows of a selector in storage that is allocated once, here.

    Args:
        selector: How rows are stored and ranked; `why_not_static` found nothing against it.
        keys: [batch, kv_heads, capacity, head_dim] keys as the model made them, zeros where nothing
            is written; it becomes the storage, and is written to.
        values: [batch, kv_heads, capacity, value_dim]; it becomes the storage.
        filled: Whether rows are written already, which are then encoded.
    """
    # One row of nothing shows what a row is: which planes it has, and how they lie.
    shown = LayerCache(selector)
    shown.append(keys.new_zeros(*keys.shape[:2], 1, keys.shape[3]), values[:, :, :1])
    lead, made = selector.lead(shown), selector.lead_format(keys.device)
    selector.query_rows(keys.new_zeros(1, keys.shape[1], 1, keys.shape[3]))  # moves its map
    plane = None if lead is None else lead.plane
    query_map = None if lead is None else lead.query_map
    if isinstance(plane, Tiles) and made is not None:
        room = -(-keys.shape[2] // TILE_ROWS) * TILE_ROWS
        shape = tiles_shape(keys.shape[0], keys.shape[1], room, plane.kind, plane.rank)
        rows = StaticRows(
            keys=keys,
            values=values,
            by=plane.kind,
            rank=plane.rank,
            plane=keys.new_zeros(shape, dtype=tile_dtype(plane.kind)),
            scales=keys.new_zeros(keys.shape[:3], dtype=torch.float16) if made.scales else None,
            key_map=made.key_map,
            query_map=query_map,
        )
    else:
        by: Ranks = "recency" if plane is None else "keys"
        rank = plane.shape[3] if isinstance(plane, Tensor) else 0
        rows = StaticRows(keys, values, by, rank, None, None, None, query_map)
    if filled:
        _encode_held(selector, rows)
    return rows


def append(rows: StaticRows, selector: RowFormat, key: Tensor, value: Tensor, held: Tensor) -> None:
    """Write new rows and their lead behind those held.

    Args:
        rows: The storage.
        selector: How keys become rows.
        key: [batch, kv_heads, tokens, head_dim], as the model made it.
        value: [batch, kv_heads, tokens, value_dim].
        held: int64 [1] on the device of the rows: how many are written.
    """
    stored = selector.rows(key)
    _append(
        stored, value, rows.keys, rows.values, rows.plane, rows.scales, rows.key_map, held, rows.by
    )


def step(
    query: Tensor,
    rows: StaticRows,
    layer: LayerPolicy,
    call: AttentionCall,
    visible: Tensor,
    held: Tensor,
) -> Tensor:
    """One sparse decode step over storage of fixed size; the new row is already written.

    Counts follow the visible rows by tensor arithmetic, and the selection is not returned.

    Args:
        query: [batch, heads, 1, head_dim], as the model made it.
        rows: The layer's rows.
        layer: The bound policy.
        call: What the model asks of the attention.
        visible: bool [batch or 1, 1, 1, capacity]; hides what is not written.
        held: int64 [1] on the device of the rows: how many are written.

    Returns:
        [batch, heads, 1, value_dim] in the query's dtype.
    """
    reading = layer.budget.reading(rows.capacity, visible)
    rows_query = layer.selector.query_rows(query)
    out: Tensor = _step(
        query,
        None if rows_query is query else rows_query,
        rows.keys,
        rows.values,
        rows.plane,
        rows.scales,
        rows.query_map,
        visible,
        cast("Tensor", reading.counts),
        held,
        call.sink_logits,
        rows.by,
        rows.rank,
        rows.capacity if reading.most is None else reading.most,
        reading.sinks,
        reading.recents,
        layer.group_reduce,
        call.scaling,
        call.softcap,
    )
    return out


@torch.library.custom_op("loki_attn::step", mutates_args=())
def _step(  # noqa: PLR0913 - an op takes tensors and numbers, not objects
    query: Tensor,
    rows_query: Tensor | None,
    keys: Tensor,
    values: Tensor,
    plane: Tensor | None,
    scales: Tensor | None,
    query_map: Tensor | None,
    visible: Tensor,
    counts: Tensor,
    held: Tensor,
    sink_logits: Tensor | None,
    by: str,
    rank: int,
    most: int,
    sinks: int,
    recents: int,
    how: str,
    scaling: float,
    softcap: float | None,
) -> Tensor:
    """The body of `step`, run as it stands."""
    capacity = keys.shape[2]
    rows_query = query if rows_query is None else rows_query
    found: Tensor | Tiles | None = None
    if plane is not None:
        found = Tiles(plane, cast("Kind", by), rank, capacity)
    elif by == "keys":
        found = keys[..., :rank]
    lead = Lead(found, scales, query_map)
    call = AttentionCall(scaling=scaling, softcap=softcap, sink_logits=sink_logits)
    reading = Reading(counts=counts, sinks=sinks, recents=recents, most=most, held=held)
    agree = cast("GroupReduce", how)
    done = ops().step(query, rows_query, keys, values, lead, reading, agree, call, visible)
    if done is not None:
        return done[0]
    scores = scores_of(query, lead, visible, capacity, agree, keys.shape[1], call)
    forced = ops().protect(visible, sinks, recents)
    indices = best_rows(scores[:, :, 0], counts, visible[:, :, 0], forced[:, :, 0], most)
    return attend_rows(rows_query, keys, values, indices, call)


@_step.register_fake
def _(query: Tensor, rows_query: Any, keys: Tensor, values: Tensor, *others: Any) -> Tensor:
    del rows_query, keys, others
    return query.new_empty(*query.shape[:3], values.shape[3])


@torch.library.custom_op("loki_attn::append", mutates_args=("keys", "values", "plane", "scales"))
def _append(  # noqa: PLR0913 - an op takes tensors and numbers, not objects
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    plane: Tensor | None,
    scales: Tensor | None,
    key_map: Tensor | None,
    held: Tensor,
    by: str,
) -> None:
    """The body of `append`, run as it stands."""
    kind, capacity = cast("Kind", by), keys.shape[2]
    tiles = None
    if plane is not None and key_map is not None:
        tiles = Tiles(plane, kind, key_map.shape[2], capacity)
    request = AppendRequest(
        key=key,
        value=value,
        keys=keys,
        values=values,
        positions=None,
        start=held,
        first_position=0,
        lead=tiles,
        lead_scales=scales,
        key_map=key_map if tiles is not None else None,
    )
    if ops().append(request):
        return
    place = torch.arange(key.shape[2], device=key.device) + held
    keys.index_copy_(2, place, key)
    values.index_copy_(2, place, value)
    if tiles is None or key_map is None:
        return
    lead = map_keys(key, key_map)
    if kind in CODE_KINDS and scales is not None:
        lead, factors = quantise_rows(lead, _CODE_BITS[kind])
        scales.index_copy_(2, place, factors)
    # Whatever the kind, a row's share of a line is one word of 4 bytes.
    words = to_columns(lead, kind).contiguous().view(torch.int32)
    columns = tiles.data.view(torch.int32).transpose(3, 4)
    columns[:, :, place // TILE_ROWS, place % TILE_ROWS] = words


def _encode_held(selector: Selector, rows: StaticRows) -> None:
    """Make rows of all keys held, whichever are written, a block at a time to bound the memory."""
    if rows.plane is None and not _redefines(type(selector), "rows"):
        return
    for start in range(0, rows.capacity, _BLOCK_ROWS):
        key = rows.keys[:, :, start : start + _BLOCK_ROWS].clone()
        value = rows.values[:, :, start : start + _BLOCK_ROWS].clone()
        append(rows, selector, key, value, torch.tensor([start], device=key.device))


def _redefines(selector: type[Selector], name: str) -> bool:
    """Whether a method has its own way of something."""
    return getattr(selector, name) is not getattr(Selector, name)
