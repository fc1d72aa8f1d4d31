"""Threads of the native kernels: their number, their pool and their company change no bit."""

import importlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from loki_attn import tiles
from loki_attn.errors import LokiAttnError
from loki_attn.kernels import native
from loki_attn.select.loki import quantise_rows
from loki_attn.types import AppendRequest, AttentionCall, Lead, Reading

pytestmark = pytest.mark.usefixtures("native_library")

LIBRARY = importlib.import_module("loki_attn.kernels.native.library")
CALL = AttentionCall(scaling=0.2, softcap=20.0)
THREADS = (1, 2, 3, 5)
# Batch, KV heads, group, rows: items that are fewer than threads, that fit them evenly, and many.
SIZES = [(1, 1, 3, 5000), (1, 3, 2, 2600), (4, 2, 1, 700), (9, 3, 2, 300)]


@pytest.fixture(autouse=True)
def threads_put_back(native_library):
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
    native_library.loki_borrow_pool(LIBRARY._torch_pool())
    native.dense(*layer(1, 1, 1, 16)[:3], None, CALL, causal=True)


def layer(batch, kv_heads, group, seq, seed=0):
    """Rows, an int8 lead and a query map."""
    draw = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, kv_heads * group, 1, 24, generator=draw)
    keys = torch.randn(batch, kv_heads, seq, 24, generator=draw)
    query_map = torch.randn(kv_heads, 24, 9, generator=draw)
    codes, scales = quantise_rows(keys @ query_map)
    lead = Lead(tiles.pack(codes, "int8"), scales, query_map)
    return query, keys, keys.flip(3).contiguous(), lead


def everything(parts, how="softmax_sum"):
    """The results of every op, as a list of tensors."""
    query, keys, values, lead = parts
    batch, kv_heads, seq, dim = keys.shape
    reading = Reading(counts=seq // 3, sinks=2, recents=3)
    out, selection = native.step(query, query, keys, values, lead, reading, how, CALL, None)
    by_mass = Reading(counts=None, mass=0.5, sinks=2)
    results = [out, selection.indices, selection.counts]
    out, chosen = native.step(query, query, keys, values, lead, by_mass, how, CALL, None)
    results += [out, chosen.indices, chosen.counts]
    again = native.attend(query, keys, values, selection, CALL)
    results += [again.output, again.log_sum_exp]
    results += native.dense_column_sums(query, keys, values, None, CALL)
    results.append(native.dense(query, keys, values, None, CALL, causal=True))
    scores = native.score(query[..., :9], lead.plane, lead.scales, CALL)
    everyone = torch.ones(1, 1, 1, seq, dtype=torch.bool)
    counts = torch.full((batch, query.shape[1], 1), seq // 2)
    results += [scores, native.choose(scores, counts, everyone, ~everyone).indices]
    results.append(native.mass_counts(scores.softmax(-1), ~everyone, 0.7))
    store = torch.zeros(batch, kv_heads, seq, dim), torch.zeros(batch, kv_heads, seq, dim)
    places = torch.zeros(batch, kv_heads, seq, dtype=torch.int32)
    shape = tiles.tiles_shape(batch, kv_heads, -(-seq // 16) * 16, "fp32", 9)
    plane = tiles.Tiles(torch.zeros(shape), "fp32", 9, seq)
    assert native.append(
        AppendRequest(
            key=keys, value=values, keys=store[0], values=store[1], positions=places, start=0,
            first_position=0, lead=plane, key_map=lead.query_map,
        )
    )  # fmt: skip
    return [*results, *store, places, plane.data]


def assert_same_bits(mine, others):
    assert len(mine) == len(others)
    for number, (one, other) in enumerate(zip(mine, others, strict=True)):
        assert torch.equal(one, other), f"result {number}"


@pytest.mark.parametrize("pool", ["torch's", "its own"])
@pytest.mark.parametrize("how", ["softmax_sum", "max", "none"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_results_do_not_depend_on_threads(native_library, sizes, how, pool):
    """Few items are shared out in phases, many of them whole: neither changes a bit."""
    parts = layer(*sizes)
    torch.set_num_threads(1)
    alone = everything(parts, how)
    if pool == "its own":
        native_library.loki_borrow_pool(None)
    for threads in THREADS[1:]:
        torch.set_num_threads(threads)
        assert_same_bits(everything(parts, how), alone)
        assert native_library.loki_threads() == threads


def test_threads_follow_torch(native_library):
    parts = layer(1, 2, 2, 40)
    for threads in (*THREADS, 1):
        torch.set_num_threads(threads)
        assert native.threads() == native.describe()["threads"] == threads
        everything(parts)
        assert native_library.loki_threads() == threads


@pytest.mark.parametrize("count", [0, -1, 1025, 2**40])
def test_a_number_of_threads_out_of_range_is_refused(native_library, count):
    before = native_library.loki_threads()
    assert native_library.loki_set_threads(count) == 2
    assert native_library.loki_threads() == before


@pytest.mark.parametrize("pool", ["torch's", "its own"])
def test_calls_from_several_threads_at_once(native_library, pool):
    """Each caller gets what it gets alone: scratch memory belongs to one thread."""
    layers = [layer(1, 2, 3, seq, seed=seq) for seq in (900, 1700, 40, 3000)]
    torch.set_num_threads(1)
    alone = [everything(parts) for parts in layers]
    if pool == "its own":
        native_library.loki_borrow_pool(None)

    def repeated(number):
        # Torch's number of threads belongs to the calling thread, and may not differ among them.
        torch.set_num_threads(2)
        return [everything(layers[number]) for _ in range(3)]

    with ThreadPoolExecutor(len(layers)) as callers:
        for number, results in enumerate(callers.map(repeated, range(len(layers)))):
            for found in results:
                assert_same_bits(found, alone[number])


FORK = """
import os, signal, sys
import torch
from loki_attn.kernels import native
from loki_attn.types import AttentionCall

native.library().loki_borrow_pool(None)
query, rows = torch.randn(1, 3, 1, 32), torch.randn(1, 3, 4000, 32)
call = AttentionCall(scaling=0.2)

def compute():
    return native.dense(query, rows, rows, None, call, causal=True)

before = compute()
assert native.library().loki_threads() == 3
child = os.fork()
if child == 0:
    signal.alarm(60)
    os._exit(17 if torch.equal(compute(), before) and torch.equal(compute(), before) else 1)
_, status = os.waitpid(child, 0)
assert torch.equal(compute(), before)
sys.exit(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_child_computes():
    """The child has none of its parent's threads, and makes its own."""
    done = subprocess.run(
        [sys.executable, "-c", FORK],
        env={**os.environ, "OMP_NUM_THREADS": "1", "LOKI_ATTN_NUM_THREADS": "3"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 17, done.stderr


@pytest.fixture
def asked(monkeypatch):
    """Ask for a number of threads by the environment."""

    def ask(number):
        monkeypatch.setenv("LOKI_ATTN_NUM_THREADS", number)
        LIBRARY._asked_threads.cache_clear()

    yield ask
    monkeypatch.undo()
    LIBRARY._asked_threads.cache_clear()


@pytest.mark.parametrize("number", [1, 3, 1024])
def test_a_number_of_threads_can_be_asked_for(native_library, asked, number):
    torch.set_num_threads(2)
    asked(str(number))
    assert native.threads() == number
    native.dense(*layer(1, 1, 1, 16)[:3], None, CALL, causal=True)
    assert native_library.loki_threads() == number


@pytest.mark.parametrize("number", ["0", "-2", "many", "1.5", "1025", " "])
def test_what_is_no_number_of_threads_is_an_error(asked, number):
    asked(number)
    expected = f"must be a number of threads from 1 to 1024, got {number!r}."
    with pytest.raises(LokiAttnError) as caught:
        native.why_not()
    assert str(caught.value) == f"LOKI_ATTN_NUM_THREADS {expected}"
    with pytest.raises(LokiAttnError, match="LOKI_ATTN_NUM_THREADS must be"):
        native.dense(*layer(1, 1, 1, 16)[:3], None, CALL, causal=True)
