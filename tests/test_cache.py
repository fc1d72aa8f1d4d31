"""LayerCache: growth, positions, bytes, and what is refused."""

import pytest
import torch

from loki_attn.cache import LayerCache
from loki_attn.errors import CacheError
from loki_attn.policy import preset
from loki_attn.row_format import RowFormat
from loki_attn.testing import layer_shape, random_rows, tiny_basis

SHAPE = layer_shape(4, 2, 8, 6)


def filled(seq=10, batch=2):
    cache = LayerCache()
    _, key, value = random_rows(SHAPE, seq, batch=batch)
    cache.append(key, value)
    return cache, key, value


def test_rows_come_back_as_they_went_in():
    cache, key, value = filled()
    assert torch.equal(cache.keys, key)
    assert torch.equal(cache.values, value)
    assert cache.positions.dtype == torch.int32
    assert cache.positions[1, 1].tolist() == list(range(10))
    assert cache.length == cache.seen == 10


def test_growth_keeps_rows_and_does_not_happen_at_every_token():
    cache, key, value = LayerCache(), *random_rows(SHAPE, 1000)[1:]
    places = set()
    for step in range(1000):
        cache.append(key[:, :, step : step + 1], value[:, :, step : step + 1])
        places.add(cache.keys.data_ptr())
        assert cache.length == step + 1 <= cache.capacity
    assert torch.equal(cache.keys, key)
    assert torch.equal(cache.values, value)
    assert len(places) < 12
    assert cache.capacity < 1.6 * 1000


def test_reserve():
    cache, key, value = LayerCache(reserve_tokens=500), *random_rows(SHAPE, 3)[1:]
    cache.append(key, value)
    assert cache.capacity >= 500
    place = cache.keys.data_ptr()
    for _ in range(100):
        cache.append(key, value)
    assert cache.keys.data_ptr() == place


def test_gather_keep_and_truncate():
    cache, key, value = filled()
    index = torch.tensor([[[1, 4], [0, 9]]]).expand(2, -1, -1)
    keys, values = cache.gather(index)
    assert torch.equal(keys[0, 1], key[0, 1, [0, 9]])
    assert torch.equal(values[1, 0], value[1, 0, [1, 4]])
    cache.keep(index)
    assert torch.equal(cache.keys, keys)
    assert torch.equal(cache.values, values)
    assert torch.equal(cache.positions, index.int())
    assert (cache.length, cache.seen) == (2, 10)
    cache.append(key[:, :, :1], value[:, :, :1])
    assert cache.positions[0].tolist() == [[1, 4, 10], [0, 9, 10]]
    cache.truncate(2)
    assert (cache.length, cache.seen) == (2, 10)


def test_truncated_tokens_are_taken_back():
    cache, key, value = filled()
    cache.truncate(7)
    assert cache.seen == 7
    cache.append(key[:, :, 7:], value[:, :, 7:])
    assert torch.equal(cache.keys, key)
    assert cache.positions[0, 0].tolist() == list(range(10))
    cache.truncate(0)
    assert cache.length == 0
    assert cache.keys.shape == (2, 2, 0, 8)


def test_batch_rows_are_chosen_and_repeated():
    cache, key, value = filled(batch=3)
    cache.select_batch(torch.tensor([2, 0]))
    assert torch.equal(cache.keys, key[[2, 0]])
    assert torch.equal(cache.values, value[[2, 0]])
    cache.repeat_batch(2)
    assert torch.equal(cache.keys, key[[2, 2, 0, 0]])
    assert cache.positions.shape == (4, 2, 10)


def test_positions_may_be_given():
    cache, key, value = LayerCache(), *random_rows(SHAPE, 3, batch=2)[1:]
    given = torch.tensor([[0, 1, 2], [5, 6, 7]])
    cache.append(key, value, given)
    assert torch.equal(cache.positions[:, 1], given.int())
    cache.append(key, value, given[:1])
    assert cache.positions[1, 0].tolist() == [5, 6, 7, 0, 1, 2]


def test_a_prefix_shares_storage():
    cache, key, _ = filled()
    first = cache.prefix(4)
    assert torch.equal(first.keys, key[:, :, :4])
    assert first.keys.data_ptr() == cache.keys.data_ptr()
    assert (first.length, cache.length) == (4, 10)
    for length in (-1, 11):
        with pytest.raises(CacheError, match="10 are held"):
            cache.prefix(length)


def test_conversion_encodes_what_is_held():
    cache, key, value = filled()
    cache.truncate(8)
    selector = preset("loki", rank=4).select.bind(SHAPE, tiny_basis(SHAPE).layer(0))
    other = cache.converted(selector)
    fresh = LayerCache(selector)
    fresh.append(key[:, :, :8], value[:, :, :8])
    for name in ("key", "value", "position", "lead", "lead_scale"):
        assert torch.equal(other.plane(name), fresh.plane(name)), name
    assert other.seen == 8
    assert LayerCache().converted(selector).length == 0


def test_reset_gives_memory_back():
    cache, key, value = filled()
    cache.reset()
    assert (cache.length, cache.seen, cache.capacity, cache.nbytes()) == (0, 0, 0, 0)
    cache.append(key[:1], value[:1])
    assert cache.positions[0, 0].tolist() == list(range(10))


def loki(**fields):
    return preset("loki", rank=5, **fields).select.bind(SHAPE, tiny_basis(SHAPE).layer(0))


@pytest.mark.parametrize("plane", ["int8", "int4", "bf16", "fp32"])
def test_tiles_share_the_storage_and_a_plane_is_a_copy(plane):
    cache = LayerCache(loki(plane_dtype=plane))
    cache.append(*random_rows(SHAPE, 21, batch=2)[1:])
    tiles = cache.tiles("lead")
    assert (tiles.kind, tiles.rank, tiles.length) == (plane, 5, 21)
    assert tiles.data.shape[2] * 16 == cache.capacity
    assert torch.equal(tiles.rows(), cache.plane("lead"))
    tiles.data.zero_()
    assert not bool(cache.tiles("lead").data.any())
    assert torch.equal(cache.prefix(4).plane("lead"), cache.plane("lead")[:, :, :4])
    assert cache.prefix(4).tiles("lead").length == 4


@pytest.mark.parametrize("kept", [0, 1, 15, 16, 17])
def test_capacity_fills_whole_tiles(kept):
    cache = LayerCache(loki())
    cache.append(*random_rows(SHAPE, 21, batch=2)[1:])
    assert cache.capacity == 64
    cache.keep(torch.arange(kept).expand(2, 2, -1))
    assert cache.capacity == -(-kept // 16) * 16
    assert cache.length == kept
    cache.append(*random_rows(SHAPE, 3, batch=2)[1:])
    assert cache.capacity % 16 == 0
    assert cache.plane("lead").shape == (2, 2, kept + 3, 5)


class Kernels:
    """Ops whose append writes nothing, keeps what it was asked and says it is done, or not."""

    def __init__(self, done):
        self.done, self.requests = done, []

    def append(self, request):
        self.requests.append(request)
        return self.done


@pytest.mark.parametrize("plane", ["int8", "int4", "bf16", "fp32"])
def test_a_kernel_is_offered_the_whole_append(monkeypatch, plane):
    selector, kernels = loki(plane_dtype=plane), Kernels(done=False)
    monkeypatch.setattr("loki_attn.cache.ops", lambda: kernels)
    cache, key, value = LayerCache(selector), *random_rows(SHAPE, 21, batch=2)[1:]
    cache.append(key, value)
    cache.keep(torch.arange(0, 20, 2).expand(2, 2, -1))
    cache.append(key[:, :, :3], value[:, :, :3])
    first, second = kernels.requests
    assert (first.start, first.first_position, first.lead.length) == (0, 0, 21)
    assert (second.start, second.first_position, second.lead.length) == (10, 21, 13)
    assert torch.equal(second.key, key[:, :, :3])
    assert torch.equal(second.value, value[:, :, :3])
    for whole, rows in ((second.keys, cache.keys), (second.values, cache.values)):
        assert whole.data_ptr() == rows.data_ptr()
        assert whole.shape[2] == cache.capacity
    assert second.positions.dtype == torch.int32
    assert second.positions.data_ptr() == cache.positions.data_ptr()
    assert second.lead.data.data_ptr() == cache.tiles("lead").data.data_ptr()
    assert (second.lead.kind, second.lead.rank) == (plane, 5)
    assert torch.equal(second.key_map, tiny_basis(SHAPE).layer(0).key_map[..., :5])
    if plane in {"bf16", "fp32"}:
        assert second.lead_scales is None
    else:
        assert second.lead_scales.shape == (2, 2, cache.capacity)
        assert second.lead_scales.dtype == torch.float16


def test_what_a_kernel_did_is_not_done_again(monkeypatch, poison):
    kernels = Kernels(done=True)
    monkeypatch.setattr("loki_attn.cache.ops", lambda: kernels)
    cache, key, value = LayerCache(), *random_rows(SHAPE, 4)[1:]
    cache.append(key, value)
    assert cache.length == cache.seen == 4
    assert bool(torch.isnan(cache.keys).all())
    (request,) = kernels.requests
    assert (request.lead, request.lead_scales, request.key_map) == (None, None, None)


class OwnPlanes(RowFormat):
    """Planes that nothing but their own code can make."""

    def planes(self, key):
        return {"own": key[..., :2]}


class Undecided(OwnPlanes):
    """The same; it could describe a lead, but has none."""

    def lead_format(self, device):
        return None


@pytest.mark.parametrize(
    "row_format",
    [loki(layout="rotated"), OwnPlanes(), Undecided()],
    ids=["rows", "planes", "undecided"],
)
def test_a_kernel_is_not_offered_what_it_cannot_know(monkeypatch, row_format):
    kernels = Kernels(done=True)
    monkeypatch.setattr("loki_attn.cache.ops", lambda: kernels)
    cache, key, value = LayerCache(row_format), *random_rows(SHAPE, 4)[1:]
    cache.append(key, value)
    plain = LayerCache()
    plain.append(key, value, torch.arange(4)[None])
    assert len(kernels.requests) == 0
    assert torch.equal(cache.keys, row_format.rows(key))
    assert torch.equal(plain.keys, key)


def test_moving():
    cache, _, _ = filled()
    cache.to("cpu")
    assert cache.length == 10


# bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ((2, 2, 3), (2, 2, 3, 6), "append needs key and value"),
        ((2, 2, 3, 8), (2, 2, 4, 6), "equal first three"),
        ((3, 2, 1, 8), (3, 2, 1, 6), "holds key rows .*batch=2, kv_heads=2, dim=8.* make a new"),
        ((2, 1, 1, 8), (2, 1, 1, 6), "holds key rows"),
        ((2, 2, 1, 9), (2, 2, 1, 6), "holds key rows"),
        ((2, 2, 1, 8), (2, 2, 1, 7), "holds value rows"),
    ],
)
def test_shapes_must_continue_the_rows(key, value, message):
    cache, _, _ = filled()
    with pytest.raises(CacheError, match=message):
        cache.append(torch.zeros(key), torch.zeros(value))
    assert cache.length == 10


def test_dtypes_must_continue_the_rows():
    cache, key, value = filled()
    with pytest.raises(CacheError, match=r"holds torch.float32 key rows, got torch.float16"):
        cache.append(key.half(), value)
    with pytest.raises(CacheError, match=r"holds torch.float32 value rows, got torch.bfloat16"):
        cache.append(key, value.bfloat16())


@pytest.mark.parametrize("shape", [(1, 4), (3, 10), (10,), (2, 2, 10)])
def test_positions_must_fit(shape):
    _, key, value = filled()
    with pytest.raises(CacheError, match=r"positions \[batch or 1, tokens\] = \[2 or 1, 10\], got"):
        LayerCache().append(key, value, torch.zeros(shape, dtype=torch.long))


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ([[[0, 10]] * 2] * 2, r"rows in 0\.\.9"),
        ([[[-1, 3]] * 2] * 2, r"rows in 0\.\.9"),
        ([[[3, 3]] * 2] * 2, "strictly ascending"),
        ([[[4, 3]] * 2] * 2, "strictly ascending"),
        ([[[3, 4]] * 2], r"per \[batch=2, kv_heads=2\], got indices \[1, 2, 2\]"),
        ([[[3, 4]]] * 2, r"per \[batch=2, kv_heads=2\]"),
        ([3, 4], r"per \[batch=2, kv_heads=2\]"),
    ],
)
def test_keep_refuses_what_it_cannot_keep(index, message):
    cache, key, _ = filled()
    with pytest.raises(CacheError, match=message):
        cache.keep(torch.tensor(index))
    assert torch.equal(cache.keys, key)


@pytest.mark.parametrize("length", [-1, 11])
def test_truncate_refuses(length):
    with pytest.raises(CacheError, match=f"Cannot truncate 10 rows to {length}"):
        filled()[0].truncate(length)


def test_what_is_not_there():
    with pytest.raises(CacheError, match="no plane 'key'; it holds nothing: append first"):
        _ = LayerCache().keys
    with pytest.raises(CacheError, match="no plane 'lead'; it holds key, value, position"):
        filled()[0].plane("lead")
    with pytest.raises(CacheError, match="'key' is not kept in tiles; read plane"):
        filled()[0].tiles("key")
    with pytest.raises(CacheError, match="no plane 'lead'; it holds nothing: append first"):
        LayerCache().tiles("lead")
    with pytest.raises(CacheError, match="append first"):
        LayerCache().keep(torch.zeros(1, 1, 1, dtype=torch.long))
