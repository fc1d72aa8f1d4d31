"""Uniform allocation: every layer and every KV head keeps the same number of rows.

Paper: none; what SnapKV, H2O and most others do
arXiv: -
What it does: gives every layer and every KV head the capacity.
What we do differently: nothing.
Bytes read per decode step: per KV head, capacity * (head_dim + value_dim) * b.
State per token: none.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from loki_attn.allocate.base import Allocate, Ballot, clamp_counts


@final
@dataclass(frozen=True, kw_only=True)
class Uniform(Allocate):
    """The same for all."""

    method: ClassVar[str] = "uniform"

    def counts(self, ballots: Sequence[Ballot]) -> list[Tensor]:
        """The capacity of the layer, for each of its heads."""
        return [clamp_counts(b.capacity[:, None].expand_as(b.held), b) for b in ballots]
