"""Summaries of pages: made when they are read, never stale, of the rows that are held."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loki_attn.cache import LayerCache
from loki_attn.errors import CacheError
from loki_attn.row_format import RowFormat
from loki_attn.testing import layer_shape, random_rows

SHAPE = layer_shape(4, 2, 8, 6)
PAGE = 4


class Paged(RowFormat):
    """The sums of a page's keys and values, and how often whole pages were summarised."""

    def __init__(self):
        self.calls = []

    def page_rows(self):
        return PAGE

    def summarise(self, keys, values):
        self.calls.append(tuple(keys.shape[2:4]))
        return {"keys": keys.sum(3), "values": values.sum(3)}


def expected(rows):
    """The same sums, page by page."""
    parts = rows.split(PAGE, 2)
    return torch.stack([part.sum(2) for part in parts], 2)


def assert_true(cache):
    torch.testing.assert_close(cache.summary("keys"), expected(cache.keys))
    torch.testing.assert_close(cache.summary("values"), expected(cache.values))


def filled(seq, batch=2):
    cache = LayerCache(Paged())
    rows = random_rows(SHAPE, seq, batch=batch)[1:]
    cache.append(*rows)
    return cache, *rows


@given(
    seq=st.integers(1, 60),
    cuts=st.lists(st.integers(1, 59), max_size=6),
    read=st.lists(st.booleans(), min_size=8, max_size=8),
)
def test_they_are_those_of_the_rows_however_these_came_and_whenever_they_are_read(seq, cuts, read):
    _, key, value = random_rows(SHAPE, seq, batch=2, seed=seq)
    cache = LayerCache(Paged())
    edges = sorted({0, seq, *(cut for cut in cuts if cut < seq)})
    for (start, end), now in zip(itertools.pairwise(edges), read, strict=False):
        cache.append(key[:, :, start:end], value[:, :, start:end])
        if now:
            assert_true(cache)
    assert_true(cache)
    assert cache.summary("keys").shape == (2, 2, -(-seq // PAGE), 8)


def test_a_whole_page_is_summarised_once_and_the_last_one_when_it_has_grown():
    cache, _, _ = filled(10)
    calls = cache.row_format.calls
    assert calls == []
    cache.summary("keys")
    assert calls == [(2, 4), (1, 2)]
    cache.summary("values")
    assert calls == [(2, 4), (1, 2)]
    cache.append(*random_rows(SHAPE, 7, batch=2)[1:])
    cache.summary("keys")
    assert calls[2:] == [(2, 4), (1, 1)]


@pytest.mark.parametrize("left", [1, 4, 5, 7, 8, 9])
def test_truncated_rows_are_forgotten(left):
    cache, _, _ = filled(10)
    cache.summary("keys")
    cache.truncate(left)
    assert_true(cache)
    cache.append(*random_rows(SHAPE, 10, batch=2, seed=9)[1:])
    assert_true(cache)


def test_after_an_eviction_the_survivors_are_paged_anew():
    cache, _, _ = filled(30)
    cache.summary("keys")
    cache.keep(torch.arange(0, 30, 3).expand(2, 2, -1))
    assert_true(cache)
    assert cache.summary("keys").shape[2] == 3


def test_they_follow_the_batch():
    cache, _, _ = filled(9, batch=3)
    cache.summary("keys")
    cache.select_batch(torch.tensor([2, 0]))
    assert_true(cache)
    cache.repeat_batch(2)
    assert_true(cache)
    cache.append(*random_rows(SHAPE, 4, batch=4)[1:])
    assert_true(cache)


def test_a_prefix_reads_its_own_pages_and_spoils_nothing():
    cache, key, _ = filled(10)
    torch.testing.assert_close(cache.prefix(6).summary("keys"), expected(key[:, :, :6]))
    assert_true(cache)
    whole = cache.prefix(8).summary("keys")
    torch.testing.assert_close(whole, expected(key[:, :, :8]))


def test_other_heads_are_summarised_from_their_rows():
    cache, key, _ = filled(10)
    cache.summary("keys")
    other = cache.narrowed(torch.tensor([1]), torch.tensor([1]), cache.row_format)
    torch.testing.assert_close(other.summary("keys"), expected(key[1:, 1:]))
    assert_true(cache)


def test_storage_made_in_inference_mode_can_be_written_outside_of_it():
    cache = LayerCache(Paged())
    rows = random_rows(SHAPE, 50, batch=2)[1:]
    with torch.inference_mode():
        cache.append(*(r[:, :, :10] for r in rows))
        cache.summary("keys")
    for start in range(10, 50, 3):
        # The rows themselves stay inference tensors, which is the caches's own matter.
        keys, values = (r[:, :, : start + 3].clone() for r in rows)
        found = cache._summaries.read("keys", keys, values)
        torch.testing.assert_close(found, expected(keys))


def test_bytes_count_and_a_reset_gives_them_back():
    cache, _, _ = filled(10)
    before = cache.nbytes()
    cache.summary("keys")
    assert cache.nbytes() == before + 2 * 2 * 3 * (8 + 6) * 4
    cache.reset()
    assert cache.nbytes() == 0
    cache.append(*random_rows(SHAPE, 3)[1:])
    assert_true(cache)


def test_what_is_not_there():
    cache, _, _ = filled(10)
    with pytest.raises(CacheError, match=r"no summary 'bounds'; there are \['keys', 'values'\]"):
        cache.summary("bounds")
    plain = LayerCache()
    plain.append(*random_rows(SHAPE, 3)[1:])
    with pytest.raises(CacheError, match=r"no summary 'keys'; there are \[\]"):
        plain.summary("keys")
    with pytest.raises(CacheError, match="append first"):
        LayerCache(Paged()).summary("keys")
