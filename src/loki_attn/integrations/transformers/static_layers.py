"""LokiStaticLayer: a transformers static cache layer, with what ranks its rows beside them."""

import copy
from collections.abc import Callable
from typing import Any, Self, TypeVar, cast, final

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import StaticLayer

from loki_attn.attention import LayerPolicy
from loki_attn.compiled import StaticRows, append, static_rows, step
from loki_attn.errors import CacheError, UnsupportedModelError
from loki_attn.integrations.transformers.layers import plain_tensors
from loki_attn.kernels import ops
from loki_attn.row_format import RowFormat
from loki_attn.traceable import dense
from loki_attn.types import AttentionCall

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _uncompiled(function: _Function) -> _Function:
    """Let no compiler look into a function; the graph breaks where it is called."""
    return cast("_Function", torch.compiler.disable(function))  # type: ignore[no-untyped-call]


@final
class LokiStaticLayer(StaticLayer):
    """A full-attention layer of a static cache: keys, values and the lead plane in fixed tensors.

    An update neither grows nor waits, so a compiled decode step serves every length. Like a
    `LokiLayer` it must be armed by its attachment before every forward.

    Args:
        policy: How rows are stored and ranked.
        owner: Token of the attachment.
        capacity: Rows that it has room for, in tokens.

    Attributes:
        rows: The rows; None before the first update.
        owner: Token of the attachment; empty after a reset, when the layer is anybody's: `generate`
            of some versions keeps its cache, attached or not.
        armed: Whether the attachment runs a forward now.
    """

    def __init__(self, policy: LayerPolicy, owner: str, capacity: int) -> None:
        """Start empty; storage is allocated at the first update."""
        with plain_tensors():
            super().__init__(max_cache_len=capacity)
        self.rows: StaticRows | None = None
        self.owner = owner
        self.armed = False
        self._policy = policy
        self._blank = True

    @classmethod
    def from_stock(cls, stock: StaticLayer, policy: LayerPolicy, owner: str) -> Self:
        """Return a layer in place of a stock one, whose tensors it takes over."""
        layer = cls(policy, owner, stock.max_cache_len)
        if stock.is_initialized:
            for name, held in vars(stock).items():
                setattr(layer, name, held)
            layer._blank = False
            layer._hold()
        return layer

    @_uncompiled
    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate everything that the layer will ever hold."""
        with plain_tensors():
            super().lazy_initialization(key_states, value_states)
            self._hold()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the new rows and their lead in place; return all slots, written or not."""
        if not self.armed and not self.owner:
            self._blank = False
            super().update(key_states, value_states, *args, **kwargs)
            return self.keys, self.values
        if not self.armed:
            raise CacheError(
                "This cache belongs to a Loki attachment, but the model that uses it is not "
                "attached, or is another one; make a cache for this model, or attach it first."
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.armed = self._blank = False
        tokens = key_states.shape[2]
        if not torch.compiler.is_compiling() and (tokens > 1 or self.device.type == "cpu"):
            self._check_room(tokens)
        with torch.no_grad():
            held, selector = self.cumulative_length.view(1), self._policy.selector
            append(cast("StaticRows", self.rows), selector, key_states, value_states, held)
            self.cumulative_length.add_(tokens)
        return self.keys, self.values

    def follow(self, policy: LayerPolicy, owner: str) -> None:
        """Serve a policy: store the rows as it wants them, which are kept as the model made them.

        Raises:
            CacheError: If another attachment's rows are held, or rotated ones of another policy.
        """
        if self.owner and self.owner != owner:
            raise CacheError(
                "This cache was made by another attachment, for another model or policy; start a "
                "new one with past_key_values=attachment.cache()."
            )
        if policy is self._policy and (self.owner or self._blank):
            self.owner = owner
            return
        rotated = type(self._policy.selector).rows is not RowFormat.rows
        if rotated and self.owner and not self._blank:
            raise CacheError(
                "This cache holds rotated keys of another policy; start a new cache after "
                "changing the policy."
            )
        self._policy, self.owner = policy, owner
        if self.is_initialized:
            self._hold()

    def reset(self) -> None:
        """Forget all rows, and whose they were."""
        super().reset()
        self.owner, self._blank = "", True

    def attend(
        self, query: Tensor, key: Tensor, call: AttentionCall, visible: Tensor | None
    ) -> Tensor:
        """Answer one attention call; its rows are written already.

        Args:
            query: [batch, heads, q_len, head_dim], after RoPE.
            key: [batch, kv_heads, capacity, head_dim], what the last update returned.
            call: What the model asks of the attention.
            visible: bool [batch or 1, 1, q_len, capacity]; None for several tokens of an empty
                cache, which see themselves and all before them.

        Returns:
            [batch, heads, q_len, value_dim] in the query's dtype.

        Raises:
            UnsupportedModelError: If the keys are not those of the cache, or the mask does not fit.
        """
        if self.rows is None or key is not self.keys:
            raise UnsupportedModelError(
                "A layer changed the keys or values after its static cache returned them (as "
                "multi-head latent attention does); such layers cannot be served."
            )
        tokens = query.shape[2]
        if visible is None and tokens == 1:
            slots = torch.arange(self.max_cache_len, device=query.device)
            visible = (slots < self.cumulative_length)[None, None, None]
        if visible is not None and visible.shape[1:] != (1, tokens, self.max_cache_len):
            raise UnsupportedModelError(
                f"A static cache of {self.max_cache_len} slots needs one mask for all heads, "
                f"[batch, 1, {tokens}, {self.max_cache_len}], got {list(visible.shape)}."
            )
        if tokens == 1 and visible is not None:
            held = self.cumulative_length.view(1)
            return step(query, self.rows, self._policy, call, visible, held)
        rows_query = self._policy.selector.query_rows(query)
        return dense_over_slots(rows_query, self.keys, self.values, self, call, visible)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow the beams."""
        if self.rows is not None:
            self._change(lambda held: held.index_select(0, beam_idx.to(held.device)))

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copy the rows; the policy and its maps are shared."""
        shared: list[Any] = [self._policy]
        if self.rows is not None:
            shared += [self.rows.key_map, self.rows.query_map]
        memo |= {id(held): held for held in shared if held is not None}
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        with plain_tensors():
            for name, held in vars(self).items():
                setattr(twin, name, copy.deepcopy(held, memo))
        return twin

    @_uncompiled
    def _hold(self) -> None:
        """Take the stock tensors as storage, and allocate what goes with them."""
        selector = self._policy.selector
        with plain_tensors():
            rows = self.rows = static_rows(selector, self.keys, self.values, filled=not self._blank)
        maps = (rows.key_map, rows.query_map, *vars(selector).values())
        for fixed in (rows.plane, rows.scales, *maps):
            if isinstance(fixed, Tensor):
                # As the stock layer does with its tensors: graphs may count on the address.
                torch._dynamo.mark_static_address(fixed)

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        with plain_tensors():
            self.rows = None if self.rows is None else self.rows.changed(change)
        if self.rows is not None:
            self.keys, self.values = self.rows.keys, self.rows.values

    def _check_room(self, tokens: int) -> None:
        held = int(self.cumulative_length)
        if held + tokens > self.max_cache_len:
            raise CacheError(
                f"A static cache of {self.max_cache_len} slots holds {held} tokens and cannot "
                f"take {tokens} more; make it larger with max_cache_len, or start a new one."
            )


def dense_over_slots(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    layer: StaticLayer | None,
    call: AttentionCall,
    visible: Tensor | None,
) -> Tensor:
    """Dense attention over what a static cache returned, some slots of which are not written.

    Args:
        query: [batch, heads, q_len, head_dim], in the space of the keys.
        keys: [batch, kv_heads, slots, head_dim].
        values: [batch, kv_heads, slots, value_dim].
        layer: The cache layer, where its slots are in the order of their tokens.
        call: What the model asks of the attention.
        visible: bool [batch or 1, 1, q_len, slots]; None where the cache was empty before.

    Returns:
        [batch, heads, q_len, value_dim] in the query's dtype.
    """
    tokens = query.shape[2]
    if visible is None and tokens > 1:
        keys, values = keys[:, :, :tokens], values[:, :, :tokens]
    if torch.compiler.is_compiling():
        return dense(query, keys, values, visible, call)
    if visible is not None and tokens > 1 and layer is not None:
        # Once per prompt: what is not written is neither read nor multiplied.
        held = int(layer.cumulative_length)
        keys, values, visible = keys[:, :, :held], values[:, :, :held], visible[..., :held]
    return ops().dense(query, keys, values, visible, call, causal=True)


@_uncompiled
def take_over(cache: Cache, index: int, policy: LayerPolicy, owner: str) -> LokiStaticLayer:
    """Return a layer of a static cache as ours, made from the stock one that was there.

    A compiler does not look into it: stock `generate` reads the prompt uncompiled. Where a prompt
    is read in compiled chunks, the first of them breaks its graph here.
    """
    layer = LokiStaticLayer.from_stock(cache.layers[index], policy, owner)
    cache.layers[index] = layer
    return layer
