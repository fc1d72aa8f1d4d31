"""Ada-KV: the best rows of a layer, safeguarded, exact, blind to the order of heads."""

import pytest
import torch
from ballots import alone, ballot, obeys, permuted, random_ballots
from hypothesis import given
from hypothesis import strategies as st

from loki_attn.allocate.adaptive import Adaptive, captured_mass
from loki_attn.errors import PolicyError
from loki_attn.evict.base import best
from loki_attn.policy import Policy, preset
from loki_attn.testing import DrivenLayer, layer_shape, plain_attention, random_rows

ALPHAS = st.sampled_from([0.0, 0.2, 0.37, 1.0])


def skewed(heads=4, length=50, batch=2, seed=0):
    """Scores whose mass lies in few heads."""
    draw = torch.Generator().manual_seed(seed)
    scale = torch.linspace(0.2, 2.0, heads)[:, None]
    return torch.rand(batch, heads, length, generator=draw) * scale


def mass_kept(one, counts):
    """The scores of the rows that stay."""
    return float(one.scores[best(one.scores, counts, one.protected, one.valid)].sum())


@given(random_ballots(), ALPHAS, st.booleans())
def test_budgets_are_exact(ballots, alpha, weigh):
    obeys(Adaptive(alpha=alpha, weigh_heads=weigh).counts(ballots), ballots)


@given(random_ballots(), ALPHAS, st.randoms(use_true_random=False))
def test_the_order_of_heads_does_not_matter(ballots, alpha, random):
    one = ballots[0]
    # Distinct sums of scores: what decides between equal remainders.
    one.scores[..., 0] = one.scores[..., 0].nan_to_num(nan=0.0) + torch.rand(one.held.shape)
    order = list(range(one.held.shape[1]))
    random.shuffle(order)
    rule = Adaptive(alpha=alpha)
    assert torch.equal(rule.counts([permuted(one, order)])[0], rule.counts([one])[0][:, order])


@given(random_ballots(), ALPHAS)
def test_batch_rows_do_not_know_each_other(ballots, alpha):
    one, rule = ballots[0], Adaptive(alpha=alpha)
    together = rule.counts([one])[0]
    for row in range(one.held.shape[0]):
        assert torch.equal(rule.counts([alone(one, row)])[0], together[row : row + 1])


def test_an_even_share_of_one_is_uniform():
    got = Adaptive(alpha=1.0).counts([ballot(skewed(), 12, protected=3)])[0]
    assert got.tolist() == [[12] * 4] * 2


def test_an_even_share_of_none_keeps_exactly_the_best_rows_of_the_layer():
    scores = skewed()
    one = ballot(scores, 12, protected=3)
    got = Adaptive(alpha=0.0).counts([one])[0]
    for row in range(2):
        flat = scores[row, :, :-3].flatten()
        best_rows = flat.argsort(descending=True)[: 4 * (12 - 3)]
        owners = best_rows // 47
        assert got[row].tolist() == [3 + int((owners == head).sum()) for head in range(4)]


def test_the_best_rows_of_a_layer_hold_no_less_mass_than_an_even_split():
    one = ballot(skewed(), 12)
    flat, mixed, even = (
        mass_kept(one, Adaptive(alpha=alpha).counts([one])[0]) for alpha in (0.0, 0.2, 1.0)
    )
    assert flat > mixed > even


def test_the_safeguard_leaves_no_head_with_less_than_its_share():
    scores = skewed()
    scores[:, 0] = 0.0
    got = Adaptive(alpha=0.2).counts([ballot(scores, 20)])[0]
    assert bool((got[:, 0] >= 0.2 * 20).all())
    assert Adaptive(alpha=0.0).counts([ballot(scores, 20)])[0][:, 0].tolist() == [1, 1]


def test_plain_rounding_would_drift():
    # Seven heads, (1 - 0.2) * own + 0.2 * 9: every head has a fraction.
    scores = skewed(heads=7, batch=1)
    one = ballot(scores, 9)
    own = Adaptive(alpha=0.0).counts([one])[0].double()
    mixed = 0.8 * own + 0.2 * 9
    got = Adaptive().counts([one])[0]
    assert bool(((got - mixed).abs() < 1).all())
    assert int(got.sum()) == 63


def test_heads_that_are_alike_keep_alike():
    scores = torch.ones(1, 3, 20)
    assert Adaptive().counts([ballot(scores, 5)])[0].tolist() == [[5, 5, 5]]


def test_sets_are_nested_without_an_even_share():
    scores = skewed()
    small, large = (
        best(one.scores, Adaptive(alpha=0.0).counts([one])[0], one.protected, one.valid)
        for one in (ballot(scores, 6), ballot(scores, 15))
    )
    assert not bool((small & ~large).any())


def test_nothing_is_written_into_the_scores():
    scores = skewed()
    before = scores.clone()
    Adaptive(weigh_heads=True).counts([ballot(scores, 6, protected=2)])
    assert torch.equal(scores, before)


def test_heads_weigh_by_the_mass_that_their_best_rows_hold():
    flat, peaked = torch.full((10,), 0.1), torch.tensor([0.91] + [0.01] * 9)
    scores = torch.stack([flat, peaked])[None]
    free = torch.ones_like(scores).bool()
    torch.testing.assert_close(
        captured_mass(scores, free, torch.tensor([2])), torch.tensor([[0.2, 0.92]])
    )
    assert captured_mass(scores * 0, free, torch.tensor([2])).tolist() == [[1.0, 1.0]]
    # Four of the flat head's rows hold 0.4 of it: 0.04 ranks below 0.06 * 0.94.
    peaked_wins = Adaptive(alpha=0.0, weigh_heads=True).counts(
        [ballot(torch.stack([flat, peaked * 6])[None], 4)]
    )
    plain = Adaptive(alpha=0.0).counts([ballot(torch.stack([flat, peaked * 6])[None], 4)])
    assert plain[0].tolist() == [[7, 1]]
    assert peaked_wins[0].tolist() == [[1, 7]]


def test_layers_may_form_a_pyramid():
    capacity, tokens = torch.tensor([50]), torch.tensor([900])
    assert Adaptive().layer_capacities(capacity, 8, tokens, 3)[:, 0].tolist() == [50, 50, 50]
    steep = Adaptive(beta=20.0).layer_capacities(capacity, 8, tokens, 3)[:, 0].tolist()
    assert steep == [90, 50, 10]


@pytest.mark.parametrize(("field", "value"), [("alpha", 1.5), ("alpha", -0.1), ("beta", 0.9)])
def test_shares_that_are_none_are_refused(field, value):
    with pytest.raises(PolicyError, match=rf"{field} is .*got {value}"):
        Adaptive(**{field: value})


@pytest.mark.parametrize("name", ["ada-kv", "ada-pyramidkv"])
def test_presets_round_trip(name):
    policy = preset(name, capacity=128)
    assert Policy.from_json(policy.to_json()) == policy
    assert policy.allocate.alpha == 0.2


@pytest.mark.parametrize("allocate", ["adaptive", "global_rows", "threshold"])
def test_reading_ragged_heads_is_dense_attention_to_what_they_hold(allocate):
    shape = layer_shape(6, 2, 16)
    amount = {"at_least": 0.2, "capacity": None} if allocate == "threshold" else {"capacity": 20}
    policy = preset("snapkv", allocate=allocate, window=4, **amount)
    query, key, value = random_rows(shape, 60, batch=2, q_len=60)
    layer = DrivenLayer(policy, shape)
    layer.prompt(*[rows[:, :, :59] for rows in (query * 3, key, value)])
    layer.evict()
    held = layer.positions()
    assert len({len(head) for row in held for head in row}) > 1
    out = layer.attend(*[rows[:, :, 59:] for rows in (query, key, value)])
    seen = torch.zeros(2, 2, 1, 60, dtype=torch.bool)
    for b, row in enumerate(held):
        for h, places in enumerate(row):
            seen[b, h, 0, [*places, 59]] = True
    truth = plain_attention(query[:, :, 59:], key, value, seen.repeat_interleave(3, 1), layer.call)
    torch.testing.assert_close(out, truth)
    rows_held = sum(len(head) + 1 for row in held for head in row)
    assert sum(shard.cache.positions.numel() for shard in layer.rows) == rows_held
