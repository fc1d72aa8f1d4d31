"""Packing: rows without padding moved to the front, so that neighbours and units are real ones."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor


@final
@dataclass(frozen=True, eq=False)
class Packing:
    """The order that puts real rows first, each kind in its own order; None where all are real.

    Attributes:
        order: int64 [batch, kv_heads or 1, length], or None.
    """

    order: Tensor | None

    @classmethod
    def of(cls, valid: Tensor | None) -> "Packing":
        """Return the packing of bool [batch, kv_heads or 1, length]; None packs nothing."""
        if valid is None or bool(valid.all()):
            return cls(None)
        return cls((~valid).byte().argsort(dim=-1, stable=True))

    def pack(self, rows: Tensor) -> Tensor:
        """Move the real rows of [batch, kv_heads, length, ...] to the front."""
        if self.order is None:
            return rows
        order = self.order.expand(rows.shape[:3])
        if rows.ndim == 4:
            order = order[..., None].expand_as(rows)
        return rows.gather(2, order)

    def unpack(self, rows: Tensor) -> Tensor:
        """Move rows [batch, kv_heads, length] back to where they came from."""
        if self.order is None:
            return rows
        return torch.empty_like(rows).scatter_(2, self.order.expand_as(rows), rows)


def real_rows(valid: Tensor | None, shape: torch.Size, device: torch.device) -> Tensor:
    """Return bool [batch, kv_heads, length] of the rows that are no padding."""
    if valid is None:
        return torch.ones(shape, dtype=torch.bool, device=device)
    return valid.expand(shape)


def without_padding(rows: Tensor, valid: Tensor | None) -> Tensor:
    """Return float32 rows [batch, kv_heads, length, dim] in which padding, NaN or not, is 0."""
    rows = rows.float()
    return rows if valid is None else torch.where(valid[..., None], rows, 0.0)
