"""Attention of the Triton kernels to listed rows, against float64; all other rows hold poison."""

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from native_scenes import laid_out, scenes
from native_truth import marked
from triton_scenes import (
    FEW,
    GROUPS,
    IEEE,
    check_attended,
    here,
    kernels,
    normal,
    random_selection,
    small_blocks,
    there,
    unread,
)

from loki_attn.kernels import reference
from loki_attn.types import AttentionCall, Selection

pytestmark = IEEE

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Every padding of rows: none, of keys, of values, of both, less than a block of a product.
DIMS = [(64, 64), (80, 80), (96, 128), (128, 64), (256, 256), (24, 5)]


def rows_of(dtype, group, dim, value_dim, seq=90, batch=4, kv_heads=2):
    sizes = ((batch, kv_heads * group, 1, dim), (batch, kv_heads, seq, dim))
    query, keys = (normal(*size, seed=i, dtype=dtype) for i, size in enumerate(sizes))
    return query, keys, normal(batch, kv_heads, seq, value_dim, seed=7, dtype=dtype)


def attended(query, keys, values, selection, call):
    """The result, with poison in the rows that are not listed, held to float64."""
    spoilt = [unread(rows, selection) for rows in (keys, values)]
    found = here(kernels.attend(*there((query, *spoilt, selection, call))))
    mask = marked(selection.indices, keys.shape[2], query.shape[1])
    check_attended(found.output, query, keys, values, mask, call)
    wide = [rows.double() for rows in (query, keys, values)]
    logits = reference.attend_masked(*wide, mask, call).log_sum_exp
    assert found.log_sum_exp.dtype == torch.float32
    torch.testing.assert_close(found.log_sum_exp.double(), logits, rtol=1e-5, atol=2e-5)
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "value_dim"), DIMS)
def test_rows_of_any_length(dtype, dim, value_dim):
    call = AttentionCall(scaling=dim**-0.5)
    rows = rows_of(dtype, 3, dim, value_dim)
    attended(*rows, random_selection(90, 40, 4, 2, seed=dim), call)


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "alone"])
@pytest.mark.parametrize("group", GROUPS)
def test_groups_that_share_a_list_or_do_not(group, shared):
    """One program serves a group that shares; else a program serves a query head."""
    call = AttentionCall(scaling=0.2, softcap=4.0, sink_logits=normal(group) if group < 9 else None)
    rows = rows_of(torch.bfloat16, group, 32, 32, kv_heads=1)
    with small_blocks():
        attended(*rows, random_selection(90, 40, 4, 1 if shared else group, seed=group), call)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("most", [1, 31, 32, 33, 90])
def test_splits_agree_with_one_piece(dtype, most):
    """With as many rows as fill a block, a split, and one more."""
    call = AttentionCall(scaling=0.2, sink_logits=normal(4, seed=most))
    rows = rows_of(dtype, 2, 16, 16)
    selection = random_selection(90, most, 4, 2, seed=most)
    whole = attended(*rows, selection, call)
    with small_blocks():
        parts = attended(*rows, selection, call)
    near = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(parts.output, whole.output, rtol=near, atol=near)


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("block", [32, 128])
def test_a_list_of_nothing_gives_zeros(block, sinks):
    """And a log-sum-exp of the sink logits, -inf without one; its neighbours get theirs."""
    sink_logits = torch.tensor([1.0, -80.0, 3.0, 90.0]) if sinks else None
    call = AttentionCall(scaling=0.2, sink_logits=sink_logits)
    selection = random_selection(90, 40, 2, 2, empty=True)
    with small_blocks(block):
        found = attended(*rows_of(torch.float32, 2, 16, 16, batch=2), selection, call)
    assert bool((found.output[0, :2] == 0).all())
    wanted = sink_logits[:2] if sinks else torch.full((2,), -torch.inf)
    assert torch.equal(found.log_sum_exp[0, :2, 0], wanted)


@pytest.mark.parametrize(
    ("size", "softcap"), [(1e-3, 50.0), (300.0, 2.0), (1.0, 1e-3), (30.0, 30.0)]
)
def test_soft_caps_of_small_and_large_logits(size, softcap):
    query, keys, values = rows_of(torch.float32, 2, 16, 16)
    call = AttentionCall(scaling=0.25, softcap=softcap)
    attended(query * size, keys, values, random_selection(90, 20, 4, 2), call)


def test_logits_far_apart_do_not_overflow():
    """One row of each split takes all of it, from either end of the list."""
    query = torch.ones(1, 1, 1, 16)
    keys, values = torch.zeros(1, 1, 64, 16), normal(1, 1, 64, 16)
    call = AttentionCall(scaling=1.0)
    selection = Selection(torch.arange(64).view(1, 1, 64), torch.tensor([[64]]))
    for best in (0, 63):
        keys[:] = -600.0
        keys[0, 0, best] = 600.0
        with small_blocks():
            found = here(kernels.attend(*there((query, keys, values, selection, call))))
        assert torch.equal(found.output[0, 0, 0], values[0, 0, best])
        assert float(found.log_sum_exp) == 9600.0


@FEW
@given(scene=scenes(), data=st.data())
def test_any_rows(scene, data):
    """Odd sizes in odd layouts; any rows, listed for a group or for each query head."""
    batch, kv_heads, seq, _ = scene.keys.shape
    choosers = data.draw(st.sampled_from([kv_heads, kv_heads * scene.group]))
    most, seed = data.draw(st.integers(1, seq)), data.draw(st.integers(0, 2**31))
    selection = random_selection(seq, most, batch, choosers, seed=seed, empty=seed % 2 == 0)
    query, keys, values = scene.query, scene.clean_keys, scene.clean_values
    spoilt = [
        laid_out(unread(rows, selection), data.draw(st.sampled_from(["plain", "view", "by token"])))
        for rows in (keys, values)
    ]
    with small_blocks(data.draw(st.sampled_from([32, 128]))):
        found = here(kernels.attend(*there((query, *spoilt, selection, scene.call))))
    mask = marked(selection.indices, seq, query.shape[1])
    check_attended(found.output, query, keys, values, mask, scene.call, budget=False)
    wide = [rows.double() for rows in (query, keys, values)]
    logits = reference.attend_masked(*wide, mask, scene.call).log_sum_exp
    torch.testing.assert_close(found.log_sum_exp.double(), logits, rtol=1e-5, atol=2e-5)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("spoilt", ["query", "key", "value"])
def test_a_nan_that_is_read_comes_out_however_the_list_is_cut(spoilt):
    query, keys, values = rows_of(torch.float32, 2, 32, 32, batch=1)
    {"query": query, "key": keys, "value": values}[spoilt][0, 1, -1] = float("nan")
    listed = Selection(torch.arange(90).expand(1, 2, 90).contiguous(), torch.full((1, 2), 90))
    call = AttentionCall(scaling=0.2)
    expected = reference.attend(query, keys, values, listed, call).output.isnan().any(-1)
    assert expected.any()
    assert not expected.all()
    for blocks in (nullcontext(), small_blocks()):
        with blocks:
            found = here(kernels.attend(*there((query, keys, values, listed, call))))
        assert torch.equal(found.output.isnan().any(-1), expected)
