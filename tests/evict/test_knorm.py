"""Knorm: small keys stay."""

import torch

from loki_attn.policy import preset
from loki_attn.testing import DrivenLayer, layer_shape, random_rows

SHAPE = layer_shape(6, 2, 16)


def orthogonal():
    draw = torch.Generator().manual_seed(7)
    matrix = torch.randn(16, 16, generator=draw, dtype=torch.float64)
    return torch.linalg.qr(matrix).Q.float()


def scores_of(key, value, query):
    driven = DrivenLayer(preset("knorm", capacity=1000), SHAPE)
    driven.prompt(query, key, value)
    return driven.layer.eviction.evictor.scores(driven.rows.whole, driven.call, None)


def test_rows_with_the_smallest_keys_stay_in_order():
    query, key, value = random_rows(SHAPE, 40, batch=2, q_len=40)
    driven = DrivenLayer(preset("knorm", capacity=9), SHAPE)
    driven.prompt(query, key, value)
    smallest = key.double().norm(dim=-1).topk(9, largest=False).indices.sort().values
    assert driven.positions() == smallest.tolist()


def test_scores_do_not_change_under_orthogonal_maps_of_the_keys():
    query, key, value = random_rows(SHAPE, 40, q_len=40)
    turn = orthogonal()
    torch.testing.assert_close(scores_of(key @ turn, value, query), scores_of(key, value, query))


def test_scores_follow_the_rows_when_they_are_permuted():
    query, key, value = random_rows(SHAPE, 40, q_len=40)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(3))
    assert torch.equal(
        scores_of(key[:, :, order], value, query), scores_of(key, value, query)[:, :, order]
    )


def test_small_keys_of_half_precision_are_told_apart():
    """Squares of small bfloat16 numbers would vanish in float16 and coarsen in bfloat16."""
    query, key, value = random_rows(SHAPE, 40, q_len=40)
    half = (key * 1e-4).half()
    scores = scores_of(half, value.half(), query.half())
    torch.testing.assert_close(scores, -half.double().norm(dim=-1).float())


def test_a_padded_row_keeps_what_it_keeps_alone():
    query, key, value = random_rows(SHAPE, 40, batch=2, q_len=40)
    valid = torch.ones(2, 40, dtype=torch.bool)
    valid[1, :7] = False
    padded = [rows.clone() for rows in (query, key, value)]
    for rows in padded:
        rows[1, :, :7] = float("nan")
    batch = DrivenLayer(preset("knorm", capacity=9), SHAPE)
    batch.prompt(*padded, valid)
    alone = DrivenLayer(preset("knorm", capacity=9), SHAPE)
    alone.prompt(*[rows[1:, :, 7:] for rows in (query, key, value)])
    assert batch.positions()[1] == [[p + 7 for p in head] for head in alone.positions()[0]]
