"""What the machine is asked, and that it is left as it was."""

import os
from pathlib import Path

import pytest
import torch

from loki_attn.bench import machine
from loki_attn.errors import InputError
from loki_attn.kernels import backends


def describe_caches(folder, *caches):
    for number, (kind, level, size) in enumerate(caches):
        index = folder / f"index{number}"
        index.mkdir()
        for name, value in (("type", kind), ("level", level), ("size", size)):
            (index / name).write_text(f"{value}\n")


def test_the_outermost_data_cache_counts(tmp_path):
    describe_caches(
        tmp_path, ("Data", 1, "32K"), ("Instruction", 9, "64M"), ("Unified", 3, "48M"), ("?", 2, "")
    )
    assert machine.last_level_cache_bytes(tmp_path) == 48 << 20


def test_a_system_that_does_not_tell_its_caches(tmp_path):
    assert machine.last_level_cache_bytes(tmp_path) == 32 << 20
    describe_caches(tmp_path, ("Unified", "?", "8M"), ("Unified", 2, "8 bananas"))
    assert machine.last_level_cache_bytes(tmp_path) == 32 << 20


def test_threads_are_restored():
    before = torch.get_num_threads()
    with machine.threads(before + 1) as count:
        assert count == torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
    with machine.threads(None) as count:
        assert count == before
    with pytest.raises(InputError, match="threads=0"), machine.threads(0):
        pass


def test_a_backend_is_asked_for_inside_the_block_only(monkeypatch):
    monkeypatch.delenv(backends.ENVIRONMENT_VARIABLE, raising=False)
    with machine.asked_backend("reference"):
        assert machine.backend_in_use() == "reference"
        assert os.environ[backends.ENVIRONMENT_VARIABLE] == "reference"
        with machine.asked_backend(None):
            assert machine.backend_in_use() == "reference"
    assert backends.ENVIRONMENT_VARIABLE not in os.environ
    with pytest.raises(InputError, match="Unknown backend 'nativ'"), machine.asked_backend("nativ"):
        pass


def test_the_reader_reads_no_less_than_it_was_asked_to(monkeypatch):
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "reference")
    reader = machine.Reader(100_001)
    assert reader.nbytes >= 100_001
    assert reader.by == "torch sum"
    assert reader.bytes_per_s() > 0


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc here")
def test_the_high_water_mark_rises_with_what_is_held():
    if not machine.reset_peak():
        pytest.skip("the mark may not be reset here")
    before = machine.peak_resident_bytes()
    held = torch.ones(8 << 20)
    assert machine.peak_resident_bytes() - before > held.nbytes // 2
    del held
    machine.reset_peak()
    assert machine.peak_resident_bytes() - before < 16 << 20
    assert machine.free_memory_bytes() > 0


def test_what_the_system_does_not_tell_is_unknown(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "_PROCESS", tmp_path)
    monkeypatch.setattr(machine, "_MEMORY", tmp_path / "meminfo")
    assert machine.peak_resident_bytes() is None
    assert machine.free_memory_bytes() is None
    monkeypatch.setattr(machine, "_PROCESS", tmp_path / "none")
    assert not machine.reset_peak()
