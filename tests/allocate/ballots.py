"""Ballots of one layer or several, and what a rule must hold whatever is voted on."""

import torch
from hypothesis import strategies as st

from loki_attn.allocate.base import Ballot


def ballot(scores, capacity, *, protected=None, valid=None, layer=0, num_layers=1, weights=None):
    """A layer's ballot; `protected` counts last rows, `capacity` is a number or one per batch."""
    batch, heads, length = scores.shape
    valid = torch.ones_like(scores, dtype=torch.bool) if valid is None else valid
    last = torch.zeros_like(valid)
    if protected:
        last[..., length - protected :] = True
    return Ballot(
        layer=layer,
        num_layers=num_layers,
        scores=scores,
        protected=last & valid,
        valid=valid,
        held=torch.full((batch, heads), length),
        capacity=torch.as_tensor(capacity).expand(batch),
        head_weights=weights,
    )


def alone(one, row):
    """The ballot of one batch row."""
    pick = slice(row, row + 1)
    return Ballot(
        layer=one.layer,
        num_layers=one.num_layers,
        scores=one.scores[pick],
        protected=one.protected[pick],
        valid=one.valid[pick],
        held=one.held[pick],
        capacity=one.capacity[pick],
        head_weights=None if one.head_weights is None else one.head_weights[pick],
    )


def permuted(one, order):
    """The ballot with its heads in another order."""
    return Ballot(
        layer=one.layer,
        num_layers=one.num_layers,
        scores=one.scores[:, order],
        protected=one.protected[:, order],
        valid=one.valid[:, order],
        held=one.held[:, order],
        capacity=one.capacity,
        head_weights=None if one.head_weights is None else one.head_weights[:, order],
    )


@st.composite
def random_ballots(draw, layers=1):
    """Ballots of `layers` layers: odd sizes, coarse scores that tie, padding, protected rows."""
    batch, heads = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    length = draw(st.integers(3, 40))
    protected = draw(st.integers(0, length // 3))
    capacity = draw(st.integers(max(1, protected), length + 2))
    padded = draw(st.lists(st.integers(0, length - 1), min_size=batch, max_size=batch))
    coarse = draw(st.booleans())
    seed = draw(st.integers(0, 10**6))
    generator = torch.Generator().manual_seed(seed)
    valid = torch.arange(length) >= torch.tensor(padded)[:, None, None]
    found = []
    for layer in range(layers):
        scores = torch.rand(batch, heads, length, generator=generator) ** (layer + 2)
        scores = (scores * 4).round() / 4 if coarse else scores
        found.append(
            ballot(
                # Padding may hold anything.
                scores.masked_fill(~valid, float("nan")),
                capacity,
                protected=protected,
                valid=valid.expand_as(scores).clone(),
                layer=layer,
                num_layers=layers,
                weights=torch.rand(batch, heads, generator=generator),
            )
        )
    return found


def obeys(counts, ballots):
    """Exact sums, within what is there, protected rows counted, nobody left without a row."""
    total = sum(b.capacity * b.held.shape[1] for b in ballots)
    held = sum(b.held.sum(-1) for b in ballots)
    least = sum(b.protected.sum(-1).clamp(min=1).sum(-1) for b in ballots)
    kept = sum(c.sum(-1) for c in counts)
    assert kept.tolist() == total.minimum(held).maximum(least).tolist()
    for count, one in zip(counts, ballots, strict=True):
        assert bool((count <= one.held).all())
        assert bool((count >= one.protected.sum(-1).clamp(min=1)).all())
        # Padding stays only where all other rows of the batch row stay as well.
        real = one.valid.sum(-1)
        whole = sum(b.valid.sum((1, 2)) for b in ballots) <= total
        assert bool((count >= real)[whole].all())
        assert bool((count <= real.clamp(min=1))[~whole].all())
