"""The native library, loaded once: its functions, its instruction set, its threads."""

import ctypes
import os
import statistics
import time
from functools import cache
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from loki_attn.errors import InputError, LokiAttnError, unknown_name
from loki_attn.kernels.native.place import find_library, why_missing

ABI: Final = 2
ISA_VARIABLE: Final = "LOKI_ATTN_ISA"
THREADS_VARIABLE: Final = "LOKI_ATTN_NUM_THREADS"
_MOST_THREADS: Final = 1024
_LEAST_READ_BYTES: Final = 64 * 256
# The codes of loki_status in native/loki_attn.h.
_PROBLEMS: Final = {
    1: "a null pointer came",
    2: "a size is out of range",
    3: "a dtype or kind is not known",
    4: "a row index lies outside the cache",
    5: "scratch memory could not be had",
    6: "this instruction set cannot run here",
}


@cache
def library() -> ctypes.CDLL:
    """Load the library, choose its instruction set and lend it torch's threads.

    Raises:
        LokiAttnError: If there is none, it is of another version, or `LOKI_ATTN_ISA` names an
            instruction set that cannot run here.
    """
    path = find_library()
    if path is None:
        raise LokiAttnError(f"The native kernels cannot run: {why_missing()}")
    found = ctypes.CDLL(str(path))
    if found.loki_abi() != ABI:
        raise LokiAttnError(
            f"The native library {path.name} has interface {found.loki_abi()}, this package needs "
            f"{ABI}; install loki-attn again with pip."
        )
    for name in ("loki_isas", "loki_isa", "loki_last_isa"):
        getattr(found, name).restype = ctypes.c_char_p
    for name in ("loki_score", "loki_attend", "loki_dense", "loki_step", "loki_choose"):
        getattr(found, name).argtypes = [ctypes.c_char_p]
    for name in ("loki_append", "loki_column_sums", "loki_hamming"):
        getattr(found, name).argtypes = [ctypes.c_char_p]
    found.loki_set_isa.argtypes = [ctypes.c_char_p]
    found.loki_set_threads.argtypes = [ctypes.c_int64]
    found.loki_threads.restype = ctypes.c_int64
    found.loki_borrow_pool.argtypes = [ctypes.c_void_p]
    found.loki_read.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.POINTER(ctypes.c_uint64)]
    asked = os.environ.get(ISA_VARIABLE)
    if asked:
        _set_isa(found, asked)
    found.loki_borrow_pool(_torch_pool())
    return found


def check(status: int) -> None:
    """Turn the status of a call into an error.

    Raises:
        InputError: If the library refused its arguments.
    """
    if status:
        problem = _PROBLEMS.get(status, f"it answered {status}")
        raise InputError(f"The native kernel refused its arguments: {problem}.")


def isas() -> tuple[str, ...]:
    """Instruction sets that run here, the best first."""
    names: bytes = library().loki_isas()
    return tuple(names.decode().split(","))


def isa() -> str:
    """The instruction set in use."""
    name: bytes = library().loki_isa()
    return name.decode()


def last_isa() -> str:
    """The instruction set whose code ran last, "" before any did: the proof that one was used."""
    name: bytes = library().loki_last_isa()
    return name.decode()


def set_isa(name: str) -> None:
    """Use this instruction set from now on.

    Raises:
        UnknownNameError: If it cannot run here; the text lists those that can.
    """
    _set_isa(library(), name)


def threads() -> int:
    """Threads that the kernels use: `LOKI_ATTN_NUM_THREADS`, else torch's number.

    Raises:
        LokiAttnError: If the variable is no number of threads.
    """
    return _asked_threads() or torch.get_num_threads()


def follow_threads(lib: ctypes.CDLL) -> None:
    """Use as many threads as torch does now, or as the environment asks for."""
    global _threads
    wanted = _asked_threads() or torch.get_num_threads()
    if wanted != _threads:
        check(lib.loki_set_threads(wanted))
        _threads = wanted


def describe() -> dict[str, Any]:
    """What the loaded library is and does: isa, isas, threads, pool, library."""
    return {
        "isa": isa(),
        "isas": list(isas()),
        "threads": threads(),
        "pool": "torch's OpenMP threads" if _torch_pool() else "its own threads",
        "library": str(find_library()),
    }


def read_bandwidth(buffer: Tensor, repeats: int = 9) -> float:
    """Measure how fast this memory can be read.

    Args:
        buffer: Contiguous CPU tensor, several times larger than the last-level cache.
        repeats: Reads; the median counts.

    Returns:
        Bytes per second, by all threads that the kernels use.

    Raises:
        InputError: If the buffer is too small to tell anything, not contiguous, or not on the CPU.
    """
    if buffer.device.type != "cpu" or not buffer.is_contiguous():
        raise InputError("read_bandwidth needs a contiguous CPU tensor.")
    if buffer.nbytes < _LEAST_READ_BYTES:
        raise InputError(
            f"read_bandwidth needs at least {_LEAST_READ_BYTES} bytes, got {buffer.nbytes}."
        )
    lib, total, taken = library(), ctypes.c_uint64(), []
    follow_threads(lib)
    for _ in range(repeats):
        start = time.perf_counter()
        check(lib.loki_read(buffer.data_ptr(), buffer.nbytes, ctypes.byref(total)))
        taken.append(time.perf_counter() - start)
    return buffer.nbytes / statistics.median(taken)


_threads = 0


def _set_isa(lib: ctypes.CDLL, name: str) -> None:
    if lib.loki_set_isa(name.encode()):
        names: bytes = lib.loki_isas()
        raise unknown_name("instruction set", name, names.decode().split(","))


@cache
def _asked_threads() -> int:
    """The number that the environment asks for, 0 where it does not."""
    asked = os.environ.get(THREADS_VARIABLE)
    if not asked:
        return 0
    if not asked.isdigit() or not 1 <= int(asked) <= _MOST_THREADS:
        raise LokiAttnError(
            f"{THREADS_VARIABLE} must be a number of threads from 1 to {_MOST_THREADS}, "
            f"got {asked!r}."
        )
    return int(asked)


@cache
def _torch_pool() -> int | None:
    """Address of GOMP_parallel in the OpenMP library that torch runs on; None without one.

    A pool of our own beside torch's would fight with it for the cores, because OpenMP threads go
    on spinning after a region ends.
    """
    if not torch._C.has_openmp:
        return None
    own = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*"))
    for place in (*map(str, own), None):
        try:
            pool = ctypes.CDLL(place).GOMP_parallel
        except (OSError, AttributeError):
            continue
        return ctypes.cast(pool, ctypes.c_void_p).value
    return None
