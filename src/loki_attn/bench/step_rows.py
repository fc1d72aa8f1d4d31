"""From times to the rows of "bench decode"."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, final

import torch

from loki_attn.bench.clock import Measured
from loki_attn.bench.contenders import DENSE_NATIVE, HF, PARTS, Contender
from loki_attn.bench.gate import Verdict
from loki_attn.bench.layers import Plan
from loki_attn.bench.place import Place
from loki_attn.bench.rows import StepRow
from loki_attn.provenance import provenance

TASK: Final = "bench decode"
_DENSE: Final = frozenset({"torch", "library", "dense"})


@final
@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all rows of one context have in common.

    Attributes:
        plan: Sizes.
        place: Where it ran.
        dtype: Name of the dtype.
        layers: Layer caches that took turns.
        bytes_between_visits: What is touched at the least until a layer is visited again.
        command: The command that makes the rows again.
    """

    plan: Plan
    place: Place
    dtype: str
    layers: int
    bytes_between_visits: int
    command: str

    def shared(self) -> dict[str, Any]:
        """As a row states it."""
        plan, place = self.plan, self.place
        return {
            "task": TASK,
            "shape": plan.shape.name,
            "num_heads": plan.shape.num_heads,
            "num_kv_heads": plan.shape.num_kv_heads,
            "head_dim": plan.shape.head_dim,
            "batch": plan.batch,
            "context": plan.context,
            "dtype": self.dtype,
            "backend": place.backend,
            "device": place.name,
            "threads": torch.get_num_threads(),
            "read_by": place.speed_by,
            "layers": self.layers,
            "bytes_between_visits": self.bytes_between_visits,
            "last_level_cache_bytes": place.cache_bytes,
            "provenance": {**provenance(), **place.facts(), "command": self.command},
        }


@final
@dataclass(frozen=True)
class _Peers:
    """Medians of whole steps, and the fastest dense ones among them."""

    medians: Mapping[str, float]
    torch_us: float | None
    dense: str | None


def rows_of(
    setting: Setting,
    able: Sequence[Contender],
    verdicts: Mapping[str, Verdict],
    measured: Measured,
) -> list[StepRow]:
    """One row per contender, and one per stage where stages are timed apart."""
    whole = [c for c in able if len(c.stages) == 1]
    medians = {c.name: measured.times[c.name, ""].median_us for c in whole}
    of_torch = [medians[c.name] for c in whole if c.kind == "torch"]
    dense = [c.name for c in whole if c.kind in _DENSE]
    fastest = min(dense, key=medians.__getitem__, default=None)
    peers = _Peers(medians, min(of_torch, default=None), fastest)
    shared = setting.shared()
    rows = []
    for contender in able:
        gate = verdicts[contender.name].to_json()
        for (stage, _), touched in zip(contender.stages, contender.touched_bytes, strict=True):
            figures = _figures(setting, contender, stage, touched, measured)
            headline = {} if stage else _against(contender, figures["median_us"], peers)
            if not stage and contender.kind == "loki":
                headline["share_of_byte_limit"] = figures["share_of_bandwidth"]
            rows.append(StepRow(**figures, **headline, **shared, gate=gate))
    return rows


def _figures(
    setting: Setting, contender: Contender, stage: str, touched: int, measured: Measured
) -> dict[str, Any]:
    """What a row says by itself."""
    times = measured.times[contender.name, stage]
    speed, limit = touched / times.median_us * 1e6, measured.read_bytes_per_s
    return {
        "contender": contender.name.removesuffix(PARTS) + (f": {stage}" if stage else ""),
        "kind": contender.kind,
        "part": stage or None,
        "k": contender.k,
        "rank": None if contender.plane is None else setting.plan.rank,
        "plane": contender.plane,
        **asdict(times),
        "timed_by": setting.place.timed_by(contender.name, stage),
        "eager_us": None if stage else setting.place.eager_us(contender.name),
        "bytes_touched": touched,
        "gb_per_s": speed / 1e9,
        "read_gb_per_s": limit / 1e9,
        "share_of_bandwidth": speed / limit,
    }


def _against(contender: Contender, median_us: float, peers: _Peers) -> dict[str, Any]:
    """What a row of a whole step says of the others."""
    ratios = {n: m / median_us for n, m in peers.medians.items() if n != contender.name}
    found: dict[str, Any] = {"ratios": ratios}
    if contender.kind == "loki":
        found |= {
            "ratio_best_torch": None if peers.torch_us is None else peers.torch_us / median_us,
            "ratio_best_dense": None if peers.dense is None else ratios[peers.dense],
            "best_dense": peers.dense,
            "ratio_hf": ratios.get(HF),
            "ratio_dense_native": ratios.get(DENSE_NATIVE),
        }
    return found
