"""KVCrush: keep the important rows, and a few that stand for the others.

Paper: KVCrush: Key value cache size-reduction using similarity in head-behaviour
arXiv: 2503.00022
What it does: describes a row by one bit per head, whether the head would keep it. Most of the
    budget goes to the best rows; the rest to representatives of those that would be dropped, taken
    at even steps from their order by Hamming distance to an anchor.
What we do differently: one bit per KV head (a group's query heads agree first), so that the rows
    are chosen per stored head, the same for all of them; rows are judged by SnapKV's window score
    (window 32, kernel 7, max pooling in the preset); both shares are of the budget that is left
    beside the rows that stay anyway. Equal distances go by position. Rows are described, not blocks
    as in the OpenVINO code, whose bits are those of positions.
Bytes read per decode step: per KV head, capacity * (head_dim + value_dim) * b.
State per token: none; the last `window` queries of a layer.
"""

from dataclasses import dataclass
from typing import ClassVar, Final, Literal, final, get_args

import torch
from torch import Tensor

from loki_attn.cache import LayerCache
from loki_attn.errors import PolicyError, unknown_name
from loki_attn.evict.base import Attended, Evict, Evictor, Needs, Place, best
from loki_attn.pieces.prefix_scores import prefix_scores
from loki_attn.pieces.queries import remember_queries
from loki_attn.pieces.reduction import Reduction, over_layer
from loki_attn.types import AttentionCall

Anchor = Literal["mean", "zeros", "ones", "alternate", "random"]
"""The bits that distances are measured from; "mean" is the majority of the rows not important."""

PRESETS: Final = {
    "kvcrush": {
        "select": {"method": "dense"},
        "evict": {"method": "kvcrush", "window": 32, "kernel": 7, "pooling": "max"},
        "keep": {"capacity": 2048},
    }
}


@final
@dataclass(frozen=True, kw_only=True)
class KVCrush(Evict):
    """Score by the last queries' attention, keep important rows and representatives.

    Attributes:
        window: Last queries that judge, whose rows stay.
        kernel: Neighbours that are pooled, an odd number; 1 pools nothing.
        pooling: "avg" or "max".
        reduce: How the query heads of a group agree: "mean", "max" or "sum".
        representatives: Share of the budget for representatives, in [0, 1].
        anchor: Where distances start.
        seed: Of the random anchor.
    """

    method: ClassVar[str] = "kvcrush"
    needs: ClassVar[Needs] = "attention of the last queries"
    window: int = 32
    kernel: int = 5
    pooling: Literal["avg", "max"] = "avg"
    reduce: Reduction = "mean"
    representatives: float = 0.25
    anchor: Anchor = "mean"
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse windows, kernels, shares and anchors that mean nothing."""
        if self.window < 1:
            raise PolicyError(f"KVCrush needs a window of at least one query, got {self.window}.")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise PolicyError(f"KVCrush pools over an odd number of rows, got {self.kernel}.")
        if not 0 <= self.representatives <= 1:
            raise PolicyError(
                f"representatives is a share of the budget in [0, 1], got {self.representatives}."
            )
        if self.anchor not in get_args(Anchor):
            raise unknown_name("anchor", self.anchor, get_args(Anchor))

    def bind(self, place: Place) -> Evictor:
        """Bind to a layer, whose KV heads get their bit of the anchor."""
        return _KVCrush(self, _fixed_anchor(self, place.shape.num_kv_heads))


@final
class _KVCrush(Evictor):
    def __init__(self, spec: KVCrush, anchor: Tensor | None) -> None:
        self._spec = spec
        self._anchor = anchor

    def observe(self, cache: LayerCache, seen: Attended) -> None:
        """Remember the last queries."""
        remember_queries(cache, seen, self._spec.window)

    def scores(self, cache: LayerCache, call: AttentionCall, valid: Tensor | None) -> Tensor:
        """Attention of the window, over the group, pooled; heads still apart."""
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

    def keep(self, scores: Tensor, counts: Tensor, protected: Tensor, valid: Tensor) -> Tensor:
        """Important rows by the mean over heads, then representatives of the others."""
        forced = protected & valid
        room = counts.minimum(valid.sum(-1)) - forced.sum(-1)
        chosen = (room * self._spec.representatives).long()
        together = over_layer(scores.nan_to_num(nan=0.0).masked_fill(~valid, 0.0))
        important = best(together, counts - chosen, protected, valid)
        bits = best(scores, counts, protected, valid)
        others = valid & ~important
        distance = self._distances(bits, others)
        marked = important | _evenly(distance, others, chosen)
        # Exactly these; and padding, where the real rows are too few.
        return best(together, counts, marked, valid)

    def narrowed(self, heads: Tensor) -> Evictor:
        """The same, with the anchor's bits of these heads."""
        return self if self._anchor is None else _KVCrush(self._spec, self._anchor[heads.cpu()])

    def _distances(self, bits: Tensor, others: Tensor) -> Tensor:
        """Hamming distances to the anchor, [batch, kv_heads, length]: seen from each head's rows.

        Every head has its own candidates, where heads keep different numbers of rows.
        """
        if self._anchor is not None:
            anchor = self._anchor.to(bits.device)[None, None, :, None]
        else:
            ones = torch.einsum("brt,bht->brh", others.float(), bits.float())
            anchor = (2 * ones >= others.sum(-1)[..., None])[..., None]
        apart = bits[:, None] != anchor
        return apart.sum(2).expand(others.shape)


def _fixed_anchor(spec: KVCrush, num_kv_heads: int) -> Tensor | None:
    """The anchor's bit for every KV head, bool [kv_heads]; None where the rows settle it."""
    if spec.anchor == "mean":
        return None
    if spec.anchor == "random":
        draw = torch.Generator().manual_seed(spec.seed)
        return torch.rand(num_kv_heads, generator=draw) < 0.5
    if spec.anchor == "alternate":
        return torch.arange(num_kv_heads) % 2 == 1
    return torch.full((num_kv_heads,), spec.anchor == "ones")


def _evenly(distance: Tensor, others: Tensor, chosen: Tensor) -> Tensor:
    """Mark `chosen` of the candidates, at even steps in the order of distance, then position."""
    far = distance.masked_fill(~others, torch.iinfo(distance.dtype).max)
    order = far.argsort(dim=-1, stable=True)
    there = others.sum(-1, keepdim=True).clamp(min=1)
    place = torch.arange(others.shape[-1], device=others.device)
    amount = chosen[..., None]
    # The step from place to place + 1 passes a whole number exactly `chosen` times.
    step = ((place + 1) * amount).div(there, rounding_mode="floor") - (place * amount).div(
        there, rounding_mode="floor"
    )
    picked = (step > 0) & (place < there)
    return torch.empty_like(others).scatter_(-1, order, picked) & others
