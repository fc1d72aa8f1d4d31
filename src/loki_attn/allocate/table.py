"""Table: shares of the budget by layer, or by layer and KV head, that were settled beforehand.

Paper: none; what offline calibration of budgets comes to, of PrefixKV (arXiv 2412.03409) say
arXiv: -
What it does: gives each layer, or each KV head of each layer, its share of the mean capacity.
What we do differently: shares average to 1, so the budget stays what the policy says; rows add up
    to it exactly; what a layer cannot use, because it is short, goes to the others alike.
Bytes read per decode step: per KV head, capacity * (head_dim + value_dim) * b, averaged over layers
    and heads.
State per token: none; heads have lengths of their own where the table tells heads apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Final, final

import torch
from torch import Tensor

from loki_attn.allocate.base import Allocate, Ballot
from loki_attn.errors import BudgetError, PolicyError
from loki_attn.pieces.sharing import apportion, settle

_TOLERANCE: Final = 1e-4
Share = float | tuple[float, ...]


@final
@dataclass(frozen=True, kw_only=True)
class Table(Allocate):
    """Shares that average to 1.

    Attributes:
        shares: One per layer: a number, or a tuple with one per KV head; empty for all alike.
    """

    method: ClassVar[str] = "table"
    ragged: ClassVar[bool] = True
    shares: tuple[Share, ...] = ()

    def __post_init__(self) -> None:
        """Refuse shares that would change the budget."""
        flat = [share for layer in self.shares for share in _numbers(layer)]
        bad = [x for x in flat if isinstance(x, bool) or not 0 <= x < float("inf")]
        if bad:
            raise PolicyError(f"Shares are numbers from 0 on, got {bad[0]!r}.")
        if any(not _numbers(layer) for layer in self.shares):
            raise PolicyError("A layer's shares are a number, or one per KV head; got none.")
        mean = self._mean()
        if abs(mean - 1) > _TOLERANCE:
            raise PolicyError(
                f"Shares average to 1, so that the capacity is the mean; these average to "
                f"{mean:.4f}: divide each by that."
            )

    def layer_capacities(
        self, capacity: Tensor, protected: int, tokens: Tensor, num_layers: int
    ) -> Tensor:
        """Each layer's share, int64 [num_layers, batch].

        Raises:
            BudgetError: If the table is for another number of layers.
        """
        if not self.shares:
            return capacity.expand(num_layers, -1)
        if len(self.shares) != num_layers:
            raise BudgetError(
                f"The table has shares for {len(self.shares)} layers, the model has {num_layers}; "
                "give one entry per layer."
            )
        means = torch.tensor([_mean_of(layer) for layer in self.shares], dtype=torch.float64)
        wishes = capacity.double()[:, None] * means.to(capacity.device)
        least = capacity.clamp(max=protected)[:, None].minimum(tokens[:, None]).expand(wishes.shape)
        most = tokens[:, None].expand(wishes.shape).maximum(least)
        shared = apportion(wishes, capacity * num_layers, least, most)
        # Where everything fits nothing is to be shared out.
        return torch.where((tokens <= capacity)[:, None], capacity[:, None], shared).T

    def counts(self, ballots: Sequence[Ballot]) -> list[Tensor]:
        """Each head's share of its layer.

        Raises:
            BudgetError: If the table is for another number of KV heads.
        """
        return [self._of_layer(ballot) for ballot in ballots]

    def _mean(self) -> float:
        if not self.shares:
            return 1.0
        return sum(_mean_of(layer) for layer in self.shares) / len(self.shares)

    def _of_layer(self, ballot: Ballot) -> Tensor:
        heads = ballot.held.shape[1]
        own = self.shares[ballot.layer] if self.shares else 1.0
        numbers = _numbers(own) if isinstance(own, tuple) else (own,) * heads
        if len(numbers) != heads:
            raise BudgetError(
                f"The table has shares for {len(numbers)} KV heads of layer {ballot.layer}, which "
                f"has {heads}; give one per KV head."
            )
        mean = sum(numbers) / heads
        shares = [x / mean if mean else 1.0 for x in numbers]
        protected = ballot.protected & ballot.valid
        wishes = ballot.capacity.double()[:, None] * torch.tensor(
            shares, dtype=torch.float64, device=ballot.scores.device
        )
        favour = ballot.scores.masked_fill(~(ballot.valid & ~protected), 0.0).sum(-1)
        return settle(
            wishes,
            ballot.capacity * heads,
            protected.sum(-1),
            ballot.valid.sum(-1),
            ballot.held,
            favour,
        )


def _numbers(layer: Share) -> tuple[float, ...]:
    return layer if isinstance(layer, tuple) else (layer,)


def _mean_of(layer: Share) -> float:
    numbers = _numbers(layer)
    return sum(numbers) / len(numbers)
