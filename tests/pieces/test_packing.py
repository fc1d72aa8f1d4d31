"""Packing: real rows in front, in their order, and back again."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from loki_attn.pieces.packing import Packing, without_padding


@given(st.integers(0, 99), st.integers(1, 30))
def test_packed_rows_are_the_real_ones_and_unpacking_undoes_it(seed, length):
    draw = torch.Generator().manual_seed(seed)
    valid = torch.rand(2, 3, length, generator=draw) < 0.6
    rows = torch.randn(2, 3, length, generator=draw)
    packing = Packing.of(valid)
    packed = packing.pack(rows)
    for b in range(2):
        for h in range(3):
            real = rows[b, h, valid[b, h]]
            assert torch.equal(packed[b, h, : len(real)], real)
    assert torch.equal(packing.unpack(packed), rows)
    wide = rows[..., None].expand(-1, -1, -1, 2)
    assert torch.equal(packing.pack(wide), packed[..., None].expand(-1, -1, -1, 2))


def test_without_padding_nothing_is_copied():
    rows = torch.randn(1, 1, 4)
    for valid in (None, torch.ones(1, 1, 4, dtype=torch.bool)):
        assert Packing.of(valid).pack(rows) is rows


def test_padding_becomes_zero_even_where_it_is_nan():
    rows = torch.tensor([float("nan"), 1.0])[None, None, :, None]
    valid = torch.tensor([[[False, True]]])
    assert without_padding(rows, valid).flatten().tolist() == [0.0, 1.0]
