"""Dense: every query reads every row. The identity of this room.

Paper: none
arXiv: none
What it does: standard attention.
What we do differently: nothing.
Bytes read per decode step: per KV head, T * (head_dim + value_dim) * b.
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
class Dense(Select):
    """Read everything; a budget with an amount does not fit it."""

    method: ClassVar[str] = "dense"

    def bind(
        self,
        shape: LayerShape,
        basis: LayerBasis | None = None,
        profile: Mapping[str, Tensor] | None = None,
    ) -> Selector:
        """Bind to a layer; neither its sizes nor a basis matter."""
        del shape, basis, profile
        return _DenseSelector()


@final
class _DenseSelector(Selector):
    def lead(self, cache: LayerCache) -> Lead:
        """Nothing to choose: all rows are read."""
        del cache
        return Lead(None)

    def score_bytes(self, cache: LayerCache) -> int:
        """Nothing is read to choose."""
        del cache
        return 0
