"""Moments: gathered in pieces, they are those of all vectors at once."""

import pytest
import torch

from loki_attn.cache import LayerCache
from loki_attn.pieces.moments import add_moments, moments


@pytest.mark.parametrize("cuts", [(), (1,), (3, 4, 20)])
def test_pieces_give_the_moments_of_the_whole(cuts):
    draw = torch.Generator().manual_seed(0)
    # A mean that is large beside the spread: squares summed about 0 would lose the spread.
    rows = torch.randn(2, 2, 3, 40, 4, generator=draw) + 1000
    counted = torch.rand(2, 2, 40, generator=draw) < 0.6
    junk = rows.masked_fill(~counted[:, :, None, :, None], float("nan"))
    cache = LayerCache()
    for start, end in zip((0, *cuts), (*cuts, 40), strict=True):
        add_moments(cache, junk[..., start:end, :], counted[..., start:end])

    mean, spread = moments(cache)

    for b in range(2):
        for h in range(2):
            for g in range(3):
                own = rows[b, h, g, counted[b, h]].double()
                torch.testing.assert_close(
                    mean[b, h, g].double(), own.mean(0), rtol=1e-6, atol=1e-3
                )
                expected = torch.cov(own.T, correction=0)
                torch.testing.assert_close(spread[b, h, g].double(), expected, rtol=1e-3, atol=1e-3)


def test_nothing_counted_is_a_mean_of_zero_and_not_nan():
    cache = LayerCache()
    add_moments(cache, torch.full((1, 1, 1, 3, 2), float("nan")), torch.zeros(1, 1, 3).bool())
    mean, spread = moments(cache)
    assert not mean.any()
    assert not spread.any()
