"""Recent queries: the last real ones of every batch row, across forwards."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loki_attn.cache import LayerCache
from loki_attn.evict.base import Attended
from loki_attn.pieces.queries import are_queries, keep_queries, recent_queries, remember_queries
from loki_attn.types import AttentionCall

TOKENS = 24


def remembered(valid, window, chunks):
    """What is remembered of numbered queries, read in chunks: a cache."""
    batch = valid.shape[0]
    cache, start = LayerCache(), 0
    number = torch.arange(TOKENS, dtype=torch.float32)
    for stop in (*chunks, TOKENS):
        tokens = number[start:stop].expand(batch, 2, -1)[..., None].expand(-1, -1, -1, 4)
        cache.append(tokens, tokens)
        causal = torch.ones(stop - start, stop).tril(start).bool()
        visible = None if bool(valid.all()) else causal & valid[:, None, None, :stop]
        query = tokens.repeat_interleave(3, 1)
        call = AttentionCall(scaling=1.0)
        remember_queries(cache, Attended(query=query, call=call, visible=visible), window)
        start = stop
    return cache


@given(
    st.lists(st.booleans(), min_size=TOKENS, max_size=TOKENS),
    st.integers(1, 30),
    st.sets(st.integers(1, TOKENS - 1), max_size=4),
)
def test_the_last_real_queries_are_remembered_however_a_prompt_is_cut(real, window, cuts):
    valid = torch.tensor([real, [True] * TOKENS])
    # The last query sees what is no padding: it is none itself.
    valid[:, -1] = True
    # A forward's padding is what its own last query does not see, so forwards end on a real one.
    chunks = [cut for cut in sorted(cuts) if real[cut - 1]]
    cache = remembered(valid, window, chunks)
    for row in range(2):
        wanted = valid[row].nonzero()[:, 0].tolist()[-window:]
        own = are_queries(cache)[row]
        for head in range(6):
            got = recent_queries(cache)[row, head, own[head // 3], 0].tolist()
            assert got == wanted


def test_no_more_is_held_than_asked_for():
    cache = remembered(torch.ones(2, TOKENS).bool(), 5, (7,))
    assert cache.memory["recent_queries"].shape == (2, 2, 3, 5, 4)
    # No view of a forward's queries, which would keep all of them alive.
    held = cache.memory["recent_queries"]
    assert held.untyped_storage().nbytes() == held.nbytes


@pytest.mark.parametrize("window", [3, 5, 9])
def test_all_but_the_last_can_be_forgotten(window):
    cache = remembered(torch.ones(1, TOKENS).bool(), 5, ())
    keep_queries(cache, window)
    assert recent_queries(cache)[0, 0, :, 0].tolist() == list(range(TOKENS))[-min(window, 5) :]
