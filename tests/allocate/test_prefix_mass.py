"""PrefixKV's budgets: one share of mass for all layers, exact sums, a table from samples."""

from itertools import pairwise

import pytest
import torch
from ballots import alone, ballot, obeys, random_ballots
from hypothesis import given
from hypothesis import strategies as st

from loki_attn.allocate.prefix_mass import PrefixMass, prefix_shares, shortest_prefixes
from loki_attn.allocate.table import Table
from loki_attn.errors import BudgetError, InputError


def curves(layers=5, tokens=40, seed=0):
    """Importance of tokens, more concentrated in later layers."""
    draw = torch.Generator().manual_seed(seed)
    flat = torch.rand(layers, tokens, generator=draw)
    return flat ** torch.arange(1, layers + 1)[:, None]


def shortest(importance, p):
    """By the definition: the fewest of the best rows that hold a share p."""
    found = []
    for layer in importance.double():
        reached = layer.sort(descending=True).values.cumsum(0) / layer.sum()
        found.append(int((reached < p).sum()) + 1)
    return found


@given(st.integers(0, 10**6), st.integers(5, 200))
def test_prefixes_are_the_shortest_that_reach_one_threshold(seed, total):
    importance = curves(seed=seed)
    counts, p = shortest_prefixes(importance, total)
    assert int(counts.sum()) == total
    assert shortest(importance, p + 1e-12) == counts.tolist()


def test_the_threshold_rises_with_the_budget():
    found = [shortest_prefixes(curves(), total)[1] for total in range(5, 201)]
    assert found == sorted(found)
    assert len(set(found)) > 190


def test_prefixes_are_nested_in_the_budget():
    found = [shortest_prefixes(curves(), total)[0] for total in range(5, 201)]
    assert all(bool((b >= a).all()) for a, b in pairwise(found))


def test_equal_curves_get_equal_budgets():
    importance = curves(layers=1).expand(4, -1)
    assert shortest_prefixes(importance, 48)[0].tolist() == [12] * 4
    assert shortest_prefixes(importance, 50)[0].tolist() == [13, 13, 12, 12]


def test_the_whole_budget_keeps_everything():
    assert shortest_prefixes(curves(), 200)[0].tolist() == [40] * 5


def test_concentrated_layers_keep_less():
    counts = shortest_prefixes(curves(), 60)[0].tolist()
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > 2 * counts[-1]


def test_layers_without_mass_take_their_rows_evenly():
    importance = torch.stack([torch.zeros(10), torch.ones(10)])
    assert shortest_prefixes(importance, 10)[0].tolist() == [5, 5]


@pytest.mark.parametrize("total", [4, 201])
def test_totals_that_cannot_be_are_refused(total):
    with pytest.raises(BudgetError, match=f"5 layers of 40 tokens can keep 5 to 200.*{total}"):
        shortest_prefixes(curves(), total)


@given(random_ballots(layers=3))
def test_budgets_are_exact(ballots):
    # In rows per head: every head of a layer keeps the same.
    counts = PrefixMass().counts(ballots)
    assert all(bool((c == c[:, :1]).all()) for c in counts)
    single = [
        ballot(
            b.scores[:, :1],
            b.capacity,
            valid=b.valid[:, :1],
            protected=int(b.protected[0, 0].sum()),
        )
        for b in ballots
    ]
    obeys([c[:, :1] for c in counts], single)


@given(random_ballots(layers=3))
def test_batch_rows_do_not_know_each_other(ballots):
    together = PrefixMass().counts(ballots)
    for row in range(ballots[0].held.shape[0]):
        single = PrefixMass().counts([alone(b, row) for b in ballots])
        assert all(
            torch.equal(one, many[row : row + 1])
            for one, many in zip(single, together, strict=True)
        )


def test_the_rule_is_the_pure_function_on_ballots():
    importance = curves()
    ballots = [
        ballot(layer.expand(1, 2, -1), 12, layer=i, num_layers=5)
        for i, layer in enumerate(importance)
    ]
    counts = [int(c[0, 0]) for c in PrefixMass().counts(ballots)]
    assert counts == shortest_prefixes(importance, 60)[0].tolist()


def test_protected_rows_come_first_in_every_prefix():
    # What is protected in layer 0 holds its mass already; layer 1 must look for it.
    first = torch.tensor([0.0] * 8 + [0.5, 0.5])
    second = torch.tensor([0.1] * 10)
    ballots = [ballot(s.expand(1, 1, -1), 4, protected=2) for s in (first, second)]
    assert [int(c) for c in PrefixMass().counts(ballots)] == [2, 6]


@pytest.mark.parametrize("odd", [float("nan"), -1.0])
def test_what_is_no_mass_counts_nothing(odd):
    scores = curves(2, 20)
    spoiled = scores.clone()
    scores[0, 3], spoiled[0, 3] = 0.0, odd
    plain, got = (
        PrefixMass().counts([ballot(layer.expand(1, 1, -1), 7) for layer in many])
        for many in (scores, spoiled)
    )
    assert [int(a) for a in plain] == [int(b) for b in got]


def test_samples_make_a_table():
    samples = [curves(tokens=40, seed=0), curves(tokens=64, seed=1)]
    shares = prefix_shares(samples, 0.25)
    assert sum(shares) == pytest.approx(5)
    assert list(shares) == sorted(shares, reverse=True)
    given_rows = Table(shares=shares).layer_capacities(torch.tensor([10]), 0, torch.tensor([40]), 5)
    online = shortest_prefixes(samples[0], 50)[0]
    assert int(given_rows.sum()) == 50
    assert bool(((given_rows[:, 0] - online).abs() <= 2).all())


def test_a_table_needs_samples_and_a_share():
    with pytest.raises(InputError, match="at least one sample"):
        prefix_shares([], 0.5)
    with pytest.raises(InputError, match=r"a share in \(0, 1\], got 1\.5"):
        prefix_shares([curves()], 1.5)
