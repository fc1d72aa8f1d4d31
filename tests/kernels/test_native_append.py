"""Appending natively: the bytes of the plain path, but for coordinates that lie on an edge."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from native_scenes import BITS, DTYPES, KINDS, LAYOUTS, each_isa, laid_out
from native_truth import EPS

from loki_attn import tiles
from loki_attn.kernels import native
from loki_attn.select.loki import quantise_rows
from loki_attn.tiles import Tiles
from loki_attn.types import AppendRequest

pytestmark = pytest.mark.usefixtures("native_library")

LARGEST = {"int8": 127, "int4": 7}
F16 = torch.finfo(torch.float16)
POISON = 0x5A


class Store:
    """Storage of one layer, all bytes of it poison."""

    def __init__(self, batch, kv_heads, capacity, dims, dtype, lead):
        def room(*sizes, dtype):
            count = torch.empty(sizes, dtype=dtype).nbytes
            return torch.full((count,), POISON, dtype=torch.uint8).view(dtype).view(sizes)

        kind, rank = lead
        self.kind, self.rank = kind, rank
        self.keys = room(batch, kv_heads, capacity, dims[0], dtype=dtype)
        self.values = room(batch, kv_heads, capacity, dims[1], dtype=dtype)
        self.positions = room(batch, kv_heads, capacity, dtype=torch.int32)
        shape = tiles.tiles_shape(batch, kv_heads, capacity, kind, rank)
        self.data = room(*shape, dtype=tiles.tile_dtype(kind))
        self.scales = room(batch, kv_heads, capacity, dtype=torch.float16) if kind in BITS else None

    def parts(self):
        held = {"keys": self.keys, "values": self.values, "positions": self.positions}
        if self.scales is not None:
            held["scales"] = self.scales
        return held

    def columns(self):
        """The bytes of every column [batch, kv_heads, capacity, bytes]."""
        columns = tiles.as_columns(self.data)
        return columns.reshape(*columns.shape[:3], -1).contiguous().view(torch.uint8)

    def request(self, key, value, start, first, key_map):
        lead = Tiles(self.data, self.kind, self.rank, start + key.shape[2])
        return AppendRequest(
            key=key, value=value, keys=self.keys, values=self.values, positions=self.positions,
            start=start, first_position=first, lead=lead, lead_scales=self.scales, key_map=key_map,
        )  # fmt: skip

    def write_plainly(self, key, value, start, first, key_map):
        """What the plain path of the cache does."""
        now = slice(start, start + key.shape[2])
        self.keys[:, :, now], self.values[:, :, now] = key, value
        self.positions[:, :, now] = torch.arange(first, first + key.shape[2])
        rows = key.float() @ key_map
        if self.scales is not None:
            rows, self.scales[:, :, now] = quantise_rows(rows, BITS[self.kind])
        tiles.write_rows(Tiles(self.data, self.kind, self.rank, start), start, rows)


def code_range(lead, error, scales, kind):
    """Lowest and highest code that a coordinate within its error may get."""
    most, step = LARGEST[kind], scales.double()[..., None]
    ends = ((lead + side * (error + 4 * EPS * lead.abs())) / step for side in (-1, 1))
    return [torch.round(end).clamp(-most, most) for end in ends]


def check_lead(store, plain, now, lead, error):
    """Coordinates and scales are those of the plain path, or of its neighbour on an edge."""
    kind = store.kind
    rows, other = (
        Tiles(s.data, kind, s.rank, now.stop).rows()[:, :, now].double() for s in (store, plain)
    )
    if kind == "fp32":
        assert bool(((rows - lead).abs() <= error).all())
        return
    if kind == "bf16":
        low, high = ((lead + side * error).float().bfloat16().double() for side in (-1, 1))
    else:
        scales = store.scales[:, :, now]
        peak = lead.abs().amax(-1) / LARGEST[kind]
        slack = error.amax(-1) / LARGEST[kind] + 4 * EPS * peak
        ends = [(peak + s * slack).clamp(F16.smallest_normal, F16.max).half() for s in (-1, 1)]
        assert bool(((ends[0] <= scales) & (scales <= ends[1])).all())
        moved = scales != plain.scales[:, :, now]
        assert not bool((moved & (ends[0] == ends[1])).any())
        assert int(moved.sum()) <= 2 + 0.02 * moved.numel()
        low, high = code_range(lead, error, scales, kind)
        other = torch.where(moved[..., None], rows, other)
    moved = rows != other
    assert bool(((low <= rows) & (rows <= high)).all())
    assert not bool((moved & (low == high)).any())
    assert int(moved.sum()) <= 2 + 0.01 * moved.numel()


def check_rest(store, plain, now):
    """Everything but the coordinates is exact, padding is zero, other memory is untouched."""
    for name, held in store.parts().items():
        if name != "scales":
            same = plain.parts()[name]
            assert torch.equal(held.view(torch.uint8), same.view(torch.uint8)), name
    others = torch.ones(store.keys.shape[2], dtype=torch.bool)
    others[now] = False
    assert bool((store.columns()[:, :, others] == POISON).all())
    if store.scales is not None:
        spare = store.scales.view(torch.int16)[:, :, others]
        assert bool((spare == POISON * 257).all())
    padded = tiles.from_columns(tiles.as_columns(store.data), store.kind)[:, :, now, store.rank :]
    assert bool((padded == 0).all())


@given(data=st.data())
def test_append(tally, data):
    draw = data.draw
    seed = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    batch, kv_heads, tokens = (draw(st.integers(1, most)) for most in (3, 3, 70))
    dim, value_dim = (draw(st.sampled_from([1, 7, 16, 40, 64, 80])) for _ in range(2))
    rank, kind = draw(st.integers(1, 40)), draw(st.sampled_from(KINDS))
    start, first = draw(st.integers(0, 40)), draw(st.integers(0, 10_000))
    size = draw(st.sampled_from([1.0, 1.0, 1e-4, 1e3, 0.0]))
    dtype = draw(st.sampled_from(DTYPES))
    key, value = (
        laid_out(
            (torch.randn(batch, kv_heads, tokens, d, generator=seed) * size).to(dtype),
            draw(st.sampled_from(LAYOUTS)),
        )
        for d in (dim, value_dim)
    )
    key_map = torch.randn(kv_heads, dim, rank, generator=seed) / dim**0.5
    now = slice(start, start + tokens)
    lead = key.double() @ key_map.double()
    error = 8 * EPS * (key.double().abs() @ key_map.double().abs())
    sizes = (batch, kv_heads, -(-now.stop // 16) * 16 + 16, (dim, value_dim), dtype, (kind, rank))
    plain = Store(*sizes)
    plain.write_plainly(key, value, start, first, key_map)
    for isa in each_isa():
        store = Store(*sizes)
        assert native.append(store.request(key, value, start, first, key_map)) is True
        check_rest(store, plain, now)
        check_lead(store, plain, now, lead, error)
        tally[f"append to {kind} on {isa}"] += 1


def test_without_a_lead_rows_and_positions_are_written():
    for dtype in DTYPES:
        for _ in each_isa():
            store, plain = (Store(2, 3, 32, (5, 9), dtype, ("fp32", 1)) for _ in range(2))
            key, value = (torch.randn(2, 3, 4, dim).to(dtype) for dim in (5, 9))
            plain.write_plainly(key, value, 7, 100, torch.ones(3, 5, 1))
            request = AppendRequest(
                key=key, value=value, keys=store.keys, values=store.values,
                positions=store.positions, start=7, first_position=100,
            )  # fmt: skip
            assert native.append(request) is True
            for name, held in store.parts().items():
                same = plain.parts()[name]
                assert torch.equal(held.view(torch.uint8), same.view(torch.uint8)), name
            assert bool((store.columns() == POISON).all())
