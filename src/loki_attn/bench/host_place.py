"""The bench on the processor: rows in ordinary memory, each step timed on its own."""

from collections.abc import Sequence
from typing import Any, Final, final

import torch

from loki_attn.bench.clock import Advance, Measured, measure
from loki_attn.bench.contenders import DENSE_NATIVE, Contender, dense_native, torch_forms
from loki_attn.bench.layers import Layer, Plan, layers_wanted, make_layers
from loki_attn.bench.machine import (
    Reader,
    backend_in_use,
    free_memory_bytes,
    last_level_cache_bytes,
)
from loki_attn.bench.place import Peers

# A layer counts as cold when this many times the last cache was touched since its last visit.
COLD_CACHES: Final = 4
_LAYERS_WHERE_UNKNOWN: Final = 64


@final
class HostPlace:
    """The processor and its memory; see `Place`."""

    name = "cpu"
    speed_by = ""
    must_fit = True

    def __init__(self) -> None:
        """Look at the machine; nothing is allocated before the first round."""
        self.device = torch.device("cpu")
        self.backend = backend_in_use()
        self.cache_bytes = last_level_cache_bytes()

    def facts(self) -> dict[str, Any]:
        """Rows know the processor by themselves."""
        return {"device": self.name}

    def layer_count(self, plan: Plan, touched_bytes: Sequence[int], limit: int | None) -> int:
        """As many layers as keep a visit cold, or fit."""
        limit = self.room_bytes(plan)[1] if limit is None else limit
        return layers_wanted(plan, touched_bytes, COLD_CACHES * self.cache_bytes, limit)

    def room_bytes(self, plan: Plan) -> tuple[int, int]:
        """A layer, and half of what is free."""
        free = free_memory_bytes()
        own = plan.layer_bytes()
        return own, own * _LAYERS_WHERE_UNKNOWN if free is None else free // 2

    def make_layers(self, plan: Plan, count: int) -> list[Layer]:
        """Draw rows once, and fill every layer from another row on."""
        return make_layers(plan, count)

    def peers(self, plan: Plan, layers: Sequence[Layer]) -> Peers:
        """The forms of torch, and our own where native kernels run."""
        found = torch_forms(plan, layers)
        if self.backend == "native":
            return Peers([*found, dense_native(plan, layers)])
        reason = f"backend {self.backend} has no dense kernel of its own"
        return Peers(found, {DENSE_NATIVE: reason})

    def prepare(self, contender: Contender, layers: int) -> Any:
        """Run layer 0; steps need no preparation here."""
        del layers
        return contender.run(0)

    def measure(
        self,
        contenders: Sequence[Contender],
        layers: int,
        *,
        repeats: int,
        warm_up: int,
        advance: Advance,
    ) -> Measured:
        """Time step by step."""
        reader = Reader(COLD_CACHES * self.cache_bytes)
        self.speed_by = reader.by
        return measure(
            contenders, layers, reader, repeats=repeats, warm_up=warm_up, advance=advance
        )

    def timed_by(self, contender: str, stage: str) -> str:
        """A clock around every step."""
        del contender, stage
        return "steps"

    def why_eager(self, contender: str) -> str:
        """There are no graphs here."""
        del contender
        return ""

    def eager_us(self, contender: str) -> None:
        """Every step is started on its own: that is its time."""
        del contender

    def end(self) -> None:
        """Nothing was prepared."""
