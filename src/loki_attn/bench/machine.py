"""What the machine has: its last cache, its free memory, its threads, what its memory delivers."""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from time import perf_counter
from typing import Any, Final

import torch
from torch import Tensor

from loki_attn.errors import InputError
from loki_attn.kernels import backends, ops

_CACHES: Final = Path("/sys/devices/system/cpu/cpu0/cache")
_PROCESS: Final = Path("/proc/self")
_MEMORY: Final = Path("/proc/meminfo")
_ASSUMED_CACHE_BYTES: Final = 32 << 20
_UNITS: Final = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
# Writing it to clear_refs sets the high-water mark of resident memory back to the present.
_RESET_PEAK: Final = "5"
_NATIVE: Final = "loki_attn.kernels.native"


def last_level_cache_bytes(folder: Path = _CACHES) -> int:
    """Size of the outermost data cache; 32 MiB where the system does not tell."""
    found = {}
    for index in folder.glob("index*"):
        try:
            kind = (index / "type").read_text().strip()
            level = int((index / "level").read_text())
            size = (index / "size").read_text().strip()
            if kind != "Instruction":
                found[level] = int(size[:-1]) * _UNITS[size[-1]]
        except (OSError, ValueError, KeyError, IndexError):
            continue
    return found[max(found)] if found else _ASSUMED_CACHE_BYTES


def free_memory_bytes() -> int | None:
    """Memory that can be had without swapping; None where the system does not tell."""
    return _field(_MEMORY, "MemAvailable")


def resident_bytes() -> int | None:
    """Memory of this process that is resident now; None where the system does not tell."""
    return _field(_PROCESS / "status", "VmRSS")


def peak_resident_bytes() -> int | None:
    """The most that was resident since `reset_peak`; None where the system does not tell."""
    return _field(_PROCESS / "status", "VmHWM")


def reset_peak() -> bool:
    """Set the high-water mark of resident memory back; False where that is not permitted."""
    try:
        (_PROCESS / "clear_refs").write_text(_RESET_PEAK)
    except OSError:
        return False
    return True


@contextmanager
def threads(count: int | None) -> Iterator[int]:
    """Compute with `count` threads inside the block, None for as many as now; yields how many.

    Raises:
        InputError: If `count` is below 1.
    """
    if count is not None and count < 1:
        raise InputError(f"threads={count} cannot compute; give 1 or more.")
    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


@contextmanager
def asked_backend(name: str | None) -> Iterator[None]:
    """Ask for a backend by its name inside the block; None leaves the choice as it is.

    Raises:
        UnknownNameError: If no backend has this name.
        LokiAttnError: If it cannot run here.
    """
    if name is None:
        yield
        return
    backends.resolve(name)
    before = os.environ.get(backends.ENVIRONMENT_VARIABLE)
    try:
        os.environ[backends.ENVIRONMENT_VARIABLE] = name
        ops.cache_clear()
        yield
    finally:
        if before is None:
            del os.environ[backends.ENVIRONMENT_VARIABLE]
        else:
            os.environ[backends.ENVIRONMENT_VARIABLE] = before
        ops.cache_clear()


def backend_in_use() -> str:
    """Name of the backend that serves by default."""
    return backends.resolve().name


class Reader:
    """Reads a buffer that no cache holds: what the memory delivers to these threads.

    Args:
        least_bytes: Size of the buffer.

    Attributes:
        by: What reads: "native read", or "torch sum" where the native backend is not in use.
        nbytes: What one pass reads.
    """

    def __init__(self, least_bytes: int) -> None:
        """Fill the buffer, so that every page of it is there."""
        self._buffer = torch.ones(math.ceil(least_bytes / 8), dtype=torch.int64)
        self.nbytes = self._buffer.nbytes
        self.by, self._read = _reading()

    def bytes_per_s(self) -> float:
        """Read the buffer once."""
        return self._read(self._buffer)


def _reading() -> tuple[str, Callable[[Tensor], float]]:
    """The native read where that backend serves and has one, else a sum by torch; in bytes/s."""
    if backend_in_use() == "native":
        native: Any = getattr(import_module(_NATIVE), "read_bandwidth", None)
        if native is not None:
            return "native read", lambda buffer: float(native(buffer, 1))
    return "torch sum", _sum_by_torch


def _sum_by_torch(buffer: Tensor) -> float:
    began = perf_counter()
    buffer.sum()
    return buffer.nbytes / (perf_counter() - began)


def _field(file: Path, name: str) -> int | None:
    """A line "name: 123 kB" of a file of the system, in bytes."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        field, _, value = line.partition(":")
        if field == name:
            return int(value.split()[0]) << 10
    return None
