"""Scores of the Triton kernels: those of the reference for codes, of float64 for numbers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from native_scenes import laid_out, planes
from native_truth import EPS, TINY, lead_logits
from triton_scenes import (
    FEW,
    GROUPS,
    IEEE,
    KINDS,
    here,
    kernels,
    lead_of,
    normal,
    small_blocks,
    there,
)

from loki_attn.kernels import reference
from loki_attn.types import AttentionCall

pytestmark = IEEE

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Ranks that fill no line, a line, and no power of two of them.
RANKS = {1: 5, 2: 13, 3: 32, 7: 1, 16: 40}


def check_scores(query, lead, numbers, call):
    """Exact where codes meet codes, but for a soft-cap's last places; else as float32 sums are."""
    kind = getattr(lead.plane, "kind", None)
    found = here(kernels.score(*there((query, lead.plane, lead.scales)), call))
    assert found.dtype == torch.float32
    if lead.scales is not None:
        wanted = reference.score(query, lead.plane, lead.scales, call)
        near = 8 * EPS * (call.softcap or 0.0)
        torch.testing.assert_close(found, wanted, rtol=0, atol=near)
        return
    truth = lead_logits(query, None, numbers, kind, call)
    assert found.shape == (*truth.value.shape[:2], 1, truth.value.shape[2])
    assert bool(((found[:, :, 0] - truth.value).abs() <= truth.margin + 8 * TINY).all())


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("kind", KINDS)
def test_tiles_of_every_kind_and_group(kind, group):
    rank = RANKS[group]
    lead, numbers = lead_of(normal(2, 2, 37, rank, seed=group), kind)
    query = normal(2, 2 * group, 1, rank, seed=1)
    check_scores(
        query, lead, numbers, AttentionCall(scaling=0.3, softcap=2.0 if rank % 2 else None)
    )


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_plain_rows_of_every_dtype_and_group(dtype, group):
    """The prefix of rows that are longer."""
    rank = RANKS[group]
    rows = normal(2, 2, 37, 48, seed=3, dtype=dtype)
    query = normal(2, 2 * group, 1, rank, seed=4, dtype=dtype)
    lead, numbers = lead_of(laid_out(rows, "view")[..., :rank], "rows")
    check_scores(
        query, lead, numbers, AttentionCall(scaling=0.3, softcap=None if rank % 2 else 2.0)
    )


@pytest.mark.parametrize("kind", [*KINDS, "rows"])
def test_a_query_of_another_dtype_than_the_rows(kind):
    """A float16 query keeps its own precision, whatever it meets."""
    lead, numbers = lead_of(normal(1, 2, 20, 16, dtype=torch.bfloat16).float(), kind)
    query = normal(1, 6, 1, 16, dtype=torch.float16)
    check_scores(query, lead, numbers, AttentionCall(scaling=1.0))


@pytest.mark.parametrize("kind", [*KINDS, "rows"])
@pytest.mark.parametrize("seq", [1, 32, 33, 131])
def test_blocks_and_splits_make_no_difference(kind, seq):
    """Rows before, at and behind the end of a block and of a split."""
    lead, numbers = lead_of(normal(1, 2, seq, 9, seed=seq), kind)
    query, call = normal(1, 4, 1, 9), AttentionCall(scaling=0.3)
    whole = kernels.score(*there((query, lead.plane, lead.scales)), call)
    with small_blocks():
        check_scores(query, lead, numbers, call)
        parts = kernels.score(*there((query, lead.plane, lead.scales)), call)
    assert torch.equal(whole, parts) if kind != "rows" else parts.shape == whole.shape


@pytest.mark.parametrize("softcap", [1e-3, 30.0, 1e6])
def test_soft_caps_of_small_and_large_arguments(softcap):
    """tanh from where it is its argument to where it is 1; at 0 it is 0."""
    size = torch.logspace(-6, 4, 61)
    rows = torch.cat([size, -size, torch.zeros(1)])[None, None, :, None]
    lead, _ = lead_of(rows, "fp32")
    call = AttentionCall(scaling=1.0, softcap=softcap)
    found = here(kernels.score(*there((torch.ones(1, 1, 1, 1), lead.plane, None)), call))
    truth = softcap * torch.tanh(rows[..., 0].double() / softcap)
    torch.testing.assert_close(found[:, :, 0].double(), truth, rtol=16 * EPS, atol=0)


@FEW
@given(data=st.data())
def test_scores_of_any_tiles(data):
    """Odd sizes, strange queries, planes and scales that are views with poison beside them."""
    batch, kv_heads, group = (data.draw(st.integers(1, most)) for most in (2, 2, 9))
    seq = data.draw(st.one_of(st.integers(1, 80), st.just(513)))
    plane = data.draw(planes(batch, kv_heads, seq))
    seed = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    size = data.draw(st.sampled_from([1.0, 1e-3, 1e4, 1e-40, 0.0]))
    query = torch.randn(batch, kv_heads * group, 1, plane.plane.rank, generator=seed) * size
    query = query.clamp(-6e4, 6e4).to(data.draw(st.sampled_from(DTYPES)))
    query = laid_out(query, data.draw(st.sampled_from(["plain", "view"])))
    call = AttentionCall(scaling=0.3, softcap=data.draw(st.sampled_from([None, None, 2.0])))
    kind = plane.plane.kind
    found = here(kernels.score(*there((query, plane.plane, plane.scales)), call))
    if plane.scales is not None:
        wanted = reference.score(query, plane.plane, plane.scales, call)
        near = 8 * EPS * (call.softcap or 0.0)
        torch.testing.assert_close(found, wanted, rtol=0, atol=near)
        return
    truth = lead_logits(query, None, plane.numbers, kind, call)
    assert bool(((found[:, :, 0] - truth.value).abs() <= truth.margin + 8 * TINY).all())


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("junk", [float("nan"), float("inf")])
def test_a_query_that_is_no_number_scores_nothing(kind, junk):
    """And leaves the other heads alone, whose soft-max weights would else be lost with it."""
    query = torch.ones(1, 2, 1, 5)
    query[0, 1, 0, 3] = junk
    lead, _ = lead_of(torch.ones(1, 1, 20, 5), kind)
    call = AttentionCall(scaling=1.0)
    scores = here(kernels.score(*there((query, lead.plane, lead.scales)), call))
    assert bool(torch.isfinite(scores[:, 0]).all())
    assert not bool(torch.isfinite(scores[:, 1]).any())
