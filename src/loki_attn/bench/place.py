"""Where a bench of decode steps runs: what it needs of a processor, or of a device beside it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, final

import torch

from loki_attn.bench.clock import Advance, Measured
from loki_attn.bench.contenders import Contender
from loki_attn.bench.layers import Layer, Plan


class StepFailed(Exception):
    """A contender of our own broke where it should have computed; the text says how."""


@final
@dataclass(frozen=True)
class Peers:
    """The dense forms that compete with ours.

    Attributes:
        contenders: Those that can be tried.
        left_out: Those that cannot, and why.
    """

    contenders: list[Contender]
    left_out: Mapping[str, str] = field(default_factory=dict)


class Place(Protocol):
    """Caches, contenders and the clock of one kind of machine.

    Attributes:
        name: "cpu" or "cuda".
        device: Where caches lie.
        backend: What serves our own contenders.
        cache_bytes: Size of the last cache before memory.
        speed_by: What measures the speed of memory between the turns.
        must_fit: Whether a context without room for one layer is refused; else it is left out.
    """

    name: str
    device: torch.device
    backend: str
    cache_bytes: int
    speed_by: str
    must_fit: bool

    def facts(self) -> dict[str, Any]:
        """What the provenance of a row says of the machine, beside what it says anyway."""

    def layer_count(self, plan: Plan, touched_bytes: Sequence[int], limit: int | None) -> int:
        """How many layers keep every visit cold, or fit; 0 where not even one fits.

        Args:
            plan: What the layers hold.
            touched_bytes: What each contender touches per visit.
            limit: Bytes that the layers may take; None for the place's own limit.
        """

    def room_bytes(self, plan: Plan) -> tuple[int, int]:
        """What one layer takes with all that goes with it, and what may be taken."""

    def make_layers(self, plan: Plan, count: int) -> list[Layer]:
        """Fill layers."""

    def peers(self, plan: Plan, layers: Sequence[Layer]) -> Peers:
        """The dense forms."""

    def prepare(self, contender: Contender, layers: int) -> Any:
        """Make a contender ready for the clock.

        Returns:
            What it gave for layer 0, to be judged.

        Raises:
            LokiAttnError: If it cannot compute such a step here.
            StepFailed: If it should and does not.
        """

    def measure(
        self,
        contenders: Sequence[Contender],
        layers: int,
        *,
        repeats: int,
        warm_up: int,
        advance: Advance,
    ) -> Measured:
        """Time prepared contenders in turns."""

    def timed_by(self, contender: str, stage: str) -> str:
        """How a stage of a contender was timed."""

    def why_eager(self, contender: str) -> str:
        """Why no graph holds the steps of a contender; empty where one does, or none is used."""

    def eager_us(self, contender: str) -> float | None:
        """Microseconds per step that is started on its own, where that differs from its time."""

    def end(self) -> None:
        """Let go of what was prepared, before the next context."""
