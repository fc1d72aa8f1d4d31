"""PrefixKV: every layer keeps the shortest prefix of its ranking that holds the same mass.

Paper: PrefixKV: Adaptive Prefix KV Cache is What Vision Instruction-Following Models Need for
    Efficient Generation
arXiv: 2412.03409
What it does: ranks each layer's rows by importance and finds the one share p of a layer's mass at
    which the shortest prefixes that reach it add up to the budget.
What we do differently: p is found by ranking where each layer takes its next row, which is exact
    where a bisection stops near the target; layers that tie share what is left; protected rows come
    first in every prefix. It acts online on any method's scores (which must not be negative), and
    `prefix_shares` makes the paper's offline table for the allocation "table".
Bytes read per decode step: per KV head, capacity * (head_dim + value_dim) * b, on average over
    layers.
State per token: none.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from torch import Tensor
from torch.nn import functional

from loki_attn.allocate.base import Allocate, Ballot
from loki_attn.errors import BudgetError, InputError
from loki_attn.pieces.sharing import settle, shares_of_best

_NEVER = float("inf")


@final
@dataclass(frozen=True, kw_only=True)
class PrefixMass(Allocate):
    """The same share of each layer's mass; all heads of a layer keep the same number."""

    method: ClassVar[str] = "prefix_mass"
    scope: ClassVar[Literal["layer", "model"]] = "model"

    def counts(self, ballots: Sequence[Ballot]) -> list[Tensor]:
        """The length of each layer's prefix."""
        device = ballots[0].scores.device
        longest = max(b.scores.shape[-1] for b in ballots)
        entries, fixed, real, held, capacity = [], [], [], [], []
        for ballot in ballots:
            protected = ballot.protected & ballot.valid
            first = entry_masses(ballot.scores, ballot.valid & ~protected, protected).to(device)
            short = longest - first.shape[-1]
            entries.append(functional.pad(first, (0, short), value=_NEVER))
            # Heads of a layer keep the same number: what the one with most needs.
            fixed.append(protected.sum(-1).amax(-1).to(device))
            real.append(ballot.valid.sum(-1).amax(-1).to(device))
            held.append(ballot.held.amax(-1).to(device))
            capacity.append(ballot.capacity.to(device))
        entry, kept = torch.stack(entries, 1), torch.stack(fixed, 1)
        total = torch.stack(capacity).sum(0)
        left = (total - kept.sum(-1)).clamp(min=0)
        wishes = kept + shares_of_best(-entry, entry < _NEVER, left)
        found = settle(wishes, total, kept, torch.stack(real, 1), torch.stack(held, 1))
        return [
            own.to(b.held.device)[:, None].expand_as(b.held).minimum(b.held)
            for own, b in zip(found.unbind(1), ballots, strict=True)
        ]


def entry_masses(scores: Tensor, free: Tensor, first: Tensor) -> Tensor:
    """Return the share of mass that a prefix holds before it takes its next row.

    A prefix takes row n of the ranking just where the threshold exceeds this: the shortest prefix
    that reaches p is one longer than the entries below p.

    Args:
        scores: float [batch, kv_heads, length]; negative ones and NaN count as no mass.
        free: bool [batch, kv_heads, length]: rows that are ranked.
        first: bool [batch, kv_heads, length]: rows that stand before the ranking.

    Returns:
        float64 [batch, length], ascending, averaged over heads; infinite behind the last free row.
    """
    mass = scores.nan_to_num(nan=0.0).clamp(min=0)
    base = mass.masked_fill(~first, 0.0).double().sum(-1).mean(-1, keepdim=True)
    ranked = mass.masked_fill(~free, 0.0).sort(-1, descending=True).values.double().mean(1)
    rows = free.sum(-1).amax(-1, keepdim=True)
    counted = torch.arange(ranked.shape[-1], device=ranked.device) < rows
    reached = base + functional.pad(ranked.cumsum(-1)[..., :-1], (1, 0))
    whole = base + ranked.sum(-1, keepdim=True)
    # A layer without mass takes its rows evenly.
    even = counted.cumsum(-1).sub(1) / rows.clamp(min=1)
    share = torch.where(whole > 0, reached / whole.clamp(min=torch.finfo(whole.dtype).tiny), even)
    return share.masked_fill(~counted, _NEVER)


def shortest_prefixes(importance: Tensor, total: int) -> tuple[Tensor, float]:
    """Find the mass threshold whose shortest prefixes add up to a number of rows.

    Args:
        importance: float [layers, tokens], not negative.
        total: Rows of all layers together.

    Returns:
        int64 [layers], rows of each layer, and the threshold: every prefix holds more than this
        share of its layer's mass, and no layer takes a row it would need for more.

    Raises:
        BudgetError: If there are not that many rows, or fewer than one per layer.
    """
    layers, tokens = importance.shape
    if not layers <= total <= layers * tokens:
        raise BudgetError(
            f"{layers} layers of {tokens} tokens can keep {layers} to {layers * tokens} rows, not "
            f"{total}; change the total."
        )
    rows = importance[:, None]
    every = torch.ones_like(rows, dtype=torch.bool)
    entry = entry_masses(rows, every, ~every)
    wanted = torch.tensor([total], device=entry.device)
    wishes = shares_of_best(-entry[None], entry[None] < _NEVER, wanted)
    held = torch.full((1, layers), tokens, device=entry.device)
    counts = settle(wishes, wanted, torch.zeros_like(held), held, held)[0]
    taken = entry.gather(1, (counts - 1)[:, None])[:, 0]
    return counts, float(taken.max())


def prefix_shares(samples: Sequence[Tensor], keep_share: float) -> tuple[float, ...]:
    """Make the shares of a `table` from samples, as the paper does offline.

    Args:
        samples: Importance of rows, float [layers, tokens] each; lengths may differ.
        keep_share: Share of the rows that stay, in (0, 1].

    Returns:
        One share per layer; their mean is 1.

    Raises:
        InputError: If there is no sample, or the share is none.
    """
    if not samples:
        raise InputError("A table needs at least one sample of importances, got none.")
    if not 0 < keep_share <= 1:
        raise InputError(f"keep_share is a share in (0, 1], got {keep_share!r}.")
    found = []
    for sample in samples:
        layers, tokens = sample.shape
        counts, _ = shortest_prefixes(sample, max(layers, round(layers * tokens * keep_share)))
        found.append(counts.double() / counts.double().mean())
    mean = torch.stack(found).mean(0)
    return tuple((mean / mean.mean()).tolist())
