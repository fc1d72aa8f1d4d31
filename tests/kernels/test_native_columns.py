"""`column_sums` and `hamming` in C++, against float64 and the reference."""

import importlib
from dataclasses import replace

import pytest
import torch
from column_scenes import Columns, bound, columns, gathered, plain, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from native_calls import BAD_DTYPE, BAD_SIZE, NULL_POINTER, OK, pack, rows
from native_scenes import each_isa, laid_out

from loki_attn.errors import LokiAttnError
from loki_attn.kernels import backends, native, ops, reference
from loki_attn.testing import assert_within_budget
from loki_attn.types import AttentionCall

pytestmark = pytest.mark.usefixtures("native_library")

LIBRARY = importlib.import_module("loki_attn.kernels.native.library")
CALL = AttentionCall(scaling=0.2)
GUARD = 64


@settings(max_examples=40)
@given(scene=columns())
def test_what_every_row_receives(tally, scene):
    """Each number within the error of float32 logits; rows that nobody sees get nothing."""
    truth, near = gathered(scene, weights(scene)), bound(scene)
    unseen = ~scene.seen[:, :, scene.query.shape[2] - scene.counted :].any(2)
    for isa in each_isa():
        result = scene.by(native.column_sums)
        assert result.dtype == torch.float32
        assert bool(((result - truth).abs() <= near).all()), isa
        assert bool((result.masked_fill(~unseen, 0.0) == 0).all())
        tally[f"column_sums on {isa}"] += 1


@pytest.mark.parametrize("how", ["sum", "max"])
@pytest.mark.parametrize("q_len", [1, 40, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_error_is_within_budget(dtype, q_len, how):
    """Large samples, several waves of queries and chunks of keys."""
    scene = _scene(2, 2, 3, q_len, 1300, dtype=dtype, how=how)
    truth = gathered(scene, weights(scene))
    honest = plain(scene, truth)
    for _ in each_isa():
        assert_within_budget(scene.by(native.column_sums), honest, truth)


def _scene(batch, kv_heads, group, q_len, seq, *, dtype=torch.float32, dim=40, **more):
    seed = torch.Generator().manual_seed(q_len + seq)
    query = torch.randn(batch, kv_heads * group, q_len, dim, generator=seed).to(dtype)
    keys = torch.randn(batch, kv_heads, seq, dim, generator=seed).to(dtype)
    given_ = {"visible": None, "window": None, "bias": None, "how": "sum", **more}
    return Columns(
        query, keys, given_["visible"], CALL, given_["window"], given_["bias"], given_["how"],
        query, keys, given_["bias"],
    )  # fmt: skip


# Batch, KV heads, group, queries, rows: one wave, many waves of all heads, waves of a few heads.
SIZES = [(1, 1, 1, 1, 40), (2, 2, 3, 7, 700), (1, 3, 3, 400, 900), (1, 3, 8, 40, 4500)]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_threads_change_no_bit(native_library, sizes, masked):
    batch, kv_heads, _, q_len, seq = sizes
    visible = None
    if masked:
        seed = torch.Generator().manual_seed(1)
        visible = torch.rand(batch, kv_heads, q_len, seq, generator=seed) < 0.7
    scenes = [_scene(*sizes, dim=24, visible=visible, how=how) for how in ("sum", "max")]
    query, codes = (torch.arange(48 * n).view(4, 2, n, 6).to(torch.int32) for n in (1, seq))
    before = torch.get_num_threads()
    try:
        results = {}
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results[threads] = [scene.by(native.column_sums) for scene in scenes]
            results[threads].append(native.hamming(query, codes))
            assert native_library.loki_threads() == threads
        native_library.loki_borrow_pool(None)
        results["its own pool"] = [scene.by(native.column_sums) for scene in scenes]
    finally:
        torch.set_num_threads(before)
        native_library.loki_borrow_pool(LIBRARY._torch_pool())
    for found in results.values():
        assert all(map(torch.equal, found, results[1]))


@pytest.mark.parametrize("junk", [float("nan"), float("inf"), -float("inf")])
def test_a_query_that_is_no_number_spoils_its_own_head_alone(junk):
    scene = _scene(1, 2, 2, 9, 600)
    clean = scene.by(reference.column_sums)
    query = scene.query.clone()
    query[0, 2, 4, 3] = junk
    for _ in each_isa():
        spoilt = replace(scene, query=query).by(native.column_sums)
        others = [0, 1, 3]
        torch.testing.assert_close(spoilt[:, others], clean[:, others])
        assert bool(torch.isnan(spoilt[0, 2, :595]).all())


@given(
    sizes=st.tuples(*(st.integers(1, n) for n in (2, 3, 4, 3))),
    seq=st.one_of(st.integers(1, 40), st.sampled_from([512, 519, 1030])),
    count=st.sampled_from([1, 2, 3, 4, 4, 4, 5, 8, 33]),
    layout=st.sampled_from(["plain", "view"]),
    seed=st.integers(0, 2**31),
)
def test_hamming_is_that_of_the_reference(tally, sizes, seq, count, layout, seed):
    batch, kv_heads, group, q_len = sizes
    draw = torch.Generator().manual_seed(seed)

    def words(*shape):
        return torch.randint(-(2**31), 2**31, shape, generator=draw).to(torch.int32)

    query, codes = words(batch, kv_heads * group, q_len, count), words(batch, kv_heads, seq, count)
    wanted = reference.hamming(query, codes)
    if layout == "view":  # laid_out fills with NaN, which words have not
        query, codes = (
            laid_out(t.view(torch.float32), layout).view(torch.int32) for t in (query, codes)
        )
    for isa in each_isa():
        assert torch.equal(native.hamming(query, codes), wanted)
        tally[f"hamming on {isa}"] += 1


# The door -----------------------------------------------------------------------------------------

BATCH, KV_HEADS, HEADS, QUERIES, SEQ, DIM, WORDS = 2, 2, 4, 3, 20, 8, 3
QUERY, KEYS = torch.randn(BATCH, HEADS, QUERIES, DIM), torch.randn(BATCH, KV_HEADS, SEQ, DIM)
ASKED = torch.ones(BATCH, HEADS, QUERIES, WORDS, dtype=torch.int32)
CODES = torch.zeros(BATCH, KV_HEADS, SEQ, WORDS, dtype=torch.int32)
EVERY = torch.ones(BATCH, KV_HEADS, QUERIES, SEQ, dtype=torch.bool)
REFUSED = {
    "float64": ("column_sums", {"query": QUERY.double()}),
    "keys in float64": ("column_sums", {"keys": KEYS.double()}),
    "meta keys": ("column_sums", {"keys": KEYS.to("meta")}),
    "a gradient": ("column_sums", {"query": QUERY.clone().requires_grad_()}),
    "a query that is no row": ("column_sums", {"query": torch.randn(2, 4, 3, 16)[..., ::2]}),
    "heads that cannot share": ("column_sums", {"query": QUERY[:, :3]}),
    "a narrow query": ("column_sums", {"query": QUERY[..., :4]}),
    "more queries than rows": ("column_sums", {"keys": KEYS[:, :, :2]}),
    "no window": ("column_sums", {"window": 0}),
    "a negative window": ("column_sums", {"window": -1}),
    "another reduction": ("column_sums", {"how": "mean"}),
    "a mask of numbers": ("column_sums", {"visible": EVERY.float()}),
    "a mask of other rows": ("column_sums", {"visible": EVERY[..., 1:]}),
    "a mask per query head": (
        "column_sums",
        {"visible": torch.ones(BATCH, HEADS, QUERIES, SEQ, dtype=torch.bool)},
    ),
    "a flat mask": ("column_sums", {"visible": EVERY[0, 0]}),
    "a meta mask": ("column_sums", {"visible": EVERY.to("meta")}),
    "a bias of one head": ("column_sums", {"bias": torch.zeros(BATCH, 1, SEQ)}),
    "a bias in float64": ("column_sums", {"bias": torch.zeros(BATCH, KV_HEADS, SEQ).double()}),
    "a meta bias": ("column_sums", {"bias": torch.zeros(BATCH, KV_HEADS, SEQ, device="meta")}),
    "codes of 64 bits": ("hamming", {"codes": CODES.long()}),
    "meta codes": ("hamming", {"codes": CODES.to("meta")}),
    "codes of other words": ("hamming", {"codes": CODES[..., :2]}),
    "scattered codes": ("hamming", {"codes": CODES.mT.contiguous().mT}),
    "codes of heads that cannot share": ("hamming", {"query_codes": ASKED[:, :3]}),
}  # fmt: skip


def served(op, changed=()):
    if op == "hamming":
        return {"query_codes": ASKED, "codes": CODES, **dict(changed)}
    return {"query": QUERY, "keys": KEYS, "visible": None, "call": CALL, **dict(changed)}


def routed(op, args):
    """Tensors by place, as callers of the ops give them."""
    first = [args.pop(name) for name in list(args) if name not in {"window", "bias", "how"}]
    return (*first,), args


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_served_is_refused_before_anything_is_read(case):
    """Asked for by name, it is an error that says why."""
    op, changed = REFUSED[case]
    assert getattr(native, op)(**served(op)) is not None
    with pytest.raises(backends.Unserved) as why:
        getattr(native, op)(**served(op, changed))
    first, more = routed(op, served(op, changed))
    with pytest.raises(LokiAttnError) as refused:
        getattr(ops("native"), op)(*first, **more)
    assert str(refused.value) == (
        f"Backend 'native' was asked for, and cannot run {op!r} here because {why.value}; drop the "
        "request to let plain torch serve it."
    )


def test_several_queries_come_to_the_kernels(monkeypatch):
    """Ops of one query token go to plain torch with more; these do not."""
    asked = []
    monkeypatch.setattr(native, "column_sums", lambda *_, **__: asked.append("column_sums"))
    monkeypatch.setattr(native, "hamming", lambda *_, **__: asked.append("hamming"))
    ops.cache_clear()
    try:
        ops("native").column_sums(QUERY, KEYS, None, CALL)
        ops("native").hamming(ASKED, CODES)
    finally:
        monkeypatch.undo()
        ops.cache_clear()
    assert asked == ["column_sums", "hamming"]


def _column_fields(out):
    size, step = QUERY.element_size(), QUERY.stride()
    return {
        "batch": BATCH, "kv_heads": KV_HEADS, "group": 2, "seq": SEQ, "q_len": QUERIES, "window": 2,
        **rows("keys", KEYS), "query": QUERY, "query_batch_stride": step[0] * size,
        "query_head_stride": step[1] * size, "query_row_stride": step[2] * size, "scaling": 0.2,
        "out": out,
    }  # fmt: skip


def _hamming_fields(out):
    fields = {
        "batch": BATCH, "kv_heads": KV_HEADS, "group": 2, "seq": SEQ, "q_len": QUERIES,
        "words": WORDS, "query": ASKED, "codes": CODES, "out": out,
    }  # fmt: skip
    for name, codes in (("query", ASKED), ("codes", CODES)):
        for place, step in zip(("batch", "head", "row"), codes.stride(), strict=False):
            fields[f"{name}_{place}_stride"] = step * 4
    return fields


CALLS = {
    "column_sums": ("loki_column_call", _column_fields, (BATCH, HEADS, SEQ)),
    "hamming": ("loki_hamming_call", _hamming_fields, (BATCH, HEADS, QUERIES, SEQ)),
}
SIZES_OUT_OF_RANGE = [
    (name, value, BAD_SIZE)
    for name, value in [
        ("batch", 0), ("kv_heads", 0), ("group", -1), ("seq", 0), ("seq", 2**31), ("q_len", 0),
        ("q_len", 2**31),
    ]
]  # fmt: skip
WRONG = [
    *(("column_sums", *wrong) for wrong in SIZES_OUT_OF_RANGE),
    *(("hamming", *wrong) for wrong in SIZES_OUT_OF_RANGE),
    ("column_sums", "window", 0, BAD_SIZE), ("column_sums", "window", 4, BAD_SIZE),
    ("column_sums", "q_len", SEQ + 1, BAD_SIZE), ("column_sums", "keys.data", 0, NULL_POINTER),
    ("column_sums", "keys.dtype", 3, BAD_DTYPE), ("column_sums", "keys.dim", 0, BAD_SIZE),
    ("column_sums", "keys.dim", 1025, BAD_SIZE), ("column_sums", "query", 0, NULL_POINTER),
    ("column_sums", "query_dtype", 3, BAD_DTYPE), ("column_sums", "out", 0, NULL_POINTER),
    ("hamming", "words", 0, BAD_SIZE), ("hamming", "words", 2**20, BAD_SIZE),
    ("hamming", "query", 0, NULL_POINTER), ("hamming", "codes", 0, NULL_POINTER),
    ("hamming", "out", 0, NULL_POINTER),
]  # fmt: skip


@pytest.mark.parametrize(("op", "field", "value", "status"), WRONG)
def test_a_wrong_field_has_a_status_and_writes_nothing(native_library, op, field, value, status):
    struct, fields_of, shape = CALLS[op]
    out = torch.full(shape, -7.0)
    fields = fields_of(out)
    run = getattr(native_library, f"loki_{op}")
    assert run(pack(struct, fields | {field: value})) == status
    assert bool((out == -7).all())
    assert run(pack(struct, fields)) == OK
    assert not bool((out == -7).any())


@pytest.mark.parametrize("op", CALLS)
def test_nothing_is_written_beside_the_result(native_library, op):
    struct, fields_of, shape = CALLS[op]
    size = torch.Size(shape).numel()
    for _ in each_isa():
        around = torch.full((size + 2 * GUARD,), -7.0)
        out = around[GUARD : GUARD + size]
        assert getattr(native_library, f"loki_{op}")(pack(struct, fields_of(out))) == OK
        assert not bool((out == -7).any())
        assert bool((around[:GUARD] == -7).all())
        assert bool((around[GUARD + size :] == -7).all())
