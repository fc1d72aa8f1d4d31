"""Traffic: what attention read, kept and dropped, counted at the calls that did it."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from loki_attn.cache import KEY, VALUE, LayerCache
from loki_attn.serving import Served
from loki_attn.types import Selection


@dataclass
class Scales:
    """What the layers of one cache hold, weighed whenever one of them attended.

    Attributes:
        held: Bytes of every layer, unused room included, by its index.
        peak_bytes: The most that all of them together held at any of these moments.
    """

    held: dict[int, int] = field(default_factory=dict)
    peak_bytes: int = 0

    def weigh(self, index: int, held_bytes: int) -> None:
        """Note what a layer holds now."""
        self.held[index] = held_bytes
        self.peak_bytes = max(self.peak_bytes, sum(self.held.values()))


@dataclass
class Traffic:
    """What attention read since the last reset, full-attention layers only.

    Attributes:
        sparse_calls: Single-token layer calls that selected.
        dense_calls: Single-token layer calls that read everything.
        every_query_calls: Multi-token layer calls in which every query selected.
        read_bytes: Cache bytes that the single-token calls read, planes included.
        dense_bytes: Cache bytes that dense attention would have read for the same calls.
        rows_read: Rows attended to, summed over calls and KV heads.
        rows_held: Rows that were there, summed alike.
        kept_bytes: Bytes of those rows, planes and marks included, summed over calls.
        evicted_rows: Rows that evictions dropped, summed over KV heads.
    """

    sparse_calls: int = 0
    dense_calls: int = 0
    every_query_calls: int = 0
    read_bytes: int = 0
    dense_bytes: int = 0
    rows_read: int = 0
    rows_held: int = 0
    kept_bytes: int = 0
    evicted_rows: int = 0

    def reset(self) -> None:
        """Start counting again."""
        self.__init__()  # type: ignore[misc]

    def record(self, served: Served) -> None:
        """Count one single-token call of one layer, or of some of its heads."""
        cache, selection = served.shard.cache, served.selection
        heads = cache.keys.shape[0] * cache.keys.shape[1]
        row = cache.row_bytes(KEY, VALUE)
        held = heads * cache.length
        read = held if selection is None else _rows_read(selection, cache)
        self.dense_bytes += heads * cache.seen * row
        self.read_bytes += read * row
        self.rows_held += held
        self.rows_read += read
        self.kept_bytes += held * cache.row_bytes()
        if selection is None:
            self.dense_calls += 1
            return
        self.sparse_calls += 1
        if served.scored:
            self.read_bytes += round(held * served.layer.selector.score_bytes(cache))


def as_mask(selection: Selection, length: int, heads: int) -> Tensor:
    """Bool [batch, heads, 1, length]: the rows of a selection."""
    indices = selection.indices
    marks = indices.new_zeros((*indices.shape[:2], length + 1), dtype=torch.bool)
    marks.scatter_(2, indices.masked_fill(indices < 0, length), value=True)
    return marks[..., None, :-1].repeat_interleave(heads // indices.shape[1], 1)


def _rows_read(selection: Selection, cache: LayerCache) -> int:
    """Physical rows: a choice per query head reads the union of its group."""
    kv_heads = cache.keys.shape[1]
    choosers = selection.indices.shape[1]
    if choosers == kv_heads:
        return int(selection.counts.sum())
    marks = as_mask(selection, cache.length, choosers)
    return int(marks.view(marks.shape[0], kv_heads, -1, cache.length).any(2).sum())
