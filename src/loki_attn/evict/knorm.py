"""Knorm: keep the rows with the smallest keys.

Paper: A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression
arXiv: 2406.11430
What it does: keeps the rows whose keys have the smallest L2 norm, which tend to be those that are
    attended to.
What we do differently: no layer is spared; the paper leaves the first layers alone, which
    `whole_layers` does here. Norms are float32 whatever the keys are.
Bytes read per decode step: per KV head, capacity * (head_dim + value_dim) * b.
State per token: none.
"""

from dataclasses import dataclass
from typing import ClassVar, Final, final

import torch
from torch import Tensor

from loki_attn.cache import LayerCache
from loki_attn.evict.base import Evict, Evictor, Needs, Place
from loki_attn.types import AttentionCall

PRESETS: Final = {
    "knorm": {
        "select": {"method": "dense"},
        "evict": {"method": "knorm"},
        "keep": {"capacity": 2048},
    }
}


@final
@dataclass(frozen=True, kw_only=True)
class Knorm(Evict):
    """Score by the norm of the key, small ones first."""

    method: ClassVar[str] = "knorm"
    needs: ClassVar[Needs] = "keys"

    def bind(self, place: Place) -> Evictor:
        """Bind to a layer; nothing about it matters."""
        del place
        return _Knorm()


@final
class _Knorm(Evictor):
    def scores(self, cache: LayerCache, call: AttentionCall, valid: Tensor | None) -> Tensor:
        """Minus the norm of every key."""
        del call, valid
        norms: Tensor = torch.linalg.vector_norm(cache.keys, dim=-1, dtype=torch.float32)
        return -norms
