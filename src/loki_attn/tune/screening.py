"""Screening: one dense forward tells what every rank, plane and budget loses in every layer."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, final

from loki_attn.basis import Basis
from loki_attn.evaluate.fidelity import Fidelity
from loki_attn.evaluate.journal import Journal
from loki_attn.evaluate.measuring import measure
from loki_attn.evaluate.protocol import Contender, LanguageModel
from loki_attn.evaluate.results import Row
from loki_attn.tune.space import Candidate, Plane

_STRIDE: Final = 4
# A bf16 plane loses what an int8 plane loses, but for a little that does not show here.
_LIKE: Final[dict[Plane, Plane]] = {"int4": "int4", "int8": "int8", "bf16": "int8"}
_FLOOR: Final = 1e-9

Losses = Mapping[int, float]
"""By layer: the squared relative error of the attention output."""


@final
@dataclass(frozen=True)
class Screen:
    """What the pass told.

    Attributes:
        losses: By rank and plane dtype, then by top_k ascending.
    """

    losses: Mapping[tuple[int, str], Mapping[int, Losses]]

    @property
    def screened(self) -> int:
        """How many policies were looked at."""
        return sum(len(ladder) for ladder in self.losses.values())

    def worst(self) -> tuple[int, ...]:
        """The layers, the one that loses most first, over all that was looked at."""
        total: dict[int, float] = {}
        for ladder in self.losses.values():
            for losses in ladder.values():
                for layer, loss in losses.items():
                    total[layer] = total.get(layer, 0.0) + loss
        return tuple(sorted(total, key=lambda layer: (-total[layer], layer)))

    def expected(self, candidate: Candidate) -> float:
        """Estimate a candidate's error: mean loss over the layers, dense ones losing nothing.

        Between two values of top_k that were looked at, the logarithm of the loss goes straight in
        the logarithm of top_k.
        """
        ladder = self.losses[candidate.rank, _LIKE[candidate.plane_dtype]]
        below = max((k for k in ladder if k <= candidate.top_k), default=min(ladder))
        above = min((k for k in ladder if k >= candidate.top_k), default=max(ladder))
        part = 0.0
        if above > below:
            part = math.log(candidate.top_k / below) / math.log(above / below)
        low, high = ladder[below], ladder[above]
        dense = set(candidate.dense_layers)
        found = [
            _between(low[layer], high[layer], part) if layer not in dense else 0.0 for layer in low
        ]
        return max(_FLOOR, sum(found) / len(found))


def coarse(amounts: Sequence[int]) -> tuple[int, ...]:
    """The values of top_k that are looked at: every fourth, and the last."""
    return tuple(sorted({*amounts[::_STRIDE], amounts[-1]}))


def screen(
    lm: LanguageModel,
    ids: Sequence[int],
    basis: Basis,
    ranks: Sequence[int],
    amounts: Sequence[int],
    *,
    queries: int,
    journal: Journal,
) -> Screen:
    """Look at ranks, plane dtypes of codes and values of top_k in one dense forward.

    Args:
        lm: The model.
        ids: Tokens of one context.
        basis: Its basis.
        ranks: Ranks to look at.
        amounts: Values of top_k to look at, ascending.
        queries: Query positions, in the second half of the context.
        journal: Holds what is known already, and keeps the rest.
    """
    looked = {
        (rank, plane, top_k): Candidate(rank=rank, plane_dtype=plane, top_k=top_k)
        for rank in ranks
        for plane in dict.fromkeys(_LIKE.values())
        for top_k in amounts
    }
    contenders = [
        Contender(name=one.name, policy=one.policy(len(ids)), basis=basis)
        for one in looked.values()
    ]
    task = Fidelity(ids=tuple(ids), windows=1, window_tokens=len(ids), queries=queries)
    losses: dict[tuple[int, str], dict[int, Losses]] = {}
    for (rank, plane, top_k), row in zip(
        looked, measure(task, lm, contenders, journal=journal), strict=True
    ):
        losses.setdefault((rank, plane), {})[top_k] = _losses(row)
    return Screen(losses)


def _losses(row: Row) -> Losses:
    layers = row.metrics["layers"]
    return {
        index: error**2
        for index, error in zip(layers["index"], layers["output_error"], strict=True)
    }


def _between(low: float, high: float, part: float) -> float:
    return math.exp((1 - part) * math.log(max(low, _FLOOR)) + part * math.log(max(high, _FLOOR)))
