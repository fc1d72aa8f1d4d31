"""Tiles: how the coordinates that rank rows lie in memory, so that one load serves 16 rows.

A tile holds 16 rows in lines of 64 bytes. A line gives every row 4 bytes: 1 float32, 2 bfloat16,
4 int8 codes, or 8 int4 codes. An int4 byte i of line j holds coordinate 8j + i in its low half and
8j + 4 + i in its high half, each as code + 8. Coordinates beyond the rank are 0.
"""

from dataclasses import dataclass
from typing import Final, Literal, final

import torch
from torch import Tensor
from torch.nn import functional

Kind = Literal["fp32", "bf16", "int8", "int4"]
"""What a coordinate is stored as; int8 and int4 are codes with a scale per row beside the tiles."""

TILE_ROWS: Final = 16
LINE_BYTES: Final = 64
CODE_KINDS: Final = frozenset({"int8", "int4"})
_PER_LINE: Final[dict[Kind, int]] = {"fp32": 1, "bf16": 2, "int8": 4, "int4": 8}
_DTYPES: Final[dict[Kind, torch.dtype]] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "int8": torch.int8,
    "int4": torch.uint8,
}
_INT4_ZERO: Final = 8


@final
@dataclass(frozen=True)
class Tiles:
    """Rows of coordinates in tiles; a column of a tile is one row.

    Attributes:
        data: [batch, kv_heads, tiles, lines, 16, width], width being 1 float32, 2 bfloat16, 4 int8
            or 4 uint8; it may hold more tiles than `length` fills.
        kind: What a coordinate is.
        rank: Coordinates of a row; the last line may have room for more, which holds zeros.
        length: Rows that are written; later columns are unwritten memory.
    """

    data: Tensor
    kind: Kind
    rank: int
    length: int

    def rows(self) -> Tensor:
        """Return the written rows [batch, kv_heads, length, rank], a copy.

        float32, bfloat16, or the int8 codes of "int8" and "int4".
        """
        filled = self.data.narrow(2, 0, -(-self.length // TILE_ROWS))
        return from_columns(as_columns(filled), self.kind)[:, :, : self.length, : self.rank]


def tiles_shape(
    batch: int, kv_heads: int, capacity: int, kind: Kind, rank: int
) -> tuple[int, int, int, int, int, int]:
    """Sizes of the data of tiles that hold `capacity` rows, a multiple of 16."""
    lines = -(-rank // _PER_LINE[kind])
    width = LINE_BYTES // TILE_ROWS // _DTYPES[kind].itemsize
    return batch, kv_heads, capacity // TILE_ROWS, lines, TILE_ROWS, width


def tile_dtype(kind: Kind) -> torch.dtype:
    """The dtype of the data of tiles; int4 codes lie in pairs in uint8."""
    return _DTYPES[kind]


def pack(rows: Tensor, kind: Kind) -> Tiles:
    """Put rows into new tiles; columns that no row fills hold zeros.

    Args:
        rows: [batch, kv_heads, length, rank], float, or integer codes in -127..127 for "int8" and
            -7..7 for "int4".
        kind: What a coordinate becomes; float rows are rounded to it.
    """
    batch, kv_heads, length, rank = rows.shape
    capacity = -(-length // TILE_ROWS) * TILE_ROWS
    shape = tiles_shape(batch, kv_heads, capacity, kind, rank)
    tiles = Tiles(rows.new_zeros(shape, dtype=_DTYPES[kind]), kind, rank, length)
    write_rows(tiles, 0, rows)
    return tiles


def write_rows(tiles: Tiles, start: int, rows: Tensor) -> None:
    """Write rows into columns `start` and up; no other column is touched.

    Args:
        tiles: Where to; whatever its length, all of its columns may be written.
        start: The first column.
        rows: [batch, kv_heads, tokens, rank], as in `pack`.
    """
    write_columns(tiles.data, start, to_columns(rows, tiles.kind))


def write_columns(data: Tensor, start: int, columns: Tensor) -> None:
    """Write columns [batch, kv_heads, tokens, lines, width] at `start` and up."""
    place = torch.arange(start, start + columns.shape[2], device=data.device)
    tile, row = place // TILE_ROWS, place % TILE_ROWS
    # Whatever the kind, a row's share of a line is one word of 4 bytes.
    words = columns.contiguous().view(torch.int32)
    data.view(torch.int32).transpose(3, 4)[:, :, tile, row] = words


def as_columns(data: Tensor) -> Tensor:
    """The data of tiles by column [batch, kv_heads, tiles * 16, lines, width], a copy."""
    words = data.view(torch.int32).transpose(3, 4).clone(memory_format=torch.contiguous_format)
    return words.flatten(2, 3).view(data.dtype)


def to_columns(rows: Tensor, kind: Kind) -> Tensor:
    """Encode rows [..., rank] as columns [..., lines, width], padded with coordinates of 0."""
    per_line = _PER_LINE[kind]
    lines = -(-rows.shape[-1] // per_line)
    padded = functional.pad(rows, (0, lines * per_line - rows.shape[-1]))
    coordinates = padded.reshape(*rows.shape[:-1], lines, per_line)
    if kind != "int4":
        return coordinates.to(_DTYPES[kind])
    low, high = (coordinates + _INT4_ZERO).to(torch.uint8).chunk(2, -1)
    both: Tensor = low | (high << 4)
    return both


def from_columns(columns: Tensor, kind: Kind) -> Tensor:
    """Decode columns [..., lines, width] to rows [..., lines * coordinates of a line]."""
    if kind == "int4":
        halves = torch.cat([columns & 15, columns >> 4], -1)
        columns = halves.to(torch.int8) - _INT4_ZERO
    return columns.flatten(-2)
