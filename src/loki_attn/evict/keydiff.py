"""KeyDiff: keep the rows whose keys point away from the mean direction.

Paper: KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference in
    Resource-Constrained Environments
arXiv: 2504.15364
What it does: keeps the rows whose keys have the smallest cosine with the mean of all key
    directions; keys alike stand for each other, keys apart are attended to.
What we do differently: padding has no part in the mean direction, and a key of length 0 counts as
    orthogonal to it.
Bytes read per decode step: per KV head, capacity * (head_dim + value_dim) * b.
State per token: none.
"""

from dataclasses import dataclass
from typing import ClassVar, Final, final

import torch
from torch import Tensor
from torch.nn import functional

from loki_attn.cache import LayerCache
from loki_attn.evict.base import Evict, Evictor, Needs, Place
from loki_attn.pieces.packing import without_padding
from loki_attn.types import AttentionCall

PRESETS: Final = {
    "keydiff": {
        "select": {"method": "dense"},
        "evict": {"method": "keydiff"},
        "keep": {"capacity": 2048},
    }
}


@final
@dataclass(frozen=True, kw_only=True)
class KeyDiff(Evict):
    """Score by the cosine with the mean direction, small ones first."""

    method: ClassVar[str] = "keydiff"
    needs: ClassVar[Needs] = "keys"

    def bind(self, place: Place) -> Evictor:
        """Bind to a layer; nothing about it matters."""
        del place
        return _KeyDiff()


@final
class _KeyDiff(Evictor):
    def scores(self, cache: LayerCache, call: AttentionCall, valid: Tensor | None) -> Tensor:
        """Minus the cosine of every key with the mean direction."""
        del call
        directions = functional.normalize(without_padding(cache.keys, valid), dim=-1)
        # The length of a mean of unit vectors does not matter to a cosine: the sum will do.
        anchor = functional.normalize(directions.sum(2, keepdim=True), dim=-1)
        return -torch.matmul(directions, anchor.mT)[..., 0]
