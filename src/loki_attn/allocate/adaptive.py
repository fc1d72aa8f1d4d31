"""Ada-KV: heads of a layer keep as many rows as they have among the layer's best.

Paper: Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for Efficient LLM
    Inference
arXiv: 2407.11550
What it does: takes the best rows of all heads of a layer together, counts how many fall to each
    head, and mixes that with the even share: (1 - alpha) * own + alpha * even.
What we do differently: counts add up to heads * capacity exactly, batch row by batch row; rows that
    tie for the last places are shared in proportion, so the order of heads does not matter; the
    capacity counts the protected rows; heads are KV heads, so nothing is stored twice; each head
    holds just its rows. The preset is the released code's base capacity of 512 beside a window of
    32, kernel 7, max pooling; ada-pyramidkv adds PyramidKV's layers (beta 20).
Bytes read per decode step: per KV head, capacity * (head_dim + value_dim) * b, averaged over heads.
State per token: none; every head has a length of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Final, final

import torch
from torch import Tensor

from loki_attn.allocate.base import Allocate, Ballot
from loki_attn.errors import PolicyError
from loki_attn.pieces.pyramid import pyramid_capacities
from loki_attn.pieces.sharing import at_least_one, settle, shares_of_best

_SNAPKV: Final = {"method": "snapkv", "window": 32, "kernel": 7, "pooling": "max"}
PRESETS: Final = {
    "ada-kv": {
        "select": {"method": "dense"},
        "evict": _SNAPKV,
        "keep": {"capacity": 544},
        "allocate": {"method": "adaptive"},
    },
    "ada-pyramidkv": {
        "select": {"method": "dense"},
        "evict": _SNAPKV,
        "keep": {"capacity": 544},
        "allocate": {"method": "adaptive", "beta": 20.0},
    },
}


@final
@dataclass(frozen=True, kw_only=True)
class Adaptive(Allocate):
    """The best rows of a layer, whatever head they are of.

    Attributes:
        alpha: Share of the budget that is split evenly, in [0, 1]; 1 is uniform.
        weigh_heads: Whether a head's scores are multiplied by the share of its mass that its best
            rows capture at the even share; for scores that are never negative.
        beta: How steep a pyramid the layers form, at least 1; 1 gives every layer the same.
    """

    method: ClassVar[str] = "adaptive"
    ragged: ClassVar[bool] = True
    alpha: float = 0.2
    weigh_heads: bool = False
    beta: float = 1.0

    def __post_init__(self) -> None:
        """Refuse shares that are none."""
        if not 0 <= self.alpha <= 1:
            raise PolicyError(f"alpha is a share in [0, 1], got {self.alpha!r}.")
        if self.beta < 1:
            raise PolicyError(f"beta is at least 1, which is uniform, got {self.beta!r}.")

    def layer_capacities(
        self, capacity: Tensor, protected: int, tokens: Tensor, num_layers: int
    ) -> Tensor:
        """The same for every layer, or a pyramid; int64 [num_layers, batch]."""
        if self.beta == 1:
            return capacity.expand(num_layers, -1)
        return pyramid_capacities(capacity, protected, tokens, num_layers, self.beta)

    def counts(self, ballots: Sequence[Ballot]) -> list[Tensor]:
        """Per layer, how many of its best rows fall to each head, and a share of the even split."""
        return [self._of_layer(ballot) for ballot in ballots]

    def _of_layer(self, ballot: Ballot) -> Tensor:
        heads = ballot.held.shape[1]
        total = ballot.capacity * heads
        protected = ballot.protected & ballot.valid
        scores = ballot.scores
        if self.weigh_heads:
            rows = (total - protected.sum((-2, -1))).clamp(min=0) // heads
            scores = scores * captured_mass(scores, ballot.valid & ~protected, rows)[..., None]
        protected = at_least_one(protected, scores, ballot.valid)
        free, fixed = ballot.valid & ~protected, protected.sum(-1)
        left = (total - fixed.sum(-1)).clamp(min=0)
        even = left.double()[:, None] / heads
        wishes = fixed + (1 - self.alpha) * shares_of_best(scores, free, left) + self.alpha * even
        favour = ballot.scores.masked_fill(~free, 0.0).sum(-1)
        return settle(wishes, total, fixed, ballot.valid.sum(-1), ballot.held, favour)


def captured_mass(scores: Tensor, free: Tensor, rows: Tensor) -> Tensor:
    """Return the share of each head's mass that its best rows hold.

    Args:
        scores: float [batch, kv_heads, length], not negative.
        free: bool [batch, kv_heads, length]: rows that count.
        rows: int64 [batch]: how many of the best.

    Returns:
        float [batch, kv_heads], in [0, 1]; 1 for a head without mass.
    """
    mass = scores.nan_to_num(nan=0.0).clamp(min=0).masked_fill(~free, 0.0)
    ranked = mass.sort(-1, descending=True).values
    best = torch.arange(mass.shape[-1], device=mass.device) < rows[:, None, None]
    whole = ranked.sum(-1)
    return torch.where(whole > 0, (ranked * best).sum(-1) / whole.clamp(min=1e-30), 1.0)
