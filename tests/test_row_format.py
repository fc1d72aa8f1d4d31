"""Marks, memory and what was chosen: state that goes wherever its rows go."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loki_attn.cache import LayerCache
from loki_attn.errors import CacheError
from loki_attn.policy import preset
from loki_attn.row_format import Mark, RowFormat
from loki_attn.testing import layer_shape, random_rows, tiny_basis

SHAPE = layer_shape(4, 2, 8, 6)
MARKS = {
    "received": Mark(torch.float32),
    "bits": Mark(torch.int32, (3,), fill=-1),
    "seen": Mark(torch.bool, fill=True),
}


def marked(seq=10, batch=3, row_format=None):
    """A cache whose marks tell the true position of their row."""
    cache = LayerCache(row_format, marks=MARKS)
    append(cache, seq, batch)
    return cache


def append(cache, tokens, batch):
    held = cache.length
    cache.append(*random_rows(SHAPE, tokens, batch=batch, seed=cache.seen)[1:])
    places = cache.positions[:, :, held:]
    cache.plane("received")[:, :, held:] = places + batch_of(places)
    cache.plane("bits")[:, :, held:] = places[..., None]
    cache.plane("seen")[:, :, held:] = places % 2 == 0


def batch_of(places):
    """Something that tells the heads apart."""
    return torch.arange(places.shape[1])[None, :, None] / 4


def assert_aligned(cache):
    places = cache.positions
    assert torch.equal(cache.plane("received"), places + batch_of(places))
    assert torch.equal(cache.plane("bits"), places[..., None].expand(*places.shape, 3))
    assert torch.equal(cache.plane("seen"), places % 2 == 0)


def test_a_new_row_starts_with_its_fill(poison):
    cache = LayerCache(marks=MARKS)
    for tokens in (3, 1, 70):
        cache.append(*random_rows(SHAPE, tokens)[1:])
    assert bool((cache.plane("received") == 0).all())
    assert bool((cache.plane("bits") == -1).all())
    assert bool(cache.plane("seen").all())
    assert cache.plane("bits").shape == (1, 2, 74, 3)


def test_a_mark_is_written_in_place():
    cache = marked()
    cache.plane("received")[:, :, 3] += 7
    assert bool((cache.plane("received")[:, 0, 3] == 10).all())


@given(data=st.data())
def test_marks_follow_their_rows_in_any_order_of_operations(data):
    cache = marked(data.draw(st.integers(1, 90)), batch=2)
    for _ in range(data.draw(st.integers(1, 5))):
        match data.draw(st.sampled_from(["append", "keep", "truncate", "reorder", "narrow"])):
            case "append":
                append(cache, data.draw(st.integers(1, 40)), cache.positions.shape[0])
            case "keep":
                kept = data.draw(st.integers(1, cache.length))
                chance = torch.rand(cache.positions.shape, generator=torch.Generator())
                cache.keep(chance.argsort(-1)[..., :kept].sort(-1).values)
            case "truncate":
                cache.truncate(data.draw(st.integers(1, cache.length)))
            case "reorder":
                cache.select_batch(torch.tensor([1, 0, 1][: data.draw(st.integers(2, 3))]))
            case "narrow":
                cache = cache.narrowed(torch.tensor([0, 1]), None, RowFormat())
        assert_aligned(cache)
        assert bool((cache.positions.diff(dim=-1) > 0).all())


def test_marks_of_some_heads_are_their_own():
    cache = marked()
    other = cache.narrowed(torch.tensor([2]), torch.tensor([1]), RowFormat())
    assert torch.equal(other.plane("received"), cache.plane("received")[2:, 1:])
    other.plane("received").zero_()
    assert_aligned(cache)
    append_here = random_rows(layer_shape(2, 1, 8, 6), 1)[1:]
    other.append(*append_here)
    assert (other.length, cache.length) == (11, 10)


def test_marks_lie_beside_the_planes_of_a_selection():
    cache = marked(row_format=preset("loki", rank=4).select.bind(SHAPE, tiny_basis(SHAPE).layer(0)))
    cache.keep(torch.arange(0, 10, 2).expand(3, 2, -1))
    assert_aligned(cache)
    assert cache.plane("lead").shape == (3, 2, 5, 4)


def remembering():
    cache = marked()
    cache.memory["queries"] = torch.arange(6.0).reshape(3, 2)
    cache.chosen["rows"] = torch.arange(6).reshape(3, 2)
    return cache


def test_what_is_remembered_survives_an_eviction_and_what_names_rows_does_not():
    cache = remembering()
    cache.keep(torch.arange(4).expand(3, 2, -1))
    assert cache.memory["queries"].tolist() == [[0, 1], [2, 3], [4, 5]]
    assert cache.chosen == {}


@pytest.mark.parametrize(
    "forget", [lambda c: c.truncate(9), lambda c: c.reset()], ids=["truncate", "reset"]
)
def test_nothing_is_remembered_of_rows_that_were_taken_back(forget):
    cache = remembering()
    forget(cache)
    assert cache.memory == cache.chosen == {}


def test_a_truncation_of_nothing_forgets_nothing():
    cache = remembering()
    cache.truncate(10)
    assert set(cache.memory) | set(cache.chosen) == {"queries", "rows"}


def test_what_is_remembered_follows_the_batch():
    cache = remembering()
    cache.select_batch(torch.tensor([2, 0]))
    assert cache.memory["queries"].tolist() == [[4, 5], [0, 1]]
    assert cache.chosen["rows"].tolist() == [[4, 5], [0, 1]]
    cache.repeat_batch(2)
    assert cache.memory["queries"].tolist() == [[4, 5], [4, 5], [0, 1], [0, 1]]


def test_what_is_remembered_of_some_heads_comes_with_them():
    other = remembering().narrowed(torch.tensor([0, 2]), torch.tensor([1]), RowFormat())
    assert other.memory["queries"].tolist() == [[1], [5]]
    assert other.chosen == {}


def test_bytes_count_marks_and_what_is_remembered():
    cache = marked(64, batch=1)
    rows = 2 * 64 * (8 * 4 + 6 * 4 + 4 + 4 + 3 * 4 + 1)
    assert cache.nbytes() == rows
    cache.memory["queries"] = torch.zeros(1, 2, 5)
    cache.chosen["rows"] = torch.zeros(1, 2, 3, dtype=torch.int64)
    assert cache.nbytes() == rows + 40 + 48
    cache.keep(torch.arange(16).expand(1, 2, -1))
    assert cache.nbytes() == rows // 4 + 40


def test_an_emptied_cache_has_the_same_marks_and_no_rows():
    cache = remembering().emptied(RowFormat())
    assert (cache.length, cache.seen, cache.nbytes(), cache.memory) == (0, 0, 0, {})
    append(cache, 5, 1)
    assert_aligned(cache)


def test_a_conversion_starts_with_fresh_marks():
    other = marked().converted(RowFormat(), MARKS)
    assert other.length == 10
    assert bool((other.plane("bits") == -1).all())
    assert not marked().converted(RowFormat())._marks


def test_the_position_of_the_next_token_may_be_set_behind_the_rows_only():
    cache = remembering()
    cache.keep(torch.arange(4).expand(3, 2, -1))
    cache.see(6)
    assert (cache.length, cache.seen) == (4, 6)
    assert cache.memory == {}
    append(cache, 1, 3)
    assert cache.positions[0, 0].tolist() == [0, 1, 2, 3, 6]
    with pytest.raises(CacheError, match="The next token cannot be 6: later rows are held"):
        cache.see(6)
