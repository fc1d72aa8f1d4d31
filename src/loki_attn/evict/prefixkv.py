"""PrefixKV: keep what all queries attended to most, as many rows per layer as hold the same mass.

Paper: PrefixKV: Adaptive Prefix KV Cache is What Vision Instruction-Following Models Need for
    Efficient Generation
arXiv: 2412.03409
What it does: ranks a layer's rows by the attention they received from all queries so far, averaged
    over heads; all heads keep the same rows. With the allocation "prefix_mass" (the preset), every
    layer keeps the shortest prefix of its ranking that holds the same share of the mass.
What we do differently: layers share the budget online, or by a `table` made from samples; budgets
    are what is kept, where the released files hold what is removed; queries of padding count
    nothing. The paper drops the row 25 from the end at every decode step, whatever it is worth, and
    one even where several should go. Here decoded rows stay, or with when="step" and a burst rows
    are judged again by all attention so far, high and low water; first 4 and last 25 rows stay.
Bytes read per decode step: per KV head, capacity * (head_dim + value_dim) * b, on average over
    layers.
State per token: 4 bytes per KV head.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final, final

import torch
from torch import Tensor

from loki_attn.cache import LayerCache
from loki_attn.evict.base import Attended, Evict, Evictor, Needs, Place
from loki_attn.kernels import ops
from loki_attn.pieces.real_tokens import seen_by_real
from loki_attn.row_format import Mark
from loki_attn.types import AttentionCall

PRESETS: Final = {
    "prefixkv": {
        "select": {"method": "dense"},
        "evict": {"method": "prefixkv"},
        "keep": {"keep_share": 0.5, "keep_first": 4, "keep_last": 25},
        "allocate": {"method": "prefix_mass"},
    }
}

_IMPORTANCE: Final = "prefixkv_importance"


@final
@dataclass(frozen=True, kw_only=True)
class PrefixKV(Evict):
    """Score by the attention of all queries, one set for all heads of a layer."""

    method: ClassVar[str] = "prefixkv"
    needs: ClassVar[Needs] = "attention of all queries"

    def bind(self, place: Place) -> Evictor:
        """Bind to a layer; nothing about it matters."""
        del place
        return _PrefixKV()


@final
class _PrefixKV(Evictor):
    wants_weights: ClassVar[bool] = True

    def marks(self) -> Mapping[str, Mark]:
        """Attention received so far, the same for all heads."""
        return {_IMPORTANCE: Mark(torch.float32)}

    def observe(self, cache: LayerCache, seen: Attended) -> None:
        """Add what every row received of these queries, averaged over query heads."""
        if seen.weights is not None:
            group = seen.query.shape[1] // cache.keys.shape[1]
            received = seen.weights.mean(1, keepdim=True) / group
        else:
            visible = seen_by_real(seen)
            sums = ops().column_sums(seen.query, cache.keys, visible, seen.call)
            received = sums.mean(1, keepdim=True)
        cache.plane(_IMPORTANCE).add_(received)

    def scores(self, cache: LayerCache, call: AttentionCall, valid: Tensor | None) -> Tensor:
        """What was received."""
        del call, valid
        return cache.plane(_IMPORTANCE)
