"""TOVA: keep what the last query attends to, one set of rows for all heads of a layer.

Paper: Transformers are Multi-State RNNs
arXiv: 2401.06104
What it does: judges every row by the attention of the last query, averaged over all heads of the
    layer; whenever there are more rows than the budget, the lowest go.
What we do differently: nothing but the order of work: rows stay in order and keep their positions.
    No row is protected, not even the newest, which is judged by its own query; padding is nobody's
    last query. Under a selection that ranks all rows by logits, a step judges by its estimated
    weights. With `burst`, many rows are dropped by one query. An allocation that gives heads
    different numbers of rows keeps one order, but not one set.
Bytes read per decode step: per KV head, capacity * (head_dim + value_dim) * b, and the keys once
    more at an eviction where the attention hands out no weights.
State per token: none; one query per layer, or its weights.
"""

from dataclasses import dataclass
from typing import ClassVar, Final, final

from torch import Tensor

from loki_attn.cache import LayerCache
from loki_attn.evict.base import Attended, Evict, Evictor, Needs, Place
from loki_attn.pieces.queries import remember_queries, window_sums
from loki_attn.pieces.real_tokens import real_queries
from loki_attn.pieces.reduction import over_layer
from loki_attn.types import AttentionCall

PRESETS: Final = {
    "tova": {
        "select": {"method": "dense"},
        "evict": {"method": "tova"},
        "keep": {"capacity": 2048},
    }
}

_WEIGHTS: Final = "last_weights"


@final
@dataclass(frozen=True, kw_only=True)
class TOVA(Evict):
    """Score by the last query's attention."""

    method: ClassVar[str] = "tova"
    needs: ClassVar[Needs] = "attention of the last queries"
    each_step: ClassVar[bool] = True

    def bind(self, place: Place) -> Evictor:
        """Bind to a layer; only the size of a group matters."""
        return _TOVA(place.shape.group)


@final
class _TOVA(Evictor):
    wants_weights: ClassVar[bool] = True

    def __init__(self, group: int) -> None:
        self._group = group

    def observe(self, cache: LayerCache, seen: Attended) -> None:
        """Remember the last query, and its weights where they cost nothing."""
        remember_queries(cache, seen, 1)
        real = real_queries(seen)
        if seen.weights is None or not (real is None or bool(real.all())):
            cache.chosen.pop(_WEIGHTS, None)
        else:
            cache.chosen[_WEIGHTS] = seen.weights.clone()

    def scores(self, cache: LayerCache, call: AttentionCall, valid: Tensor | None) -> Tensor:
        """The mean over all query heads, for every head."""
        weights = cache.chosen.get(_WEIGHTS)
        if weights is not None:
            return over_layer(weights / self._group)
        judged = over_layer(window_sums(cache, call, valid))
        return judged[:, : cache.keys.shape[1]]
