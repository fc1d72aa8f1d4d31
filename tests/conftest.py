"""The ground every test stands on: no hub, one thread, fixed examples in CI, poison on demand."""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
# Before anything imports Triton: its kernels are interpreted here. On a GPU they are tested with
# `make gpu`, which says otherwise.
os.environ.setdefault("TRITON_INTERPRET", "1")

import hypothesis
import pytest
import torch

torch.set_num_threads(1)

hypothesis.settings.register_profile("default", max_examples=20, deadline=None)
hypothesis.settings.register_profile("ci", max_examples=100, deadline=None, derandomize=True)
hypothesis.settings.register_profile("long", max_examples=2000, deadline=None)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")


def pytest_addoption(parser):
    """Let the whole suite run against another build of the native library."""
    parser.addoption(
        "--native-library", type=Path, help="the native library to test, a sanitized one say"
    )


def pytest_configure(config):
    """Choose the library before any test loads one."""
    if library := config.getoption("--native-library"):
        from loki_attn.kernels.native import place

        place.use_library(library)


def pytest_collection_modifyitems(items):
    """Skip the tests that need an accelerator where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no accelerator here"))


@pytest.fixture
def poison(monkeypatch):
    """Fill the cache's fresh storage with values that no result survives, so stale reads show."""
    import loki_attn.cache

    allocate = loki_attn.cache.allocate

    def allocate_poisoned(shape, dtype, device):
        storage = allocate(shape, dtype, device)
        if dtype.is_floating_point:
            return storage.fill_(float("nan"))
        return storage.fill_(127 if dtype in (torch.int8, torch.uint8) else -1)

    monkeypatch.setattr(loki_attn.cache, "allocate", allocate_poisoned)


@pytest.fixture(scope="session")
def quick_interpreter():
    """Let Triton's interpreter prepare each module once, not anew at every call of a function."""
    from triton.runtime.interpreter import InterpretedFunction

    prepare, prepared = InterpretedFunction.__call__, set()

    def call(self, *args, **kwargs):
        if self.fn.__module__ in prepared:
            return self.rewrite()(*args, **kwargs)
        prepared.add(self.fn.__module__)
        return prepare(self, *args, **kwargs)

    InterpretedFunction.__call__ = call
    yield
    InterpretedFunction.__call__ = prepare


@pytest.fixture
def interpreted(request):
    """Triton's kernels on CPU tensors; skips where they are compiled for a GPU, or missing."""
    from loki_attn.kernels import backends

    found = backends.probe("triton")
    if isinstance(found, backends.Rejected):
        pytest.skip(f"triton does not run: {found.reason}")
    if not found.module.interpreted():
        pytest.skip("triton's kernels are compiled here: TRITON_INTERPRET is off")
    request.getfixturevalue("quick_interpreter")
    return found.module
