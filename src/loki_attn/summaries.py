"""Page summaries: what a method keeps per page of rows instead of per row, made when it is read."""

from collections.abc import Callable, Mapping
from typing import Final, final

import torch
from torch import Tensor

from loki_attn.errors import CacheError

Summarise = Callable[[Tensor, Tensor], Mapping[str, Tensor]]
"""From key and value rows [batch, kv_heads, pages, rows, dim] to [batch, kv_heads, pages, ...]."""

_GROWTH: Final = 1.5


@final
class Summaries:
    """Summaries of a cache's pages, brought up to date when somebody reads them.

    A page is `page_rows` consecutive rows of the cache; the last one may be short. Whole pages are
    summarised once, the short one whenever it has grown.

    Args:
        page_rows: Rows per page.
        summarise: Summarises pages of equal length, by name.
    """

    def __init__(self, page_rows: int, summarise: Summarise) -> None:
        """Start with nothing summarised."""
        self._page_rows = page_rows
        self._summarise = summarise
        self._held: dict[str, Tensor] = {}
        self._rows = 0  # rows that are summarised, those of a short last page included

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(held.nbytes for held in self._held.values())

    def read(self, name: str, keys: Tensor, values: Tensor) -> Tensor:
        """Return one summary of all pages.

        Where these rows are the first ones of a longer cache that was summarised before, the last
        page may know of rows behind them.

        Args:
            name: One of the names that `summarise` returns.
            keys: The rows [batch, kv_heads, rows, head_dim].
            values: The rows [batch, kv_heads, rows, value_dim].

        Returns:
            [batch, kv_heads, pages, ...], a view.
        """
        if self._page_rows and self._rows < keys.shape[2]:
            # Storage made under inference_mode could not be written outside of it.
            with torch.inference_mode(mode=False), torch.no_grad():
                self._update(keys, values)
        if name not in self._held:
            raise CacheError(f"There is no summary {name!r}; there are {sorted(self._held)}.")
        return self._held[name].narrow(2, 0, -(-keys.shape[2] // self._page_rows))

    def truncate(self, length: int) -> None:
        """Forget what was summarised of rows from `length` on."""
        if length < self._rows:
            self._rows = length - length % self._page_rows

    def reset(self) -> None:
        """Forget everything: rows have moved."""
        self._held, self._rows = {}, 0

    def change(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change all summaries alike: another batch, another device, other heads."""
        self._held = {name: change(held) for name, held in self._held.items()}

    def _update(self, keys: Tensor, values: Tensor) -> None:
        length, size = keys.shape[2], self._page_rows
        first, whole = self._rows // size, length // size
        if whole > first:
            pages = [
                rows[:, :, first * size : whole * size].reshape(
                    *rows.shape[:2], whole - first, size, rows.shape[3]
                )
                for rows in (keys, values)
            ]
            self._write(first, self._summarise(*pages))
        if length % size:
            self._write(
                whole,
                self._summarise(
                    keys[:, :, None, whole * size :], values[:, :, None, whole * size :]
                ),
            )
        self._rows = length

    def _write(self, first: int, found: Mapping[str, Tensor]) -> None:
        for name, new in found.items():
            held, end = self._held.get(name), first + new.shape[2]
            if held is None or held.shape[2] < end:
                room = max(end, int(first * _GROWTH))
                larger = new.new_zeros(*new.shape[:2], room, *new.shape[3:])
                if held is not None:
                    larger.narrow(2, 0, first).copy_(held.narrow(2, 0, first))
                self._held[name] = held = larger
            held.narrow(2, first, new.shape[2]).copy_(new)
