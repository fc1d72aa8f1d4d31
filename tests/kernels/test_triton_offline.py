"""Compiling for GPUs that are not here: no spills, little shared memory, no new variants."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from triton.backends import backends

PROGRAM = Path(__file__).with_name("triton_offline.py")
# Of a multiprocessor, for one program: the smallest of those served, and the largest.
SHARED_BYTES = {86: 99 << 10, 90: 227 << 10}
STEP = {"map_query", "sum_weights", "rank_rows", "compact", "refine", "attend_rows", "merge"}
RARE = {
    "count_visible", "mark_recent", "sum_queries", "settle_sums", "sum_columns", "count_bits",
}  # fmt: skip


@pytest.fixture(scope="module", params=SHARED_BYTES, ids="sm_{}".format)
def compiled(request, tmp_path_factory):
    """What the compiler says of every kernel, and the architecture."""
    if "nvidia" not in backends:
        pytest.skip("this Triton does not compile for NVIDIA GPUs")
    fresh = {
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("kernels")),
        "TRITON_DUMP_PTXAS_LOG": "1",
    }
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    more = ["also-rare"] if request.param == 90 else ["few-but-largest"]
    command = [sys.executable, str(PROGRAM), str(request.param), *more]
    done = subprocess.run(command, env=kept | fresh, capture_output=True, text=True, check=False)
    if done.returncode == 3:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stderr[-4000:]
    return request.param, json.loads(done.stdout)


@pytest.mark.slow
def test_every_kernel_of_a_step_compiles_without_spills(compiled):
    """Registers that do not suffice go to memory, which costs what the kernels save."""
    architecture, found = compiled
    names = {name for name, _, _ in found["compiled"]}
    assert names == STEP | {"append_rows"} | (RARE if architecture == 90 else set())
    assert [kernel for kernel in found["compiled"] if kernel[2]] == []


@pytest.mark.slow
def test_shared_memory_suffices(compiled):
    architecture, found = compiled
    too_many = {n: size for n, size in found["shared"].items() if size > SHARED_BYTES[architecture]}
    assert too_many == {}


@pytest.mark.slow
def test_nothing_is_compiled_anew_as_rows_and_budgets_grow(compiled):
    """A decode loop must never wait for a compiler, and a graph is captured once."""
    _, found = compiled
    assert {name for name, _, _ in found["grown"]} == set()
