"""LagKV: every chunk is judged by the range of the next one."""

import pytest
import torch

from loki_attn.errors import PolicyError
from loki_attn.policy import preset
from loki_attn.testing import DrivenLayer, layer_shape, random_rows, tiny_basis

SHAPE = layer_shape(6, 2, 16)
LAG, SINKS = 8, 3


def orthogonal():
    draw = torch.Generator().manual_seed(7)
    matrix = torch.randn(16, 16, generator=draw, dtype=torch.float64)
    return torch.linalg.qr(matrix).Q.float()


def driven_over(query, key, value, valid=None, capacity=1000, **fields):
    policy = preset("lagkv", **{"lag": LAG, "evict.sinks": SINKS, "capacity": capacity, **fields})
    driven = DrivenLayer(policy, SHAPE)
    driven.prompt(query, key, value, valid)
    return driven


def scores_of(query, key, value, **fields):
    driven = driven_over(query, key, value, **fields)
    return driven.layer.eviction.evictor.scores(driven.rows.whole, driven.call, None)


def plain(key, value):
    """Ranks as shares, chunk by chunk, head by head; 1 where there is no whole next chunk."""
    tokens = key.shape[2]
    out = torch.ones(key.shape[:3], dtype=torch.float64)
    for b in range(key.shape[0]):
        for h in range(key.shape[1]):
            for start in range(SINKS, tokens - 2 * LAG + 1, LAG):
                parts = []
                for rows in (key[b, h].double(), value[b, h].double()):
                    own, following = rows[start : start + LAG], rows[start + LAG : start + 2 * LAG]
                    low, high = following.min(0).values, following.max(0).values
                    scaled = torch.where(high > low, (own - low) / (high - low), 0.0)
                    parts.append(scaled.std(1, correction=0).softmax(0))
                judged = (parts[0] + parts[1]) / 2
                for i in range(LAG):
                    out[b, h, start + i] = (judged < judged[i]).sum() / LAG
    return out


@pytest.mark.parametrize("tokens", [51, 58, 59])
def test_scores_are_ranks_of_the_spread_relative_to_the_next_chunk(tokens):
    query, key, value = random_rows(SHAPE, tokens, batch=2, q_len=tokens)
    scores = scores_of(query, key, value)[..., SINKS:]
    torch.testing.assert_close(scores.double(), plain(key, value)[..., SINKS:])


def test_sinks_and_the_last_chunk_stay_and_others_keep_the_same_share():
    query, key, value = random_rows(SHAPE, SINKS + 5 * LAG, batch=2, q_len=SINKS + 5 * LAG)
    capacity = SINKS + LAG + 4 * 3
    for row in driven_over(query, key, value, capacity=capacity).positions():
        for head in row:
            assert head[:SINKS] == list(range(SINKS))
            assert head[-LAG:] == list(range(SINKS + 4 * LAG, SINKS + 5 * LAG))
            for chunk in range(4):
                start = SINKS + chunk * LAG
                assert sum(start <= p < start + LAG for p in head) == 3


def test_what_follows_the_last_whole_chunk_stays_with_it_as_far_as_there_is_room():
    tokens = SINKS + 3 * LAG + 5
    query, key, value = random_rows(SHAPE, tokens, q_len=tokens)
    for head in driven_over(query, key, value, capacity=SINKS + LAG + 5).positions()[0]:
        assert head == [*range(SINKS), *range(tokens - LAG - 5, tokens)]
    for head in driven_over(query, key, value, capacity=SINKS + LAG + 2).positions()[0]:
        assert len(head) == SINKS + LAG + 2


def test_a_channel_that_is_constant_in_the_next_chunk_does_no_harm():
    """Divided by its range of 0 it would make the whole chunk NaN, or all of one rank."""
    tokens = SINKS + 4 * LAG
    query, key, value = random_rows(SHAPE, tokens, q_len=tokens)
    constant = key.clone()
    constant[..., 5] = 0.25
    scores = scores_of(query, constant, value)
    torch.testing.assert_close(scores[..., SINKS:].double(), plain(constant, value)[..., SINKS:])


def test_rows_that_are_all_equal_stay_in_order():
    tokens = SINKS + 3 * LAG
    query, key, value = random_rows(SHAPE, tokens, q_len=tokens)
    capacity = SINKS + LAG + 4
    driven = driven_over(query, key * 0, value * 0, capacity=capacity)
    first = [*range(SINKS + 2), *range(SINKS + LAG, SINKS + LAG + 2)]
    assert driven.positions()[0][0] == [*first, *range(tokens - LAG, tokens)]


def test_scores_change_under_rotation_so_keys_in_a_basis_are_refused():
    tokens = SINKS + 4 * LAG
    query, key, value = random_rows(SHAPE, tokens, q_len=tokens)
    turn = orthogonal()
    assert not torch.equal(scores_of(query, key @ turn, value), scores_of(query, key, value))
    policy = preset("loki-paper", evict="lagkv", capacity=200)
    with pytest.raises(PolicyError, match="lagkv rotates stored keys or looks at single channels"):
        DrivenLayer(policy, SHAPE, basis=tiny_basis(SHAPE))


@pytest.mark.parametrize("pad", [1, 7, 8, 30])
def test_a_padded_row_keeps_what_it_keeps_alone(pad):
    """Chunks begin behind the sinks of each batch row."""
    tokens = SINKS + 5 * LAG + 2
    query, key, value = random_rows(SHAPE, tokens, batch=2, q_len=tokens)
    valid = torch.ones(2, tokens, dtype=torch.bool)
    valid[1, :pad] = False
    rest = [rows[1:, :, pad:] for rows in (query, key, value)]
    alone = driven_over(*rest, capacity=15).positions()[0]
    for junk in (1e9, float("nan")):
        padded = [rows.clone() for rows in (query, key, value)]
        for rows in padded:
            rows[1, :, :pad] = junk
        kept = driven_over(*padded, valid, capacity=15).positions()
        whole = [[p + pad for p in head] for head in alone]
        assert [head[-len(w) :] for head, w in zip(kept[1], whole, strict=True)] == whole


def test_a_prompt_shorter_than_two_chunks_is_kept_by_recency_of_nothing():
    """There is nothing to compare with: all rows rank alike, and the lower ones stay."""
    query, key, value = random_rows(SHAPE, 16, q_len=16)
    head = driven_over(query, key, value, capacity=12).positions()[0][0]
    assert head == [0, 1, 2, 3, *range(8, 16)]


def test_fields_that_mean_nothing_are_refused():
    with pytest.raises(PolicyError, match="at least one row, got lag=0"):
        preset("lagkv", lag=0)
    with pytest.raises(PolicyError, match="a number of sinks, got -1"):
        preset("lagkv", **{"evict.sinks": -1})
