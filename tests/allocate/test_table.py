"""Table: the shares that were given, and the budget that was stated."""

import pytest
import torch
from ballots import alone, ballot, obeys, random_ballots
from hypothesis import given
from hypothesis import strategies as st

from loki_attn.allocate.table import Table
from loki_attn.errors import BudgetError, PolicyError
from loki_attn.policy import Policy, preset


def normalised(numbers):
    mean = sum(numbers) / len(numbers)
    return tuple(x / mean for x in numbers)


WEIGHTS = st.lists(st.floats(0.01, 5.0), min_size=1, max_size=40).map(normalised)


@given(WEIGHTS, st.integers(1, 500), st.integers(0, 20), st.integers(1, 2000))
def test_layers_add_up_to_the_budget(shares, capacity, protected, tokens):
    capacity = max(capacity, protected)
    got = Table(shares=shares).layer_capacities(
        torch.tensor([capacity]), protected, torch.tensor([tokens]), len(shares)
    )
    assert got.sum(0).tolist() == [len(shares) * capacity]
    assert int(got.max()) <= max(tokens, capacity)
    assert int(got.min()) >= min(protected, tokens)


def test_layers_get_their_shares():
    table = Table(shares=(2.0, 0.5, (0.25, 0.75)))
    got = table.layer_capacities(torch.tensor([10]), 2, torch.tensor([900]), 3)
    assert got[:, 0].tolist() == [20, 5, 5]


def test_what_a_short_layer_cannot_use_goes_to_the_others():
    got = Table(shares=(2.0, 0.5, 0.5)).layer_capacities(
        torch.tensor([10, 10]), 2, torch.tensor([14, 8]), 3
    )
    assert got.T.tolist() == [[14, 8, 8], [10, 10, 10]]


def test_heads_get_their_shares():
    one = ballot(torch.rand(2, 2, 50), 12, layer=1, num_layers=2)
    assert Table(shares=(1.0, (0.5, 1.5))).counts([one])[0].tolist() == [[6, 18], [6, 18]]
    other = ballot(torch.rand(2, 2, 50), 12, layer=0, num_layers=2)
    assert Table(shares=(1.0, (0.5, 1.5))).counts([other])[0].tolist() == [[12, 12], [12, 12]]


@given(random_ballots(), st.lists(st.floats(0.0, 5.0), min_size=5, max_size=5))
def test_budgets_are_exact(ballots, numbers):
    numbers = numbers[: ballots[0].held.shape[1]]
    numbers = normalised(numbers) if sum(numbers) > 0 else (1.0,) * len(numbers)
    obeys(Table(shares=(numbers,)).counts(ballots), ballots)


@given(random_ballots())
def test_batch_rows_do_not_know_each_other(ballots):
    table = Table(shares=(normalised([1 + i for i in range(ballots[0].held.shape[1])]),))
    together = table.counts(ballots)[0]
    for row in range(together.shape[0]):
        assert torch.equal(table.counts([alone(ballots[0], row)])[0], together[row : row + 1])


def test_no_shares_are_uniform():
    got = Table().layer_capacities(torch.tensor([7]), 2, torch.tensor([90]), 4)
    assert got[:, 0].tolist() == [7] * 4
    assert Table().counts([ballot(torch.rand(1, 3, 20), 7)])[0].tolist() == [[7, 7, 7]]


def test_fields_round_trip():
    policy = preset("snapkv", capacity=64, allocate="table", shares=(0.5, (1.0, 2.0)))
    again = Policy.from_json(policy.to_json())
    assert again == policy
    assert again.allocate.shares == (0.5, (1.0, 2.0))


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ((1.0, 2.0), r"these average to 1\.5000: divide each by that"),
        ((1.0, (0.5, 1.0)), r"these average to 0\.8750"),
        ((2.5, -0.5), r"numbers from 0 on, got -0\.5"),
        ((float("nan"),), "numbers from 0 on, got nan"),
        ((True,), "numbers from 0 on, got True"),
        ((1.0, ()), "one per KV head; got none"),
    ],
)
def test_shares_that_would_change_the_budget_are_refused(shares, message):
    with pytest.raises(PolicyError, match=message):
        Table(shares=shares)


def test_tables_of_another_model_are_refused():
    table = Table(shares=((0.5, 1.5), 1.0))
    with pytest.raises(BudgetError, match="shares for 2 layers, the model has 3"):
        table.layer_capacities(torch.tensor([7]), 2, torch.tensor([90]), 3)
    with pytest.raises(BudgetError, match="2 KV heads of layer 0, which has 3"):
        table.counts([ballot(torch.rand(1, 3, 20), 7)])
