"""A CUDA device as the bench sees it; the only file here that speaks to torch.cuda."""

import subprocess
import warnings
from collections.abc import Callable
from contextlib import suppress
from importlib import metadata
from typing import Any, Final, final

import torch
from torch import Tensor

from loki_attn.bench.device_clock import Replay, Uncapturable
from loki_attn.bench.device_place import first_line
from loki_attn.errors import InputError

_COPY_BYTES: Final = 1 << 30
# About a millisecond of a large GPU, at the speed of its memory.
_SAMPLE_BYTES: Final = 4_000_000_000
# What torch says of an operation that waits, in its "error" mode.
_WAITS: Final = "synchronizing"
_PACKAGES: Final = ("triton", "flashinfer-python", "flash-attn", "flash-attn-3")
_DRIVER: Final = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


@final
class CudaDevice:
    """The current CUDA device; see `Device`.

    Raises:
        InputError: If torch sees none.
    """

    name = "cuda"
    sample_bytes = _SAMPLE_BYTES
    copied_bytes = 2 * _COPY_BYTES

    def __init__(self) -> None:
        """Look at the device."""
        if not torch.cuda.is_available():
            built = torch.version.cuda
            why = "is built without CUDA" if built is None else f"for CUDA {built} finds none"
            raise InputError(
                f"device='cuda' was asked for, and there is no CUDA device here: torch "
                f"{torch.__version__} {why}. Run it on a machine with a GPU, or use device='cpu'."
            )
        self.torch_device = torch.device("cuda", torch.cuda.current_device())
        self._properties = torch.cuda.get_device_properties(self.torch_device)
        self.cache_bytes = int(self._properties.L2_cache_size)
        # The graphs of a run never run at once, so that they may share what they compute in.
        self._pool = torch.cuda.graph_pool_handle()
        self._marks = [_mark() for _ in range(2)]
        self._copies: tuple[Tensor, Tensor] | None = None

    def free_bytes(self) -> int:
        """What the driver can give, once the allocator's leftovers are given back."""
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(self.torch_device)[0])

    def facts(self) -> dict[str, Any]:
        """The device, the driver, and the versions of what computes there."""
        own = self._properties
        return {
            "gpu": own.name,
            "gpu_sm_count": own.multi_processor_count,
            "gpu_capability": f"{own.major}.{own.minor}",
            "gpu_memory_bytes": own.total_memory,
            "gpu_l2_bytes": self.cache_bytes,
            "gpu_driver": _driver(),
            "cuda": torch.version.cuda,
            "gpu_versions": {name: found for name in _PACKAGES if (found := _version(name))},
        }

    def capture(self, work: Callable[[], Any]) -> tuple[Replay, Any]:
        """Warm up on a stream beside, look whether anything waits there, and record."""
        own = torch.cuda.current_stream()
        beside: Any = torch.cuda.Stream(self.torch_device)  # type: ignore[no-untyped-call]
        beside.wait_stream(own)
        with torch.cuda.stream(beside):
            work()
            _require_no_wait(work)
        own.wait_stream(beside)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                result = work()
        except Exception as error:
            self._abandon(own)
            if isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError):
                raise Uncapturable(first_line(error)) from error
            raise
        return graph.replay, result

    def _abandon(self, stream: Any) -> None:
        """Clear up after a recording that broke off, which torch itself does in part only."""
        torch.cuda.set_stream(stream)
        # An error at the end of a recording leaves the allocator recording into the pool: nothing
        # could be recorded into it any more, nor unused memory be given back.
        with suppress(RuntimeError, AttributeError):
            torch._C._cuda_endAllocateToPool(self.torch_device.index, self._pool)
        self._pool = torch.cuda.graph_pool_handle()
        torch.cuda.synchronize()

    def begin(self) -> None:
        """Put an event into the stream."""
        self._marks[0].record()

    def elapsed_ns(self) -> float:
        """Put another one, and wait for it."""
        self._marks[1].record()
        self._marks[1].synchronize()
        return float(self._marks[0].elapsed_time(self._marks[1])) * 1e6

    def copy(self) -> int:
        """Copy a buffer that no cache holds."""
        if self._copies is None:
            numbers = torch.arange(_COPY_BYTES // 8, device=self.torch_device)
            self._copies = numbers, torch.empty_like(numbers)
        source, target = self._copies
        target.copy_(source)
        return source.nbytes + target.nbytes

    def end(self) -> None:
        """Empty the allocator; a pool without graphs goes with it."""
        self._copies = None
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        self._pool = torch.cuda.graph_pool_handle()


def _require_no_wait(work: Callable[[], Any]) -> None:
    """Run work whose waiting for the device is an error.

    A recording that finds it out is broken off, and leaves torch in a state that is hard to mend.
    """
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        # That this mode does not detect everything.
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode("error")
    try:
        work()
    except RuntimeError as error:
        if _WAITS not in str(error):
            raise
        raise Uncapturable("it waits for the device") from error
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _mark() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _driver() -> str | None:
    try:
        done = subprocess.run(_DRIVER, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = done.stdout.split()
    return lines[0] if lines else None


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
