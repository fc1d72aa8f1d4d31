"""Every allocation: the budget to the row, within what is there, alike for heads and batch rows."""

from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loki_attn.allocate.base import Ballot
from loki_attn.allocate.table import Table
from loki_attn.keep_budget import KeepBudget
from loki_attn.policy import Policy, methods
from loki_attn.select.dense import Dense

LAYERS, BATCH, HEADS = 3, 2, 4
FIRST, LAST = 2, 4
ALLOCATIONS = [
    variant
    for method in methods("allocate").values()
    for variant in (
        method(),
        *(method(**{f.name: not f.default}) for f in fields(method) if f.type is bool),
    )
] + [Table(shares=(0.5, 1.5, 1.0))]


@pytest.fixture(scope="module", params=ALLOCATIONS, ids=str)
def allocation(request):
    return request.param


@pytest.fixture(scope="module", params=[a for a in ALLOCATIONS if a.needs_budget], ids=str)
def sharing(request):
    """The allocations that share out an amount."""
    return request.param


def ballots(allocation, capacity, lengths, seed=0, pad=0):
    """What three layers put to the vote; the second batch row starts with padding."""
    draw = torch.Generator().manual_seed(seed)
    rows = torch.tensor([capacity] * BATCH)
    tokens = torch.tensor([max(lengths), max(lengths) - pad])
    shared = allocation.layer_capacities(rows, FIRST + LAST, tokens, LAYERS)
    found = []
    for layer, length in enumerate(lengths):
        place = torch.arange(length)
        valid = (place >= torch.tensor([0, pad])[:, None])[:, None].expand(-1, HEADS, -1)
        ends = (place >= length - LAST) | (place < FIRST + torch.tensor([0, pad])[:, None])
        found.append(
            Ballot(
                layer=layer,
                num_layers=LAYERS,
                scores=torch.rand(BATCH, HEADS, length, generator=draw) ** 3,
                protected=ends[:, None].expand(-1, HEADS, -1) & valid,
                valid=valid,
                held=torch.full((BATCH, HEADS), length),
                capacity=shared[layer],
                head_weights=torch.rand(BATCH, HEADS, generator=draw),
            )
        )
    return found


def settle(allocation, votes):
    """Counts [layers, batch, heads], layer by layer where the allocation works so."""
    if allocation.scope == "model":
        return torch.stack(allocation.counts(votes))
    return torch.stack([allocation.counts([vote])[0] for vote in votes])


def picked(vote, batch=slice(None), heads=slice(None)):
    """A vote of some batch rows, its heads in another order."""
    own = {
        name: getattr(vote, name)[batch][:, heads]
        for name in ("scores", "protected", "valid", "held", "head_weights")
    }
    return replace(vote, capacity=vote.capacity[batch], **own)


CALLS = {
    "capacity": st.integers(FIRST + LAST, 60),
    "length": st.integers(20, 50),
    "pad": st.integers(0, 10),
    "seed": st.integers(0, 99),
}


@settings(max_examples=15)
@given(**CALLS)
def test_the_sum_is_the_budget_and_every_head_is_within_its_bounds(
    allocation, capacity, length, pad, seed
):
    votes = ballots(allocation, capacity, [length] * LAYERS, seed, pad)
    counts = settle(allocation, votes)
    for own, vote in zip(counts, votes, strict=True):
        assert own.shape == (BATCH, HEADS)
        assert own.dtype == torch.int64
        assert bool((own >= vote.protected.sum(-1).clamp(min=1)).all())
        assert bool((own <= vote.held).all())
    if allocation.needs_budget:
        expected = LAYERS * HEADS * min(capacity, length)
        assert counts.sum((0, 2)).tolist() == [expected] * BATCH


@pytest.mark.parametrize("capacity", [40, 41, 1000])
def test_with_room_for_all_all_stay(sharing, capacity):
    votes = ballots(sharing, capacity, [40] * LAYERS, pad=7)
    assert bool((settle(sharing, votes) == 40).all())


@pytest.mark.parametrize("capacity", [7, 13, 30])
def test_heads_of_a_layer_differ_only_where_that_is_said(allocation, capacity):
    counts = settle(allocation, ballots(allocation, capacity, [40] * LAYERS))
    if not allocation.ragged:
        assert bool((counts == counts[:, :, :1]).all())


@pytest.mark.parametrize("capacity", [7, 13, 30])
def test_the_order_of_heads_does_not_matter(allocation, capacity):
    votes = ballots(allocation, capacity, [40] * LAYERS, pad=5)
    order = [2, 0, 3, 1]
    turned = settle(allocation, [picked(vote, heads=order) for vote in votes])
    assert torch.equal(turned, settle(allocation, votes)[:, :, order])


@pytest.mark.parametrize("capacity", [7, 13, 30])
def test_batch_rows_do_not_meet(allocation, capacity):
    votes = ballots(allocation, capacity, [40] * LAYERS, pad=5)
    whole = settle(allocation, votes)
    for row in range(BATCH):
        alone = settle(allocation, [picked(vote, slice(row, row + 1)) for vote in votes])
        assert torch.equal(alone[:, 0], whole[:, row])


@pytest.mark.parametrize("junk", [float("nan"), float("inf"), float("-inf"), 1e9])
def test_scores_of_padding_do_not_matter(allocation, junk):
    votes = ballots(allocation, 13, [40] * LAYERS, pad=9)
    spoilt = [replace(v, scores=v.scores.masked_fill(~v.valid, junk)) for v in votes]
    assert torch.equal(settle(allocation, spoilt), settle(allocation, votes))


def test_a_vote_is_left_as_it_was_and_repeats_agree(allocation):
    votes = ballots(allocation, 13, [40] * LAYERS, pad=9)
    copies = [picked(vote) for vote in votes]
    copies = [replace(c, scores=c.scores.clone(), held=c.held.clone()) for c in copies]
    first = settle(allocation, votes)
    for _ in range(5):
        assert torch.equal(settle(allocation, votes), first)
    for vote, copy in zip(votes, copies, strict=True):
        assert torch.equal(vote.scores, copy.scores)
        assert torch.equal(vote.held, copy.held)


@settings(max_examples=30)
@given(capacity=st.integers(1, 500), tokens=st.integers(1, 600), layers=st.integers(1, 12))
def test_layers_share_the_budget_to_the_row(sharing, capacity, tokens, layers):
    """Each row of a batch by itself; a layer gets no less than it keeps in any case."""
    if isinstance(sharing, Table) and sharing.shares:
        layers = LAYERS
    always = min(6, capacity)
    rows, seen = torch.tensor([capacity, 2 * capacity]), torch.tensor([tokens, tokens])
    shared = sharing.layer_capacities(rows, always, seen, layers)
    assert shared.shape == (layers, 2)
    for batch in range(2):
        own = shared[:, batch]
        amount = int(rows[batch])
        if tokens > amount:
            assert int(own.sum()) == layers * amount
            assert bool((own >= always).all())
            assert int(own.max()) <= tokens
        else:
            assert bool((own >= tokens).all())
        alone = sharing.layer_capacities(
            rows[batch : batch + 1], always, seen[batch : batch + 1], layers
        )
        assert torch.equal(alone[:, 0], own)


def test_a_policy_survives_json(allocation):
    evict = methods("evict")["uncomp"]()
    policy = Policy(
        select=Dense(), evict=evict, keep=KeepBudget(capacity=99), allocate=allocation, name="mine"
    )
    assert Policy.from_json(policy.to_json()) == policy
