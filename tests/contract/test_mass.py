"""Law 10: captured mass accounts for the output; mass budgets take the smallest set."""

import pytest
import torch

from loki_attn import attention
from loki_attn.kernels import ops
from loki_attn.testing import layer_shape, plain_attention, plain_weights, random_rows

SHAPE = layer_shape(6, 2, 32)
SEQ = 60


def parts(case, laws, seed, **amount):
    """Mass kept, and in float64 the dense output, the kept part's and the dropped part's."""
    query, key, value = (t.double() for t in random_rows(SHAPE, SEQ, batch=2, seed=seed))
    layer, call = case.layer(SHAPE, **amount), laws.call(SHAPE)
    out, selection = case.decode(layer, query, key, value)
    mask = laws.mask(selection, 6, SEQ)
    if case.corrects:  # the account is that of the rows which were read
        out = ops().attend(query, key, value, selection, call).output
    kept = (plain_weights(query, key, None, call) * mask).sum(-1, keepdim=True)
    dense = plain_attention(query, key, value, None, call)
    return kept, dense, out, plain_attention(query, key, value, ~mask, call), value


@pytest.mark.parametrize("seed", range(3))
def test_dense_is_kept_and_dropped_by_mass(sparse_case, laws, seed):
    kept, dense, out, dropped, _ = parts(sparse_case, laws, seed, top_k=9, sinks=2)
    assert bool((kept < 1).all())
    # The maps of a basis are float32, so rotated rows are right to 1e-6 only.
    torch.testing.assert_close(kept * out + (1 - kept) * dropped, dense, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_the_error_is_bounded_by_the_lost_mass(sparse_case, laws, seed):
    kept, dense, out, _, value = parts(sparse_case, laws, seed, top_k=9, sinks=2)
    error = (out - dense).norm(dim=-1, keepdim=True)
    largest = value.norm(dim=-1).amax(-1)[:, :, None, None].repeat_interleave(3, 1)
    assert bool((error <= 2 * (1 - kept) * largest + 1e-6).all())


@pytest.mark.parametrize("mass", [0.1, 0.5, 0.9, 0.99])
def test_the_smallest_set_that_reaches_the_mass(scoring_case, laws, mass):
    """Exactly, for the estimate that the case itself ranks with; forced rows come first."""
    query, key, value = random_rows(SHAPE, SEQ)
    layer, call = scoring_case.layer(SHAPE, mass=mass, sinks=1, recents=2), laws.call(SHAPE)
    _, selection = scoring_case.decode(layer, query, key, value)
    cache = scoring_case.filled(layer, key, value)
    visible = torch.ones(1, 1, 1, SEQ, dtype=torch.bool)
    scores, _, _ = attention.select(query, cache, layer, call, visible)
    weighed = scoring_case.group_reduce.startswith("softmax")
    share = scores[:, :, 0] if weighed else scores[:, :, 0].softmax(-1)
    share = (share / share.sum(-1, keepdim=True)).double()
    for row, chosen, count in zip(
        share[0], selection.indices[0], selection.counts[0].tolist(), strict=True
    ):
        picked = chosen[:count]
        free = [i for i in picked.tolist() if i not in {0, SEQ - 2, SEQ - 1}]
        reached = float(row[picked].sum())
        assert reached >= mass - 1e-6
        if free:
            assert reached - float(row[free].min()) < mass + 1e-6
            others = set(range(SEQ)) - set(picked.tolist())
            assert float(row[free].min()) >= max((float(row[i]) for i in others), default=0.0)


def test_the_cap_holds(scoring_case):
    query, key, value = random_rows(SHAPE, SEQ)
    free, _ = counts(scoring_case, query, key, value, mass=0.9)
    capped, selection = counts(scoring_case, query, key, value, mass=0.9, cap=5, sinks=2)
    assert int(free.min()) > 5
    assert bool((capped == 5).all())
    assert bool((selection.indices[..., :2] == torch.tensor([0, 1])).all())


def counts(case, query, key, value, **amount):
    _, selection = case.decode(case.layer(SHAPE, **amount), query, key, value)
    return selection.counts, selection


def test_more_rows_capture_more_mass(sparse_case, laws):
    nested = [parts(sparse_case, laws, 0, top_k=k)[0] for k in (3, 9, 27)]
    assert bool((nested[0] < nested[1]).all())
    assert bool((nested[1] < nested[2]).all())
