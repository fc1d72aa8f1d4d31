"""Sharing: wishes become whole rows with an exact sum, and the best rows fall to their sets."""

from typing import Final

import torch
from torch import Tensor

_STEPS: Final = 64  # halvings: more digits than a float64 has
_EXACT: Final = 1e-6  # of a row: what float64 sums of wishes may be off


def apportion(
    wishes: Tensor, total: Tensor, least: Tensor, most: Tensor, favour: Tensor | None = None
) -> Tensor:
    """Turn wishes into whole numbers with an exact sum, within bounds.

    What the bounds take from some is given to all others alike. Largest remainders are rounded up;
    among equal ones those of larger `favour`, then the first.

    Args:
        wishes: float [batch, n], in rows.
        total: int64 [batch]: the sum, as far as the bounds allow it.
        least: int64 [batch, n].
        most: int64 [batch, n], at least `least`.
        favour: None, or float [batch, n].

    Returns:
        int64 [batch, n].
    """
    low, high = least.double(), most.double()
    total = total.maximum(least.sum(-1)).minimum(most.sum(-1))
    shifted = _filled(wishes.double(), total.double(), low, high)
    whole = (shifted + _EXACT).floor().clamp(low, high)
    missing = total - whole.sum(-1).long()
    # Rounded, so that what ought to be equal is.
    rest = ((shifted - whole) / _EXACT).round().masked_fill(whole >= high, float("-inf"))
    order = torch.arange(wishes.shape[-1], device=wishes.device).expand(wishes.shape)
    if favour is not None:
        order = favour.argsort(dim=-1, descending=True, stable=True)
    ranks = rest.gather(-1, order).argsort(dim=-1, descending=True, stable=True)
    order = order.gather(-1, ranks)
    more = torch.arange(wishes.shape[-1], device=wishes.device) < missing[:, None]
    return whole.long().scatter_add(-1, order, more.long())


def settle(
    wishes: Tensor,
    total: Tensor,
    fixed: Tensor,
    real: Tensor,
    held: Tensor,
    favour: Tensor | None = None,
) -> Tensor:
    """Settle how many rows each of n sets of rows keeps, with an exact sum.

    Where all rows that are no padding fit into the total they all stay, and padding fills it up,
    evenly: a short prompt of a padded batch then keeps the shape of the others. Elsewhere no
    padding stays.

    Args:
        wishes: float [batch, n], fixed rows included.
        total: int64 [batch]: rows of all sets together.
        fixed: int64 [batch, n]: rows that stay in any case.
        real: int64 [batch, n]: rows that are no padding, the fixed ones included.
        held: int64 [batch, n]: rows, padding included.
        favour: As of `apportion`.

    Returns:
        int64 [batch, n], at least 1 each.
    """
    enough = (real.sum(-1) <= total)[:, None]
    even = (total.double() / wishes.shape[-1])[:, None].expand(wishes.shape)
    least = torch.where(enough, real, fixed).clamp(min=1)
    most = torch.where(enough, held, real).maximum(least)
    return apportion(torch.where(enough, even, wishes.double()), total, least, most, favour)


def shares_of_best(scores: Tensor, free: Tensor, total: Tensor) -> Tensor:
    """Count how many of the `total` best rows of all sets lie in each of them.

    Rows that tie for the last places share them, in proportion: so the order of the sets does not
    matter, and the result need not be whole.

    Args:
        scores: float [batch, n, length]; NaN ranks last.
        free: bool [batch, n, length]: rows that take part.
        total: int64 [batch].

    Returns:
        float64 [batch, n] whose sum is `total`, or the free rows where there are fewer.
    """
    limit = torch.finfo(scores.dtype).max
    ranked = scores.nan_to_num(nan=-limit, posinf=limit, neginf=-limit)
    ranked = ranked.masked_fill(~free, float("-inf"))
    total = total.clamp(min=0).minimum(free.sum((-2, -1)))
    most = max(1, int(total.max()))
    last = ranked.flatten(1).topk(min(most, ranked[0].numel())).values
    last = last.gather(1, (total - 1).clamp(min=0)[:, None])[..., None]
    above = (ranked > last).sum(-1).double()
    tied = ((ranked == last) & free).sum(-1).double()
    left = (total - above.sum(-1)) / tied.sum(-1).clamp(min=1)
    return (above + tied * left[:, None]).masked_fill((total == 0)[:, None], 0.0)


def at_least_one(protected: Tensor, scores: Tensor, valid: Tensor) -> Tensor:
    """Protect the best row of every set that has no protected row, for no set may end up empty.

    Args:
        protected: bool [batch, n, length], among the valid rows.
        scores: float [batch, n, length]; NaN ranks last.
        valid: bool [batch, n, length].

    Returns:
        bool [batch, n, length]; a set without valid rows stays without.
    """
    limit = torch.finfo(scores.dtype).max
    ranked = scores.nan_to_num(nan=-limit, posinf=limit, neginf=-limit)
    best = ranked.masked_fill(~valid, float("-inf")).argmax(-1, keepdim=True)
    alone = torch.zeros_like(protected).scatter_(-1, best, ~protected.any(-1, keepdim=True))
    return protected | (alone & valid)


def _filled(wishes: Tensor, total: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Wishes within bounds, all shifted by the one number that makes their sum the total."""
    plain = wishes.clamp(low, high)
    fits = ((plain.sum(-1) - total).abs() <= _EXACT)[:, None]
    if bool(fits.all()):
        return plain
    below = (low - wishes).amin(-1, keepdim=True)
    above = (high - wishes).amax(-1, keepdim=True)
    for _ in range(_STEPS):
        middle = (below + above) / 2
        short = (wishes + middle).clamp(low, high).sum(-1, keepdim=True) < total[:, None]
        below, above = torch.where(short, middle, below), torch.where(short, above, middle)
    return torch.where(fits, plain, (wishes + above).clamp(low, high))
