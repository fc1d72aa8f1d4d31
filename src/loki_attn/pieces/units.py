"""Units: consecutive rows that are judged as one, and kept or dropped as one."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from loki_attn.pieces.packing import Packing, real_rows
from loki_attn.pieces.smoothing import unit_scores


def judge_units(
    scores: Tensor, valid: Tensor | None, size: int, how: Literal["mean", "best_half"] = "mean"
) -> Tensor:
    """Give every row the judgement of its unit; units are counted from the first real row.

    Args:
        scores: float32 [batch, kv_heads, length].
        valid: None, or bool [batch, kv_heads or 1, length]: rows that are no padding.
        size: Rows of a unit; the last one may be short.
        how: The mean of a unit's scores, or of the better half of them (rounded up).

    Returns:
        float32 [batch, kv_heads, length]; padding gets -inf.
    """
    real = real_rows(valid, scores.shape, scores.device)
    packing = Packing.of(valid)
    packed = packing.pack(scores.masked_fill(~real, float("nan")))
    judged = unit_scores(packed, size, how)
    return packing.unpack(judged).masked_fill(~real, float("-inf"))


def keep_units(
    scores: Tensor, counts: Tensor, protected: Tensor, valid: Tensor, size: int
) -> Tensor:
    """Mark whole units, the best first, and exactly `counts` rows.

    Units that hold a protected row come first, lower units before higher ones of equal score. The
    rows that are left when the next unit does not fit whole go to the last rows not yet marked, so
    at most one unit is cut, and the amount is kept to the row.

    Args:
        scores: float32 [batch, kv_heads, length], the same for all rows of a unit (`judge_units`);
            NaN ranks last.
        counts: int64 [batch, kv_heads], at most length.
        protected: bool [batch, kv_heads, length].
        valid: bool [batch, kv_heads, length]; padding is marked only where real rows are too few.
        size: Rows of a unit.

    Returns:
        bool [batch, kv_heads, length].
    """
    packing = Packing.of(valid)
    real = packing.pack(valid)
    forced = packing.pack(protected) & real
    amount = counts.minimum(real.sum(-1))
    room = amount - forced.sum(-1)

    worst = torch.finfo(scores.dtype).min
    judged = packing.pack(scores).nan_to_num(nan=worst, neginf=worst).masked_fill(~real, worst)
    held = _by_unit(forced, size, fill=0).any(-1)
    priority = _by_unit(judged, size, fill=worst).amax(-1).masked_fill(held, float("inf"))
    cost = _by_unit(real & ~forced, size, fill=0).sum(-1)
    order = priority.argsort(dim=-1, descending=True, stable=True)
    fits = cost.gather(-1, order).cumsum(-1) <= room[..., None]
    taken = torch.empty_like(fits).scatter_(-1, order, fits)

    marked = forced | (taken.repeat_interleave(size, -1)[..., : real.shape[-1]] & real)
    marked |= _last(real & ~marked, amount - marked.sum(-1))
    return packing.unpack(marked) | _last(~valid, counts - amount)


def _by_unit(rows: Tensor, size: int, fill: float) -> Tensor:
    """View [batch, kv_heads, length] as [batch, kv_heads, units, size]."""
    short = -rows.shape[-1] % size
    whole = functional.pad(rows, (0, short), value=fill)
    return whole.reshape(*rows.shape[:-1], -1, size)


def _last(rows: Tensor, counts: Tensor) -> Tensor:
    """The last `counts` of the marked rows."""
    behind = rows.flip(-1).cumsum(-1).flip(-1)
    return rows & (behind <= counts[..., None])
