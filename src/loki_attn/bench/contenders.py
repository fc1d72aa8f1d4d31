"""Who competes: the dense forms of torch, our dense attention, exact top-k, Loki.

Each reads the same rows in the same storage. A contender is a chain of stages, one for a whole
step; where the parts of a step are timed apart, one for each part.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Final, Literal, final

import torch
from torch import Tensor
from torch.nn import functional

from loki_attn import attention
from loki_attn.attention import LayerPolicy, bind
from loki_attn.bench.layers import Layer, Plan
from loki_attn.bench.machine import backend_in_use
from loki_attn.budget import Budget
from loki_attn.kernels import ops
from loki_attn.policy import preset

Kind = Literal["torch", "library", "dense", "exact", "loki"]

HF: Final = "sdpa-hf"
DENSE_NATIVE: Final = "dense-native"
PARTS: Final = " in parts"
SCALE_BYTES: Final = 2
PLANE_BYTES: Final = {"int4": 0.5, "int8": 1.0, "bf16": 2.0, "fp32": 4.0}
_CODED: Final = {"int4", "int8"}
_MAP_BYTES: Final = 4


@final
@dataclass(frozen=True)
class Lap:
    """What a stage returned that knows its own time better than a clock around it.

    Attributes:
        value: For the next stage.
        taken_ns: Nanoseconds that count for the stage.
    """

    value: Any
    taken_ns: int


@final
@dataclass(frozen=True, kw_only=True)
class Contender:
    """One way to compute a decode step of one layer.

    Attributes:
        name: What tables call it; unique in a run.
        kind: "torch", "library" and "dense" read every row, "exact" and "loki" choose.
        stages: Names and functions: the first takes the index of a layer, each further one what
            the one before returned. The last returns the output, of a choosing contender with the
            selection.
        touched_bytes: What each stage touches, by formula.
        k: Rows read of each KV head; None for all.
        plane: Number format of the lead plane, for "loki".
        budget: Sinks and recents of a choosing contender.
    """

    name: str
    kind: Kind
    stages: tuple[tuple[str, Callable[[Any], Any]], ...]
    touched_bytes: tuple[int, ...]
    k: int | None = None
    plane: str | None = None
    budget: Budget | None = None

    def run(self, index: int) -> Any:
        """Compute one step of a layer."""
        value: Any = index
        for _, stage in self.stages:
            value = stage(value)
            value = value.value if isinstance(value, Lap) else value
        return value


def torch_forms(plan: Plan, layers: Sequence[Layer]) -> list[Contender]:
    """Dense attention as torch users write it, the form of transformers first."""
    shape, scaling = plan.shape, plan.call.scaling
    grouped = (plan.batch, shape.num_kv_heads, shape.group, shape.head_dim)
    grouping = {"enable_gqa": True} if shape.group > 1 else {}

    def sdpa(query: Tensor, keys: Tensor, values: Tensor, **more: Any) -> Tensor:
        return functional.scaled_dot_product_attention(query, keys, values, scale=scaling, **more)

    def as_transformers(index: int) -> Tensor:
        layer = layers[index]
        return sdpa(layer.query, layer.keys, layer.values, **grouping)

    def repeated(index: int) -> Tensor:
        layer = layers[index]
        keys, values = (_repeat(rows, shape.group) for rows in (layer.keys, layer.values))
        return sdpa(layer.query, keys, values)

    def group_rows(index: int) -> Tensor:
        layer = layers[index]
        out = sdpa(layer.query.view(grouped), layer.keys, layer.values)
        return out.view(layer.query.shape)

    forms: dict[str, Callable[[int], Tensor]] = {HF: as_transformers}
    if shape.group > 1:
        forms |= {"sdpa-repeat-kv": repeated, "sdpa-group-rows": group_rows}
    forms["eager-group-rows"] = _Eager(plan, layers)
    touched = plan.context * plan.row_bytes()
    return [_whole(name, "torch", form, touched) for name, form in forms.items()]


def dense_native(plan: Plan, layers: Sequence[Layer]) -> Contender:
    """Our own dense attention."""
    bound = bind(preset("dense"), plan.shape.layer(), 1, None)
    call = plan.call

    def step(index: int) -> Tensor:
        layer = layers[index]
        return attention.dense(layer.query, layer.rows, bound, call, None)

    return _whole(DENSE_NATIVE, "dense", step, plan.context * plan.row_bytes())


def exact_topk(plan: Plan, layers: Sequence[Layer], k: int) -> Contender:
    """Exact top-k: ranks by the whole keys."""
    bound = bind(preset("exact-topk", top_k=k), plan.shape.layer(), 1, None)
    call = plan.call

    def step(index: int) -> Any:
        layer = layers[index]
        return attention.decode(layer.query, layer.rows, bound, call)

    touched = plan.context * plan.row_bytes() // 2 + k * plan.row_bytes()
    return _whole(f"exact-topk k={k}", "exact", step, touched, k=k, budget=bound.budget)


def loki(plan: Plan, layers: Sequence[Layer], plane: str, k: int) -> Contender:
    """Loki, through the library's own path."""
    bound, budget = _bound(layers, plane, k)
    call = plan.call

    def step(index: int) -> Any:
        layer = layers[index]
        return attention.decode(layer.query, layer.caches[plane], bound(index), call)

    touched = sum(_loki_bytes(plan, plane, k))
    name = f"loki {plane} k={k}"
    return _whole(name, "loki", step, touched, k=k, plane=plane, budget=budget)


def loki_parts(plan: Plan, layers: Sequence[Layer], plane: str, k: int) -> Contender:
    """The same step with the time of each of its parts.

    The native kernel does all of them in one call and says what each took: the time of all threads
    together, shared out among them here. Other backends run the ops one by one.
    """
    bound, budget = _bound(layers, plane, k)
    plane_bytes, rows_bytes = _loki_bytes(plan, plane, k)
    logits_bytes = plan.batch * plan.shape.num_heads * plan.context * 4
    made = _fused_stages if backend_in_use() == "native" else _stages
    return Contender(
        name=f"loki {plane} k={k}{PARTS}",
        kind="loki",
        stages=made(plan, layers, plane, bound),
        touched_bytes=(plane_bytes, logits_bytes, rows_bytes),
        k=k,
        plane=plane,
        budget=budget,
    )


Stages = tuple[tuple[str, Callable[[Any], Any]], ...]


def _fused_stages(
    plan: Plan, layers: Sequence[Layer], plane: str, bound: Callable[[int], LayerPolicy]
) -> Stages:
    from loki_attn.kernels import native

    taken = torch.zeros(3, dtype=torch.int64)
    visible = None

    def score(index: int) -> Lap:
        own, cache = bound(index), layers[index].caches[plane]
        query, lead = layers[index].query, own.selector.lead(cache)
        if lead is None:
            raise TypeError("Loki ranks its rows by a lead; its selector has none.")
        reading = own.budget.reading(cache.length, visible)
        rows = own.selector.query_rows(query), cache.keys, cache.values
        taken.zero_()
        done = native.step(
            query, *rows, lead, reading, own.group_reduce, plan.call, visible, stages=taken
        )
        return lap(0)(done)

    def lap(stage: int) -> Callable[[Any], Lap]:
        return lambda done: Lap(done, int(taken[stage]) // native.threads())

    return ("score", score), ("choose", lap(1)), ("attend", lap(2))


def _stages(
    plan: Plan, layers: Sequence[Layer], plane: str, bound: Callable[[int], LayerPolicy]
) -> Stages:
    call, kernels, kv_heads = plan.call, ops(), plan.shape.num_kv_heads
    visible = torch.ones(1, 1, 1, plan.context, dtype=torch.bool, device=plan.device)

    def score(index: int) -> tuple[int, Tensor]:
        layer, policy = layers[index], bound(index)
        logits = policy.selector.score(layer.query, layer.caches[plane], call)
        if logits is None:
            raise TypeError("Loki scores its rows; its selector returned nothing.")
        return index, logits

    def choose(scored: tuple[int, Tensor]) -> tuple[int, Any]:
        index, logits = scored
        own = bound(index)
        scores = kernels.reduce_group(logits, kv_heads, own.group_reduce, visible, call)
        forced = kernels.protect(visible, own.budget.sinks, own.budget.recents)
        counts = own.budget.counts(visible.sum(-1))
        return index, kernels.choose(scores, counts, visible, forced)

    def attend(chosen: tuple[int, Any]) -> Any:
        index, selection = chosen
        cache = layers[index].caches[plane]
        query = bound(index).selector.query_rows(layers[index].query)
        out = kernels.attend(query, cache.keys, cache.values, selection, call)
        return out.output, selection

    return ("score", score), ("choose", choose), ("attend", attend)


@final
class _Eager:
    """Two products and a soft-max over grouped rows, into buffers that are kept."""

    def __init__(self, plan: Plan, layers: Sequence[Layer]) -> None:
        shape = plan.shape
        rows = (plan.batch, shape.num_kv_heads, shape.group)
        self._layers, self._scaling = layers, plan.call.scaling
        self._query = (*rows, shape.head_dim)
        self._logits = torch.empty(*rows, plan.context, dtype=plan.dtype, device=plan.device)
        self._out = torch.empty(self._query, dtype=plan.dtype, device=plan.device)

    def __call__(self, index: int) -> Tensor:
        layer = self._layers[index]
        query = layer.query.view(self._query)
        torch.matmul(query, layer.keys.transpose(2, 3), out=self._logits)
        self._logits.mul_(self._scaling)
        weights = torch.softmax(self._logits, -1, dtype=torch.float32).to(query.dtype)
        torch.matmul(weights, layer.values, out=self._out)
        return self._out.view(layer.query.shape)


def _whole(
    name: str, kind: Kind, step: Callable[[int], Any], touched_bytes: int, **more: Any
) -> Contender:
    return Contender(
        name=name, kind=kind, stages=(("", step),), touched_bytes=(touched_bytes,), **more
    )


def _bound(
    layers: Sequence[Layer], plane: str, k: int
) -> tuple[Callable[[int], LayerPolicy], Budget]:
    """Each layer's own Loki with this amount, made when it is first asked for."""
    budget = preset("loki", top_k=k, dense_below=0).budget

    @cache
    def own(index: int) -> LayerPolicy:
        return replace(layers[index].bound[plane], budget=budget)

    return own, budget


def _loki_bytes(plan: Plan, plane: str, k: int) -> tuple[int, int]:
    """What the lead plane with its scales and maps, and what the chosen rows come to."""
    kv_heads, dim = plan.shape.num_kv_heads, plan.shape.head_dim
    row = plan.rank * PLANE_BYTES[plane] + (SCALE_BYTES if plane in _CODED else 0)
    plane_bytes = plan.batch * kv_heads * plan.context * row
    return round(plane_bytes) + kv_heads * dim * plan.rank * _MAP_BYTES, k * plan.row_bytes()


def _repeat(rows: Tensor, group: int) -> Tensor:
    """Every KV head `group` times, neighbours together, as a copy."""
    batch, heads, seq, dim = rows.shape
    wide = rows[:, :, None].expand(batch, heads, group, seq, dim)
    return wide.reshape(batch, heads * group, seq, dim)
