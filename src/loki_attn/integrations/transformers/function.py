"""The attention function that transformers calls, and the state that it finds on the module."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn

from loki_attn import attention
from loki_attn.attention import LayerPolicy
from loki_attn.cache import KEY, VALUE, LayerCache
from loki_attn.errors import UnsupportedModelError
from loki_attn.integrations.transformers.layers import LokiLayer
from loki_attn.kernels import ops
from loki_attn.types import AttentionCall, Mode, Selection

STATE: Final = "_loki_attn_state"

_UNDERSTOOD: Final = {"s_aux", "sinks", "softcap", "sliding_window", "is_causal"}
_HARMLESS: Final = {
    "cache_position",
    "deterministic",
    "labels",
    "logits_to_keep",
    "num_items_in_batch",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "position_embeddings",
    "position_ids",
    "return_dict",
    "token_type_ids",
    "use_cache",
}
_REFUSED: Final = {
    "position_bias": "it adds a position bias to the logits",
    "indices": "it selects tokens natively",
    "block_indices": "it selects blocks natively",
    "cache": "it runs under continuous batching",
    "cu_seq_lens_q": "it packs several sequences",
}


@dataclass(frozen=True)
class Observation:
    """What one attention layer saw in one forward, for calibration and fidelity.

    Attributes:
        layer_index: The layer.
        query: [batch, heads, q_len, head_dim], after RoPE.
        key: [batch, kv_heads, seq, head_dim], after RoPE, heads not repeated.
        value: [batch, kv_heads, seq, value_dim].
        call: Scaling, soft-cap, sink logits.
        visible: None for causal, or bool [batch or 1, 1, q_len, seq].
        rotary: The model's (cos, sin) of the new tokens, where it passes them.
    """

    layer_index: int
    query: Tensor
    key: Tensor
    value: Tensor
    call: AttentionCall
    visible: Tensor | None
    rotary: tuple[Tensor, Tensor] | None


Observer = Callable[[Observation], None]


@dataclass
class Traffic:
    """What attention read since the last reset, full-attention layers only.

    Attributes:
        sparse_calls: Single-token layer calls that selected.
        dense_calls: Single-token layer calls that read everything.
        every_query_calls: Multi-token layer calls in which every query selected.
        read_bytes: Cache bytes that the single-token calls read, planes included.
        dense_bytes: Cache bytes that dense attention would have read for the same calls.
        rows_read: Rows attended to, summed over calls and KV heads.
        rows_held: Rows that were there, summed alike.
    """

    sparse_calls: int = 0
    dense_calls: int = 0
    every_query_calls: int = 0
    read_bytes: int = 0
    dense_bytes: int = 0
    rows_read: int = 0
    rows_held: int = 0

    def reset(self) -> None:
        """Start counting again."""
        self.__init__()  # type: ignore[misc]

    def record(self, cache: LayerCache, layer: LayerPolicy, selection: Selection | None) -> None:
        """Count one single-token call of one layer."""
        heads = cache.keys.shape[0] * cache.keys.shape[1]
        row = cache.row_bytes(KEY, VALUE)
        held = heads * cache.length
        read = held if selection is None else _rows_read(selection, cache)
        self.dense_bytes += held * row
        self.read_bytes += read * row
        self.rows_held += held
        self.rows_read += read
        if selection is None:
            self.dense_calls += 1
        else:
            self.sparse_calls += 1
            self.read_bytes += held * layer.selector.score_bytes(cache)


@dataclass
class Shared:
    """What all layers of one attachment share."""

    mode: Mode = "decode"
    force_selection: bool = False
    observer: Observer | None = None
    traffic: Traffic = field(default_factory=Traffic)


@dataclass
class LayerState:
    """What the attention function knows about one module; found on the module itself.

    `policy` is None where the layer stays dense (sliding window, linear, excluded) and while the
    probe runs, which fills in what it saw.
    """

    index: int
    shared: Shared
    policy: LayerPolicy | None = None
    layer: LokiLayer | None = None
    rotary: tuple[Tensor, Tensor] | None = None
    seen: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None


def loki_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Serve one attention call of a transformers model.

    Args:
        module: The attention module; an attached one carries its state.
        query: [batch, heads, q_len, head_dim], after RoPE.
        key: [batch, kv_heads, seq, head_dim], what the cache returned.
        value: [batch, kv_heads, seq, value_dim].
        attention_mask: None, bool (True = attend) or additive, [batch or 1, 1, q_len, seq].
        scaling: Factor on the logits; head_dim ** -0.5 if None.
        dropout: Ignored: this is for inference.
        kwargs: What the model adds; unknown ones that matter are refused.

    Returns:
        [batch, q_len, heads, value_dim] and None for the weights.
    """
    del dropout
    call = _read_call(query, scaling, kwargs)
    visible = _as_bool(attention_mask)
    causal = bool(kwargs.get("is_causal", True) if kwargs.get("is_causal") is not None else True)
    state: LayerState | None = getattr(module, STATE, None)
    if state is None or state.policy is None:
        if state is not None:
            _note(state, query, key, value, kwargs)
        out = ops().dense(query, key, value, visible, call, causal=causal)
    else:
        out = _serve(state, state.policy, query, key, value, call, visible)
    return out.transpose(1, 2).contiguous(), None


def _serve(
    state: LayerState,
    layer: LayerPolicy,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    call: AttentionCall,
    visible: Tensor | None,
) -> Tensor:
    shared, cache = state.shared, _rows_of(state, layer, key, value)
    if shared.observer is not None:
        shared.observer(
            Observation(state.index, query, cache.keys, value, call, visible, state.rotary)
        )
    single = query.shape[2] == 1
    wanted = single or shared.mode == "every_query"
    if not wanted or (layer.budget.is_dense(cache.length) and not shared.force_selection):
        if single:
            shared.traffic.record(cache, layer, None)
        return attention.dense(query, cache, layer, call, visible)
    if single:
        out, selection = attention.decode(query, cache, layer, call, visible)
        shared.traffic.record(cache, layer, selection)
        return out
    shared.traffic.every_query_calls += 1
    return attention.every_query(query, cache, layer, call, visible)


def _rows_of(state: LayerState, layer: LayerPolicy, key: Tensor, value: Tensor) -> LayerCache:
    """The cache behind these keys, or a passing one where the model runs without a cache."""
    if state.layer is None:
        cache = LayerCache(layer.selector)
        cache.append(key, value)
        return cache
    if not _is_same(key, state.layer.rows.keys):
        raise UnsupportedModelError(
            f"Layer {state.index} changed the keys after the cache returned them (multi-head "
            "latent attention does); such layers cannot be served."
        )
    return state.layer.rows


def _note(
    state: LayerState, query: Tensor, key: Tensor, value: Tensor, kwargs: dict[str, Any]
) -> None:
    """Remember what the probe needs to know about a layer."""
    state.seen = {
        "query": tuple(query.shape),
        "key": tuple(key.shape),
        "value": tuple(value.shape),
        "sliding": kwargs.get("sliding_window") is not None,
        "cached": state.layer is not None,
        "handed_off": state.layer is None or _is_same(key, state.layer.rows.keys),
    }


def _is_same(key: Tensor, rows: Tensor) -> bool:
    return key.shape == rows.shape and key.data_ptr() == rows.data_ptr()


def _read_call(query: Tensor, scaling: float | None, kwargs: dict[str, Any]) -> AttentionCall:
    for name, value in kwargs.items():
        if value is None or name in _UNDERSTOOD or name in _HARMLESS:
            continue
        reason = _REFUSED.get(name, "its meaning is not known here")
        raise UnsupportedModelError(
            f"The model passes {name!r} to its attention: {reason}; it cannot be served."
        )
    sinks = kwargs.get("s_aux")
    sinks = kwargs.get("sinks") if sinks is None else sinks
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    return AttentionCall(scaling=scale, softcap=kwargs.get("softcap"), sink_logits=sinks)


def _as_bool(mask: Tensor | None) -> Tensor | None:
    if mask is None or mask.dtype == torch.bool:
        return mask
    visible = mask == 0
    if bool((mask[~visible] > -1e3).any()):
        raise UnsupportedModelError(
            "An additive attention mask came with values between -1000 and 0, a bias; only masks "
            "that show or hide rows can be served."
        )
    return visible


def _rows_read(selection: Selection, cache: LayerCache) -> int:
    """Physical rows: a choice per query head reads the union of its group."""
    batch, choosers, picked = selection.indices.shape
    kv_heads = cache.keys.shape[1]
    if choosers == kv_heads:
        return batch * choosers * picked
    marks = torch.zeros(batch, kv_heads, cache.length + 1, dtype=torch.bool)
    flat = selection.indices.reshape(batch, kv_heads, -1).cpu()
    marks.scatter_(2, flat.masked_fill(flat < 0, cache.length), value=True)
    return int(marks[..., :-1].sum())
