"""Pages: what a query may know of rows that are judged together."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from loki_attn.pieces.pages import behind, finite_rows, mean_row, to_rows, whole_pages


@given(q_len=st.integers(1, 20), past=st.integers(0, 20), size=st.integers(1, 7))
def test_a_causal_query_knows_the_pages_that_end_with_it(q_len, past, size):
    length = past + q_len
    visible = torch.ones(q_len, length, dtype=torch.bool).tril(past)[None, None]
    pages = whole_pages(visible, size)
    assert pages[0, 0, :, 0].tolist() == [(past + i + 1) // size for i in range(q_len)]
    own = visible & behind(pages, size, length)
    for i, row in enumerate(own[0, 0]):
        end = past + i + 1
        assert row.nonzero()[:, 0].tolist() == list(range(end // size * size, end))


def test_padding_behind_a_query_is_not_counted():
    visible = torch.tensor([[True, True, True, True, True, False, False, False]])
    assert int(whole_pages(visible, 2)) == 2
    assert int(whole_pages(torch.zeros_like(visible), 2)) == 0


def test_a_short_last_page_has_as_many_rows_as_there_are():
    assert to_rows(torch.tensor([1.0, 2.0]), 3, 5).tolist() == [1, 1, 1, 2, 2]


def test_rows_that_are_not_finite_are_in_no_mean():
    keys = torch.tensor([[1.0, 3.0], [float("nan"), 0.0], [0.0, float("inf")], [3.0, 5.0]])
    rows, real = finite_rows(keys)
    assert real.tolist() == [True, False, False, True]
    assert mean_row(rows, real).tolist() == [2.0, 4.0]
    assert mean_row(*finite_rows(torch.full((2, 2), float("nan")))).tolist() == [0.0, 0.0]
