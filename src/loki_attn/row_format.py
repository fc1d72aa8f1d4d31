"""RowFormat: what a stored key looks like, which planes, summaries and marks go with a row."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from loki_attn.tiles import Kind


@final
@dataclass(frozen=True)
class LeadFormat:
    """How `planes` computes the one lead plane of keys, so that a kernel can do the same.

    Attributes:
        plane: Name of the plane; it is kept in tiles.
        scales: Name of the plane with the scale of each row's codes; None without one.
        key_map: float32 [kv_heads, head_dim, rank], contiguous: keys to lead coordinates.
    """

    plane: str
    scales: str | None
    key_map: Tensor


@final
@dataclass(frozen=True)
class Mark:
    """State that a method keeps with every row, written by the method itself.

    Attributes:
        dtype: Of one element.
        inner: Shape of one row's state; () for a number.
        fill: What a new row starts with.
    """

    dtype: torch.dtype
    inner: tuple[int, ...] = ()
    fill: float = 0.0


class RowFormat:
    """What becomes of a key when it is stored. The default stores it as it is, without planes."""

    def rows(self, key: Tensor) -> Tensor:
        """Return the key rows to store, from keys [batch, kv_heads, tokens, head_dim]."""
        return key

    def planes(self, key: Tensor) -> dict[str, Tensor]:
        """Return the side planes of these keys by name, each [batch, kv_heads, tokens, ...]."""
        del key
        return {}

    def tiled(self) -> Mapping[str, Kind]:
        """Return which of the planes are kept in tiles, and as what."""
        return {}

    def page_rows(self) -> int:
        """Return how many rows one page summary covers; 0 without summaries."""
        return 0

    def summarise(self, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
        """Summarise pages of rows, by name.

        Args:
            keys: Stored key rows [batch, kv_heads, pages, rows, head_dim]; rows is `page_rows`, or
                fewer for the last page, which then comes alone.
            values: Value rows [batch, kv_heads, pages, rows, value_dim].

        Returns:
            Tensors [batch, kv_heads, pages, ...]; a name's dtype and inner shape never change.
        """
        del keys, values
        return {}

    def lead_format(self, device: torch.device) -> LeadFormat | None:
        """Return what `planes` does, where all of it is one lead plane; None otherwise."""
        del device
        return None

    def stores_only(self, lead: LeadFormat | None) -> bool:
        """Return whether keys are stored untouched, with no planes but those of this lead."""
        own = type(self)
        return own.rows is RowFormat.rows and (lead is not None or own.planes is RowFormat.planes)
