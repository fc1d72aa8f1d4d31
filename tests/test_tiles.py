"""Tiles: every byte lies where the layout says, and nothing else is touched."""

import itertools
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loki_attn import tiles
from loki_attn.tiles import LINE_BYTES, TILE_ROWS, Tiles

KINDS = ["fp32", "bf16", "int8", "int4"]
LARGEST = {"int8": 127, "int4": 7}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8, "int4": torch.int8}
BITS = {"fp32": 32, "bf16": 16, "int8": 8, "int4": 4}

kinds = st.sampled_from(KINDS)
ranks = st.integers(1, 70)
lengths = st.integers(0, 70)


def draw_rows(kind, length, rank, seed=0, batch=2, kv_heads=3):
    """Rows that the kind can hold exactly."""
    draw = torch.Generator().manual_seed(seed)
    shape = (batch, kv_heads, length, rank)
    if kind in LARGEST:
        most = LARGEST[kind]
        return torch.randint(-most, most + 1, shape, generator=draw, dtype=torch.int8)
    return torch.randn(shape, generator=draw).to(DTYPES[kind])


def raw(data):
    """The bytes of one batch row and head's tiles."""
    return data[1, 2].contiguous().view(torch.uint8).numpy().reshape(-1)


def coordinate(memory, kind, rank, row, place):
    """Read one coordinate by the layout's words: tile, line, 4 bytes per row."""
    per_line = 32 // BITS[kind]
    lines = -(-rank // per_line)
    tile, line = row // TILE_ROWS, place // per_line
    start = (tile * lines + line) * LINE_BYTES + 4 * (row % TILE_ROWS)
    inside = place % per_line
    if kind == "int4":
        byte = int(memory[start + inside % 4])
        return (byte >> 4 if inside >= 4 else byte & 15) - 8
    size = BITS[kind] // 8
    cell = memory[start + inside * size : start + (inside + 1) * size]
    if kind == "int8":
        return int(cell.view(np.int8)[0])
    if kind == "fp32":
        return float(cell.view(np.float32)[0])
    return float(np.concatenate([np.zeros(2, np.uint8), cell]).view(np.float32)[0])


@given(kind=kinds, rank=ranks, length=lengths, seed=st.integers(0, 99))
def test_rows_come_back_as_they_went_in(kind, rank, length, seed):
    rows = draw_rows(kind, length, rank, seed)
    packed = tiles.pack(rows, kind)
    assert packed.rows().dtype == DTYPES[kind]
    assert torch.equal(packed.rows(), rows)
    lines = -(-rank * BITS[kind] // 32)
    assert packed.data.shape[:5] == (2, 3, -(-length // TILE_ROWS), lines, TILE_ROWS)
    if length:
        assert packed.data[0, 0, 0, 0].nbytes == LINE_BYTES


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [1, 8, 13])
def test_every_coordinate_lies_where_the_layout_says(kind, rank):
    rows = draw_rows(kind, 37, rank)
    memory = raw(tiles.pack(rows, kind).data)
    per_line = 32 // BITS[kind]
    for row in range(37):
        for place in range(-(-rank // per_line) * per_line):
            expected = float(rows[1, 2, row, place]) if place < rank else 0
            assert coordinate(memory, kind, rank, row, place) == expected, (row, place)


@given(kind=kinds, rank=ranks, start=st.integers(0, 50), tokens=st.integers(0, 40))
def test_writing_touches_its_own_columns_only(kind, rank, start, tokens):
    """What lies before and behind keeps its bytes, whatever they are."""
    shape = tiles.tiles_shape(2, 3, 96, kind, rank)
    data = torch.empty(shape, dtype=tiles.tile_dtype(kind))
    data.view(torch.uint8).fill_(0xA5)
    before = tiles.as_columns(data)
    rows = draw_rows(kind, tokens, rank)
    tiles.write_rows(Tiles(data, kind, rank, start), start, rows)
    after = tiles.as_columns(data)
    for part in (slice(0, start), slice(start + tokens, None)):
        same = [t[:, :, part].contiguous().view(torch.uint8) for t in (before, after)]
        assert torch.equal(*same)
    assert torch.equal(Tiles(data, kind, rank, start + tokens).rows()[:, :, start:], rows)


@given(kind=kinds, rank=ranks, cuts=st.lists(st.integers(0, 60), max_size=5))
def test_pieces_make_the_same_tiles_as_one_piece(kind, rank, cuts):
    rows = draw_rows(kind, 61, rank)
    whole = tiles.pack(rows, kind)
    pieces = Tiles(torch.zeros_like(whole.data), kind, rank, 0)
    edges = sorted({0, 61, *cuts})
    for start, end in itertools.pairwise(edges):
        tiles.write_rows(pieces, start, rows[:, :, start:end])
    assert torch.equal(pieces.data.view(torch.uint8), whole.data.view(torch.uint8))


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_floats_are_rounded_to_the_kind(kind):
    rows = torch.randn(1, 1, 20, 5, dtype=torch.float64)
    assert torch.equal(tiles.pack(rows, kind).rows(), rows.to(DTYPES[kind]))


@pytest.mark.parametrize("rank", [1, 9])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_a_copy(kind, rank):
    packed = tiles.pack(draw_rows(kind, 5, rank), kind)
    rows = packed.rows()
    rows.fill_(3)
    assert torch.equal(packed.rows(), draw_rows(kind, 5, rank))


@pytest.mark.parametrize("rank", [1, 3])
def test_what_no_row_fills_is_not_read(rank):
    packed = tiles.pack(draw_rows("fp32", 5, rank), "fp32")
    clean = packed.rows()
    packed.data[:, :, :, :, 5:] = float("nan")
    assert torch.equal(packed.rows(), clean)


def test_frozen():
    with pytest.raises(FrozenInstanceError):
        tiles.pack(draw_rows("int8", 5, 3), "int8").length = 4
