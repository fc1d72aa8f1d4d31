"""Rope: rotations compose, differences of positions are all that scores see, norms stay."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loki_attn.rope import Rope

DIM = 12
FREQUENCIES = 10_000.0 ** -(torch.arange(0, 8, 2) / 8)  # 8 of 12 dimensions turn
LAYOUTS = ["halves", "pairs"]


def rope(layout):
    return Rope(frequencies=FREQUENCIES, layout=layout)


def rows(seq=7, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, seq, DIM, generator=draw, dtype=torch.float64)


@pytest.mark.parametrize("layout", LAYOUTS)
@given(first=st.integers(-9000, 9000), second=st.integers(-9000, 9000))
def test_turns_add_up(layout, first, second):
    turn, held = rope(layout).turn, rows()
    twice = turn(turn(held, torch.tensor(first)), torch.tensor(second))
    torch.testing.assert_close(twice, turn(held, torch.tensor(first + second)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_turn_is_undone_exactly_where_nothing_turned_and_nearly_elsewhere(layout):
    held, places = rows(), torch.arange(7) * 911
    turned = rope(layout).turn(held, places)
    torch.testing.assert_close(rope(layout).turn(turned, -places), held)
    assert torch.equal(turned[..., 8:], held[..., 8:])
    assert torch.equal(turned[:, :, 0], held[:, :, 0])
    assert not torch.equal(turned[:, :, 1], held[:, :, 1])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scores_depend_on_differences_of_positions_only(layout):
    query, key = rows(seed=1), rows(seed=2)
    turn, places = rope(layout).turn, torch.arange(7)
    plain = turn(query, places + 100) @ turn(key, places).mT
    moved = turn(query, places + 5100) @ turn(key, places + 5000).mT
    torch.testing.assert_close(moved, plain)
    torch.testing.assert_close(turn(query, places).norm(dim=-1), query.norm(dim=-1))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_which_dimensions_turn_together(layout):
    """One quarter turn of the fastest pair: (1, 0) becomes (0, 1)."""
    quarter = Rope(frequencies=torch.tensor([torch.pi / 2, 0.0]), layout=layout)
    first, second = (0, 2) if layout == "halves" else (0, 1)
    row = torch.zeros(1, 4, dtype=torch.float64)
    row[0, first] = 1
    turned = quarter.turn(row, torch.tensor([1]))
    expected = torch.zeros(1, 4, dtype=torch.float64)
    expected[0, second] = 1
    torch.testing.assert_close(turned, expected, rtol=0, atol=1e-6)


def test_every_row_may_move_by_its_own_shift():
    held, shift = rows(), torch.arange(2 * 3 * 7).reshape(2, 3, 7)
    whole = rope("halves").turn(held, shift)
    for place in ((0, 0, 0), (1, 2, 6), (0, 2, 3)):
        one = rope("halves").turn(held[place][None], shift[place][None])
        torch.testing.assert_close(whole[place], one[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_far_positions_are_as_exact_as_near_ones(dtype):
    """Angles in float32 would be off by a hundredth here; one rounding is allowed."""
    held = rows().to(dtype)
    turned = rope("halves").turn(held, torch.tensor(131_072))
    assert turned.dtype == dtype
    truth = rope("halves").turn(held.double(), torch.tensor(131_072))
    error = (turned.double() - truth).abs().max()
    assert float(error) <= torch.finfo(dtype).eps * float(truth.abs().max()) + 1e-6
