"""Exact top-k: rank the rows by their true logits.

Paper: none; the upper bound that every ranking method is measured against.
arXiv: 2406.02542, section 5 ("Exact-TopK")
What it does: computes q.k in full, keeps the best k rows, attends to them exactly.
What we do differently: the query heads of a group share one choice by default.
Bytes read per decode step: per KV head, T * head_dim * b for the keys and k * (head_dim +
    value_dim) * b for the chosen rows.
State per token: none.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from loki_attn.basis import LayerBasis
from loki_attn.cache import KEY, LayerCache
from loki_attn.select.base import Select, Selector
from loki_attn.types import LayerShape, Lead


@final
@dataclass(frozen=True, kw_only=True)
class ExactTopK(Select):
    """Rank by the true logits."""

    method: ClassVar[str] = "exact_topk"

    def bind(
        self,
        shape: LayerShape,
        basis: LayerBasis | None = None,
        profile: Mapping[str, Tensor] | None = None,
    ) -> Selector:
        """Bind to a layer; neither its sizes nor a basis matter."""
        del shape, basis, profile
        return _ExactTopKSelector()


@final
class _ExactTopKSelector(Selector):
    def lead(self, cache: LayerCache) -> Lead:
        """All coordinates of the keys themselves."""
        return Lead(cache.keys)

    def score_bytes(self, cache: LayerCache) -> int:
        """A whole key row."""
        return cache.row_bytes(KEY)
