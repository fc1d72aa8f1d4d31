"""What stands in for kernels while a graph is traced or captured: the same rows, and result."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loki_attn.kernels import ops
from loki_attn.traceable import attend_rows, best_rows, dense
from loki_attn.types import AttentionCall, Selection


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("sinks", [False, True])
def test_dense_in_the_open_is_dense(softcap, sinks):
    torch.manual_seed(0)
    call = AttentionCall(
        scaling=0.25, softcap=softcap, sink_logits=torch.randn(4) if sinks else None
    )
    query, keys, values = (
        torch.randn(2, 4, 5, 16), torch.randn(2, 2, 9, 16), torch.randn(2, 2, 9, 24)
    )  # fmt: skip
    visible = torch.rand(2, 1, 5, 9) < 0.6
    visible[0, 0, 2] = False  # a query of padding sees nothing
    expected = ops().dense(query, keys, values, visible, call, causal=True)
    torch.testing.assert_close(dense(query, keys, values, visible, call), expected)
    keys, values = keys[:, :, :5], values[:, :, :5]
    expected = ops().dense(query, keys, values, None, call, causal=True)
    torch.testing.assert_close(dense(query, keys, values, None, call), expected)


@given(
    seq=st.integers(1, 40),
    seed=st.integers(0, 2**31),
    tied=st.booleans(),
    sinks=st.integers(0, 3),
    recents=st.integers(0, 3),
)
def test_the_best_rows_are_those_that_are_chosen(seq, seed, tied, sinks, recents):
    """With ties, NaN and infinities, masks with holes, and a batch row that sees nothing."""
    draw = torch.Generator().manual_seed(seed)
    scores = torch.randn(3, 2, 1, seq, generator=draw)
    scores = scores.round() if tied else scores
    scores[0, 0, 0, 0], scores[1, 1, 0, -1] = float("nan"), float("inf")
    visible = torch.rand(3, 1, 1, seq, generator=draw) < 0.7
    visible[2] = False
    forced = ops("reference").protect(visible, sinks, recents)
    shown = visible.sum(-1)[:, 0, 0]
    counts = torch.minimum(shown, torch.tensor([1 + seed % seq]))
    most = max(int(counts.max()), 1)
    chosen = ops("reference").choose(scores, counts[:, None, None], visible, forced)
    found = best_rows(scores[:, :, 0], counts, visible[:, :, 0], forced[:, :, 0], most)
    assert found.shape == (3, 2, most)
    assert torch.equal((found >= 0).sum(-1), chosen.counts)
    last = torch.where(found < 0, seq, found).sort(-1).values
    assert torch.equal(last.masked_fill(last == seq, -1), chosen.indices)


@pytest.mark.parametrize("choosers", [2, 4])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_attention_to_named_rows_in_any_order(choosers, softcap):
    torch.manual_seed(0)
    call = AttentionCall(scaling=0.25, softcap=softcap, sink_logits=torch.randn(4))
    query, keys, values = (
        torch.randn(3, 4, 1, 16),
        torch.randn(3, 2, 9, 16),
        torch.randn(3, 2, 9, 8),
    )
    indices = torch.stack([torch.randperm(9)[:5] for _ in range(3 * choosers)])
    indices = indices.view(3, choosers, 5)
    counts = torch.tensor([5, 2, 0]).expand(choosers, 3).T.contiguous()
    indices = indices.masked_fill(torch.arange(5) >= counts[..., None], -1)
    ordered = torch.where(indices < 0, 9, indices).sort(-1).values
    listed = Selection(ordered.masked_fill(ordered == 9, -1), counts)
    expected = ops("reference").attend(query, keys, values, listed, call).output
    torch.testing.assert_close(attend_rows(query, keys, values, indices, call), expected)
