"""ChunkKV: keep whole chunks of neighbouring rows.

Paper: ChunkKV: Semantic-Preserving KV Cache Compression for Efficient Long-Context LLM Inference
arXiv: 2502.00299
What it does: cuts the rows into chunks of 20, judges a chunk by the mean attention that the last
    queries of all heads give its rows, and keeps the best chunks whole, the same for all heads.
What we do differently: the amount is kept to the row: chunks with a row that stays anyway come
    first, and what is left when the next chunk does not fit goes to the most recent rows, so at
    most one chunk is cut. Every batch row has its own chunks, counted from its first real token.
    The indices are not reused by other layers.
Bytes read per decode step: per KV head, capacity * (head_dim + value_dim) * b.
State per token: none; the last `window` queries of a layer.
"""

from dataclasses import dataclass
from typing import ClassVar, Final, final

from torch import Tensor

from loki_attn.cache import LayerCache
from loki_attn.errors import PolicyError
from loki_attn.evict.base import Attended, Evict, Evictor, Needs, Place
from loki_attn.pieces.prefix_scores import prefix_scores
from loki_attn.pieces.queries import remember_queries
from loki_attn.pieces.reduction import over_layer
from loki_attn.pieces.units import judge_units, keep_units
from loki_attn.types import AttentionCall

PRESETS: Final = {
    "chunkkv": {
        "select": {"method": "dense"},
        "evict": {"method": "chunkkv"},
        "keep": {"capacity": 2048},
    }
}


@final
@dataclass(frozen=True, kw_only=True)
class ChunkKV(Evict):
    """Score chunks by the last queries' attention.

    Attributes:
        chunk: Rows that are kept or dropped together.
        window: Last queries that judge, whose rows stay.
    """

    method: ClassVar[str] = "chunkkv"
    needs: ClassVar[Needs] = "attention of the last queries"
    chunk: int = 20
    window: int = 32

    def __post_init__(self) -> None:
        """Refuse chunks without rows and windows that judge nothing."""
        if self.chunk < 1:
            raise PolicyError(f"ChunkKV keeps chunks of at least one row, got chunk={self.chunk}.")
        if self.window < 1:
            raise PolicyError(f"ChunkKV needs a window of at least one query, got {self.window}.")

    def bind(self, place: Place) -> Evictor:
        """Bind to a layer; nothing about it matters."""
        del place
        return _ChunkKV(self)


@final
class _ChunkKV(Evictor):
    def __init__(self, spec: ChunkKV) -> None:
        self._spec = spec

    def observe(self, cache: LayerCache, seen: Attended) -> None:
        """Remember the last queries."""
        remember_queries(cache, seen, self._spec.window)

    def scores(self, cache: LayerCache, call: AttentionCall, valid: Tensor | None) -> Tensor:
        """Mean attention of a row's chunk, for the whole layer."""
        spec = self._spec
        received = prefix_scores(
            cache, call, valid, window=spec.window, kernel=1, pooling="avg", reduce="mean"
        )
        return judge_units(over_layer(received), valid, spec.chunk)

    def keep(self, scores: Tensor, counts: Tensor, protected: Tensor, valid: Tensor) -> Tensor:
        """Whole chunks."""
        return keep_units(scores, counts, protected, valid, self._spec.chunk)
