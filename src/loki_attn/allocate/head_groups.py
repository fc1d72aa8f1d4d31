"""Head groups: heads that deserve more, by the eviction's own judgement, keep more rows.

Paper: UNComp: Uncertainty-Aware Long-Context Compressor (its budgets by head group)
arXiv: 2410.03090
What it does: ranks the KV heads of a layer, cuts the ranking into groups of equal size, and gives
    the groups capacities in equal steps, the best one `ratio` times that of the worst.
What we do differently: rows add up to heads * capacity exactly, where the released code keeps
    3/4 and 3/2 of the nominal number, 1.125 times on average; the ratio of the two, 2, is kept.
    Heads that tie share their groups' capacities. Groups are of KV heads.
Bytes read per decode step: per KV head, capacity * (head_dim + value_dim) * b, averaged over heads.
State per token: none; every group has a length of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from loki_attn.allocate.base import Allocate, Ballot
from loki_attn.errors import PolicyError
from loki_attn.pieces.sharing import settle


@final
@dataclass(frozen=True, kw_only=True)
class HeadGroups(Allocate):
    """Capacities by the rank of a head in its layer.

    Attributes:
        groups: Groups of heads; 1 gives every head the same, more than heads one head each.
        ratio: Capacity of the best group, as a multiple of that of the worst; at least 1.
    """

    method: ClassVar[str] = "head_groups"
    ragged: ClassVar[bool] = True
    weighs_heads: ClassVar[bool] = True
    groups: int = 2
    ratio: float = 2.0

    def __post_init__(self) -> None:
        """Refuse groups that are none."""
        if isinstance(self.groups, bool) or self.groups < 1:
            raise PolicyError(f"Heads fall into at least one group, got groups={self.groups!r}.")
        if not 1 <= self.ratio < float("inf"):
            raise PolicyError(f"ratio is at least 1, which is uniform, got {self.ratio!r}.")

    def counts(self, ballots: Sequence[Ballot]) -> list[Tensor]:
        """Each head's share of its layer, by the group it is in.

        Raises:
            PolicyError: If the eviction does not judge heads.
        """
        return [self._of_layer(ballot) for ballot in ballots]

    def _of_layer(self, ballot: Ballot) -> Tensor:
        if ballot.head_weights is None:
            raise PolicyError(
                "head_groups needs an eviction that judges heads, and this one does not: use "
                "evict='uncomp', or allocate='adaptive', which goes by the scores."
            )
        weights = ballot.head_weights.to(ballot.scores.device)
        wishes = ballot.capacity.double()[:, None] * group_shares(weights, self.groups, self.ratio)
        fixed = (ballot.protected & ballot.valid).sum(-1)
        total = ballot.capacity * ballot.held.shape[1]
        return settle(wishes, total, fixed, ballot.valid.sum(-1), ballot.held, weights)


def group_shares(weights: Tensor, groups: int, ratio: float) -> Tensor:
    """Return each head's share of the mean capacity, by its rank.

    Args:
        weights: float [batch, heads]: higher deserves more.
        groups: Groups of heads.
        ratio: Share of the best group over that of the worst.

    Returns:
        float64 [batch, heads] with a mean of 1.
    """
    heads = weights.shape[1]
    groups = min(groups, heads)
    place = torch.arange(heads, dtype=torch.float64, device=weights.device)
    group = (place * groups / heads).floor()
    by_rank = 1 + (ratio - 1) * group / max(groups - 1, 1)
    order = weights.argsort(dim=-1, stable=True)
    shares = torch.zeros(weights.shape, dtype=torch.float64, device=weights.device)
    shares.scatter_(-1, order, (by_rank / by_rank.mean()).expand_as(shares))
    alike = (weights[:, :, None] == weights[:, None]).double()
    # NaN is like nothing, itself included; it keeps the share of its place.
    return torch.where(
        weights.isnan(), shares, (alike @ shares[..., None])[..., 0] / alike.sum(-1).clamp(min=1)
    )
