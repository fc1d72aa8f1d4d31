"""The device that Triton runs on here: a GPU, or the interpreter on the CPU."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, wraps
from typing import Any, Final, TypeVar, cast

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.runtime.errors import OutOfResources

from loki_attn.kernels.backends import Unserved

_Op = TypeVar("_Op", bound=Callable[..., Any])

_OLDEST: Final = (3, 6)
# Programs per multiprocessor that hide each other's waiting, all of them small.
_PROGRAMS_PER_PROCESSOR: Final = 8
# The interpreter gains nothing from splits, but laws are tested with a few.
_INTERPRETED_PROGRAMS: Final = 8


def interpreted() -> bool:
    """Whether kernels are interpreted: TRITON_INTERPRET=1 was set before the first import."""
    return bool(knobs.runtime.interpret)


def why_not() -> str | None:
    """Why no kernel can run here, None if they can."""
    if interpreted():
        return None
    if tuple(map(int, triton.__version__.split(".")[:2])) < _OLDEST:
        return (
            f"triton {triton.__version__} is older than 3.6 (up to 3.4 some histograms are counted "
            "wrongly); install a torch that brings a newer one"
        )
    if torch.version.hip:
        return "its kernels use an instruction of NVIDIA GPUs, and this torch is made for AMD's"
    if torch.cuda.is_available():
        return None
    return (
        f"triton {triton.__version__} found no GPU; its kernels run on CUDA devices, and for tests "
        "in the interpreter (set TRITON_INTERPRET=1 before the start)"
    )


def device_types() -> tuple[str, ...]:
    """Types of the devices whose tensors are served."""
    return ("cpu",) if interpreted() else ("cuda",)


def within_means(op: _Op) -> _Op:
    """Let an op refuse, rather than break, where a kernel needs more than the GPU has."""

    @wraps(op)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return op(*args, **kwargs)
        except OutOfResources as why:
            raise Unserved(
                f"a kernel needs {why.required} of {why.name} and this GPU has {why.limit}"
            ) from why

    return cast("_Op", run)


def on(tensor: Tensor) -> AbstractContextManager[Any]:
    """Make the device of a tensor the current one inside the block: kernels start there."""
    if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


@cache
def programs_wanted(device: torch.device) -> int:
    """How many programs keep the device busy."""
    if device.type == "cpu":
        return _INTERPRETED_PROGRAMS
    return torch.cuda.get_device_properties(device).multi_processor_count * _PROGRAMS_PER_PROCESSOR


def mapping_precision() -> str:
    """How float32 maps are multiplied: by tensor cores, three times, to float32 precision."""
    return "ieee" if interpreted() else "tf32x3"
