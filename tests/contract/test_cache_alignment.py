"""Laws 5, 6 and 9: rows and planes stay together, stale memory is never read, bytes are true."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loki_attn import attention
from loki_attn.cache import KEY, POSITION, VALUE, LayerCache
from loki_attn.row_format import RowFormat
from loki_attn.testing import layer_shape, random_rows
from loki_attn.types import AttentionCall

SHAPE = layer_shape(4, 2, 24, 16)
CALL = AttentionCall(scaling=24**-0.5)
AMOUNT = {"top_k": 7, "sinks": 1, "recents": 2}


def planes_of(cache):
    return {name: cache.plane(name) for name in cache._storage}


def assert_same_rows(cache, other, layer):
    """Equal rows; what an encoder computed may differ by the order of summation of one product."""
    mine, theirs = planes_of(cache), planes_of(other)
    assert mine.keys() == theirs.keys()
    rotated = type(layer.selector).rows is not RowFormat.rows
    for name, rows in mine.items():
        if name in {VALUE, POSITION} or (name == KEY and not rotated):
            assert torch.equal(rows, theirs[name]), name
        elif rows.dtype == torch.int8:
            assert int((rows.int() - theirs[name].int()).abs().max()) <= 1
        elif rows.dtype in {torch.int32, torch.int64, torch.uint8}:
            # Packed signs: a number next to zero may fall to either side.
            assert int((rows != theirs[name]).sum()) <= 1 + rows.numel() // 1000, name
        else:
            torch.testing.assert_close(rows, theirs[name], msg=name)


def assert_fresh(cache, layer, key, value, positions):
    """The cache equals one that only ever held these rows."""
    fresh = LayerCache(layer.selector)
    fresh.append(key, value)
    fresh.positions.copy_(positions)
    assert_same_rows(cache, fresh, layer)


def take(rows, index):
    return rows.gather(2, index[..., None].expand(*index.shape, rows.shape[3]))


@settings(max_examples=10)
@given(seq=st.integers(1, 130), cuts=st.lists(st.integers(1, 129), max_size=4))
def test_one_by_one_in_chunks_or_at_once(case, seq, cuts):
    _, key, value = random_rows(SHAPE, seq, batch=2, seed=seq)
    layer = case.layer(SHAPE, **AMOUNT)
    whole = case.filled(layer, key, value)
    edges = sorted({0, seq, *(cut for cut in cuts if cut < seq)})
    for steps in (list(range(seq + 1)), edges):
        cache = LayerCache(layer.selector)
        for start, end in itertools.pairwise(steps):
            cache.append(key[:, :, start:end], value[:, :, start:end])
        assert_same_rows(cache, whole, layer)
        assert cache.length == cache.seen == seq


def test_stale_memory_is_never_read(case, poison):
    """Fresh slots hold NaN (codes 127, positions -1); every length from 1 on must not see them."""
    layer = case.layer(SHAPE, **AMOUNT)
    query, key, value = random_rows(SHAPE, 130, q_len=130)
    cache = LayerCache(layer.selector)
    for step in range(130):
        cache.append(key[:, :, step : step + 1], value[:, :, step : step + 1])
        assert cache.positions.tolist()[0][0] == list(range(step + 1))
        if step in {0, 1, 6, 7, 63, 64, 100, 129}:
            args = (query[:, :, step : step + 1], cache, layer, CALL)
            out, selection = attention.decode(*args)
            assert bool(torch.isfinite(out).all())
            assert int(selection.indices.max()) <= step
            assert bool(torch.isfinite(attention.dense(*args, None)).all())
    cache.truncate(50)
    out = attention.every_query(query[:, :, 20:50], cache, layer, CALL)
    assert bool(torch.isfinite(out).all())
    assert bool(torch.isnan(cache._storage[KEY].data[:, :, 130:]).all())


@settings(max_examples=10)
@given(data=st.data())
def test_any_order_of_operations_keeps_planes_with_rows(case, data):
    """After append, keep, truncate, reorder in any order: as if only the survivors had come."""
    _, key, value = random_rows(SHAPE, 300, batch=3, seed=8)
    layer = case.layer(SHAPE, **AMOUNT)
    cache = LayerCache(layer.selector)
    used = 0
    mine_key, mine_value = key[:, :, :0], value[:, :, :0]
    places = torch.zeros(3, 2, 0, dtype=torch.int32)
    for _ in range(data.draw(st.integers(1, 5))):
        tokens = data.draw(st.integers(1, 50))
        new = [t[..., used : used + tokens, :] for t in (key, value)]
        if used:
            new = [t[: mine_key.shape[0]] for t in new]
        cache.append(*new)
        mine_key, mine_value = torch.cat([mine_key, new[0]], 2), torch.cat([mine_value, new[1]], 2)
        come = torch.arange(cache.seen - tokens, cache.seen, dtype=torch.int32)
        places = torch.cat([places, come.expand(3, 2, -1)], 2)
        used += tokens
        match data.draw(st.sampled_from(["keep", "truncate", "reorder", "nothing"])):
            case "keep":
                kept = data.draw(st.integers(1, cache.length))
                seed = torch.Generator().manual_seed(used)
                chance = torch.rand(mine_key.shape[:3], generator=seed)
                index = chance.argsort(-1)[..., :kept].sort(-1).values
                cache.keep(index)
                mine_key, mine_value = take(mine_key, index), take(mine_value, index)
                places = places.gather(2, index)
            case "truncate":
                length = data.draw(st.integers(1, cache.length))
                cache.truncate(length)
                mine_key, mine_value = mine_key[:, :, :length], mine_value[:, :, :length]
                places = places[:, :, :length]
            case "reorder":
                rows = torch.tensor([2, 0, 0])
                cache.select_batch(rows)
                mine_key, mine_value = mine_key[rows], mine_value[rows]
                places = places[rows]
        assert_fresh(cache, layer, mine_key, mine_value, places)
        assert bool((cache.positions.diff(dim=-1) > 0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bytes_are_the_bytes_held(case, dtype):
    layer = case.layer(SHAPE, **AMOUNT)
    _, key, value = random_rows(SHAPE, 70, batch=2, dtype=dtype)
    cache = case.filled(layer, key, value)

    def held():
        return sum(s.data.untyped_storage().nbytes() for s in cache._storage.values())

    assert cache.nbytes() == held() > 0
    cache.append(key, value)
    cache.append(key, value)
    assert cache.nbytes() == held()
    cache.keep(torch.arange(0, 210, 3).expand(2, 2, -1))
    assert cache.capacity == 80  # whole tiles
    assert cache.nbytes() == held() == 2 * 2 * 80 * cache.row_bytes()
    cache.repeat_batch(3)
    assert cache.nbytes() == held() == 6 * 2 * 80 * cache.row_bytes()
    cache.reset()
    assert cache.nbytes() == 0


def test_score_bytes_are_part_of_the_row(case):
    layer = case.layer(SHAPE, **AMOUNT)
    cache = case.filled(layer, *random_rows(SHAPE, 9)[1:])
    planes = cache.row_bytes() - cache.row_bytes(KEY, VALUE, "position")
    read = layer.selector.score_bytes(cache)
    if layer.selector.page_rows() or case.corrects:
        beside = sum(summary.nbytes for summary in summaries_of(layer.selector, cache).values()) / (
            cache.positions.numel()
        )
        assert 0 < read <= planes + beside + cache.row_bytes(KEY)
    else:
        assert read == planes if planes else read in {0, 24 // 4 * 4, 24 * 4}


def summaries_of(selector, cache):
    """Summaries of all rows, made as one page after the other."""
    size = selector.page_rows()
    if not size:
        return {}
    parts = [
        selector.summarise(*(rows[:, :, None, start : start + size] for rows in pair))
        for pair in [(cache.keys, cache.values)]
        for start in range(0, cache.length, size)
    ]
    return {name: torch.cat([part[name] for part in parts], 2) for name in parts[0]}
