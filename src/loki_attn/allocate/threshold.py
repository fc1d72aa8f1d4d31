"""Threshold: every row whose score is high enough stays; there is no budget.

Paper: none; the decision rule of KVzap (kvpress) and of trained gates
arXiv: -
What it does: keeps rows with a score of at least `at_least`, and the protected ones.
What we do differently: rows at the threshold stay (a strict one drops all that tie there); a head
    keeps at least one row; a capacity, if one is given, is the most that a head may keep.
Bytes read per decode step: per KV head, rows kept * (head_dim + value_dim) * b.
State per token: none; every head has a length of its own.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from loki_attn.allocate.base import Allocate, Ballot, clamp_counts
from loki_attn.errors import PolicyError


@final
@dataclass(frozen=True, kw_only=True)
class Threshold(Allocate):
    """As many rows as are good enough.

    Attributes:
        at_least: The least score that stays, in the units of the eviction's scores.
    """

    method: ClassVar[str] = "threshold"
    ragged: ClassVar[bool] = True
    needs_budget: ClassVar[bool] = False
    at_least: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what no score can reach."""
        if not math.isfinite(self.at_least):
            raise PolicyError(f"at_least is a score, got {self.at_least!r}; give a finite number.")

    def counts(self, ballots: Sequence[Ballot]) -> list[Tensor]:
        """Rows at or above the threshold, and the protected ones."""
        return [self._of_layer(ballot) for ballot in ballots]

    def _of_layer(self, ballot: Ballot) -> Tensor:
        good = (ballot.scores >= self.at_least) | ballot.protected
        counts = (good & ballot.valid).sum(-1)
        return clamp_counts(counts.minimum(ballot.capacity[:, None]), ballot)
