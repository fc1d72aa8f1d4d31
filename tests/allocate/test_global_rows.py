"""Global: one threshold over all layers and heads, exact, nested, no tie dropped."""

import pytest
import torch
from ballots import alone, ballot, obeys, permuted, random_ballots
from hypothesis import given
from hypothesis import strategies as st

from loki_attn.allocate.global_rows import GlobalRows
from loki_attn.errors import PolicyError
from loki_attn.evict.base import best


def model(capacity, layers=3, seed=0, protected=0):
    draw = torch.Generator().manual_seed(seed)
    return [
        ballot(
            torch.rand(2, 2, 30, generator=draw) * (layer + 1),
            capacity,
            protected=protected,
            layer=layer,
            num_layers=layers,
        )
        for layer in range(layers)
    ]


def kept(ballots, counts):
    return [best(b.scores, c, b.protected, b.valid) for b, c in zip(ballots, counts, strict=True)]


@given(random_ballots(layers=3), st.sampled_from([0.0, 0.3, 1.0]))
def test_budgets_are_exact(ballots, alpha):
    obeys(GlobalRows(alpha=alpha).counts(ballots), ballots)


@given(random_ballots(layers=3))
def test_batch_rows_do_not_know_each_other(ballots):
    together = GlobalRows().counts(ballots)
    for row in range(ballots[0].held.shape[0]):
        single = GlobalRows().counts([alone(b, row) for b in ballots])
        assert all(
            torch.equal(one, many[row : row + 1])
            for one, many in zip(single, together, strict=True)
        )


def test_one_threshold_parts_what_stays_from_what_goes():
    ballots = model(8)
    marks = kept(ballots, GlobalRows().counts(ballots))
    for row in range(2):
        stays = torch.cat([b.scores[row][m[row]] for b, m in zip(ballots, marks, strict=True)])
        goes = torch.cat([b.scores[row][~m[row]] for b, m in zip(ballots, marks, strict=True)])
        assert stays.numel() == 3 * 2 * 8
        # Every head keeps a row, however little it is worth: those of layer 0 do by that alone.
        assert stays.sort().values[2] > goes.max()
        assert int(marks[0][row].sum()) == 2


def test_a_head_that_must_keep_a_row_costs_the_model_its_worst_one():
    scores = torch.tensor([[[0.0, 0.1], [0.9, 0.8], [0.7, 0.6]]])
    counts = GlobalRows().counts([ballot(scores, 1)])
    assert counts[0].tolist() == [[1, 1, 1]]
    assert kept([ballot(scores, 1)], counts)[0].tolist() == [
        [[False, True], [True, False], [True, False]]
    ]


def test_sets_are_nested():
    small, large = (kept(m, GlobalRows().counts(m)) for m in (model(6), model(11)))
    assert not any(bool((s & ~b).any()) for s, b in zip(small, large, strict=True))


def test_rows_that_tie_at_the_threshold_are_not_dropped():
    ballots = [ballot(torch.ones(1, 2, 10), 5, layer=i, num_layers=2) for i in range(2)]
    assert [c.tolist() for c in GlobalRows().counts(ballots)] == [[[5, 5]], [[5, 5]]]


def test_the_order_of_layers_and_heads_does_not_matter():
    ballots = model(8, protected=2)
    counts = GlobalRows().counts(ballots)
    turned = GlobalRows().counts([permuted(b, [1, 0]) for b in reversed(ballots)])
    assert all(torch.equal(a[:, [1, 0]], b) for a, b in zip(counts, reversed(turned), strict=True))


def test_layers_may_hold_different_numbers_of_rows():
    ballots = [
        ballot(torch.rand(1, 2, length), 4, layer=i, num_layers=2)
        for i, length in enumerate((5, 12))
    ]
    obeys(GlobalRows().counts(ballots), ballots)


def test_an_even_share_of_one_is_uniform():
    assert all((c == 9).all() for c in GlobalRows(alpha=1.0).counts(model(9)))


def test_shares_that_are_none_are_refused():
    with pytest.raises(PolicyError, match=r"alpha is a share in \[0, 1\], got 2"):
        GlobalRows(alpha=2)
