"""One decode step of one layer: Loki beside the dense forms, gated, cold, in turns."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final, final

import torch

from loki_attn.bench.clock import Advance, Measured, Times, measure
from loki_attn.bench.contenders import (
    DENSE_NATIVE,
    HF,
    PARTS,
    Contender,
    dense_native,
    exact_topk,
    loki,
    loki_parts,
    torch_forms,
)
from loki_attn.bench.gate import Gate, Verdict
from loki_attn.bench.layers import Layer, Plan, layers_wanted, make_layers
from loki_attn.bench.machine import (
    Reader,
    asked_backend,
    backend_in_use,
    free_memory_bytes,
    last_level_cache_bytes,
)
from loki_attn.bench.rows import StepRow
from loki_attn.bench.shapes import Shape, rows_wanted
from loki_attn.errors import InputError, LokiAttnError, unknown_name
from loki_attn.policy import preset
from loki_attn.provenance import provenance
from loki_attn.select.loki import Loki

DTYPES: Final[Mapping[str, torch.dtype]] = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
}
TASK: Final = "bench decode"
# A layer counts as cold when this many times the last cache was touched since its last visit.
_COLD_CACHES: Final = 4


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
        memory_bytes: What the caches may take; None for half of what is free.
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

    def __post_init__(self) -> None:
        """Refuse what cannot be measured."""
        if self.dtype not in DTYPES:
            raise unknown_name("dtype", self.dtype, DTYPES)
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


def measure_decode(
    bench: DecodeBench,
    tell: Callable[[str], None],
    advancing: Callable[[str, int], Any],
) -> Outcome:
    """Measure every context.

    Args:
        bench: What is to be measured.
        tell: Called with lines of news.
        advancing: Given a description and the number of turns, a context manager that yields what
            is to be called after each of them.

    Raises:
        InputError: If not even one layer fits into the memory.
    """
    outcome = Outcome()
    # Asked for by name, a backend never hands a contender to another one.
    with asked_backend(backend_in_use()):
        for context in bench.contexts:
            _measure_context(bench, context, outcome, tell, advancing)
    return outcome


def _measure_context(
    bench: DecodeBench,
    context: int,
    outcome: Outcome,
    tell: Callable[[str], None],
    advancing: Callable[[str, int], Any],
) -> None:
    plan = Plan(
        shape=bench.shape,
        batch=bench.batch,
        context=context,
        dtype=DTYPES[bench.dtype],
        rank=bench.coordinates,
        planes=bench.planes,
    )
    tell(f"{context:,} tokens: filling caches and checking every contender")
    _Context(bench, plan, outcome).measure(tell, advancing)


class _Context:
    """One context: caches, gate, rounds, rows."""

    def __init__(self, bench: DecodeBench, plan: Plan, outcome: Outcome) -> None:
        self.bench, self.plan, self.outcome = bench, plan, outcome
        self.backend = backend_in_use()
        self.cache_bytes = last_level_cache_bytes()

    def measure(self, tell: Callable[[str], None], advancing: Callable[[str, int], Any]) -> None:
        """Fill, judge, time, and add the rows to the outcome."""
        layers: list[Layer] = []
        contenders = self._contenders(layers)
        count = self._layer_count(contenders)
        layers += make_layers(self.plan, count)
        verdicts = self._judge(contenders, layers[0], tell)
        able = [c for c in contenders if c.name in verdicts and verdicts[c.name].passed]
        if not able:
            return
        reader = Reader(_COLD_CACHES * self.cache_bytes)
        title = f"{self.plan.context:,} tokens x {count} layers"
        turns = len(able) * (self.bench.repeats + self.bench.warm_up)
        with advancing(title, turns) as advance:
            measured = self._time(able, count, reader, advance)
        least = count * min(sum(contender.touched_bytes) for contender in able)
        made = _Rows(self, measured, reader.by, count, least)
        self.outcome.rows.extend(made.of(able, verdicts))

    def _time(
        self, able: Sequence[Contender], count: int, reader: Reader, advance: Advance
    ) -> Measured:
        return measure(
            able,
            count,
            reader,
            repeats=self.bench.repeats,
            warm_up=self.bench.warm_up,
            advance=advance,
        )

    def _contenders(self, layers: Sequence[Layer]) -> list[Contender]:
        """Everybody; they look into `layers` when they run."""
        plan, bench = self.plan, self.bench
        amounts = sorted({rows_wanted(amount, plan.context) for amount in bench.amounts})
        found = torch_forms(plan, layers)
        if self.backend == "native":
            found.append(dense_native(plan, layers))
        else:
            self.outcome.left_out[DENSE_NATIVE] = (
                f"backend {self.backend} has no dense kernel of its own"
            )
        found += [exact_topk(plan, layers, k) for k in amounts]
        found += [loki(plan, layers, plane, k) for plane in bench.planes for k in amounts]
        if bench.parts:
            found += [loki_parts(plan, layers, p, k) for p in bench.planes for k in amounts]
        return found

    def _layer_count(self, contenders: Sequence[Contender]) -> int:
        if self.bench.layers is not None:
            return self.bench.layers
        free = free_memory_bytes()
        limit = self.bench.memory_bytes
        if limit is None:
            limit = self.plan.layer_bytes() * 64 if free is None else free // 2
        touched = [sum(c.touched_bytes) for c in contenders]
        count = layers_wanted(self.plan, touched, _COLD_CACHES * self.cache_bytes, limit)
        if count == 0:
            raise InputError(
                f"One layer of {self.plan.context:,} tokens takes "
                f"{self.plan.layer_bytes() / 1e9:.2f} GB and as much again to fill, more than the "
                f"{limit / 1e9:.2f} GB allowed; raise the memory limit or lower the context."
            )
        return count

    def _judge(
        self, contenders: Sequence[Contender], layer: Layer, tell: Callable[[str], None]
    ) -> dict[str, Verdict]:
        gate = Gate(self.plan, layer)
        verdicts = {}
        with torch.inference_mode():
            for contender in contenders:
                try:
                    verdict = gate.judge(contender)
                except LokiAttnError as error:
                    self.outcome.left_out[contender.name] = str(error)
                    continue
                verdicts[contender.name] = verdict
                if not verdict.passed:
                    key = f"{contender.name} at {self.plan.context:,} tokens"
                    self.outcome.failures[key] = verdict.reason
                    tell(f"{key} is wrong: {verdict.reason}")
        return verdicts


class _Rows:
    """From times to rows."""

    def __init__(
        self, context: _Context, measured: Measured, read_by: str, count: int, least: int
    ) -> None:
        self._context, self._measured = context, measured
        plan, bench = context.plan, context.bench
        self._shared: dict[str, Any] = {
            "task": TASK,
            "shape": plan.shape.name,
            "num_heads": plan.shape.num_heads,
            "num_kv_heads": plan.shape.num_kv_heads,
            "head_dim": plan.shape.head_dim,
            "batch": plan.batch,
            "context": plan.context,
            "dtype": bench.dtype,
            "backend": context.backend,
            "threads": torch.get_num_threads(),
            "read_by": read_by,
            "layers": count,
            "bytes_between_visits": least,
            "last_level_cache_bytes": context.cache_bytes,
            "provenance": {**provenance(), "device": "cpu", "command": bench.command},
        }

    def of(self, able: Sequence[Contender], verdicts: Mapping[str, Verdict]) -> list[StepRow]:
        """One row per contender, and one per stage where stages are timed apart."""
        whole = [c for c in able if len(c.stages) == 1]
        medians = {c.name: self._times(c.name, "").median_us for c in whole}
        torch_names = [c.name for c in whole if c.kind == "torch"]
        best = min((medians[name] for name in torch_names), default=None)
        rows = []
        for contender in able:
            verdict = verdicts[contender.name]
            for stage, touched in zip(contender.stages, contender.touched_bytes, strict=True):
                rows.append(self._row(contender, stage[0], touched, verdict, medians, best))
        return rows

    def _times(self, name: str, stage: str) -> Times:
        return self._measured.times[name, stage]

    def _row(
        self,
        contender: Contender,
        stage: str,
        touched: int,
        verdict: Verdict,
        medians: Mapping[str, float],
        best: float | None,
    ) -> StepRow:
        plan, read_bytes_per_s = self._context.plan, self._measured.read_bytes_per_s
        times = self._times(contender.name, stage)
        speed = touched / times.median_us * 1e6
        peers = {n: m for n, m in medians.items() if not stage and n != contender.name}
        ratios = {name: median / times.median_us for name, median in peers.items()}
        headline: dict[str, Any] = {}
        if not stage and contender.kind == "loki":
            headline = {
                "ratio_best_torch": None if best is None else best / times.median_us,
                "ratio_hf": ratios.get(HF),
                "ratio_dense_native": ratios.get(DENSE_NATIVE),
                "share_of_byte_limit": speed / read_bytes_per_s,
            }
        return StepRow(
            contender=contender.name.removesuffix(PARTS) + (f": {stage}" if stage else ""),
            kind=contender.kind,
            part=stage or None,
            k=contender.k,
            rank=None if contender.plane is None else plan.rank,
            plane=contender.plane,
            **asdict(times),
            bytes_touched=touched,
            gb_per_s=speed / 1e9,
            read_gb_per_s=read_bytes_per_s / 1e9,
            share_of_bandwidth=speed / read_bytes_per_s,
            ratios=ratios,
            gate=verdict.to_json(),
            **self._shared,
            **headline,
        )


def _refuse_repeats(name: str, given: tuple[Any, ...]) -> None:
    """Refuse an empty list, and one that names a thing twice."""
    if not given:
        raise InputError(f"There are no {name}; give at least one.")
    twice = sorted({str(one) for one in given if given.count(one) > 1})
    if twice:
        raise InputError(f"{twice[0]} is given twice among the {name}; give it once.")
