"""LokiLayer: a transformers cache layer that keeps its rows in a LayerCache."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from loki_attn.cache import LayerCache, RowFormat
from loki_attn.errors import CacheError


@contextmanager
def _plain_tensors() -> Iterator[None]:
    """Make storage that may be written in any mode: no graph, and no inference tensors.

    A cache that was filled under `torch.inference_mode` could not grow outside of it.
    """
    with torch.inference_mode(mode=False), torch.no_grad():
        yield


class LokiLayer(DynamicLayer):
    """A full-attention layer of a transformers cache, in growable preallocated storage.

    It serves only the attachment that made it: before every forward the attachment arms the
    layer, and an update that nobody armed comes from another model, or from after the detach.

    Args:
        row_format: How rows are stored and which planes go with them.
        owner: Token of the attachment.
        reserve_tokens: Rows to allocate at the first update.
    """

    keys: Tensor | None
    values: Tensor | None

    def __init__(self, row_format: RowFormat, owner: str, reserve_tokens: int = 0) -> None:
        """Start empty."""
        super().__init__()
        self.rows = LayerCache(row_format, reserve_tokens=reserve_tokens)
        self.owner = owner
        self.armed = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Note dtype and device; the rows allocate themselves."""
        del value_states
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    @_plain_tensors()
    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append and return all rows; keys in the space they are stored in."""
        del args, kwargs
        if not self.armed:
            raise CacheError(
                "This cache belongs to a Loki attachment, but the model that uses it is not "
                "attached, or is another one; make a cache for this model, or attach it first."
            )
        self.armed = False
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.rows.append(key_states, value_states)
        self._show()
        return self.rows.keys, self.rows.values

    @_plain_tensors()
    def convert(self, row_format: RowFormat) -> None:
        """Store the rows in another format; needs rows that are kept as the model made them."""
        if type(self.rows.row_format).rows is not RowFormat.rows:
            raise CacheError(
                "This cache holds rotated keys of another policy; start a new cache after "
                "changing the policy."
            )
        self.rows = self.rows.converted(row_format)
        self._show()

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return self.rows.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Rows after the next update, and their offset."""
        return self.rows.length + int(query_length), 0

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def get_max_cache_shape(self) -> int:
        """No limit; the name that transformers used up to 5.10."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Remove that many last tokens if negative; up to 5.13, a positive count is kept."""
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        keep = tokens_to_remove if tokens_to_remove > 0 else self.rows.length + tokens_to_remove
        self.rows.truncate(max(0, min(keep, self.rows.length)))
        self._show()

    def reset(self) -> None:
        """Forget everything."""
        self.rows.reset()
        self.keys = self.values = None
        self.is_initialized = False

    @_plain_tensors()
    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow the beams."""
        if self.is_initialized:
            self.rows.select_batch(beam_idx)
            self._show()

    @_plain_tensors()
    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every batch row."""
        if self.is_initialized:
            self.rows.repeat_batch(repeats)
            self._show()

    @_plain_tensors()
    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some batch rows, given by index or by a boolean mask."""
        if self.is_initialized:
            picked = indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices
            self.rows.select_batch(picked)
            self._show()

    @_plain_tensors()
    def offload(self) -> None:
        """Move the rows to the CPU."""
        if self.is_initialized:
            self.rows.to("cpu")
            self._show()

    @_plain_tensors()
    def prefetch(self) -> None:
        """Move the rows back."""
        if self.is_initialized:
            self.rows.to(self.device)
            self._show()

    @_plain_tensors()
    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copy the rows; the format, which belongs to the attachment, is shared."""
        memo[id(self.rows.row_format)] = self.rows.row_format
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        for name, held in vars(self).items():
            setattr(twin, name, copy.deepcopy(held, memo))
        return twin

    def _show(self) -> None:
        self.keys, self.values = self.rows.keys, self.rows.values
