"""LokiLayer: a transformers cache layer that keeps its rows in a LayerCache."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from loki_attn.attention import LayerPolicy
from loki_attn.cache import LayerCache
from loki_attn.compiled import StaticRows
from loki_attn.errors import CacheError
from loki_attn.eviction import Turn
from loki_attn.row_format import Mark, RowFormat
from loki_attn.shards import LayerRows, Narrow


@contextmanager
def plain_tensors() -> Iterator[None]:
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
        policy: How rows are stored, which planes and marks go with them; None for plain rows.
        owner: Token of the attachment.
        reserve_tokens: Rows to allocate at the first update.

    Attributes:
        turn: The rows, and what an eviction must know beside them.
        asked: [batch, heads, tokens, head_dim]: the queries of a densely read prompt, where they
            were recorded so that evictions can judge its rows later; else None.
    """

    keys: Tensor | None
    values: Tensor | None

    def __init__(self, policy: LayerPolicy | None, owner: str, reserve_tokens: int = 0) -> None:
        """Start empty."""
        super().__init__()
        row_format, marks = _format_of(policy)
        cache = LayerCache(row_format, reserve_tokens=reserve_tokens, marks=marks)
        self.turn = Turn(rows=LayerRows(cache, _narrow_of(policy), _parts_of(policy)))
        self.asked: Tensor | None = None
        self.owner = owner
        self.armed = False
        self._policy = policy

    @property
    def rows(self) -> LayerRows:
        """The rows."""
        return self.turn.rows

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Note dtype and device; the rows allocate themselves."""
        del value_states
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    @plain_tensors()
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
        return self.show()

    @plain_tensors()
    def follow(self, policy: LayerPolicy | None) -> None:
        """Store the rows as another policy wants them; needs rows kept as the model made them."""
        if policy is self._policy or policy is None:
            return
        row_format, marks = _format_of(policy)
        first = self.rows.shards[0].cache
        if type(first.row_format).rows is not RowFormat.rows:
            raise CacheError(
                "This cache holds rotated keys of another policy; start a new cache after "
                "changing the policy."
            )
        rows = self.rows.converted(row_format, _narrow_of(policy), marks, policy.parts)
        self.turn = Turn(rows=rows, call=self.turn.call, valid=self.turn.valid)
        self._policy = policy
        if rows.seen:
            self.show()

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return self.rows.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Tokens after the next update, and their offset: masks are over tokens, not over rows.

        Layers and heads may hold different rows; each takes its part of the mask by position.
        """
        return self.rows.seen + int(query_length), 0

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
        keep = tokens_to_remove if tokens_to_remove > 0 else self.rows.seen + tokens_to_remove
        self.rows.truncate(max(0, min(keep, self.rows.seen)))
        if self.turn.valid is not None:
            self.turn.valid = self.turn.valid[..., : self.rows.seen]
        if self.rows.seen:
            self.show()
        else:
            self.keys = self.values = None

    def reset(self) -> None:
        """Forget everything."""
        self.rows.reset()
        self.turn = Turn(rows=self.rows)
        self.keys = self.values = self.asked = None
        self.is_initialized = False

    @plain_tensors()
    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow the beams."""
        if self.is_initialized:
            self._select(beam_idx)

    @plain_tensors()
    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every batch row."""
        if self.is_initialized:
            self.rows.repeat_batch(repeats)
            if self.turn.valid is not None and self.turn.valid.shape[0] > 1:
                self.turn.valid = self.turn.valid.repeat_interleave(repeats, 0)
            self.show()

    @plain_tensors()
    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some batch rows, given by index or by a boolean mask."""
        if self.is_initialized:
            picked = indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices
            self._select(picked)

    @plain_tensors()
    def offload(self) -> None:
        """Move the rows to the CPU."""
        if self.is_initialized:
            self.rows.to("cpu")
            self.show()

    @plain_tensors()
    def prefetch(self) -> None:
        """Move the rows back."""
        if self.is_initialized:
            self.rows.to(self.device)
            self.show()

    @plain_tensors()
    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copy the rows; what belongs to the attachment, and recorded queries, are shared."""
        shared: list[Any] = [shard.cache.row_format for shard in self.rows]
        shared += [self._policy, self.asked, self.rows.row_format, self.turn.call]
        memo |= {id(held): held for held in shared if held is not None}
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        for name, held in vars(self).items():
            setattr(twin, name, copy.deepcopy(held, memo))
        return twin

    def record(self, query: Tensor) -> None:
        """Keep the queries of a forward, behind those of the forwards before."""
        kept = [query] if self.asked is None else [self.asked, query]
        self.asked = torch.cat(kept, 2)

    def show(self) -> tuple[Tensor, Tensor]:
        """Let the host see the rows, and return them; of a layer in shards the first one's."""
        first = self.rows.shards[0].cache
        self.keys, self.values = first.keys, first.values
        return self.keys, self.values

    def _select(self, batch: Tensor) -> None:
        """Make the batch consist of these rows of it."""
        self.rows.select_batch(batch)
        if self.turn.valid is not None and self.turn.valid.shape[0] > 1:
            self.turn.valid = self.turn.valid.index_select(0, batch.to(self.turn.valid.device))
        self.show()


def _format_of(policy: LayerPolicy | None) -> tuple[RowFormat, Mapping[str, Mark]]:
    """How rows are stored under a policy, and what is kept with each."""
    return (RowFormat(), {}) if policy is None else (policy.selector, marks_of(policy))


def marks_of(policy: LayerPolicy) -> Mapping[str, Mark]:
    """What a policy's eviction keeps with every row."""
    return {} if policy.eviction is None else policy.eviction.evictor.marks()


def _narrow_of(policy: LayerPolicy | None) -> Narrow | None:
    """The row format of some of the heads."""
    return None if policy is None else (lambda heads: policy.of(heads).selector)


def _parts_of(policy: LayerPolicy | None) -> tuple[Tensor, ...]:
    """KV heads whose rows lie apart from the start."""
    return () if policy is None else policy.parts


def cache_bytes(cache: Cache) -> int:
    """Bytes that the layers of a cache hold, ours or the host's, unused room included."""
    return sum(_layer_bytes(layer) for layer in cache.layers)


def _layer_bytes(layer: Any) -> int:
    if isinstance(layer, LokiLayer):
        return layer.rows.nbytes()
    fixed = getattr(layer, "rows", None)
    if isinstance(fixed, StaticRows):
        return fixed.nbytes
    held = (getattr(layer, name, None) for name in ("keys", "values"))
    return sum(rows.nbytes for rows in held if rows is not None)
