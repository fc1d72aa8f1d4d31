"""WindowKV: keep whole windows of rows, judged as the task wants it; neighbouring layers agree.

Paper: WindowKV: Task-Adaptive Group-Wise KV Cache Window Selection for Efficient LLM Inference
arXiv: 2503.17922
What it does: cuts the rows into windows of 8, judges a window by the attention of the prompt's last
    queries, averaged over all heads, and keeps the best windows whole. Tasks that look one thing up
    judge by the better half of a window ("max"), tasks that draw on everything by its mean. Layers
    in groups of 8 keep what the first of them keeps, fewer from group to group.
What we do differently: no classifier chooses the strategy, it is a field. One choice is stored
    once, not per query head. What one layer kept is handed on within one forward of one request, so
    a later prompt cannot meet stale indices; the first layer of a group that evicts leads it, and
    where a layer holds other rows than its leader it chooses for itself. A group keeps the mean of
    what PyramidKV's allocation gives its layers (beta 14), which is a little less steep than the
    paper's steps from group to group. The capacity is kept to the row: what is left when the next
    window does not fit goes to the most recent rows.
Bytes read per decode step: per KV head, capacity * (head_dim + value_dim) * b.
State per token: none; the last `suffix` queries of a layer.
"""

from dataclasses import dataclass
from typing import ClassVar, Final, Literal, final, get_args

from torch import Tensor

from loki_attn.cache import LayerCache
from loki_attn.errors import PolicyError, unknown_name
from loki_attn.evict.base import Attended, Evict, Evictor, Needs, Place
from loki_attn.pieces.prefix_scores import prefix_scores
from loki_attn.pieces.queries import remember_queries
from loki_attn.pieces.reduction import over_layer
from loki_attn.pieces.units import judge_units, keep_units
from loki_attn.types import AttentionCall

Strategy = Literal["max", "mean"]
"""How a window is judged: the mean of the better half of its rows, or of all of them."""

PRESETS: Final = {
    "windowkv": {
        "select": {"method": "dense"},
        "evict": {"method": "windowkv"},
        "keep": {"capacity": 2048},
        "allocate": {"method": "pyramid", "beta": 14.0},
    }
}


@final
@dataclass(frozen=True, kw_only=True)
class WindowKV(Evict):
    """Score windows by the last queries' attention.

    Attributes:
        unit: Rows that are kept or dropped together (the paper's window).
        suffix: Last queries that judge, whose rows stay.
        strategy: "max" to look things up, "mean" to draw on everything.
        layers: Neighbouring layers that keep the same rows; 1 lets every layer choose.
    """

    method: ClassVar[str] = "windowkv"
    needs: ClassVar[Needs] = "attention of the last queries"
    unit: int = 8
    suffix: int = 32
    strategy: Strategy = "max"
    layers: int = 8

    def __post_init__(self) -> None:
        """Refuse sizes of nothing and unknown strategies."""
        for name in ("unit", "suffix", "layers"):
            if getattr(self, name) < 1:
                raise PolicyError(
                    f"WindowKV counts {name} from 1, got {name}={getattr(self, name)}."
                )
        if self.strategy not in get_args(Strategy):
            raise unknown_name("strategy", self.strategy, get_args(Strategy))

    @property
    def window(self) -> int:
        """The suffix stays."""
        return self.suffix

    def leader(self, layer: int) -> int:
        """The first layer of a layer's group."""
        return layer - layer % self.layers

    def bind(self, place: Place) -> Evictor:
        """Bind to a layer; nothing about it matters."""
        del place
        return _WindowKV(self)


@final
class _WindowKV(Evictor):
    def __init__(self, spec: WindowKV) -> None:
        self._spec = spec

    def observe(self, cache: LayerCache, seen: Attended) -> None:
        """Remember the last queries."""
        remember_queries(cache, seen, self._spec.suffix)

    def scores(self, cache: LayerCache, call: AttentionCall, valid: Tensor | None) -> Tensor:
        """Judgement of a row's window, for the whole layer."""
        spec = self._spec
        how: Literal["mean", "best_half"] = "best_half" if spec.strategy == "max" else "mean"
        received = prefix_scores(
            cache, call, valid, window=spec.suffix, kernel=1, pooling="avg", reduce="mean"
        )
        return judge_units(over_layer(received), valid, spec.unit, how)

    def keep(self, scores: Tensor, counts: Tensor, protected: Tensor, valid: Tensor) -> Tensor:
        """Whole windows."""
        return keep_units(scores, counts, protected, valid, self._spec.unit)
