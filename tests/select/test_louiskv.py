"""LouisKV: clusters of keys as units, segments where a block is unfinished, the reuse preset."""

import itertools

import pytest
import torch

from loki_attn import attention
from loki_attn.budget import Budget
from loki_attn.cache import LayerCache
from loki_attn.errors import PolicyError
from loki_attn.policy import Policy, preset
from loki_attn.select.exact_topk import ExactTopK
from loki_attn.select.louiskv import CENTROID, CLUSTER, LouisKV, cluster_rows
from loki_attn.testing import layer_shape, plain_attention, random_rows
from loki_attn.types import AttentionCall

SHAPE = layer_shape(6, 2, 32)
CALL = AttentionCall(scaling=32**-0.5)
SMALL = LouisKV(cluster=4, block=32)


def bound(select=SMALL, how="softmax_sum", reuse_above=None, **amount):
    policy = Policy(
        select=select, budget=Budget(**amount), group_reduce=how, reuse_above=reuse_above
    )
    return attention.bind(policy, SHAPE, 1, None)


def filled(layer, key, value):
    cache = LayerCache(layer.selector)
    cache.append(key, value)
    return cache


def read(layer, cache, query):
    _, selection = attention.decode(query, cache, layer, CALL)
    return [set(row.tolist()) - {-1} for row in selection.indices[0]]


def distortion(keys, means, owners):
    own = means.gather(2, owners.long()[..., None].expand(-1, -1, -1, keys.shape[3]))
    return (keys - own).square().sum((2, 3))


# Clusters.


def test_a_cluster_is_described_by_the_mean_of_its_keys():
    _, key, _ = random_rows(SHAPE, 64)
    means, owners = cluster_rows(key, 4, 5)
    for head in range(2):
        for cluster in range(16):
            members = key[0, head, owners[0, head] == cluster]
            if len(members):
                torch.testing.assert_close(means[0, head, cluster], members.mean(0))


def test_keys_that_lie_together_are_one_cluster_wherever_they_stand():
    """Four far apart places, visited in an order that no contiguous segment follows."""
    draw = torch.Generator().manual_seed(0)
    places = 10 * torch.eye(4, 32)
    visits = torch.cat(
        [torch.arange(4).repeat_interleave(3), torch.randint(4, (20,), generator=draw)]
    )
    key = places[visits] + 0.1 * torch.randn(32, 32, generator=draw)
    _, owners = cluster_rows(key[None, None], 4, 4)
    for cluster in range(8):
        assert len(set(visits[owners[0, 0] == cluster].tolist())) <= 1


@pytest.mark.parametrize("seed", range(5))
def test_more_rounds_never_describe_keys_worse_and_beat_segments(seed):
    _, key, _ = random_rows(SHAPE, 128, decay=1.0, seed=seed)
    errors = [distortion(key, *cluster_rows(key, 4, rounds)) for rounds in (1, 2, 4, 10)]
    for worse, better in itertools.pairwise(errors):
        assert bool((better <= worse + 1e-4).all())
    segments = key.view(1, 2, 32, 4, 32).mean(3)
    own = torch.arange(128).div(4, rounding_mode="floor").expand(1, 2, -1)
    assert bool((errors[2] < 0.8 * distortion(key, segments, own)).all())


def test_clustering_repeats_and_batch_rows_do_not_meet():
    _, key, _ = random_rows(SHAPE, 128, batch=3)
    means, owners = cluster_rows(key, 4, 5)
    for _ in range(5):
        again = cluster_rows(key, 4, 5)
        assert torch.equal(again[0], means)
        assert torch.equal(again[1], owners)
    alone = cluster_rows(key[1:2], 4, 5)
    assert torch.equal(alone[1], owners[1:2])


def test_keys_that_are_not_finite_are_in_no_mean():
    _, key, _ = random_rows(SHAPE, 32)
    key[:, :, 3], key[:, :, 8:12] = float("nan"), float("inf")
    means, _ = cluster_rows(key, 4, 5)
    assert bool(torch.isfinite(means).all())
    assert bool((means != 0).any(-1).all())


# Units.


@pytest.mark.parametrize("seed", range(3))
def test_clusters_of_one_row_are_the_exact_choice(seed):
    query, key, value = random_rows(SHAPE, 100, seed=seed)
    layer = bound(LouisKV(cluster=1, block=32), top_k=13)
    policy = Policy(select=ExactTopK(), budget=Budget(top_k=13))
    exact = attention.bind(policy, SHAPE, 1, None)
    assert read(layer, filled(layer, key, value), query) == read(
        exact, filled(exact, key, value), query
    )


def units_of(key, head):
    """The units of 64 clustered rows and segments behind them: rows of each."""
    found = []
    for start in (0, 32):
        _, owners = cluster_rows(key[:, :, start : start + 32], SMALL.cluster, SMALL.rounds)
        for cluster in range(8):
            rows = (owners[0, head] == cluster).nonzero()[:, 0] + start
            found += [rows.tolist()] if len(rows) else []
    return found + [list(range(i, i + 4)) for i in range(64, key.shape[2] - 3, 4)]


@pytest.mark.parametrize("seed", range(4))
def test_whole_units_by_falling_weight(seed):
    """Weights of the heads' soft-max over mean keys, a unit as often as it has rows, averaged."""
    query, key, value = random_rows(SHAPE, 64 + 12 + 3, seed=seed)
    expected, amounts = [], []
    for head in range(2):
        units = units_of(key, head)
        means = torch.stack([key[0, head, rows].mean(0) for rows in units])
        sizes = torch.tensor([len(rows) for rows in units]).float()
        logits = query[0, 3 * head : 3 * head + 3, 0] @ means.mT * CALL.scaling
        shares = logits.exp() / (logits.exp() * sizes).sum(-1, keepdim=True)
        order = shares.mean(0).argsort(descending=True)[:5].tolist()
        expected.append({row for unit in order for row in units[unit]} | {76, 77, 78})
        amounts.append(len(expected[-1]))
    layer = bound(top_k=min(amounts))
    mine = read(layer, filled(layer, key, value), query)
    for rows, unit_rows, amount in zip(mine, expected, amounts, strict=True):
        assert rows <= unit_rows
        assert rows == unit_rows or amount > min(amounts)


def test_units_do_not_depend_on_how_the_rows_came():
    query, key, value = random_rows(SHAPE, 90, q_len=90)
    layer = bound(top_k=24)
    whole = filled(layer, key, value)
    cache = LayerCache(layer.selector)
    for row in range(90):
        cache.append(key[:, :, row : row + 1], value[:, :, row : row + 1])
        cache.summary(CLUSTER)
    for name in (CENTROID, CLUSTER):
        assert torch.equal(cache.summary(name)[:, :, :2], whole.summary(name)[:, :, :2])
    assert read(layer, cache, query[:, :, -1:]) == read(layer, whole, query[:, :, -1:])


def test_a_query_of_an_unfinished_block_knows_no_cluster_of_it():
    """In one forward, rows of a later block and of the rest of this one change nothing."""
    query, key, value = random_rows(SHAPE, 128, q_len=128)
    layer = bound(top_k=16)
    clean = attention.every_query(query, filled(layer, key, value), layer, CALL)
    for edge in (40, 63, 64):
        spoilt = key.clone()
        spoilt[:, :, edge:] = 7.0
        out = attention.every_query(query, filled(layer, spoilt, value), layer, CALL)
        torch.testing.assert_close(out[:, :, :edge], clean[:, :, :edge])


def test_padding_behind_all_rows_does_not_shift_a_query_to_another_block():
    """A forward whose last rows are padding for every batch row."""
    query, key, value = random_rows(SHAPE, 128, q_len=128)
    layer = bound(top_k=16)
    visible = torch.ones(128, 128, dtype=torch.bool).tril()[None, None].clone()
    visible[..., 75:] = False
    padded = attention.every_query(query, filled(layer, key, value), layer, CALL, visible)
    own = filled(layer, key[:, :, :75], value[:, :, :75])
    alone = attention.every_query(query[:, :, :75], own, layer, CALL)
    torch.testing.assert_close(padded[:, :, :75], alone)


def test_after_an_eviction_the_surviving_rows_are_clustered():
    _, key, value = random_rows(SHAPE, 128)
    layer = bound()
    cache = filled(layer, key, value)
    cache.summary(CLUSTER)
    cache.keep(torch.arange(0, 128, 2).expand(1, 2, -1))
    fresh = filled(layer, key[:, :, ::2].contiguous(), value[:, :, ::2].contiguous())
    for name in (CENTROID, CLUSTER):
        assert torch.equal(cache.summary(name), fresh.summary(name))


def test_all_rows_are_dense_attention():
    query, key, value = random_rows(SHAPE, 75)
    layer = bound(top_k=75)
    out, _ = attention.decode(query, filled(layer, key, value), layer, CALL)
    torch.testing.assert_close(out, plain_attention(query, key, value, None, CALL))


# The trigger and the preset.


def test_the_set_is_constant_between_triggers_and_chosen_anew_after():
    first, key, value = random_rows(SHAPE, 100)
    other = -first
    layer = bound(top_k=16, reuse_above=0.85)
    cache = filled(layer, key, value)
    chosen = read(layer, cache, first)
    assert read(layer, cache, first + 0.05 * random_rows(SHAPE, 1, seed=5)[0]) == chosen
    plain = bound(top_k=16)
    anew = read(plain, filled(plain, key, value), other)
    assert anew != chosen
    assert read(layer, cache, other) == anew


def test_the_preset_has_the_published_amounts_for_long_inputs():
    policy = preset("louiskv")
    assert policy.budget == Budget(top_k=32 + 512 + 512, sinks=32, recents=512)
    assert (policy.select.cluster, policy.reuse_above) == (16, 0.85)


def test_bytes_are_clusters_of_whole_blocks_and_keys_of_the_rest():
    layer = bound(LouisKV(cluster=16, block=64))
    _, key, value = random_rows(SHAPE, 140, dtype=torch.bfloat16)
    cache = filled(layer, key, value)
    expected = (128 * (64 / 16 + 1) + 12 * 64) / 140
    assert layer.selector.score_bytes(cache) == pytest.approx(expected)
    before = cache.nbytes()
    assert cache.summary(CENTROID).dtype == torch.bfloat16
    assert cache.nbytes() - before == 2 * 3 * 64 * (64 / 16 + 1)


@pytest.mark.parametrize(("cluster", "block"), [(16, 24), (2, 1024)])
def test_a_block_is_divided_into_clusters(cluster, block):
    with pytest.raises(PolicyError, match=f"block must be a multiple of cluster={cluster}"):
        LouisKV(cluster=cluster, block=block)
