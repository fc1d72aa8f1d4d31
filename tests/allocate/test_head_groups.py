"""Head groups: capacities by rank, with the stated mean."""

import pytest
import torch
from ballots import alone, ballot, obeys, permuted, random_ballots
from hypothesis import given
from hypothesis import strategies as st

from loki_attn.allocate.head_groups import HeadGroups, group_shares
from loki_attn.errors import PolicyError
from loki_attn.policy import Policy, preset


@given(random_ballots(), st.integers(1, 6), st.floats(1.0, 8.0))
def test_budgets_are_exact(ballots, groups, ratio):
    obeys(HeadGroups(groups=groups, ratio=ratio).counts(ballots), ballots)


@given(st.integers(1, 12), st.integers(1, 12), st.floats(1.0, 8.0))
def test_shares_average_to_one(heads, groups, ratio):
    weights = torch.rand(3, heads, generator=torch.Generator().manual_seed(heads))
    shares = group_shares(weights, groups, ratio)
    torch.testing.assert_close(shares.mean(-1), torch.ones(3, dtype=torch.float64))


def test_the_released_budgets_would_exceed_the_nominal_one_and_these_do_not():
    # 3/4 and 3/2 of 512 are 576 on average; their ratio of 2 is kept.
    weights = torch.tensor([[0.9, 0.1, 0.5, 0.3]])
    one = ballot(torch.rand(1, 4, 2000), 512, weights=weights)
    got = HeadGroups().counts([one])[0]
    assert got.tolist() == [[683, 341, 683, 341]]
    assert int(got.sum()) == 4 * 512


def test_one_group_is_uniform():
    one = ballot(torch.rand(1, 4, 50), 11, weights=torch.rand(1, 4))
    assert HeadGroups(groups=1).counts([one])[0].tolist() == [[11] * 4]
    assert HeadGroups(ratio=1.0).counts([one])[0].tolist() == [[11] * 4]


def test_groups_get_equal_steps():
    shares = group_shares(torch.tensor([[3.0, 1.0, 2.0, 4.0]]), 4, 4.0)
    torch.testing.assert_close(shares, torch.tensor([[1.2, 0.4, 0.8, 1.6]], dtype=torch.float64))


def test_more_groups_than_heads_give_a_head_each():
    weights = torch.tensor([[0.2, 0.1]])
    assert torch.equal(group_shares(weights, 32, 3.0), group_shares(weights, 2, 3.0))


def test_heads_that_tie_keep_the_same():
    shares = group_shares(torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.1, 0.5, 0.5, 0.9]]), 2, 2.0)
    assert shares[0].tolist() == [1.0] * 4
    assert shares[1, 1] == shares[1, 2]


@given(random_ballots(), st.randoms(use_true_random=False))
def test_the_order_of_heads_does_not_matter(ballots, random):
    one = ballots[0]
    order = list(range(one.held.shape[1]))
    random.shuffle(order)
    got = HeadGroups(groups=3).counts([permuted(one, order)])[0]
    assert torch.equal(got, HeadGroups(groups=3).counts([one])[0][:, order])


@given(random_ballots())
def test_batch_rows_do_not_know_each_other(ballots):
    together = HeadGroups().counts(ballots)[0]
    for row in range(together.shape[0]):
        single = HeadGroups().counts([alone(ballots[0], row)])[0]
        assert torch.equal(single, together[row : row + 1])


def test_an_eviction_that_judges_no_heads_is_refused():
    with pytest.raises(
        PolicyError, match=r"head_groups needs an eviction that judges heads.*'uncomp'"
    ):
        HeadGroups().counts([ballot(torch.rand(1, 2, 9), 4)])


@pytest.mark.parametrize(("field", "value"), [("groups", 0), ("groups", True), ("ratio", 0.5)])
def test_what_is_no_group_is_refused(field, value):
    with pytest.raises(PolicyError, match=f"at least.*got (groups=)?{value}"):
        HeadGroups(**{field: value})


def test_fields_round_trip():
    policy = preset("uncomp", groups=3, ratio=2.5)
    assert Policy.from_json(policy.to_json()) == policy
