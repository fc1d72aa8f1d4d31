"""Appending in Triton: the bytes of the plain path of the cache, and no others."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from native_scenes import laid_out
from native_truth import EPS
from triton_scenes import DEVICE, FEW, IEEE, KINDS, kernels, normal, there
from triton_stores import POISON, Store

from loki_attn import tiles
from loki_attn.cache import LayerCache
from loki_attn.kernels import backends
from loki_attn.pieces.lead_plane import LeadPlane
from loki_attn.row_format import RowFormat
from loki_attn.types import AppendRequest

pytestmark = IEEE

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# One token or many, at the start, at and across the end of a tile, and over several blocks.
PLACES = [(1, 0), (1, 15), (1, 16), (5, 13), (37, 30)]


def whole(*size, seed=0, dtype=torch.float32, most=9):
    """Small whole numbers: sums of their products are exact in any order and on any device."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(-most, most + 1, size, generator=draw).to(dtype)


def check_append(key, value, key_map, start, kind, rank, *, held=False, first=1000):
    """Every byte of the storage is what the plain path leaves in it."""
    batch, kv_heads, tokens, dim = key.shape
    room = -(-(start + tokens) // 16) * 16 + 16
    sizes = (batch, kv_heads, room, (dim, value.shape[3]), key.dtype, kind, rank)
    plain, store = Store.of(*sizes), there(Store.of(*sizes))
    plain.write_plainly(key, value, key_map, start, first, positioned=not held)
    place = torch.tensor([start], device=DEVICE) if held else start
    new = there((key, value, key_map))
    assert kernels.append(store.request(*new, place, first, positioned=not held)) is True
    store.assert_same_bytes(plain)


@pytest.mark.parametrize(("tokens", "start"), PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_at_any_place(kind, tokens, start):
    """Codes, scales, positions, and the zeros that fill the last line; then by a device start."""
    dtype, rank = DTYPES[tokens % 3], {"int8": 6, "int4": 11, "bf16": 7, "fp32": 5}[kind]
    key, value = whole(2, 2, tokens, 20, dtype=dtype), whole(2, 2, tokens, 12, seed=1, dtype=dtype)
    key_map = whole(2, 20, rank, seed=2) / 4
    check_append(key, value, key_map, start, kind, rank)
    check_append(key, value, key_map, start, kind, rank, held=True)


@pytest.mark.parametrize("size", [0.0, 2.0**-40, 2.0**30])
@pytest.mark.parametrize("kind", KINDS)
def test_numbers_beyond_the_scales(kind, size):
    """Scales stop at the least normal float16 and at the largest; codes at theirs."""
    key, value = whole(1, 2, 3, 16) * size, whole(1, 2, 3, 16)
    check_append(key, value, whole(2, 16, 16, seed=2), 14, kind, 16)


@FEW
@given(data=st.data())
def test_any_append(data):
    """Odd sizes and layouts of what comes."""
    draw = data.draw
    seed, kind = draw(st.integers(0, 2**31)), draw(st.sampled_from([*KINDS, None]))
    batch, kv_heads, tokens = (draw(st.integers(1, most)) for most in (3, 3, 40))
    dims = [draw(st.sampled_from([1, 7, 16, 40, 80])) for _ in range(2)]
    dtype, rank = draw(st.sampled_from(DTYPES)), draw(st.integers(1, 40))
    key, value = (
        laid_out(whole(batch, kv_heads, tokens, dim, seed=seed, dtype=dtype), layout)
        for dim, layout in zip(
            dims, draw(st.permutations(["plain", "view", "by token"])), strict=False
        )
    )
    start, held = draw(st.integers(0, 40)), draw(st.booleans())
    key_map = whole(kv_heads, dims[0], rank, seed=seed)
    check_append(key, value, key_map, start, kind, rank, held=held)


@pytest.mark.parametrize("start", [29, 32, 40])
def test_rows_that_find_no_room_are_not_written(start):
    """Where only the device knows how many are held; what still fits is."""
    key, key_map = whole(1, 2, 5, 8), whole(2, 8, 4, seed=1)
    plain = Store.of(1, 2, 32, (8, 8), torch.float32, "int8", 4)
    store = there(Store.of(1, 2, 32, (8, 8), torch.float32, "int8", 4))
    fits = max(32 - start, 0)
    if fits:
        now = key[:, :, :fits]
        plain.write_plainly(now, now, key_map, start, positioned=False)
    place = torch.tensor([start], device=DEVICE)
    request = store.request(*there((key, key, key_map)), place, positioned=False)
    assert kernels.append(request) is True
    store.assert_same_bytes(plain)


def test_codes_without_room_for_their_scales_are_refused():
    """They would have been written over the keys."""
    key, key_map = whole(1, 2, 5, 8), whole(2, 8, 4, seed=1)
    store = there(Store.of(1, 2, 32, (8, 8), torch.float32, "int8", 4))
    request = replace(store.request(*there((key, key, key_map)), 0), lead_scales=None)
    with pytest.raises(backends.Unserved, match="only codes, by scales: int8, no scales"):
        kernels.append(request)


def test_coordinates_are_as_exact_as_float32_sums():
    """Products of whole float32 numbers, not of shortened ones."""
    key, key_map = normal(1, 2, 20, 128), normal(2, 128, 32, seed=1) / 11
    store = there(Store.of(1, 2, 32, (128, 128), torch.float32, "fp32", 32))
    assert kernels.append(store.request(*there((key, key, key_map)), 0)) is True
    found = tiles.from_columns(tiles.as_columns(store.data.cpu()), "fp32")[:, :, :20]
    truth = key.double() @ key_map.double()
    slack = 8 * EPS * (key.double().abs() @ key_map.double().abs())
    assert bool(((found - truth).abs() <= slack).all())


def test_a_cache_is_filled_alike():
    """Token by token through the kernel, as LayerCache asks for it: what plain torch encodes."""

    class Planes(RowFormat):
        plane = LeadPlane(whole(2, 16, 8, seed=2), whole(2, 16, 8), "int8")
        planes = property(lambda self: self.plane.planes)
        tiled = property(lambda self: self.plane.tiled)
        lead_format = property(lambda self: self.plane.format)

    class Watched(LayerCache):
        served = 0

        def _append_at_once(self, key, value):
            from loki_attn import cache

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(cache, "ops", lambda: kernels)
                done = super()._append_at_once(key, value)
            self.served += done
            return done

    class Plain(LayerCache):
        def _append_at_once(self, key, value):
            return False

    fast, plain = Watched(Planes()), Plain(Planes())
    for turn, tokens in enumerate([19, 1, 1, 30]):
        rows = whole(1, 2, tokens, 16, seed=turn), whole(1, 2, tokens, 16, seed=9)
        fast.append(*there(rows))
        plain.append(*rows)
    assert fast.served == 4
    for name in ("key", "value", "position", "lead", "lead_scale"):
        assert torch.equal(fast.plane(name).cpu(), plain.plane(name)), name


def request_of(**changed):
    """A request on the device that is served, but for what is changed."""
    store = Store.of(1, 2, 32, (8, 8), torch.float32, "int8", 4)
    rows = whole(1, 2, 3, 8)
    request = store.request(rows, rows, whole(2, 8, 4), 0)
    return there(AppendRequest(**{**vars(request), **changed}))


def test_nothing_is_written_for_no_tokens_or_where_a_graph_is_recorded():
    rows = torch.zeros(1, 2, 1, 8, device=DEVICE)
    for key in (rows[:, :, :0], rows.requires_grad_()):
        request = request_of(key=key, value=key)
        assert kernels.append(request) is False
        assert bool((request.keys.view(torch.int32) == POISON * 0x01010101).all())


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"start": 30}, "rows 30 to 33 have no room among 32"),
        ({"start": -1}, "rows -1 to 2 have no room among 32"),
        ({"key_map": torch.zeros(2, 8, 5)}, r"the map \[2, 8, 5\] does not fit the keys"),
        ({"key_map": torch.zeros(2, 4, 8).mT}, "the map is not contiguous"),
        ({"key": torch.zeros(1, 2, 3, 8).half()}, "torch.float16 queries met torch.float32 keys"),
        ({"positions": torch.zeros(1, 2, 32)}, "positions are contiguous int32, got torch.float32"),
        ({"lead_scales": torch.zeros(1, 2, 32)}, "scales are contiguous float16, got"),
        ({"keys": torch.zeros(1, 2, 32, 9)}, "does not fit rows"),
    ],
)
def test_what_is_not_served_is_refused(changed, why):
    with pytest.raises(backends.Unserved, match=why):
        kernels.append(request_of(**changed))
