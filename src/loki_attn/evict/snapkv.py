"""SnapKV: keep what the last queries of the prompt attend to.

Paper: SnapKV: LLM Knows What You are Looking for Before Generation
arXiv: 2404.14469
What it does: sums the attention of the last `window` queries to every earlier row, pools it over
    neighbours, keeps the best rows of the prompt and the window itself.
What we do differently: one choice per KV head from the mean over its query heads, so that nothing
    is stored twice under grouped-query attention; rows stay in order and keep their positions; the
    capacity counts the window, as the paper's does; only rows before the window are pooled, and an
    average at an end is over the rows that are there (count_include_pad is off, which the released
    code leaves on); the queries are remembered across chunks of a prompt, so with when="prompt" the
    choice does not depend on how it was cut. The preset has the LongBench configuration: window 32,
    kernel 7, max pooling, capacity 2048 (the paper's tables have 1024 and 4096 besides); its needle
    test has window 16, kernel 5, capacity 1024, the released class averages over 5 with window 64.
Bytes read per decode step: per KV head, capacity * (head_dim + value_dim) * b.
State per token: none; the last `window` queries of a layer.
"""

from dataclasses import dataclass
from typing import ClassVar, Final, Literal, final

from torch import Tensor

from loki_attn.cache import LayerCache
from loki_attn.errors import PolicyError
from loki_attn.evict.base import Attended, Evict, Evictor, Needs, Place
from loki_attn.pieces.prefix_scores import prefix_scores
from loki_attn.pieces.queries import remember_queries
from loki_attn.pieces.reduction import Reduction
from loki_attn.types import AttentionCall

PRESETS: Final = {
    "snapkv": {
        "select": {"method": "dense"},
        "evict": {"method": "snapkv", "window": 32, "kernel": 7, "pooling": "max"},
        "keep": {"capacity": 2048},
    }
}


@final
@dataclass(frozen=True, kw_only=True)
class SnapKV(Evict):
    """Score by the last queries' attention.

    Attributes:
        window: Last queries that judge, whose rows stay (`window` of the paper's w).
        kernel: Neighbours that are pooled, an odd number; 1 pools nothing.
        pooling: "avg" or "max".
        reduce: How the query heads of a group agree: "mean", "max" or "sum".
    """

    method: ClassVar[str] = "snapkv"
    needs: ClassVar[Needs] = "attention of the last queries"
    window: int = 32
    kernel: int = 5
    pooling: Literal["avg", "max"] = "avg"
    reduce: Reduction = "mean"

    def __post_init__(self) -> None:
        """Refuse windows and kernels that judge nothing."""
        if self.window < 1:
            raise PolicyError(f"SnapKV needs a window of at least one query, got {self.window}.")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise PolicyError(f"SnapKV pools over an odd number of rows, got kernel={self.kernel}.")

    def bind(self, place: Place) -> Evictor:
        """Bind to a layer; nothing about it matters."""
        del place
        return _SnapKV(self)


@final
class _SnapKV(Evictor):
    def __init__(self, spec: SnapKV) -> None:
        self._spec = spec

    def observe(self, cache: LayerCache, seen: Attended) -> None:
        """Remember the last queries."""
        remember_queries(cache, seen, self._spec.window)

    def scores(self, cache: LayerCache, call: AttentionCall, valid: Tensor | None) -> Tensor:
        """Attention of the window, over the group, pooled."""
        spec = self._spec
        return prefix_scores(
            cache,
            call,
            valid,
            window=spec.window,
            kernel=spec.kernel,
            pooling=spec.pooling,
            reduce=spec.reduce,
        )
