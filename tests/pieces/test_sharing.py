"""Wishes become whole rows: exact sums, bounds, no favour by place."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loki_attn.pieces.sharing import apportion, settle, shares_of_best


@st.composite
def requests(draw):
    """Wishes, a total and bounds of a few batch rows."""
    batch, n = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    draw_from = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    wishes = torch.rand(batch, n, generator=draw_from, dtype=torch.float64) * 30
    if draw(st.booleans()):
        wishes = (wishes * 2).round() / 2
    least = torch.randint(0, 8, (batch, n), generator=draw_from)
    most = least + torch.randint(0, 30, (batch, n), generator=draw_from)
    total = torch.randint(0, 25 * n, (batch,), generator=draw_from)
    return wishes, total, least, most


@given(requests())
def test_sums_are_exact_and_bounds_hold(request):
    wishes, total, least, most = request
    got = apportion(wishes, total, least, most)
    assert got.sum(-1).tolist() == total.clamp(least.sum(-1), most.sum(-1)).tolist()
    assert bool(((got >= least) & (got <= most)).all())


@given(requests())
def test_batch_rows_do_not_know_each_other(request):
    wishes, total, least, most = request
    got = apportion(wishes, total, least, most)
    for row in range(wishes.shape[0]):
        pick = slice(row, row + 1)
        assert torch.equal(apportion(wishes[pick], total[pick], least[pick], most[pick]), got[pick])


@given(requests(), st.randoms(use_true_random=False))
def test_order_does_not_matter_where_favour_tells_equals_apart(request, random):
    wishes, total, least, most = request
    order = list(range(wishes.shape[1]))
    favour = torch.rand(wishes.shape, generator=torch.Generator().manual_seed(0))
    got = apportion(wishes, total, least, most, favour)
    random.shuffle(order)
    again = apportion(wishes[:, order], total, least[:, order], most[:, order], favour[:, order])
    assert torch.equal(again, got[:, order])


@given(requests())
def test_wishes_that_fit_are_rounded_to_a_neighbour(request):
    wishes, _, _, _ = request
    total = wishes.sum(-1).round().long()
    shift = (total - wishes.sum(-1))[:, None] / wishes.shape[1]
    wishes = wishes + shift
    free = torch.zeros_like(wishes).long() - 100, torch.full_like(wishes, 1000).long()
    assert bool(((apportion(wishes, total, *free) - wishes).abs() < 1).all())


def test_plain_rounding_drifts_and_this_does_not():
    wishes = torch.tensor([[2.5, 2.5, 2.5, 2.5]])
    bounds = torch.zeros(1, 4).long(), torch.full((1, 4), 9)
    assert wishes.round().sum() == 8
    assert apportion(wishes, torch.tensor([10]), *bounds).tolist() == [[3, 3, 2, 2]]
    favour = torch.tensor([[0.0, 1.0, 0.5, 2.0]])
    assert apportion(wishes, torch.tensor([10]), *bounds, favour).tolist() == [[2, 3, 2, 3]]


def test_what_a_bound_takes_goes_to_the_others_alike():
    got = apportion(
        torch.tensor([[30.0, 6.0, 4.0]]),
        torch.tensor([40]),
        torch.zeros(1, 3).long(),
        torch.tensor([[20, 50, 50]]),
    )
    assert got.tolist() == [[20, 11, 9]]


def test_large_sums_lose_no_row():
    wishes = torch.full((1, 256), 4_000_000 / 3, dtype=torch.float64)
    total = torch.tensor([int(256 * 4_000_000 / 3)])
    bounds = torch.zeros(1, 256).long(), torch.full((1, 256), 10**7)
    assert int(apportion(wishes, total, *bounds).sum()) == int(total)


def test_short_rows_keep_everything_and_padding_fills_up():
    got = settle(
        torch.tensor([[9.0, 1.0], [9.0, 1.0]]),
        torch.tensor([10, 10]),
        fixed=torch.tensor([[1, 1], [1, 1]]),
        real=torch.tensor([[4, 4], [8, 8]]),
        held=torch.tensor([[8, 8], [8, 8]]),
    )
    assert got.tolist() == [[5, 5], [8, 2]]


@given(st.integers(0, 10**6), st.integers(0, 70))
def test_the_best_rows_are_counted_where_they_lie(seed, total):
    scores = torch.rand(2, 3, 20, generator=torch.Generator().manual_seed(seed))
    free = torch.rand(2, 3, 20, generator=torch.Generator().manual_seed(seed + 1)) < 0.8
    got = shares_of_best(scores, free, torch.tensor([total, 5]))
    for row, most in enumerate((total, 5)):
        flat = scores[row].masked_fill(~free[row], -1).flatten()
        best = flat.argsort(descending=True)[: min(most, int(free[row].sum()))]
        assert got[row].tolist() == [int((best // 20 == head).sum()) for head in range(3)]


def test_rows_that_tie_share_the_last_places():
    scores = torch.tensor([[[5.0, 1.0, 1.0], [1.0, 0.0, 0.0], [4.0, 1.0, 0.0]]])
    got = shares_of_best(scores, torch.ones_like(scores).bool(), torch.tensor([4]))
    assert got.tolist() == [[2.0, 0.5, 1.5]]


@pytest.mark.parametrize("odd", [float("nan"), float("-inf")])
def test_what_cannot_be_ranked_comes_last(odd):
    scores = torch.tensor([[[odd, -3.0], [odd, 2.0]]])
    free = torch.ones_like(scores).bool()
    assert shares_of_best(scores, free, torch.tensor([2])).tolist() == [[1.0, 1.0]]
    assert shares_of_best(scores, free, torch.tensor([3])).tolist() == [[1.5, 1.5]]
