"""RocketKV: the split of one number, bounds in the loud channels, behind SnapKV."""

from dataclasses import asdict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loki_attn import attention
from loki_attn.budget import Budget
from loki_attn.cache import LayerCache
from loki_attn.errors import BudgetError, PolicyError
from loki_attn.evict.base import Attended
from loki_attn.eviction import Turn, evict, observe
from loki_attn.policy import Policy, preset
from loki_attn.select.rocketkv import BOUNDS, RocketKV, Split, split
from loki_attn.shards import LayerRows
from loki_attn.testing import layer_shape, random_rows
from loki_attn.types import AttentionCall

SHAPE = layer_shape(6, 2, 32)
CALL = AttentionCall(scaling=32**-0.5)


def bound(select, shape=SHAPE, how="sum", **amount):
    policy = Policy(select=select, budget=Budget(**amount), group_reduce=how)
    return attention.bind(policy, shape, 1, None)


def filled(layer, key, value):
    cache = LayerCache(layer.selector)
    cache.append(key, value)
    return cache


def read(layer, cache, query):
    _, selection = attention.decode(query, cache, layer, CALL)
    return [set(row.tolist()) - {-1} for row in selection.indices[0]]


# The split.


@pytest.mark.parametrize(
    ("seq", "expected"),
    [
        (8 * 1024, Split(capacity=3717, chunk=2, channels=71, top_k=512)),
        (128 * 1024, Split(capacity=6472, chunk=3, channels=61, top_k=512)),
    ],
)
def test_the_split_of_1024_tokens(seq, expected):
    assert split(seq, 1024, 128) == expected


@pytest.mark.parametrize("seq", [1, 100, 1024])
def test_a_prompt_of_no_more_tokens_is_kept_whole(seq):
    got = split(seq, 1024, 64)
    assert (got.capacity, got.chunk, got.channels) == (seq, 1, 64)
    assert 1 <= got.top_k <= max(1, min(512, seq))


@given(seq=st.integers(1, 1 << 20), tokens=st.integers(1, 4096), dim=st.sampled_from([16, 64, 128]))
def test_every_split_is_a_policy(seq, tokens, dim):
    got = split(seq, tokens, dim)
    assert 1 <= got.capacity <= seq
    assert 1 <= got.channels <= dim
    assert got.chunk >= 1
    assert 1 <= got.top_k <= got.capacity


def test_a_longer_prompt_leaves_more_to_the_second_stage():
    kept = [split(1024 << i, 1024, 128).capacity for i in range(8)]
    assert kept == sorted(kept)
    assert len(set(kept)) == 8


def test_a_split_makes_the_preset_of_its_prompt():
    policy = preset("rocketkv", **asdict(split(131072, 1024, 128)))
    assert (policy.keep.capacity, policy.budget.top_k) == (6472, 512)
    assert policy.select == RocketKV(chunk=3, channels=61)


def test_a_split_wants_whole_numbers():
    with pytest.raises(BudgetError, match="tokens must be a whole number of tokens >= 1, got 0"):
        split(100, 0, 64)


def test_the_preset_is_snapkv_then_this():
    policy = preset("rocketkv")
    assert policy.evict.method == "snapkv"
    assert (policy.evict.window, policy.evict.kernel) == (32, 63)
    assert (policy.evict.pooling, policy.evict.reduce) == ("max", "sum")
    assert policy.select.coordinates(128) == split(8192, 1024, 128).channels
    assert policy.group_reduce == "sum"


# The bound.


@pytest.mark.parametrize("seed", range(4))
def test_the_bound_holds_for_every_head_of_a_group(seed):
    """Heads of opposite signs in every channel: one sign for the group would bound one of them."""
    query, key, value = random_rows(SHAPE, 60, seed=seed)
    query[:, 1::3] = -query[:, 0::3]
    layer = bound(RocketKV(chunk=4, channels=32))
    cache = filled(layer, key, value)
    bounds = layer.selector.score(query, cache, CALL)[:, :, 0]
    exact = (query @ key.repeat_interleave(3, 1).mT)[:, :, 0] * CALL.scaling
    assert bool((bounds >= exact - 1e-5).all())


def test_bounds_of_a_group_are_added_over_its_heads():
    """The published single sign per channel would read the wrong page here."""
    shape = layer_shape(2, 1, 4)
    query = torch.tensor([[[[3.0, 0, 0, 1]], [[-2.9, 0, 0, 1]]]])
    key = torch.zeros(1, 1, 8, 4)
    key[0, 0, 0:2, 0] = torch.tensor([5.0, -5.0])  # either head finds its row here
    key[0, 0, 2:4, 0] = 5.0  # head 0 only
    key[0, 0, 4:6, 3] = 0.5
    layer = bound(RocketKV(chunk=2, channels=4), shape, top_k=2)
    assert read(layer, filled(layer, key, key), query) == [{0, 1}]


@pytest.mark.parametrize("seed", range(4))
def test_pages_of_one_row_and_all_channels_are_the_exact_choice(seed):
    query, key, value = random_rows(SHAPE, 50, seed=seed)
    layer = bound(RocketKV(chunk=1, channels=1.0), top_k=9)
    exact = (query @ key.repeat_interleave(3, 1).mT)[0, :, 0].view(2, 3, -1).sum(1)
    expected = [set(row.topk(9).indices.tolist()) for row in exact]
    assert read(layer, filled(layer, key, value), query) == expected


@pytest.mark.parametrize("seed", range(4))
def test_the_loudest_channels_of_the_group_rank(seed):
    query, key, value = random_rows(SHAPE, 50, seed=seed)
    layer = bound(RocketKV(chunk=5, channels=6), top_k=20)
    expected = []
    for head in range(2):
        asked = query[0, 3 * head : 3 * head + 3, 0]
        loud = asked.abs().sum(0).topk(6).indices
        pages = key[0, head].view(10, 5, 32)[..., loud]
        reach = torch.maximum(
            asked[:, None, loud] * pages.amax(1), asked[:, None, loud] * pages.amin(1)
        )
        best = reach.sum(-1).sum(0).topk(4).indices
        expected.append({5 * int(p) + i for p in best for i in range(5)})
    assert read(layer, filled(layer, key, value), query) == expected


def test_bounds_only_widen_as_a_page_fills():
    _, key, value = random_rows(SHAPE, 8)
    layer = bound(RocketKV(chunk=8, channels=32))
    cache = LayerCache(layer.selector)
    held = None
    for row in range(8):
        cache.append(key[:, :, row : row + 1], value[:, :, row : row + 1])
        greatest, least = cache.summary(BOUNDS)[:, :, 0].clone().chunk(2, -1)
        if held is not None:
            assert bool((greatest >= held[0]).all())
            assert bool((least <= held[1]).all())
        held = greatest, least
    assert torch.equal(held[0], key.amax(2))
    assert torch.equal(held[1], key.amin(2))


def test_keys_that_are_not_finite_spoil_no_bound():
    _, key, value = random_rows(SHAPE, 8)
    key[:, :, 1], key[:, :, 4:6] = float("inf"), float("nan")
    cache = filled(bound(RocketKV(chunk=2, channels=32)), key, value)
    bounds = cache.summary(BOUNDS)
    assert bool(torch.isfinite(bounds).all())
    assert torch.equal(bounds[:, :, 0], torch.cat([key[:, :, 0], key[:, :, 0]], -1))


# Both stages.


def evicted(policy, seq=300):
    """A prompt attended and evicted by a policy: its layer, its rows, the next query."""
    query, key, value = random_rows(SHAPE, seq, q_len=seq)
    layer = attention.bind(policy, SHAPE, 4, None)
    rows = LayerRows(LayerCache(layer.selector, marks=layer.eviction.evictor.marks()))
    rows.append(key, value)
    turn = Turn(rows=rows)
    for shard in rows:
        observe(layer.eviction, turn, shard, Attended(query=query, call=CALL))
    evict([(layer.eviction, turn)])
    return layer, rows.whole, random_rows(SHAPE, 1, seed=9)[0]


def test_reading_all_pages_is_snapkv_alone():
    both, rows, query = evicted(preset("rocketkv", capacity=100, top_k=100, channels=8))
    alone = preset("snapkv", capacity=100, window=32, kernel=63, pooling="max", reduce="sum")
    other, kept, _ = evicted(alone)
    assert torch.equal(rows.positions, kept.positions)
    out, _ = attention.decode(query, rows, both, CALL)
    torch.testing.assert_close(out, attention.dense(query, kept, other, CALL, None))


def test_without_the_first_stage_it_is_the_selection():
    whole = preset("rocketkv", evict="keep_all", capacity=None, top_k=40, channels=8)
    assert not whole.evicts
    query, key, value = random_rows(SHAPE, 300)
    layer = attention.bind(whole, SHAPE, 4, None)
    alone = bound(RocketKV(chunk=2, channels=8), top_k=40)
    mine = read(layer, filled(layer, key, value), query)
    assert mine == read(alone, filled(alone, key, value), query)


def test_bounds_after_the_first_stage_are_those_of_the_survivors():
    layer, rows, query = evicted(preset("rocketkv", capacity=100, top_k=20, channels=8))
    fresh = filled(layer, rows.keys.clone(), rows.values.clone())
    assert torch.equal(rows.summary(BOUNDS), fresh.summary(BOUNDS))
    assert read(layer, rows, query) == read(layer, fresh, query)


def test_bytes_are_all_channels_of_a_page():
    _, key, value = random_rows(SHAPE, 64, dtype=torch.bfloat16)
    layer = bound(RocketKV(chunk=2, channels=8))
    assert layer.selector.score_bytes(filled(layer, key, value)) == 2 * 32 * 2 / 2


@pytest.mark.parametrize("channels", [0, 1.5, 0.0, True, "all"])
def test_channels_are_a_number_or_a_share(channels):
    with pytest.raises(PolicyError, match="channels must be a whole number >= 1, or a share"):
        RocketKV(channels=channels)


def test_there_are_not_more_channels_than_coordinates():
    with pytest.raises(PolicyError, match="channels=33 is above head_dim=32; lower it"):
        bound(RocketKV(channels=33))
