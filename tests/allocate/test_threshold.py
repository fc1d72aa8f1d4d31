"""Threshold: what is good enough stays, and nothing else."""

import pytest
import torch
from ballots import alone, ballot, random_ballots
from hypothesis import given

from loki_attn.allocate.threshold import Threshold
from loki_attn.errors import PolicyError
from loki_attn.evict.base import best
from loki_attn.policy import Policy, preset


@given(random_ballots())
def test_just_the_good_rows_and_the_protected_ones_stay(ballots):
    one = ballots[0]
    free = ballot(one.scores, one.scores.shape[-1], valid=one.valid, protected=0)
    counts = Threshold(at_least=0.5).counts([free])[0]
    marks = best(free.scores, counts, free.protected, free.valid)
    good = (free.scores >= 0.5) & free.valid
    some = good.any(-1)
    assert torch.equal(marks[some], good[some])
    assert bool((marks[~some].sum(-1) == 1).all())


@given(random_ballots())
def test_batch_rows_do_not_know_each_other(ballots):
    together = Threshold(at_least=0.3).counts(ballots)[0]
    for row in range(together.shape[0]):
        single = Threshold(at_least=0.3).counts([alone(ballots[0], row)])[0]
        assert torch.equal(single, together[row : row + 1])


def test_rows_at_the_threshold_stay():
    scores = torch.tensor([[[0.5, 0.5, 0.4, 0.5]]])
    assert Threshold(at_least=0.5).counts([ballot(scores, 4)])[0].tolist() == [[3]]


def test_a_capacity_is_the_most_that_a_head_keeps():
    scores = torch.tensor([[[3.0, 2.0, 1.0, 0.0], [0.0, 0.0, 0.0, 2.0]]])
    assert Threshold(at_least=1.0).counts([ballot(scores, 2)])[0].tolist() == [[2, 1]]


def test_protected_rows_stay_whatever_they_score():
    one = ballot(torch.zeros(1, 2, 9), 9, protected=4)
    assert Threshold(at_least=1.0).counts([one])[0].tolist() == [[4, 4]]


def test_no_amount_is_needed():
    policy = preset("snapkv", capacity=None, allocate="threshold", at_least=0.1)
    assert policy.keep.keeps_everything
    assert Policy.from_json(policy.to_json()) == policy


def test_what_no_score_reaches_is_refused():
    with pytest.raises(PolicyError, match="at_least is a score, got nan; give a finite number"):
        Threshold(at_least=float("nan"))
