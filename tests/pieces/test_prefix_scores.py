"""Pooling of what a window attends to: only over rows before it that are there."""

import torch

from loki_attn.pieces.prefix_scores import pool_rows


def test_averages_at_the_ends_are_over_the_rows_that_are_there():
    scores = torch.tensor([[[3.0, 0.0, 0.0, 9.0]]])
    got = pool_rows(scores, torch.ones_like(scores), 3, "avg")
    assert got.tolist() == [[[1.5, 1.0, 3.0, 4.5]]]


def test_padding_is_no_neighbour():
    scores = torch.rand(1, 2, 9, generator=torch.Generator().manual_seed(0))
    padded = torch.cat([torch.zeros(1, 2, 4), scores], -1)
    real = torch.cat([torch.zeros(1, 2, 4), torch.ones(1, 2, 9)], -1)
    for how in ("avg", "max"):
        alone = pool_rows(scores, torch.ones_like(scores), 5, how)
        assert torch.equal(pool_rows(padded, real, 5, how)[..., 4:], alone)


def test_the_largest_neighbour_counts():
    scores = torch.tensor([[[1.0, 0.0, 0.0, 2.0, 0.0]]])
    got = pool_rows(scores, torch.ones_like(scores), 3, "max")
    assert got.tolist() == [[[1.0, 1.0, 2.0, 2.0, 2.0]]]


def test_a_kernel_of_one_pools_nothing():
    scores = torch.rand(1, 1, 5)
    assert pool_rows(scores, torch.ones_like(scores), 1, "avg") is scores


def test_no_rows_are_pooled_to_no_rows():
    none = torch.zeros(1, 2, 0)
    assert pool_rows(none, none, 7, "max").shape == (1, 2, 0)
