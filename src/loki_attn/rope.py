"""Rope: the rotary position embedding of a layer, to move keys and queries to other positions."""

from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

RopeLayout = Literal["halves", "pairs"]
"""Which dimensions turn together: i and i + half (Llama), or neighbours (GLM, Cohere)."""


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Rope:
    """The rotation R_p that a layer applies to queries and keys at position p (arXiv 2104.09864).

    R_a R_b = R_{a+b}, so keys that were stored after RoPE move by the difference of positions.

    Attributes:
        frequencies: float32 [rotary_dim / 2], radians per position; dimensions beyond
            rotary_dim do not turn.
        layout: Which dimensions turn together.
    """

    frequencies: Tensor
    layout: RopeLayout = "halves"

    def turn(self, rows: Tensor, shift: Tensor) -> Tensor:
        """Return rows moved by `shift` positions: R_shift row.

        Args:
            rows: [..., seq, head_dim].
            shift: Integers broadcastable to [..., seq]; -position undoes RoPE.

        Returns:
            The same shape and dtype; computed in float32 or wider.
        """
        wide = torch.promote_types(rows.dtype, torch.float32)
        # Angles in float64: float32 loses a thousandth of a turn at position 10,000.
        angles = shift.to(rows.device, torch.float64)[..., None] * self.frequencies.to(
            rows.device, torch.float64
        )
        cos, sin = angles.cos().to(wide), angles.sin().to(wide)
        size = 2 * self.frequencies.shape[0]
        turned, rest = rows[..., :size].to(wide), rows[..., size:]
        if self.layout == "halves":
            one, other = turned.chunk(2, -1)
            parts = torch.cat([one * cos - other * sin, other * cos + one * sin], -1)
        else:
            one, other = turned[..., ::2], turned[..., 1::2]
            parts = torch.stack([one * cos - other * sin, other * cos + one * sin], -1).flatten(-2)
        return torch.cat([parts.to(rows.dtype), rest], -1)
