"""`column_sums` of the Triton kernels, against float64 and the reference."""

import math
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from column_scenes import Columns, bound, columns, gathered, plain, weights
from hypothesis import given
from native_scenes import laid_out
from triton_scenes import FEW, IEEE, here, kernels, normal, there

from loki_attn.errors import LokiAttnError
from loki_attn.kernels import backends, ops, reference
from loki_attn.kernels.triton import tuning
from loki_attn.kernels.triton.tuning import Pane
from loki_attn.testing import assert_within_budget
from loki_attn.types import AttentionCall

pytestmark = [IEEE, pytest.mark.usefixtures("quick_interpreter")]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CALL = AttentionCall(scaling=0.2)


@contextmanager
def panes(queries=16, rows=32, warps=1):
    """Blocks so small that a few queries and rows make several, and splits of them."""
    pane = Pane(queries, rows, warps, stages=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "query_pane", lambda *_, **__: pane)
        patch.setattr(tuning, "row_pane", lambda *_, **__: pane)
        yield


def scene_of(batch, kv_heads, group, q_len, seq, *, dtype=torch.float32, dim=40, **more):
    query = normal(batch, kv_heads * group, q_len, dim, seed=q_len, dtype=dtype)
    keys = normal(batch, kv_heads, seq, dim, seed=seq, dtype=dtype)
    scene = Columns(query, keys, None, CALL, None, None, "sum", query, keys, None)
    return replace(scene, clean_bias=more.get("bias"), **more)


def received(scene):
    """What the kernels say that every row receives."""
    return here(there(scene).by(kernels.column_sums))


def check(scene):
    """Each number within the error of float32 logits; rows that nobody sees get nothing."""
    result = received(scene)
    truth = gathered(scene, weights(scene))
    unseen = ~scene.seen[:, :, scene.query.shape[2] - scene.counted :].any(2)
    assert result.dtype == torch.float32
    assert result.shape == truth.shape
    assert bool(((result - truth).abs() <= bound(scene)).all()), scene
    assert bool((result.masked_fill(~unseen, 0.0) == 0).all())
    return result


@FEW
@given(scene=columns(longest=130))
def test_what_every_row_receives(scene):
    """Of any dtype, layout, mask, window, bias, soft-max; hidden rows and queries hold poison."""
    with panes():
        check(scene)


@FEW
@given(scene=columns(longest=130))
def test_what_every_row_receives_in_blocks_of_real_size(scene):
    check(scene)


@pytest.mark.parametrize("dim", [1, 5, 64, 80, 96, 128, 200, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_any_length(dtype, dim):
    check(scene_of(1, 2, 2, 20, 37, dtype=dtype, dim=dim))


@pytest.mark.parametrize(("how", "q_len"), [("sum", 1), ("sum", 80), ("max", 150)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_error_is_within_budget(dtype, q_len, how):
    """Large samples: a part of a block of queries, one and several."""
    scene = scene_of(2, 1, 2, q_len, 270, dtype=dtype, how=how)
    truth = gathered(scene, weights(scene))
    assert_within_budget(received(scene), plain(scene, truth), truth)


@pytest.mark.parametrize("window", [None, 1, 17, 33])
@pytest.mark.parametrize(
    ("q_len", "seq"), [(1, 1), (16, 32), (16, 33), (17, 33), (33, 33), (40, 131)]
)
def test_the_diagonal_may_lie_anywhere_in_a_block(q_len, seq, window):
    with panes():
        check(scene_of(1, 1, 1, q_len, seq, dim=3, window=window))


def test_each_query_gives_one_in_all():
    """Columns sum to the queries that count; a sink takes its share away."""
    scene = scene_of(1, 2, 3, 40, 70, window=9)
    total = received(scene).sum(-1)
    torch.testing.assert_close(total, torch.full_like(total, 9.0))
    sinks = AttentionCall(scaling=0.2, sink_logits=torch.zeros(6))
    assert bool((received(replace(scene, call=sinks)).sum(-1) < 8.99).all())


@pytest.mark.parametrize("q_len", [3, 40])
def test_blocks_and_splits_change_nothing_but_rounding(q_len):
    """One query's rows are cut into splits that meet again, its sink counted once."""
    call = AttentionCall(scaling=0.2, sink_logits=torch.tensor([3.0, -1.0]))
    scene = scene_of(1, 1, 2, q_len, 300, call=call)
    whole = received(scene)
    with panes():
        torch.testing.assert_close(check(scene), whole)
    with panes(queries=64, rows=16, warps=4):
        torch.testing.assert_close(check(scene), whole)


@pytest.mark.parametrize("how", ["sum", "max"])
def test_runs_repeat_bit_by_bit(how):
    scene = scene_of(1, 2, 2, 40, 100, how=how, dim=16)
    with panes():
        assert torch.equal(received(scene), received(scene))


def test_queries_before_the_window_are_not_read():
    scene = scene_of(1, 1, 2, 40, 50, window=3)
    query = scene.query.clone()
    query[:, :, :37] = math.nan
    assert torch.equal(received(replace(scene, query=query)), received(scene))


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 3), (2, 3)])
@pytest.mark.parametrize("layout", ["plain", "view", "mirrored"])
def test_masks_shared_by_batch_rows_and_heads(shape, layout):
    """Their elements may lie anywhere, the rows of a query apart."""
    seen = normal(*shape, 20, 45, seed=3) < 0.3
    visible = seen.mT.contiguous().mT if layout == "mirrored" else laid_out(seen, layout)
    with panes():
        check(scene_of(2, 3, 2, 20, 45, dim=8, visible=visible))


@pytest.mark.parametrize("sinks", [None, torch.tensor([1.0, 2.0])])
@pytest.mark.parametrize("how", ["sum", "max"])
def test_a_query_that_sees_nothing_adds_nothing(how, sinks):
    visible = torch.ones(1, 1, 20, 45, dtype=torch.bool)
    visible[:, :, 4:9] = False
    call = AttentionCall(scaling=0.2, sink_logits=sinks)
    scene = scene_of(1, 1, 2, 20, 45, visible=visible, call=call, how=how)
    check(scene)
    hidden = received(replace(scene, visible=torch.zeros_like(visible)))
    assert bool((hidden == 0).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bias_adds_to_the_logits(dtype):
    """In its own dtype; minus infinity hides a row, and all rows of a head."""
    bias = normal(1, 2, 45, seed=5, dtype=dtype)
    bias[:, :, 7] = -math.inf
    bias[:, 1] = -math.inf
    scene = scene_of(1, 2, 2, 20, 45, bias=bias)
    result = received(scene)
    assert bool((result[:, :, 7] == 0).all())
    assert bool((result[:, 2:] == 0).all())
    torch.testing.assert_close(result, scene.by(reference.column_sums))


@pytest.mark.parametrize("how", ["sum", "max"])
@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf])
def test_a_query_that_is_no_number_spoils_its_own_head_alone(junk, how):
    """And there the rows that it sees."""
    scene = scene_of(1, 2, 2, 9, 60, how=how)
    clean = scene.by(reference.column_sums)
    query = scene.query.clone()
    query[0, 2, 4, 3] = junk
    spoilt = received(replace(scene, query=query))
    others = [0, 1, 3]
    torch.testing.assert_close(spoilt[:, others], clean[:, others])
    assert bool(torch.isnan(spoilt[0, 2, :56]).all())
    assert bool(torch.isfinite(spoilt[0, 2, 56:]).all())


# The door -----------------------------------------------------------------------------------------

BATCH, KV_HEADS, HEADS, QUERIES, SEQ, DIM = 2, 2, 4, 3, 20, 8
QUERY, KEYS = normal(BATCH, HEADS, QUERIES, DIM), normal(BATCH, KV_HEADS, SEQ, DIM)
EVERY = torch.ones(BATCH, KV_HEADS, QUERIES, SEQ, dtype=torch.bool)
FAR = torch.ones(2, 1 << 24, dtype=torch.bool)[None, None, :, :SEQ]
REFUSED = {
    "float64": {"query": QUERY.double(), "keys": KEYS.double()},
    "keys of another dtype": {"keys": KEYS.half()},
    "meta keys": {"keys": KEYS.to("meta")},
    "a gradient": {"query": QUERY.clone().requires_grad_()},
    "a query that is no row": {"query": normal(BATCH, HEADS, QUERIES, 2 * DIM)[..., ::2]},
    "heads that cannot share": {"query": QUERY[:, :3]},
    "a narrow query": {"query": QUERY[..., :4]},
    "a query of one batch row": {"query": QUERY[:1]},
    "a flat query": {"query": QUERY[0]},
    "no queries": {"query": QUERY[:, :, :0]},
    "long rows": {"query": normal(1, 2, 1, 257), "keys": normal(1, 2, 9, 257)},
    "more queries than rows": {"keys": KEYS[:, :, :2]},
    "no window": {"window": 0},
    "a negative window": {"window": -1},
    "another reduction": {"how": "mean"},
    "a mask of numbers": {"visible": EVERY.float()},
    "a mask of other rows": {"visible": EVERY[..., 1:]},
    "a mask of other queries": {"visible": EVERY[:, :, :1]},
    "a mask per query head": {
        "visible": torch.ones(BATCH, HEADS, QUERIES, SEQ, dtype=torch.bool),
    },
    "a flat mask": {"visible": EVERY[0, 0]},
    "a mask of far elements": {"query": QUERY[:, :, :2], "visible": FAR},
    "a meta mask": {"visible": EVERY.to("meta")},
    "a bias of one head": {"bias": torch.zeros(BATCH, 1, SEQ)},
    "a bias in float64": {"bias": torch.zeros(BATCH, KV_HEADS, SEQ).double()},
    "a meta bias": {"bias": torch.zeros(BATCH, KV_HEADS, SEQ, device="meta")},
    "sinks of other heads": {"call": AttentionCall(scaling=0.2, sink_logits=torch.zeros(3))},
}  # fmt: skip


def is_meta(value):
    """Whether this cannot be moved to a device."""
    return isinstance(value, torch.Tensor) and value.is_meta


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_served_is_refused_before_anything_is_done(monkeypatch, case):
    """Asked for by name, it is an error that says why."""
    for kernel in ("sum_queries", "settle_sums", "sum_columns"):
        monkeypatch.setattr(kernels.columns, kernel, None)  # nothing may be launched
    args = {"query": QUERY, "keys": KEYS, "visible": None, "call": CALL, **REFUSED[case]}
    args = {name: value if is_meta(value) else there(value) for name, value in args.items()}
    with pytest.raises(backends.Unserved) as why:
        kernels.column_sums(**args)
    first = (args.pop("query"), args.pop("keys"), args.pop("visible"), args.pop("call"))
    with pytest.raises(LokiAttnError) as refused:
        ops("triton").column_sums(*first, **args)
    assert str(refused.value) == (
        f"Backend 'triton' was asked for, and cannot run 'column_sums' here because {why.value}; "
        "drop the request to let plain torch serve it."
    )


def test_several_queries_come_to_the_kernels():
    """Ops of one query token go to plain torch with more; this does not."""
    scene = scene_of(1, 2, 2, 5, 20, window=4)
    found = here(there(scene).by(ops("triton").column_sums))
    assert torch.equal(found, received(scene))
