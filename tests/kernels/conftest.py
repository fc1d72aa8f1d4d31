"""Tests of this folder share the modules beside them, and count what they draw."""

import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from loki_attn.kernels import native
from loki_attn.kernels.native import place


@pytest.fixture(scope="session")
def tally():
    """Examples drawn by each differential test; `-s` shows them at the end."""
    counts = Counter()
    yield counts
    for name, count in sorted(counts.items()):
        print(f"\nnative fuzz: {name}: {count} examples", end="")  # noqa: T201


@pytest.fixture(scope="session")
def native_library():
    """The loaded library; tests of the native kernels are skipped where none is installed."""
    if place.find_library() is None:
        pytest.skip(f"there are no native kernels: {place.why_missing()}")
    return native.library()


@pytest.fixture(scope="module", autouse=True)
def isa_put_back():
    """Use the same instruction set after a module as before it."""
    before = native.isa() if place.find_library() else None
    yield
    if before:
        native.set_isa(before)
