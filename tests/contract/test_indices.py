"""Law 7: indices are unique, ascending, in range, deterministic; ties go to the lower index."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loki_attn.testing import layer_shape, random_rows

SHAPE = layer_shape(4, 2, 16)


@settings(max_examples=10)
@given(
    seq=st.integers(1, 200),
    amount=st.sampled_from([{"top_k": 1}, {"top_k": 13}, {"fraction": 0.07}, {"fraction": 0.9}]),
)
def test_indices_are_unique_ascending_and_in_range(sparse_case, seq, amount):
    query, key, value = random_rows(SHAPE, seq, batch=2, seed=seq)
    _, selection = sparse_case.decode(sparse_case.layer(SHAPE, **amount), query, key, value)
    for rows, counts in zip(
        selection.indices.flatten(0, 1), selection.counts.flatten().tolist(), strict=True
    ):
        real, rest = rows[:counts], rows[counts:]
        assert counts >= 1
        assert bool((real.diff() > 0).all())
        assert 0 <= int(real[0]) <= int(real[-1]) < seq
        assert bool((rest == -1).all())


def test_ties_go_to_the_lower_index(ranking_case):
    """All rows alike: nothing but the tie rule decides, and what a method reads anyway."""
    query, key, value = random_rows(SHAPE, 30)
    key = key[:, :, :1].expand(-1, -1, 30, -1).contiguous()
    layer = ranking_case.layer(SHAPE, top_k=6, sinks=1, recents=2)
    _, selection = ranking_case.decode(layer, query, key, value)
    cache = ranking_case.filled(layer, key, value)
    always = layer.selector.always(cache, torch.ones(1, 1, 1, 30, dtype=torch.bool))
    anyway = [] if always is None else always.flatten(0, -2).any(0).nonzero()[:, 0].tolist()
    first = [0, 28, 29, *(row for row in anyway if row not in {0, 28, 29})]
    expected = sorted([*first, *(row for row in range(30) if row not in first)][:6])
    assert torch.equal(selection.indices, torch.tensor(expected).expand_as(selection.indices))


def test_twenty_repeats_agree(sparse_case):
    query, key, value = random_rows(SHAPE, 77, batch=2)
    layer = sparse_case.layer(SHAPE, top_k=11, sinks=1)
    out, selection = sparse_case.decode(layer, query, key, value)
    for _ in range(20):
        again, same = sparse_case.decode(layer, query, key, value)
        assert torch.equal(again, out)
        assert torch.equal(same.indices, selection.indices)


def test_order_inside_the_set_does_not_matter(sparse_case, kernels, laws):
    """U13: the output depends on the set only."""
    query, key, value = random_rows(SHAPE, 50)
    layer = sparse_case.layer(SHAPE, top_k=12)
    _, selection = sparse_case.decode(layer, query, key, value)
    backwards = type(selection)(selection.indices.flip(-1), selection.counts)
    other = kernels.attend(query, key, value, backwards, laws.call(SHAPE)).output
    # What was read, before any correction.
    sparse_case.check(other, layer, query, key, value, laws.mask(selection, 4, 50))
