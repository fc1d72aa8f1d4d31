"""Uniform: the capacity for everybody."""

import torch
from ballots import ballot, obeys, random_ballots
from hypothesis import given

from loki_attn.allocate.uniform import Uniform


def test_every_head_keeps_the_capacity():
    got = Uniform().counts([ballot(torch.rand(2, 3, 20), 7)])[0]
    assert got.tolist() == [[7, 7, 7], [7, 7, 7]]


def test_no_head_keeps_more_than_it_holds_or_less_than_is_protected():
    assert Uniform().counts([ballot(torch.rand(1, 1, 5), 7)])[0].tolist() == [[5]]
    assert Uniform().counts([ballot(torch.rand(1, 1, 9), 2, protected=4)])[0].tolist() == [[4]]


@given(random_ballots())
def test_budgets_are_exact(ballots):
    one = ballots[0]
    counts = Uniform().counts([one])
    assert bool((counts[0] == one.capacity[:, None].minimum(one.held)).all())
    if bool(one.valid.all()):
        obeys(counts, [one])


def test_layers_share_alike():
    shared = Uniform().layer_capacities(torch.tensor([7, 3]), 2, torch.tensor([90, 9]), 4)
    assert shared.tolist() == [[7, 3]] * 4
