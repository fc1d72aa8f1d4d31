"""StreamingLLM's reading pattern: sinks and recents, whatever the query is.

Paper: Efficient Streaming Language Models with Attention Sinks
arXiv: 2309.17453
What it does: every query reads the first few tokens and a window of the last ones.
What we do differently: it is a selection here, so nothing is evicted and true positions stay;
    it reads what StreamingLLM would have kept, but frees no memory. The budget's amount is filled
    up with recents.
Bytes read per decode step: per KV head, k * (head_dim + value_dim) * b.
State per token: none.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from loki_attn.basis import LayerBasis
from loki_attn.cache import LayerCache
from loki_attn.select.base import Select, Selector
from loki_attn.types import LayerShape, Lead


@final
@dataclass(frozen=True, kw_only=True)
class StreamingLLM(Select):
    """Read sinks and recents only."""

    method: ClassVar[str] = "streaming_llm"
    estimates_mass: ClassVar[bool] = False

    def bind(
        self,
        shape: LayerShape,
        basis: LayerBasis | None = None,
        profile: Mapping[str, Tensor] | None = None,
    ) -> Selector:
        """Bind to a layer; neither its sizes nor a basis matter."""
        del shape, basis, profile
        return _StreamingSelector()


@final
class _StreamingSelector(Selector):
    def lead(self, cache: LayerCache) -> Lead:
        """Recency: the budget is filled up with the last rows, whatever the query is."""
        del cache
        return Lead(None)

    def score_bytes(self, cache: LayerCache) -> int:
        """Nothing is read to choose."""
        del cache
        return 0
