"""The bench on a device: rows in its memory, contenders recorded before they are judged."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final, Protocol, final

import torch

from loki_attn.bench.clock import Advance, Measured
from loki_attn.bench.contenders import DENSE_NATIVE, Contender
from loki_attn.bench.device_clock import Recorded, Stopwatch, measure_recorded, record
from loki_attn.bench.drawn_layers import draw_layers, drawing_bytes, drawn_layer_bytes
from loki_attn.bench.layers import Layer, Plan
from loki_attn.bench.peers import device_peers
from loki_attn.bench.place import Peers, StepFailed
from loki_attn.errors import LokiAttnError
from loki_attn.kernels import backends

_COLD_CACHES: Final = 4
# Bytes per estimated logit that a step of plain torch holds at once, results and copies included.
_STEP_BYTES: Final = 24
# What fragments and the library's own buffers leave.
_USABLE: Final = 0.95
_FOREIGN: Final = frozenset({"torch", "library"})


class Device(Stopwatch, Protocol):
    """A device with memory of its own.

    Attributes:
        name: As `--device` calls it.
        torch_device: As torch calls it.
        cache_bytes: Size of its last cache.
        copied_bytes: What its copies take of its memory.
    """

    name: str
    torch_device: torch.device
    cache_bytes: int
    copied_bytes: int

    def free_bytes(self) -> int:
        """Memory that can be had now."""

    def facts(self) -> dict[str, Any]:
        """Name, driver, versions, sizes."""

    def end(self) -> None:
        """Give back memory that nothing holds any more."""


@final
class DevicePlace:
    """A device; see `Place`.

    Args:
        device: The device.
    """

    speed_by = "copy, read + written"
    must_fit = False

    def __init__(self, device: Device) -> None:
        """Choose the backend; nothing is allocated."""
        self.name = device.name
        self.device = device.torch_device
        self.backend = backends.resolve(None, device.name).name
        self.cache_bytes = device.cache_bytes
        self._device = device
        self._recorded: dict[str, Recorded] = {}

    def facts(self) -> dict[str, Any]:
        """The device, beside the processor."""
        return {"device": self.name, **self._device.facts()}

    def layer_count(self, plan: Plan, touched_bytes: Sequence[int], limit: int | None) -> int:
        """As many layers as keep a visit cold, or fit."""
        wanted = -(-_COLD_CACHES * self.cache_bytes // max(1, min(touched_bytes)))
        taken, room = self.room_bytes(plan)
        own = drawn_layer_bytes(plan)
        limit = room if limit is None else limit
        return max(0, min(wanted, (limit - (taken - own)) // own))

    def room_bytes(self, plan: Plan) -> tuple[int, int]:
        """A layer, what drawing and computing hold beside it, and what is free."""
        step = _STEP_BYTES * plan.batch * plan.shape.num_heads * plan.context
        beside = max(step, drawing_bytes(plan)) + self._device.copied_bytes
        free = int(self._device.free_bytes() * _USABLE)
        return drawn_layer_bytes(plan) + beside, free

    def make_layers(self, plan: Plan, count: int) -> list[Layer]:
        """Draw rows where they lie."""
        return draw_layers(plan, count)

    def peers(self, plan: Plan, layers: Sequence[Layer]) -> Peers:
        """The forms of torch, and the libraries that are installed."""
        found = device_peers(plan, layers)
        reason = f"backend {self.backend} has no dense kernel of its own"
        return Peers(found.contenders, {DENSE_NATIVE: reason, **found.left_out})

    def prepare(self, contender: Contender, layers: int) -> Any:
        """Record the contender; what it replayed is judged."""
        try:
            recorded = record(contender, layers, self._device)
        except LokiAttnError:
            raise
        except torch.OutOfMemoryError as error:
            self._device.end()
            raise LokiAttnError("it needs more memory than the device has free") from error
        # A library may raise what it likes. That must not end a run on a machine that is lent.
        except Exception as error:
            reason = f"{type(error).__name__}: {first_line(error)}"
            if contender.kind in _FOREIGN:
                raise LokiAttnError(reason) from error
            raise StepFailed(reason) from error
        # Judged once, it need not be held while others are recorded into the same memory.
        self._recorded[contender.name] = replace(recorded, result=None)
        return recorded.result

    def measure(
        self,
        contenders: Sequence[Contender],
        layers: int,
        *,
        repeats: int,
        warm_up: int,
        advance: Advance,
    ) -> Measured:
        """Replay in turns."""
        del layers
        able = [self._recorded[contender.name] for contender in contenders]
        return measure_recorded(
            able, self._device, repeats=repeats, warm_up=warm_up, advance=advance
        )

    def timed_by(self, contender: str, stage: str) -> str:
        """Replays of a graph, where one holds the stage."""
        stages = self._recorded[contender].stages
        return next(own.timed_by for own in stages if own.name == stage)

    def why_eager(self, contender: str) -> str:
        """What recording the contender said."""
        stages = self._recorded[contender].stages
        return "; ".join(f"{own.name} {own.why_not}".strip() for own in stages if own.why_not)

    def eager_us(self, contender: str) -> float:
        """Steps started one by one, which is what a loop in Python pays."""
        return self._recorded[contender].eager_us

    def end(self) -> None:
        """Drop the graphs and give their memory back."""
        self._recorded.clear()
        self._device.end()


def first_line(error: BaseException) -> str:
    """The first line of an error's text that says something."""
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line for line in lines if line), "without a text")
