"""The contract of an allocation: how a budget of rows is shared out over layers and KV heads."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, final

from torch import Tensor


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Ballot:
    """What one layer puts to the vote.

    Attributes:
        layer: The layer's index.
        num_layers: Layers of the model.
        scores: float32 [batch, kv_heads, length]: higher means keep.
        protected: bool [batch, kv_heads, length]: rows that stay and count.
        valid: bool [batch, kv_heads, length]: rows that are there and no padding.
        held: int64 [batch, kv_heads]: rows that are there, padding included.
        capacity: int64 [batch]: rows to keep per KV head of this layer on average, protected ones
            included, as `layer_capacities` settled it.
        head_weights: For allocations that weigh heads, float [batch, kv_heads]: what the eviction
            says they deserve; None where it does not judge heads.
    """

    layer: int
    num_layers: int
    scores: Tensor
    protected: Tensor
    valid: Tensor
    held: Tensor
    capacity: Tensor
    head_weights: Tensor | None = None


class Allocate(ABC):
    """The specification of an allocation: subclasses are frozen dataclasses in files of their own.

    Attributes:
        method: Its name, that of its file.
        scope: "layer" where a layer's counts follow from its own scores, "model" where all layers
            must be read first (their memory then falls only after the last of them).
        ragged: Whether the KV heads of a layer may keep different numbers of rows.
        needs_budget: Whether it shares out an amount; otherwise it decides by the scores alone.
        weighs_heads: Whether it asks the eviction how much each head deserves.
    """

    method: ClassVar[str]
    scope: ClassVar[Literal["layer", "model"]] = "layer"
    ragged: ClassVar[bool] = False
    needs_budget: ClassVar[bool] = True
    weighs_heads: ClassVar[bool] = False

    def layer_capacities(
        self, capacity: Tensor, protected: int, tokens: Tensor, num_layers: int
    ) -> Tensor:
        """Share rows out over layers. By default every layer gets the same.

        Args:
            capacity: int64 [batch]: rows per KV head, on average over layers.
            protected: Rows of it that every layer keeps in any case, its window say.
            tokens: int64 [batch]: tokens there are; a layer that would get more leaves the rest to
                others.
            num_layers: Layers of the model.

        Returns:
            int64 [num_layers, batch] whose sum over layers is num_layers * capacity, as far as
            `tokens` allows.
        """
        del protected, tokens
        return capacity.expand(num_layers, -1)

    @abstractmethod
    def counts(self, ballots: Sequence[Ballot]) -> list[Tensor]:
        """Settle how many rows every KV head keeps, protected ones included.

        Args:
            ballots: One layer for scope "layer", all of them for scope "model".

        Returns:
            Per ballot int64 [batch, kv_heads], within what `clamp_counts` allows.
        """


def clamp_counts(counts: Tensor, ballot: Ballot) -> Tensor:
    """Bring counts [batch, kv_heads] between the protected rows (at least 1) and the rows held."""
    least = ballot.protected.sum(-1).clamp(min=1)
    return counts.maximum(least).minimum(ballot.held)
