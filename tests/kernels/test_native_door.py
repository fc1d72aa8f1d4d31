"""The door of the native kernels: what they do not serve is refused or goes to plain torch."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from loki_attn.errors import InputError, LokiAttnError
from loki_attn.kernels import backends, native, ops, reference
from loki_attn.kernels.backends import Unserved
from loki_attn.kernels.native import place
from loki_attn.testing import layer_shape, random_rows
from loki_attn.tiles import Tiles, pack
from loki_attn.types import AppendRequest, AttentionCall, Lead, Reading, Selection

CALL = AttentionCall(scaling=0.2)
BATCH, KV_HEADS, HEADS, SEQ, DIM, VALUE_DIM, RANK = 2, 2, 4, 20, 8, 6, 3


def test_the_library_is_there_where_it_can_be_built():
    """Without it all native tests are skipped: where there is a compiler, that is a failure."""
    compilers = [name for name in ("c++", "g++", "clang++") if shutil.which(name)]
    assert place.find_library() is not None or not compilers, place.why_missing()


# Tensors ------------------------------------------------------------------------------------------


def rows(dim=DIM, seq=SEQ, heads=KV_HEADS, batch=BATCH):
    return torch.randn(batch, heads, seq, dim)


def marks(*shape):
    return torch.ones(*shape, dtype=torch.bool)


def selection(*shape):
    count = torch.full(shape[:2], shape[2])
    return Selection(torch.arange(shape[2]).expand(shape).contiguous(), count)


QUERY, KEYS, VALUES = rows(heads=HEADS, seq=1), rows(), rows(VALUE_DIM)
CODES = pack(torch.ones(BATCH, KV_HEADS, SEQ, RANK), "int8")
SCALES = torch.ones(BATCH, KV_HEADS, SEQ, dtype=torch.float16)
MAP = torch.randn(KV_HEADS, DIM, RANK)
EVERY = marks(BATCH, 1, 1, SEQ)
SCORES = torch.randn(BATCH, KV_HEADS, 1, SEQ)
COUNTS = torch.full((BATCH, KV_HEADS, 1), 5)
SINKS = torch.zeros(HEADS)

# Arguments that are served, by op; a case replaces one of them.
SERVED = {
    "dense": (QUERY, KEYS, VALUES, None, CALL),
    "attend": (QUERY, KEYS, VALUES, selection(BATCH, KV_HEADS, 5), CALL),
    "score": (QUERY[..., :RANK], CODES, SCALES, CALL),
    "choose": (SCORES, COUNTS, EVERY, EVERY),
    "mass_counts": (SCORES.softmax(-1), EVERY, 0.5),
    "step": (
        QUERY, QUERY, KEYS, VALUES, Lead(CODES, SCALES, MAP), Reading(counts=5), "max", CALL, None,
    ),
}  # fmt: skip
REFUSED = {
    "float64": ("dense", 0, QUERY.double()),
    "keys in float64": ("dense", 1, KEYS.double()),
    "values of integers": ("dense", 2, VALUES.int()),
    "meta query": ("dense", 0, QUERY.to("meta")),
    "meta keys": ("dense", 1, KEYS.to("meta")),
    "too large head_dim": ("dense", 1, rows(1025)),
    "rows that are no rows": ("dense", 1, rows(SEQ, seq=DIM).mT),
    "a query that is no row": ("dense", 0, torch.randn(BATCH, HEADS, 1, 2 * DIM)[..., ::2]),
    "two query tokens": ("dense", 0, rows(heads=HEADS, seq=2)),
    "a narrow query": ("dense", 0, QUERY[..., :4]),
    "a query of another batch": ("dense", 0, QUERY[:1]),
    "heads that cannot share": ("dense", 0, QUERY[:, :3]),
    "fewer values": ("dense", 2, VALUES[:, :, :10]),
    "values of fewer heads": ("dense", 2, VALUES[:, :1]),
    "a short mask": ("dense", 3, EVERY[..., :10]),
    "a mask per head": ("dense", 3, marks(BATCH, HEADS, 1, SEQ)),
    "a mask of numbers": ("dense", 3, EVERY.float()),
    "a meta mask": ("dense", 3, EVERY.to("meta")),
    "too few sink logits": ("dense", 4, replace(CALL, sink_logits=SINKS[:1])),
    "meta sink logits": ("dense", 4, replace(CALL, sink_logits=SINKS.to("meta"))),
    "indices of another batch": ("attend", 3, selection(1, KV_HEADS, 5)),
    "indices of other heads": ("attend", 3, selection(BATCH, 3, 5)),
    "counts of one head": ("attend", 3, replace(selection(BATCH, 2, 5), counts=COUNTS[:, :1, 0])),
    "scores of another rank": ("score", 0, QUERY[..., :5]),
    "tiles of another batch": ("score", 1, pack(torch.ones(3, KV_HEADS, SEQ, RANK), "int8")),
    "too few tiles": ("score", 1, Tiles(CODES.data[:, :, :1], "int8", RANK, SEQ)),
    "scattered tiles": ("score", 1, Tiles(CODES.data.transpose(3, 4), "int8", RANK, SEQ)),
    "fewer scales": ("score", 2, SCALES[..., :10]),
    "float32 scales": ("score", 2, SCALES.float()),
    "meta scales": ("score", 2, SCALES.to("meta")),
    "float64 scores": ("choose", 0, SCORES.double()),
    "a visible that is no mask": ("choose", 2, EVERY.int()),
    "a meta visible": ("choose", 2, EVERY.to("meta")),
    "a forced that is no mask": ("mass_counts", 1, EVERY.int()),
    "a plane of fewer rows": ("step", 4, Lead(KEYS[:, :, :10], None, None)),
    "a plane beyond the query": ("step", 4, Lead(rows(DIM + 1), None, None)),
    "a map of fewer heads": ("step", 4, Lead(CODES, SCALES, MAP[:1])),
    "a map of another width": ("step", 4, Lead(CODES, SCALES, MAP[:, :4])),
    "a map in float64": ("step", 4, Lead(CODES, SCALES, MAP.double())),
    "a map that is not contiguous": ("step", 4, Lead(CODES, SCALES, MAP.mT.contiguous().mT)),
    "a ranking query of another width": ("step", 0, QUERY[..., :4]),
    "float64 to a step": ("step", 1, QUERY.double()),
}  # fmt: skip


def arguments(op, place_of=None, value=None):
    args = list(SERVED[op])
    if place_of is not None:
        args[place_of] = value
    return args, ({"causal": True} if op == "dense" else {})


@pytest.mark.parametrize("op", SERVED)
@pytest.mark.usefixtures("native_library")
def test_what_the_cases_start_from_is_served(op):
    args, more = arguments(op)
    assert getattr(native, op)(*args, **more) is not None


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.usefixtures("native_library")
def test_what_is_not_served_is_refused_before_anything_is_read(case):
    """Asked for by name, it is an error that says why; by default, plain torch gets it."""
    op, place_of, value = REFUSED[case]
    args, more = arguments(op, place_of, value)
    with pytest.raises(Unserved) as why:
        getattr(native, op)(*args, **more)
    if op == "step" or args[0].shape[2] != 1:
        return
    with pytest.raises(LokiAttnError) as refused:
        getattr(ops("native"), op)(*args, **more)
    assert str(refused.value) == (
        f"Backend 'native' was asked for, and cannot run {op!r} here because {why.value}; drop the "
        "request to let plain torch serve it."
    )


@pytest.mark.usefixtures("native_library")
def test_float64_is_an_error_where_native_was_asked_for(monkeypatch):
    monkeypatch.setenv("LOKI_ATTN_BACKEND", "native")
    ops.cache_clear()
    args = [rows.double() for rows in (QUERY, KEYS, VALUES)]
    with pytest.raises(LokiAttnError) as caught:
        ops().dense(*args, None, CALL, causal=True)
    assert str(caught.value) == (
        "Backend 'native' was asked for, and cannot run 'dense' here because it serves float32, "
        "bfloat16 and float16 on the CPU, and keys is torch.float64 on cpu; drop the request to "
        "let plain torch serve it."
    )
    monkeypatch.undo()
    ops.cache_clear()


@pytest.mark.usefixtures("native_library")
def test_plain_torch_serves_what_native_does_not(monkeypatch):
    """By default, with the result of the reference."""
    monkeypatch.delenv("LOKI_ATTN_BACKEND", raising=False)
    ops.cache_clear()
    assert backends.resolve().name == "native"
    for case in ("float64", "keys in float64", "a mask per head", "float64 scores"):
        op, place_of, value = REFUSED[case]
        args, more = arguments(op, place_of, value)
        if case == "a mask per head":
            args[:3] = (part.repeat_interleave(2, 1)[:, :HEADS] for part in args[:3])
        elif op == "dense":
            args[:3] = (part.double() for part in args[:3])
        result, expected = (getattr(b, op)(*args, **more) for b in (ops(), reference))
        for mine, plain in zip(parts(result), parts(expected), strict=True):
            assert torch.equal(mine, plain)
    ops.cache_clear()


def parts(result):
    return list(vars(result).values()) if isinstance(result, Selection) else [result]


@pytest.mark.parametrize("junk", [-2, SEQ, 2**40, -(2**40)])
@pytest.mark.usefixtures("native_library")
def test_rows_outside_the_cache_are_an_error(junk):
    chosen = selection(BATCH, KV_HEADS, 5)
    chosen.indices[1, 1, 3] = junk
    with pytest.raises(InputError, match=r"refused its arguments: a row index lies outside"):
        native.attend(QUERY, KEYS, VALUES, chosen, CALL)


@pytest.mark.parametrize("count", [-1, 6, 2**40])
@pytest.mark.usefixtures("native_library")
def test_counts_that_cannot_be_are_an_error(count):
    chosen = selection(BATCH, KV_HEADS, 5)
    chosen.counts[1, 0] = count
    with pytest.raises(InputError, match=r"refused its arguments: a size is out of range"):
        native.attend(QUERY, KEYS, VALUES, chosen, CALL)
    if count < 0:
        with pytest.raises(InputError, match=r"a size is out of range"):
            native.choose(SCORES, torch.full_like(COUNTS, count), EVERY, EVERY)


@pytest.mark.usefixtures("native_library")
def test_more_than_there_is_means_all_of_it():
    found = native.choose(SCORES, torch.full_like(COUNTS, 10**6), EVERY, ~EVERY)
    assert bool((found.indices == torch.arange(SEQ)).all())
    assert bool((found.counts == SEQ).all())


@pytest.mark.parametrize("sizes", [(2, 0, 8), (0, 20, 8), (2, 20, 0)], ids=str)
@pytest.mark.usefixtures("native_library")
def test_nothing_is_an_error(sizes):
    batch, seq, dim = sizes
    keys, query = torch.ones(batch, 2, seq, dim), torch.ones(batch, 4, 1, dim)
    with pytest.raises(InputError, match=r"The native kernel refused its arguments: a "):
        native.dense(query, keys, keys, None, CALL, causal=True)


# Appending ----------------------------------------------------------------------------------------


def request(**changed):
    """Four new rows behind two of at most 32, with a lead of codes."""
    fields = {
        "key": rows(seq=4), "value": rows(VALUE_DIM, seq=4), "keys": torch.zeros_like(rows(seq=32)),
        "values": torch.zeros_like(rows(VALUE_DIM, seq=32)), "start": 2, "first_position": 2,
        "positions": torch.zeros(BATCH, KV_HEADS, 32, dtype=torch.int32),
        "lead": pack(torch.zeros(BATCH, KV_HEADS, 32, RANK), "int8"), "key_map": MAP,
        "lead_scales": torch.zeros(BATCH, KV_HEADS, 32, dtype=torch.float16),
    }  # fmt: skip
    return AppendRequest(**(fields | changed))


ONE_TILE = pack(torch.zeros(BATCH, KV_HEADS, 16, RANK), "int8")
PLACES = torch.zeros(BATCH, KV_HEADS, 32, dtype=torch.int32)
BAD_APPENDS = {
    "no room": {"start": 29},
    "a negative start": {"start": -1},
    "no room for the lead": {"lead": ONE_TILE, "start": 13},
    "fewer values than keys": {"value": rows(VALUE_DIM, seq=3)},
    "storage of other heads": {"keys": rows(seq=32, heads=1)},
    "storage of another width": {"values": rows(VALUE_DIM + 1, seq=32)},
    "less storage of values": {"values": rows(VALUE_DIM, seq=16)},
    "positions of another dtype": {"positions": PLACES.long()},
    "fewer positions": {"positions": PLACES[..., :5]},
    "a lead of other heads": {"lead": pack(torch.zeros(BATCH, 1, 32, RANK), "int8")},
    "a map of another rank": {"key_map": MAP[..., :2].contiguous()},
    "fewer scales": {"lead_scales": torch.zeros(BATCH, KV_HEADS, 5, dtype=torch.float16)},
    "float64": {"key": rows(seq=4).double()},
    "meta": {"key": rows(seq=4).to("meta")},
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_APPENDS)
@pytest.mark.usefixtures("native_library")
def test_an_append_that_does_not_fit_writes_nothing(case):
    asked = request(**BAD_APPENDS[case])
    before = [held.clone() for held in (asked.keys, asked.values, asked.positions)]
    with pytest.raises(Unserved):
        native.append(asked)
    for held, old in zip((asked.keys, asked.values, asked.positions), before, strict=True):
        assert torch.equal(held, old)
    with pytest.raises(LokiAttnError, match=r"was asked for, and cannot run 'append' here because"):
        ops("native").append(asked)


@pytest.mark.usefixtures("native_library")
def test_an_append_of_another_dtype_is_an_error():
    with pytest.raises(InputError, match=r"a size is out of range"):
        native.append(request(keys=rows(seq=32).half()))


@pytest.mark.usefixtures("native_library")
def test_appends_that_go_to_the_plain_path():
    """Nothing to write, and what a gradient flows through."""
    assert native.append(request()) is True
    assert native.append(request(key=rows(seq=0), value=rows(VALUE_DIM, seq=0))) is False
    assert native.append(request(key=rows(seq=4).requires_grad_())) is False


# Instruction sets ---------------------------------------------------------------------------------

SHOW = "from loki_attn.kernels import native, ops; ops('native'); print(native.isa())"


def show(**environment):
    """The instruction set that a process of its own uses."""
    return subprocess.run(
        [sys.executable, "-c", SHOW],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.usefixtures("native_library")
def test_an_instruction_set_can_be_asked_for():
    worst = native.isas()[-1]
    asked = "avx2" if "avx2" in native.isas() else worst
    done = show(LOKI_ATTN_ISA=asked)
    assert done.stdout.split() == [asked], done.stderr


@pytest.mark.usefixtures("native_library")
def test_an_unknown_instruction_set_is_an_error():
    done = show(LOKI_ATTN_ISA="?")
    assert done.returncode == 1
    valid = ", ".join(sorted(native.isas()))
    text = f"UnknownNameError: Unknown instruction set '?'. Valid: {valid}."
    assert text in done.stderr
    before = native.isa()
    with pytest.raises(LokiAttnError, match="Unknown instruction set 'avx1024'"):
        native.set_isa("avx1024")
    assert native.isa() == before


def test_gradients_are_left_to_plain_torch(native_library):
    del native_library
    query, key, value = random_rows(layer_shape(2, 1, 8), 5)
    query.requires_grad_()
    call = AttentionCall(scaling=1.0)
    out = ops("native")
    with pytest.raises(LokiAttnError, match="has no gradients, and the query asks for one"):
        out.dense(query, key, value, None, call, causal=True)
    with torch.no_grad():
        assert not out.dense(query, key, value, None, call, causal=True).requires_grad
