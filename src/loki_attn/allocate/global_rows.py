"""Global: one threshold over all layers and heads, so the best rows of the whole model stay.

Paper: KVzip: Query-Agnostic KV Cache Compression with Context Reconstruction (its head-wise budget)
arXiv: 2505.23416
What it does: ranks the rows of all layers and heads together and keeps the best of them.
What we do differently: counts add up exactly; rows that tie at the threshold are shared in
    proportion (a strict threshold drops all of them); protected rows count; a head keeps at least
    one row; `alpha` may split a share of the budget evenly, as Ada-KV does within a layer.
Bytes read per decode step: per KV head, capacity * (head_dim + value_dim) * b, averaged over layers
    and heads.
State per token: none; every head has a length of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from torch import Tensor
from torch.nn import functional

from loki_attn.allocate.base import Allocate, Ballot
from loki_attn.errors import PolicyError
from loki_attn.pieces.sharing import at_least_one, settle, shares_of_best


@final
@dataclass(frozen=True, kw_only=True)
class GlobalRows(Allocate):
    """The best rows of the model, whatever layer and head they are of.

    Scores of different layers must be comparable: attention is, norms of keys are not.

    Attributes:
        alpha: Share of the budget that is split evenly over layers and heads, in [0, 1].
    """

    method: ClassVar[str] = "global_rows"
    scope: ClassVar[Literal["layer", "model"]] = "model"
    ragged: ClassVar[bool] = True
    alpha: float = 0.0

    def __post_init__(self) -> None:
        """Refuse a share that is none."""
        if not 0 <= self.alpha <= 1:
            raise PolicyError(f"alpha is a share in [0, 1], got {self.alpha!r}.")

    def counts(self, ballots: Sequence[Ballot]) -> list[Tensor]:
        """How many of the model's best rows fall to each head of each layer."""
        scores = _of_all([b.scores for b in ballots], float("-inf"))
        valid = _of_all([b.valid for b in ballots], 0.0)
        protected = _of_all([b.protected for b in ballots], 0.0) & valid
        protected = at_least_one(protected, scores, valid)
        held = torch.cat([b.held.to(scores.device) for b in ballots], 1)
        heads = [b.held.shape[1] for b in ballots]
        totals = [b.capacity.to(scores.device) * n for b, n in zip(ballots, heads, strict=True)]
        total = torch.stack(totals).sum(0)
        fixed, real, free = protected.sum(-1), valid.sum(-1), valid & ~protected
        left = (total - fixed.sum(-1)).clamp(min=0)
        even = left.double()[:, None] / sum(heads)
        wishes = fixed + (1 - self.alpha) * shares_of_best(scores, free, left) + self.alpha * even
        favour = scores.masked_fill(~free, 0.0).sum(-1)
        counts = torch.split(settle(wishes, total, fixed, real, held, favour), heads, 1)
        return [own.to(b.held.device) for own, b in zip(counts, ballots, strict=True)]


def _of_all(parts: Sequence[Tensor], fill: float) -> Tensor:
    """The heads of all layers side by side, the shorter ones filled up."""
    longest = max(part.shape[-1] for part in parts)
    device = parts[0].device
    padded = [
        functional.pad(part.to(device), (0, longest - part.shape[-1]), value=fill) for part in parts
    ]
    return torch.cat(padded, 1)
