"""One decode step of one layer: Loki beside the dense forms, gated, cold, in turns."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, final

import torch

from loki_attn.bench.contenders import Contender, exact_topk, loki, loki_parts
from loki_attn.bench.gate import Gate, Verdict
from loki_attn.bench.host_place import HostPlace
from loki_attn.bench.layers import Layer, Plan
from loki_attn.bench.machine import asked_backend
from loki_attn.bench.place import Place, StepFailed
from loki_attn.bench.shapes import Shape, rows_wanted
from loki_attn.bench.step_rows import Setting, rows_of
from loki_attn.errors import InputError, LokiAttnError, unknown_name
from loki_attn.policy import preset
from loki_attn.select.loki import Loki

DTYPES: Final[Mapping[str, torch.dtype]] = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
}
DEVICES: Final = ("cpu", "cuda")


@final
@dataclass(frozen=True, kw_only=True)
class DecodeBench:
    """What is to be measured.

    Attributes:
        shape: Sizes of the layer.
        contexts: Rows of the caches, in tokens.
        amounts: How many rows a step reads: numbers, or parts such as "T/8".
        planes: Number formats of Loki's lead plane.
        rank: Its coordinates; None for Loki's own default.
        dtype: Dtype of keys and values, a key of `DTYPES`.
        batch: Batch rows.
        repeats: Rounds that count.
        warm_up: Rounds before them.
        layers: Layer caches; None for as many as keep every visit cold.
        memory_bytes: What the caches may take; None for half of what is free, on a device for all
            of it.
        device: Where caches lie and steps are computed, one of `DEVICES`.
        parts: Whether to time the parts of a Loki step as well.
        command: The command that makes the rows again.
    """

    shape: Shape
    contexts: tuple[int, ...]
    amounts: tuple[str, ...] = ("T/8",)
    planes: tuple[str, ...] = ("int8",)
    rank: int | None = None
    dtype: str = "bf16"
    batch: int = 1
    repeats: int = 20
    warm_up: int = 2
    layers: int | None = None
    memory_bytes: int | None = None
    parts: bool = False
    command: str = ""
    device: str = "cpu"

    def __post_init__(self) -> None:
        """Refuse what cannot be measured."""
        if self.dtype not in DTYPES:
            raise unknown_name("dtype", self.dtype, DTYPES)
        if self.device not in DEVICES:
            raise unknown_name("device", self.device, DEVICES)
        for name in ("contexts", "amounts", "planes"):
            _refuse_repeats(name, getattr(self, name))
        for name in ("batch", "repeats", "layers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be 1 or more, got {value}.")
        if self.warm_up < 0:
            raise InputError(f"warm_up must be 0 or more, got {self.warm_up}.")
        self._check_planes()
        for context in self.contexts:
            if context < 1:
                raise InputError(f"A context holds at least 1 token, got {context}.")
            for amount in self.amounts:
                # The policy refuses what sinks alone exceed.
                preset("loki", top_k=rows_wanted(amount, context))

    def _check_planes(self) -> None:
        for plane in self.planes:
            Loki(rank=self.rank, plane_dtype=plane)  # type: ignore[arg-type]
        if isinstance(self.rank, int) and self.rank > self.shape.head_dim:
            raise InputError(
                f"rank={self.rank} is above head_dim={self.shape.head_dim} of {self.shape.name}; "
                "lower it."
            )

    @property
    def coordinates(self) -> int:
        """The rank in coordinates."""
        return Loki(rank=self.rank).coordinates(self.shape.head_dim)

    def plan(self, context: int, device: torch.device) -> Plan:
        """What the contenders of one context have in common."""
        return Plan(
            shape=self.shape,
            batch=self.batch,
            context=context,
            dtype=DTYPES[self.dtype],
            rank=self.coordinates,
            planes=self.planes,
            device=device,
        )


@final
@dataclass(frozen=True)
class Outcome:
    """What came of a bench.

    Attributes:
        rows: Of the contenders that passed.
        failures: Those that did not, and why.
        left_out: Contenders that were not tried, and why.
    """

    rows: list[Any] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def add(self, other: "Outcome") -> None:
        """Take in what came of another bench."""
        self.rows.extend(other.rows)
        self.failures.update(other.failures)
        self.left_out.update(other.left_out)


def measure_decode(
    bench: DecodeBench,
    tell: Callable[[str], None],
    advancing: Callable[[str, int], Any],
    place: Place | None = None,
) -> Outcome:
    """Measure every context.

    Args:
        bench: What is to be measured.
        tell: Called with lines of news.
        advancing: Given a description and the number of turns, a context manager that yields what
            is to be called after each of them.
        place: Where; None for the bench's device.

    Raises:
        InputError: If there is no such device, or on the processor, if not even one layer fits into
            the memory. Elsewhere such a context is left out.
    """
    outcome = Outcome()
    place = place_named(bench.device) if place is None else place
    # Asked for by name, a backend never hands a contender to another one.
    with asked_backend(place.backend):
        for context in bench.contexts:
            _Context(bench, bench.plan(context, place.device), place, outcome, tell).measure(
                advancing
            )
    return outcome


def place_named(device: str) -> Place:
    """Return where a device's name leads: "cpu" or "cuda".

    Raises:
        InputError: If there is none here.
    """
    if device == HostPlace.name:
        return HostPlace()
    from loki_attn.bench.cuda_device import CudaDevice
    from loki_attn.bench.device_place import DevicePlace

    return DevicePlace(CudaDevice())


@final
@dataclass(frozen=True)
class _Context:
    """One context: caches, gate, rounds, rows."""

    bench: DecodeBench
    plan: Plan
    place: Place
    outcome: Outcome
    tell: Callable[[str], None]

    @property
    def title(self) -> str:
        """What news and tables call it."""
        batch = "" if self.plan.batch == 1 else f", batch {self.plan.batch}"
        return f"{self.plan.context:,} tokens{batch}"

    def measure(self, advancing: Callable[[str, int], Any]) -> None:
        """Fill, judge, time, and add the rows to the outcome."""
        self.tell(f"{self.title}: filling caches and checking every contender")
        layers: list[Layer] = []
        contenders = self._contenders(layers)
        touched = [sum(c.touched_bytes) for c in contenders]
        count = self.bench.layers or self.place.layer_count(
            self.plan, touched, self.bench.memory_bytes
        )
        try:
            if count == 0:
                self._refuse()
                return
            layers += self.place.make_layers(self.plan, count)
            self._measure(contenders, layers, advancing)
        except torch.OutOfMemoryError as error:
            self.outcome.left_out[self.title] = f"the device's memory: {error}".split(". ")[0]
        finally:
            layers.clear()
            self.place.end()

    def _measure(
        self,
        contenders: Sequence[Contender],
        layers: Sequence[Layer],
        advancing: Callable[[str, int], Any],
    ) -> None:
        bench, count = self.bench, len(layers)
        verdicts = self._judge(contenders, layers)
        able = [c for c in contenders if c.name in verdicts and verdicts[c.name].passed]
        if not able:
            return
        turns = len(able) * (bench.repeats + bench.warm_up)
        title = f"{self.title} x {count} layers"
        with advancing(title, turns) as advance, torch.inference_mode():
            measured = self.place.measure(
                able, count, repeats=bench.repeats, warm_up=bench.warm_up, advance=advance
            )
        setting = Setting(
            plan=self.plan,
            place=self.place,
            dtype=bench.dtype,
            layers=count,
            bytes_between_visits=count * min(sum(c.touched_bytes) for c in able),
            command=bench.command,
        )
        self.outcome.rows.extend(rows_of(setting, able, verdicts, measured))

    def _contenders(self, layers: Sequence[Layer]) -> list[Contender]:
        """Everybody; they look into `layers` when they run."""
        plan, bench = self.plan, self.bench
        amounts = sorted({rows_wanted(amount, plan.context) for amount in bench.amounts})
        peers = self.place.peers(plan, layers)
        self.outcome.left_out.update(peers.left_out)
        found = list(peers.contenders)
        found += [exact_topk(plan, layers, k) for k in amounts]
        found += [loki(plan, layers, plane, k) for plane in bench.planes for k in amounts]
        if bench.parts:
            found += [loki_parts(plan, layers, p, k) for p in bench.planes for k in amounts]
        return found

    def _refuse(self) -> None:
        """Say that not even one layer fits."""
        taken, room = self.place.room_bytes(self.plan)
        limit = room if self.bench.memory_bytes is None else self.bench.memory_bytes
        said = (
            f"One layer of {self.title} takes {taken / 1e9:.2f} GB and as much again to fill, more "
            f"than the {limit / 1e9:.2f} GB allowed; raise the memory limit or lower the context."
        )
        if self.place.must_fit:
            raise InputError(said)
        self.outcome.left_out[self.title] = (
            f"one layer takes {taken / 1e9:.2f} GB with what its steps need, more than the "
            f"{limit / 1e9:.2f} GB there are"
        )

    def _judge(
        self, contenders: Sequence[Contender], layers: Sequence[Layer]
    ) -> dict[str, Verdict]:
        gate, verdicts = Gate(self.plan, layers[0]), {}
        with torch.inference_mode():
            for contender in contenders:
                key = f"{contender.name} at {self.title}"
                try:
                    found = self.place.prepare(contender, len(layers))
                    verdict = gate.judge(contender, found)
                except LokiAttnError as error:
                    self.outcome.left_out[contender.name if self.place.must_fit else key] = str(
                        error
                    )
                    continue
                except StepFailed as failed:
                    self._fail(key, str(failed))
                    continue
                verdicts[contender.name] = verdict
                if why := self.place.why_eager(contender.name):
                    self.tell(f"{key} is timed by events, because no graph holds it: {why}")
                if not verdict.passed:
                    self._fail(key, verdict.reason)
        return verdicts

    def _fail(self, key: str, reason: str) -> None:
        self.outcome.failures[key] = reason
        self.tell(f"{key} is wrong: {reason}")


def _refuse_repeats(name: str, given: tuple[Any, ...]) -> None:
    """Refuse an empty list, and one that names a thing twice."""
    if not given:
        raise InputError(f"There are no {name}; give at least one.")
    twice = sorted({str(one) for one in given if given.count(one) > 1})
    if twice:
        raise InputError(f"{twice[0]} is given twice among the {name}; give it once.")
