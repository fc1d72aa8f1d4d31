"""KeyDiff: keys that point elsewhere stay."""

import torch

from loki_attn.policy import preset
from loki_attn.testing import DrivenLayer, layer_shape, random_rows

SHAPE = layer_shape(6, 2, 16)


def orthogonal():
    draw = torch.Generator().manual_seed(7)
    matrix = torch.randn(16, 16, generator=draw, dtype=torch.float64)
    return torch.linalg.qr(matrix).Q.float()


def driven_over(query, key, value, valid=None, capacity=1000):
    driven = DrivenLayer(preset("keydiff", capacity=capacity), SHAPE)
    driven.prompt(query, key, value, valid)
    return driven


def scores_of(query, key, value):
    driven = driven_over(query, key, value)
    return driven.layer.eviction.evictor.scores(driven.rows.whole, driven.call, None)


def plain(key):
    directions = key.double() / key.double().norm(dim=-1, keepdim=True)
    mean = directions.mean(2, keepdim=True)
    return -torch.cosine_similarity(key.double(), mean, dim=-1)


def test_scores_are_minus_the_cosine_with_the_mean_direction():
    query, key, value = random_rows(SHAPE, 40, batch=2, q_len=40)
    torch.testing.assert_close(scores_of(query, key, value).double(), plain(key))


def test_rows_that_point_away_stay_in_order():
    query, key, value = random_rows(SHAPE, 40, batch=2, q_len=40)
    kept = driven_over(query, key, value, capacity=9).positions()
    assert kept == plain(key).topk(9).indices.sort().values.tolist()


def test_the_anchor_is_the_mean_of_directions_not_of_keys():
    """One long key must not make the anchor its own."""
    query, key, value = random_rows(SHAPE, 40, q_len=40)
    long = key.clone()
    long[:, :, 3] *= 1e4
    torch.testing.assert_close(scores_of(query, long, value), scores_of(query, key, value))


def test_scores_do_not_change_under_orthogonal_maps_of_the_keys():
    query, key, value = random_rows(SHAPE, 40, q_len=40)
    turn = orthogonal()
    torch.testing.assert_close(scores_of(query, key @ turn, value), scores_of(query, key, value))


def test_scores_follow_the_rows_when_they_are_permuted():
    query, key, value = random_rows(SHAPE, 40, q_len=40)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(
        scores_of(query, key[:, :, order], value), scores_of(query, key, value)[:, :, order]
    )


def test_a_key_of_length_zero_is_judged():
    query, key, value = random_rows(SHAPE, 40, q_len=40)
    key[:, :, 5] = 0.0
    scores = scores_of(query, key, value)
    assert scores.isfinite().all()
    assert not scores[:, :, 5].any()


def test_padding_has_no_part_in_the_mean():
    query, key, value = random_rows(SHAPE, 40, batch=2, q_len=40)
    alone = driven_over(*[rows[1:, :, 7:] for rows in (query, key, value)], capacity=9)
    valid = torch.ones(2, 40, dtype=torch.bool)
    valid[1, :7] = False
    for junk in (1e9, float("nan")):
        padded = [rows.clone() for rows in (query, key, value)]
        for rows in padded:
            rows[1, :, :7] = junk
        kept = driven_over(*padded, valid, capacity=9).positions()
        assert kept[1] == [[p + 7 for p in head] for head in alone.positions()[0]]
