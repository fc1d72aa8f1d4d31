"""Keep everything: no eviction.

Paper: none; the identity of this verb
arXiv: -
What it does: keeps every row.
What we do differently: nothing.
Bytes read per decode step: those of the selection, over all T rows.
State per token: none.
"""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from loki_attn.cache import LayerCache
from loki_attn.evict.base import Evict, Evictor, Needs, Place
from loki_attn.types import AttentionCall


@final
@dataclass(frozen=True, kw_only=True)
class KeepAll(Evict):
    """Drop nothing."""

    method: ClassVar[str] = "keep_all"
    needs: ClassVar[Needs] = "nothing"

    def bind(self, place: Place) -> Evictor:
        """Bind to a layer; nothing about it matters."""
        del place
        return _KeepAll()


@final
class _KeepAll(Evictor):
    def scores(self, cache: LayerCache, call: AttentionCall, valid: Tensor | None) -> Tensor:
        """All rows alike."""
        del call, valid
        return torch.zeros(cache.positions.shape)
