"""Storage of row tensors: preallocated, growable, alike whether rows lie singly or in tiles."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Self, final

import torch
from torch import Tensor

from loki_attn import tiles
from loki_attn.tiles import Kind, Tiles

Allocate = Callable[[tuple[int, ...], torch.dtype, torch.device], Tensor]
"""Returns unwritten memory of a shape, a dtype and a device."""


@dataclass(frozen=True)
class Storage(ABC):
    """Memory for one row per token, of every batch row and KV head.

    Attributes:
        data: [batch, kv_heads, blocks, ...]; a block holds `block_rows` rows.
    """

    block_rows: ClassVar[int]
    data: Tensor

    @property
    def capacity(self) -> int:
        """Rows that fit."""
        return self.data.shape[2] * self.block_rows

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.data.nbytes

    @property
    @abstractmethod
    def row_bytes(self) -> int:
        """Bytes of one row of one KV head, what fills up its last line included."""

    @abstractmethod
    def write(self, start: int, rows: Tensor) -> None:
        """Write rows [batch or 1, kv_heads or 1, tokens, ...] at row `start` and up."""

    @abstractmethod
    def read(self, length: int) -> Tensor:
        """Return the first `length` rows [batch, kv_heads, length, ...]."""

    @abstractmethod
    def copy_rows(self, indices: Tensor, to: Self) -> None:
        """Copy the rows at `indices` [batch, kv_heads, picked] to the first rows of another."""

    @abstractmethod
    def as_tiles(self, length: int) -> Tiles | None:
        """The first `length` rows as tiles, where they lie in tiles; shares this memory."""

    def empty(self, capacity: int, allocate: Allocate) -> Self:
        """Return unwritten storage for the same kind of rows; `capacity` fills whole blocks."""
        shape = (*self.data.shape[:2], capacity // self.block_rows, *self.data.shape[3:])
        return self.changed(lambda data: allocate(shape, data.dtype, data.device))

    def grown(self, capacity: int, length: int, allocate: Allocate) -> Self:
        """Return larger storage with the first `length` rows."""
        larger, blocks = self.empty(capacity, allocate), -(-length // self.block_rows)
        larger.data.narrow(2, 0, blocks).copy_(self.data.narrow(2, 0, blocks))
        return larger

    def changed(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Return storage whose data was changed as a whole: another batch, another device."""
        return replace(self, data=change(self.data))


@final
@dataclass(frozen=True)
class Rows(Storage):
    """Plain rows: data [batch, kv_heads, capacity, ...]; what is read is a view."""

    block_rows: ClassVar[int] = 1

    @property
    def row_bytes(self) -> int:
        """Elements of a row."""
        return math.prod(self.data.shape[3:]) * self.data.itemsize

    def write(self, start: int, rows: Tensor) -> None:
        """Copy rows behind `start` others."""
        self.data.narrow(2, start, rows.shape[2]).copy_(rows)

    def read(self, length: int) -> Tensor:
        """A view of the first rows."""
        return self.data.narrow(2, 0, length)

    def copy_rows(self, indices: Tensor, to: Self) -> None:
        """Copy rows one by one."""
        to.write(0, take_rows(self.data, indices))

    def as_tiles(self, length: int) -> None:
        """Plain rows are no tiles."""
        del length


@final
@dataclass(frozen=True)
class Tiled(Storage):
    """Rows of coordinates in tiles: data as in `Tiles`; what is read is a copy.

    Attributes:
        kind: What a coordinate is stored as.
        rank: Coordinates of a row.
    """

    block_rows: ClassVar[int] = tiles.TILE_ROWS
    kind: Kind
    rank: int

    @property
    def row_bytes(self) -> int:
        """4 bytes in every line."""
        return self.data.shape[3] * tiles.LINE_BYTES // tiles.TILE_ROWS

    def write(self, start: int, rows: Tensor) -> None:
        """Encode rows into their columns."""
        tiles.write_rows(self.as_tiles(start), start, rows)

    def read(self, length: int) -> Tensor:
        """Decode the first rows; codes come as int8."""
        return self.as_tiles(length).rows()

    def copy_rows(self, indices: Tensor, to: Self) -> None:
        """Copy columns as they are, without decoding them."""
        picked = take_rows(tiles.as_columns(self.data), indices)
        tiles.write_columns(to.data, 0, picked)

    def as_tiles(self, length: int) -> Tiles:
        """The same memory, with the number of its rows that count."""
        return Tiles(self.data, self.kind, self.rank, length)


def storage_for(sample: Tensor, kind: Kind | None) -> Storage:
    """Return storage without capacity, for rows such as `sample`'s.

    Args:
        sample: [batch, kv_heads, any, ...]; for tiles [batch, kv_heads, any, rank].
        kind: None for plain rows in the sample's dtype, else the kind of tiles.
    """
    if kind is None:
        return Rows(sample.new_empty((*sample.shape[:2], 0, *sample.shape[3:])))
    batch, kv_heads, _, rank = sample.shape
    shape = tiles.tiles_shape(batch, kv_heads, 0, kind, rank)
    return Tiled(sample.new_empty(shape, dtype=tiles.tile_dtype(kind)), kind, rank)


def take_rows(rows: Tensor, indices: Tensor) -> Tensor:
    """Copy the rows [batch, kv_heads, rows, ...] at `indices` [batch, kv_heads, picked]."""
    index, inner = indices.to(rows.device), rows.shape[3:]
    if rows.is_contiguous() and rows.numel():
        # Whole rows at once; `gather` would fetch them element by element, ten times as slowly.
        heads = torch.arange(index.shape[0] * index.shape[1], device=rows.device)
        first = heads.view(*index.shape[:2], 1) * rows.shape[2]
        flat = rows.flatten(0, 2).index_select(0, (index + first).flatten())
        return flat.view(*index.shape, *inner)
    index = index[(..., *(None for _ in inner))].expand(*index.shape, *inner)
    return rows.gather(2, index)
