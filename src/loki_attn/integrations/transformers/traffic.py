"""Traffic: what attention read, kept and dropped, counted at the calls that did it."""

from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

from loki_attn.cache import KEY, VALUE, LayerCache
from loki_attn.serving import Served
from loki_attn.types import Selection

# Counts that may wait to be read: a few steps of a large model.
_MOST_UNREAD: Final = 1024


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

    With a static cache nobody waits to hear how many rows were read: only `static_calls` are
    counted there, and where the model is compiled nothing is.

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
        static_calls: Single-token layer calls that selected from a static cache, uncompiled.
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
    static_calls: int = 0

    def reset(self) -> None:
        """Start counting again."""
        self.__init__()  # type: ignore[misc]

    def record(self, served: Served) -> "Unread | None":
        """Count one single-token call of one layer, or of some of its heads.

        Returns:
            The rows read, where only another device knows them yet; `add` counts them later.
        """
        cache, selection = served.shard.cache, served.selection
        heads = cache.keys.shape[0] * cache.keys.shape[1]
        row = cache.row_bytes(KEY, VALUE)
        held = heads * cache.length
        self.dense_bytes += heads * cache.seen * row
        self.rows_held += held
        self.kept_bytes += held * cache.row_bytes()
        if selection is None:
            self.dense_calls += 1
            self.add(held, row)
            return None
        self.sparse_calls += 1
        if served.scored:
            self.read_bytes += round(held * served.layer.selector.score_bytes(cache))
        read = _rows_read(selection, cache)
        if is_far(read):
            return Unread(read, row)
        self.add(int(read), row)
        return None

    def add(self, rows: int, row_bytes: int) -> None:
        """Count rows that were read."""
        self.rows_read += rows
        self.read_bytes += rows * row_bytes


@dataclass(frozen=True)
class Unread:
    """A count of rows that nobody has waited for yet.

    Attributes:
        rows: int64 [], on another device.
        row_bytes: Bytes of one of them.
    """

    rows: Tensor
    row_bytes: int


class Meter:
    """Counts the traffic of a model without waiting for its device at every layer.

    Attributes:
        counts: The traffic, but for rows that nobody has waited for yet.
    """

    def __init__(self) -> None:
        """Start at zero."""
        self.counts = Traffic()
        self._unread: list[Unread] = []

    def record(self, served: Served) -> None:
        """Count one single-token call."""
        unread = self.counts.record(served)
        if unread is not None:
            self._unread.append(unread)
        if len(self._unread) >= _MOST_UNREAD:
            self.settled()

    def settled(self) -> Traffic:
        """The traffic, up to date; waits for the device where it must."""
        unread, self._unread = self._unread, []
        if unread:
            counts = torch.stack([one.rows.to(unread[0].rows.device) for one in unread]).tolist()
            for one, rows in zip(unread, counts, strict=True):
                self.counts.add(rows, one.row_bytes)
        return self.counts


def is_far(tensor: Tensor) -> bool:
    """Whether reading a number means waiting for another device."""
    return tensor.device.type != "cpu"


def as_mask(selection: Selection, length: int, heads: int) -> Tensor:
    """Bool [batch, heads, 1, length]: the rows of a selection."""
    indices = selection.indices
    marks = indices.new_zeros((*indices.shape[:2], length + 1), dtype=torch.bool)
    marks.scatter_(2, indices.masked_fill(indices < 0, length), value=True)
    return marks[..., None, :-1].repeat_interleave(heads // indices.shape[1], 1)


def _rows_read(selection: Selection, cache: LayerCache) -> Tensor:
    """Physical rows: a choice per query head reads the union of its group."""
    kv_heads = cache.keys.shape[1]
    choosers = selection.indices.shape[1]
    if choosers == kv_heads:
        return selection.counts.sum()
    marks = as_mask(selection, cache.length, choosers)
    return marks.view(marks.shape[0], kv_heads, -1, cache.length).any(2).sum()
