"""Adopting: the cache layers of a forward, found in its arguments and replaced by ours."""

from collections.abc import Iterable, Sequence
from typing import Any, Final, final

import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer, StaticLayer

from loki_attn.attention import LayerPolicy
from loki_attn.compiled import why_not_static
from loki_attn.errors import CacheError
from loki_attn.integrations.transformers.function import LayerState, Shared
from loki_attn.integrations.transformers.layers import LokiLayer
from loki_attn.integrations.transformers.static_layers import (
    LokiStaticLayer,
    take_over,
)

_INSTEAD: Final = (
    "drop cache_implementation='static', so that the cache is dynamic, or use a policy that keeps "
    "every row and ranks rows by a lead, such as 'loki' with top_k or fraction, in mode 'decode'"
)
_CACHE_ARGUMENTS: Final = ("past_key_values", "layer_past", "past_key_value")


def cache_of(args: Iterable[Any], kwargs: dict[str, Any]) -> Cache | None:
    """Return the cache among the arguments of an attention module."""
    for name in _CACHE_ARGUMENTS:
        if isinstance(kwargs.get(name), Cache):
            return kwargs[name]
    for given in args:
        if isinstance(given, Cache):
            return given
    return None


@final
class Adopter:
    """Swaps the stock layers of caches for layers of one attachment, and arms them.

    All of it is traced where the model is compiled: no state that changes from step to step.

    Args:
        owner: Token of the attachment.
        shared: What its layers share.
        states: Its layers, in the order of the model.
        reserve_tokens: Rows that a new dynamic layer allocates at once.
    """

    def __init__(
        self, owner: str, shared: Shared, states: dict[int, LayerState], reserve_tokens: int
    ) -> None:
        """Note whose layers they are."""
        self._owner, self._shared, self._states = owner, shared, states
        self._reserve_tokens = reserve_tokens

    def new_layer(self, index: int, reserve_tokens: int | None = None) -> LokiLayer:
        """Return an empty dynamic layer."""
        reserve = self._reserve_tokens if reserve_tokens is None else reserve_tokens
        return LokiLayer(self._states[index].policy, self._owner, reserve)

    def adopt(self, cache: Cache, state: LayerState) -> None:
        """Put the cache's layer, as ours and armed, on the state, or leave it to the host.

        Raises:
            CacheError: If the cache is another's, or of a kind that cannot serve the policy.
        """
        index, layers = state.index, cache.layers
        probing = state.policy is None and state.seen is None
        if index < len(layers) and isinstance(layers[index], StaticLayer) and not probing:
            state.static = True
            state.fixed = self._static(cache, state)
        elif state.policy is not None or probing:
            state.layer = self._dynamic(cache, state, probing=probing)

    def _dynamic(self, cache: Cache, state: LayerState, *, probing: bool) -> LokiLayer | None:
        index, layers = state.index, cache.layers
        while len(layers) <= index and getattr(cache, "layer_class_to_replicate", None):
            layers.append(cache.layer_class_to_replicate())
        if index >= len(layers):
            return None
        layer = layers[index]
        state.cache_layer = type(layer).__name__
        if isinstance(layer, LokiLayer):
            self._check_owner(layer)
        elif type(layer) is DynamicLayer:
            layer = layers[index] = self._from_stock(layer, index)
        elif probing:
            return None
        else:
            raise _unserved(layer, index)
        layer.follow(state.policy)
        layer.armed = True
        return layer

    def _static(self, cache: Cache, state: LayerState) -> LokiStaticLayer | None:
        policy, layer = state.policy, cache.layers[state.index]
        judged = [] if policy is None else [policy]
        if state.first:  # all of them, before the first layer writes anything
            judged = [one.policy for one in self._states.values() if one.policy is not None]
        # Those of a compiled step were judged when the prompt was read.
        refuse_static(cache, () if torch.compiler.is_compiling() else judged, self._shared)
        if policy is None:
            return None
        ours = layer if isinstance(layer, LokiStaticLayer) else None
        if ours is None and type(layer) is not StaticLayer:
            raise _unserved(layer, state.index)
        whole = policy.budget.is_dense(layer.max_cache_len) and not self._shared.always_select
        if whole and (ours is None or not ours.owner):
            return None
        if ours is None:
            ours = take_over(cache, state.index, policy, self._owner)
        else:
            ours.follow(policy, self._owner)
        ours.armed = True
        return ours

    def _from_stock(self, stock: DynamicLayer, index: int) -> LokiLayer:
        layer = self.new_layer(index)
        if stock.get_seq_length() > 0:
            layer.armed = True
            layer.update(stock.keys, stock.values)
        return layer

    def _check_owner(self, layer: LokiLayer) -> None:
        if layer.owner != self._owner:
            raise CacheError(
                "This cache was made by another attachment, for another model or policy; start a "
                "new one with past_key_values=attachment.cache()."
            )


def _unserved(layer: Any, index: int) -> CacheError:
    """The error for a cache layer that no sparse layer can live in."""
    return CacheError(
        f"Layer {index} of this cache is a {type(layer).__name__}; a sparse layer needs "
        "the default dynamic cache or a static one: drop cache_implementation, or pass "
        "past_key_values=attachment.cache()."
    )


def refuse_static(cache: Cache, policies: Sequence[LayerPolicy], shared: Shared) -> None:
    """Refuse what a static cache cannot do, before anything is written.

    Args:
        cache: The static cache.
        policies: Bound policies to judge.
        shared: What else the attachment is asked for.

    Raises:
        CacheError: If a policy, or something that is asked for, needs a dynamic cache.
    """
    reason = None
    if shared.mode == "every_query":
        reason = "in mode 'every_query' every query of a prompt selects"
    elif shared.observer is not None:
        reason = "an observer looks at the rows of every step"
    elif shared.recording:
        reason = "recording keeps the queries beside the rows"
    elif cache.offloading:
        reason = "an offloaded cache hands out copies of its rows"
    for policy in policies:
        reason = why_not_static(policy) if reason is None else reason
    if reason is not None:
        raise CacheError(f"A static cache cannot be used here because {reason}; {_INSTEAD}.")
