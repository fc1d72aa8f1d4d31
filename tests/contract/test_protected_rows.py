"""Law 2: sinks and recents are read, exactly once, and count against the budget."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loki_attn.budget import Budget
from loki_attn.testing import layer_shape, random_rows

SHAPE = layer_shape(4, 2, 16)


@settings(max_examples=10)
@given(
    seq=st.integers(1, 90),
    sinks=st.integers(0, 6),
    recents=st.integers(0, 9),
    more=st.integers(0, 20),
    min_k=st.integers(1, 4),
)
def test_protected_rows_are_read_and_counted(sparse_case, seq, sinks, recents, more, min_k):
    top_k = max(sinks + recents + more, min_k)
    query, key, value = random_rows(SHAPE, seq, batch=2, seed=seq)
    layer = sparse_case.layer(SHAPE, top_k=top_k, sinks=sinks, recents=recents, min_k=min_k)
    _, selection = sparse_case.decode(layer, query, key, value)
    for rows in selection.indices.flatten(0, 1).tolist():
        read = [row for row in rows if row >= 0]
        assert len(set(read)) == len(read) == min(top_k, seq)
        assert set(range(min(sinks, seq))) <= set(read)
        assert set(range(max(seq - recents, 0), seq)) <= set(read)
    assert bool((selection.counts == min(top_k, seq)).all())


def test_they_are_the_visible_ones(sparse_case):
    """With padding on both sides, the first visible token is the sink."""
    visible = torch.zeros(1, 1, 1, 40, dtype=torch.bool)
    visible[..., 7:33] = True
    query, key, value = random_rows(SHAPE, 40)
    layer = sparse_case.layer(SHAPE, top_k=5, sinks=2, recents=2)
    _, selection = sparse_case.decode(layer, query, key, value, visible)
    for rows in selection.indices.flatten(0, 1).tolist():
        assert {7, 8, 31, 32} < set(rows)
        assert set(rows) <= set(range(7, 33))


@pytest.mark.parametrize("amount", [{"mass": 0.5}, {"mass": 0.5, "cap": 8}, {"fraction": 0.01}])
def test_they_come_first_whatever_the_amount(ranking_case, amount):
    if "mass" in amount and not ranking_case.select.estimates_mass:
        amount = {"top_k": 8}
    query, key, value = random_rows(SHAPE, 60)
    layer = ranking_case.layer(SHAPE, **amount, sinks=3, recents=4)
    _, selection = ranking_case.decode(layer, query, key, value)
    for rows in selection.indices.flatten(0, 1).tolist():
        assert {0, 1, 2, 56, 57, 58, 59} <= set(rows)
    if "cap" in amount:
        assert int(selection.counts.max()) <= 8


def test_every_query_protects_for_each_query(sparse_case, kernels, laws):
    """A huge key that only the protected row has: leaving it out would show in the output."""
    query, key, value = random_rows(SHAPE, 30, q_len=30)
    value[:, :, 0] = 1e4
    layer = sparse_case.layer(SHAPE, top_k=3, sinks=1, recents=1)
    out = sparse_case.every_query(layer, query, key, value)
    assert bool((out.abs().amax(-1) > 1).all())


@settings(max_examples=60)
@given(
    visible=st.integers(0, 5000),
    fraction=st.floats(1e-6, 1.0),
    top_k=st.integers(1, 600),
    min_k=st.integers(1, 40),
    dense_below=st.integers(0, 200),
)
def test_the_count_is_never_zero_nor_above_what_is_visible(
    visible, fraction, top_k, min_k, dense_below
):
    for amount in ({"fraction": fraction}, {"top_k": max(top_k, min_k)}, {}):
        budget = Budget(**amount, min_k=min_k, dense_below=dense_below)
        count = int(budget.counts(torch.tensor(visible)))
        assert min(visible, min_k) <= count <= visible
        if visible <= dense_below or not amount:
            assert count == visible
        if budget.is_dense(visible):
            assert count == visible
