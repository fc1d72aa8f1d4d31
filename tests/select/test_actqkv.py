"""ActQKV: block representatives, the probe query, budgets by entropy."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loki_attn import attention
from loki_attn.budget import Budget
from loki_attn.cache import LayerCache
from loki_attn.errors import InputError, PolicyError
from loki_attn.policy import Policy, preset
from loki_attn.select.actqkv import (
    PICKED,
    ActQKV,
    QueryMoments,
    activation_weights,
    chunk_probe,
    entropy_budgets,
    normalised_entropy,
)
from loki_attn.testing import layer_shape, plain_attention, random_rows
from loki_attn.types import AttentionCall

SHAPE = layer_shape(6, 2, 32)
CALL = AttentionCall(scaling=32**-0.5)
SMALL = ActQKV(block=8, representatives=3)


def bound(select=SMALL, how="max", **amount):
    policy = Policy(select=select, budget=Budget(**amount), group_reduce=how)
    return attention.bind(policy, SHAPE, 1, None)


def filled(layer, key, value):
    cache = LayerCache(layer.selector)
    cache.append(key, value)
    return cache


def empty(batch=1):
    """A cache with a few rows: only its memory matters."""
    return filled(bound(), *random_rows(SHAPE, 8, batch=batch)[1:])


def queries(tokens, batch=1, seed=0):
    return random_rows(SHAPE, 1, batch=batch, q_len=tokens, seed=seed)[0]


def all_of(query):
    return torch.ones(query.shape[0], query.shape[2], dtype=torch.bool)


def moments_of(query):
    return QueryMoments.none(query).with_queries(query, all_of(query))


# The probe.


def test_the_probe_of_one_query_is_the_query():
    query = queries(1, batch=2)
    torch.testing.assert_close(chunk_probe(query, empty(2)), query)


def test_the_probe_of_equal_queries_is_that_query():
    query = queries(1).expand(-1, -1, 9, -1)
    torch.testing.assert_close(chunk_probe(query, empty()), query[:, :, :1])


@given(tokens=st.integers(1, 30), seed=st.integers(0, 50))
def test_weights_are_shares_that_sum_to_one(tokens, seed):
    query = queries(tokens, batch=2, seed=seed)
    weights = activation_weights(query, moments_of(query), all_of(query))
    assert bool((weights >= 0).all())
    torch.testing.assert_close(weights.sum(-1), torch.ones(2))


def test_weights_follow_their_formula():
    query = queries(7).double()
    flat = query[0].transpose(0, 1).reshape(7, -1)
    variance = flat.var(0, correction=0)
    bias = ((flat - flat.mean(0)) ** 2 / (variance + variance.mean() / 100)).mean(1)
    weights = activation_weights(query, moments_of(query), all_of(query))
    torch.testing.assert_close(weights[0].double(), bias / bias.sum(), rtol=1e-4, atol=1e-6)


def test_an_unusual_query_weighs_more_from_the_first_chunk_on():
    """Not equal weights until a thousand calls have been made."""
    query = queries(12)
    query[:, :, 5] *= 4
    weights = activation_weights(query, moments_of(query), all_of(query))
    assert int(weights.argmax()) == 5
    assert float(weights[0, 5]) > 3 / 12


def test_moments_of_chunks_are_those_of_all_queries():
    query = queries(30, batch=2)
    parts = QueryMoments.none(query)
    for start, end in ((0, 1), (1, 9), (9, 30)):
        chunk = query[:, :, start:end]
        parts = parts.with_queries(chunk, all_of(chunk))
    torch.testing.assert_close(parts.mean, query.mean(2))
    torch.testing.assert_close(parts.variance, query.var(2, correction=0))


def test_padding_has_no_part_in_the_probe():
    query = queries(10, batch=2)
    real = torch.ones(2, 10, dtype=torch.bool)
    real[0, :4] = False
    spoilt = query.masked_fill(~real[:, None, :, None], float("nan"))
    cache = empty(2)
    probe = chunk_probe(spoilt, cache, real)
    torch.testing.assert_close(probe[:1], chunk_probe(query[:1, :, 4:], empty()))
    torch.testing.assert_close(probe[1:], chunk_probe(query[1:], empty()))


def test_layers_and_requests_have_moments_of_their_own():
    first, second = queries(9, seed=1), queries(9, seed=2)
    one, other = empty(), empty()
    chunk_probe(first, one)
    fresh = chunk_probe(second, other)
    assert not torch.equal(chunk_probe(second, one), fresh)
    one.reset()
    one.append(*random_rows(SHAPE, 8)[1:])
    assert torch.equal(chunk_probe(second, one), fresh)


def test_moments_go_with_their_batch_rows_and_stay_when_rows_go():
    query, later = queries(9, batch=3), queries(5, batch=3, seed=4)
    cache, plain = empty(3), empty(3)
    for held in (cache, plain):
        chunk_probe(query, held)
    order = torch.tensor([2, 0, 0])
    cache.select_batch(order)
    cache.keep(torch.arange(4).expand(3, 2, -1))
    mine = chunk_probe(later[order], cache)
    torch.testing.assert_close(mine, chunk_probe(later, plain)[order])


# Blocks.


def picked_by_hand(keys, number):
    """Of [rows, head_dim]: the one most like the mean direction, then the least like those."""
    directions = keys / keys.norm(dim=-1, keepdim=True)
    chosen = [int((directions @ directions.mean(0)).argmax())]
    while len(chosen) < number:
        nearest = (directions @ directions[chosen].mT).amax(1)
        chosen.append(int(nearest.argmin()))
    return directions[chosen]


def test_representatives_are_keys_picked_apart_from_each_other():
    _, key, value = random_rows(SHAPE, 40)
    picked = filled(bound(), key, value).summary(PICKED)
    for head in range(2):
        for block in range(5):
            rows = key[0, head, 8 * block : 8 * block + 8]
            torch.testing.assert_close(picked[0, head, block], picked_by_hand(rows, 3))


def test_an_odd_key_of_a_block_is_represented():
    """A needle among alike keys: it is the one farthest from the first representative."""
    _, key, value = random_rows(SHAPE, 8)
    key = key[:, :, :1] + 0.05 * key
    key[:, :, 6] = -key[:, :, 6]
    picked = filled(bound(ActQKV(block=8, representatives=2)), key, value).summary(PICKED)
    needle = torch.nn.functional.normalize(key[:, :, 6], dim=-1)
    torch.testing.assert_close(picked[:, :, 0, 1], needle)


def test_blocks_are_read_whole_by_the_mean_cosine_of_their_best_representatives():
    query, key, value = random_rows(SHAPE, 67, seed=2)
    layer = bound(top_k=3 * 8 + 3)
    _, selection = attention.decode(query, filled(layer, key, value), layer, CALL)
    scores = []
    for block in range(8):
        best = []
        for head in range(6):
            rows = key[0, head // 3, 8 * block : 8 * block + 8]
            asked = query[0, head, 0]
            best.append((picked_by_hand(rows, 3) @ asked / asked.norm()).max())
        scores.append(torch.stack(best).mean())
    chosen = torch.stack(scores).argsort(descending=True)[:3].sort().values
    expected = [8 * int(c) + i for c in chosen for i in range(8)] + [64, 65, 66]
    assert selection.indices[0].tolist() == [expected, expected]


@pytest.mark.parametrize("how", ["max", "none", "softmax_sum"])
def test_all_heads_of_a_layer_read_one_set(how):
    query, key, value = random_rows(SHAPE, 80, batch=2)
    layer = bound(how=how, top_k=20)
    _, selection = attention.decode(query, filled(layer, key, value), layer, CALL)
    assert torch.equal(selection.indices, selection.indices[:, :1].expand_as(selection.indices))


def test_the_length_of_queries_and_keys_does_not_matter():
    query, key, value = random_rows(SHAPE, 64)
    layer = bound(top_k=16)
    _, plain = attention.decode(query, filled(layer, key, value), layer, CALL)
    factor = torch.linspace(0.5, 3, 64)[None, None, :, None]
    scaled = filled(layer, key * factor, value)
    heads = torch.linspace(0.5, 3, 6)[None, :, None, None]
    _, other = attention.decode(query * heads, scaled, layer, CALL)
    assert torch.equal(plain.indices, other.indices)


def test_all_blocks_are_dense_attention():
    query, key, value = random_rows(SHAPE, 45)
    layer = bound(top_k=48)
    out, selection = attention.decode(query, filled(layer, key, value), layer, CALL)
    assert bool((selection.counts == 45).all())
    torch.testing.assert_close(out, plain_attention(query, key, value, None, CALL))


def test_what_is_read_does_not_depend_on_earlier_requests():
    layer = bound(top_k=16)
    query, key, value = random_rows(SHAPE, 50, seed=1)
    cache = filled(layer, key, value)
    attention.decode(query * 5, cache, layer, CALL)
    cache.reset()
    assert cache.memory == {}
    cache.append(key, value)
    _, after = attention.decode(query, cache, layer, CALL)
    fresh = bound(top_k=16)
    _, first = attention.decode(query, filled(fresh, key, value), fresh, CALL)
    assert torch.equal(after.indices, first.indices)


def test_bytes_are_a_share_of_the_block():
    _, key, value = random_rows(SHAPE, 64, dtype=torch.bfloat16)
    layer = bound(ActQKV())
    assert layer.selector.score_bytes(filled(layer, key, value)) == 4 * 32 * 2 / 32


def test_the_preset_has_the_published_amounts():
    policy = preset("actqkv")
    assert policy.select == ActQKV(block=32, representatives=4)
    assert policy.budget == Budget(top_k=64 + 512 + 46 * 32, sinks=64, recents=512)


def test_a_block_has_rows_for_its_representatives():
    with pytest.raises(PolicyError, match="representatives=9 is more than the 8 rows of a block"):
        ActQKV(block=8, representatives=9)


# Budgets by entropy.


def test_entropy_is_a_share_of_the_largest():
    assert float(normalised_entropy(torch.zeros(7))) == pytest.approx(1.0)
    assert float(normalised_entropy(torch.tensor([50.0, 0, 0]))) == pytest.approx(0.0, abs=1e-6)
    assert float(normalised_entropy(torch.tensor([3.0]))) == 0.0
    two = normalised_entropy(torch.tensor([[0.0, 0.0, -80.0, -80.0], [1.0, 1.0, 1.0, 1.0]]))
    torch.testing.assert_close(two, torch.tensor([0.5, 1.0]))


def test_layers_share_the_budget_by_entropy():
    assert entropy_budgets([0.2, 0.3, 0.5], 1000, least=1, most=1000) == (200, 300, 500)
    assert entropy_budgets([0.0, 0.0], 100, least=1, most=100) == (50, 50)


def test_what_a_bound_takes_or_leaves_goes_to_later_layers():
    assert entropy_budgets([0.9, 0.05, 0.05], 1000, least=32, most=500) == (500, 250, 250)
    assert entropy_budgets([0.0, 0.5, 0.5], 1000, least=100, most=900) == (100, 450, 450)
    assert entropy_budgets([1.0, 1.0], 10, least=32, most=64) == (32, 32)


def test_the_table_is_a_budget_per_layer():
    table = entropy_budgets([0.5, 0.25, 0.25], 4096, least=600, most=2048)
    policy = preset("actqkv", per_layer=table)
    assert [policy.budget.for_layer(i, 3).top_k for i in range(3)] == [2048, 1024, 1024]


def test_entropies_are_numbers():
    with pytest.raises(InputError, match="entropies must be finite and at least 0"):
        entropy_budgets([0.5, float("nan")], 100, least=1, most=10)
    with pytest.raises(InputError, match="most=10 is less than least=20"):
        entropy_budgets([0.5], 100, least=20, most=10)
