"""The attention function that transformers calls, and the state that it finds on the module."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn

from loki_attn import attention
from loki_attn.attention import LayerPolicy
from loki_attn.cache import KEY, VALUE, LayerCache
from loki_attn.errors import InputError, LokiAttnError, UnsupportedModelError
from loki_attn.integrations.transformers.layers import LokiLayer
from loki_attn.kernels import ops
from loki_attn.types import AttentionCall, Mode, Selection

IMPLEMENTATION: Final = "loki_attn"
STATE: Final = "_loki_attn_state"
_HIDDEN_BELOW: Final = -1e3

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
        key: [batch, kv_heads, seq, head_dim], after RoPE, heads not repeated; in the space they
            are stored in (another one under Loki's rotated layout).
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
    """What all layers of one attachment share.

    `always_select` sends steps that would read everything through the selection as well: at full
    budget the result must not change, which is how an attachment verifies itself.
    """

    mode: Mode = "decode"
    always_select: bool = False
    observer: Observer | None = None
    traffic: Traffic = field(default_factory=Traffic)


@dataclass(frozen=True)
class Seen:
    """What the probe learns from one attention call of a layer."""

    query_shape: tuple[int, ...]
    key_shape: tuple[int, ...]
    value_shape: tuple[int, ...]
    sliding: bool
    cached: bool
    handed_off: bool


@dataclass
class LayerState:
    """What the attention function knows about one module; found on the module itself.

    Attributes:
        index: The layer's index in the model.
        shared: What it shares with the other layers of the attachment.
        policy: None where the layer stays dense (sliding window, linear, natively sparse) and
            while the probe runs.
        layer: The cache layer of the forward that runs now; None between forwards.
        cache_layer: Class name of the stock cache layer that the probe found.
        rotary: The model's (cos, sin) of the forward that runs now.
        seen: What the probe saw.
        called: Whether the forward that runs now called the attention function.
    """

    index: int
    shared: Shared
    policy: LayerPolicy | None = None
    layer: LokiLayer | None = None
    cache_layer: str = ""
    rotary: tuple[Tensor, Tensor] | None = None
    seen: Seen | None = None
    called: bool = False


def loki_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Serve one attention call of a transformers model.

    Args:
        module: The attention module; an attached one carries its state.
        query: [batch, heads, q_len, head_dim], after RoPE.
        key: [batch, kv_heads, seq, head_dim], what the cache returned.
        value: [batch, kv_heads, seq, value_dim].
        attention_mask: None, bool (True = attend) or additive, [batch or 1, 1, q_len, seq].
        scaling: Factor on the logits; head_dim ** -0.5 if None.
        dropout: Must be 0: this is for inference.
        kwargs: What the model adds; unknown ones that matter are refused.

    Returns:
        [batch, q_len, heads, value_dim], and the weights [batch, heads, q_len, seq] where the
        model was called with output_attentions=True, else None.

    Raises:
        UnsupportedModelError: If the model asks for something that is not understood.
        LokiAttnError: If the model is in training mode and drops attention weights.
    """
    if dropout:
        raise LokiAttnError(
            f"The model asks for attention dropout {dropout}: it is in training mode, and an "
            "attached model is for inference; call model.eval()."
        )
    call = _read_call(query, scaling, kwargs)
    visible = _visible(module, query, key, attention_mask, kwargs.get("is_causal"))
    weigh = bool(kwargs.get("output_attentions"))
    state: LayerState | None = getattr(module, STATE, None)
    if state is not None:
        state.called = True
    if state is not None and state.policy is not None:
        rows = query, key, value
        with torch.no_grad():
            out, weights = _serve(state, state.policy, rows, call, visible, weigh=weigh)
        if query.requires_grad and torch.is_grad_enabled():
            out = _ForwardOnly.apply(out, query)  # type: ignore[no-untyped-call]
    else:
        if state is not None:
            state.seen = _look(state, query, key, value, kwargs)
        out = ops().dense(query, key, value, visible, call, causal=True)
        weights = _weights(query, key, call, visible) if weigh else None
    return out.transpose(1, 2).contiguous(), weights


class _ForwardOnly(torch.autograd.Function):
    """Lets a forward run with gradients enabled, and refuses to make up gradients."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, query: Tensor) -> Tensor:
        """Pass the output on."""
        del ctx, query
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """Refuse."""
        del ctx, gradients
        raise LokiAttnError(
            "An attached model is for inference: its sparse attention has no gradient. Detach it "
            "to train."
        )


def _serve(
    state: LayerState,
    layer: LayerPolicy,
    tensors: tuple[Tensor, Tensor, Tensor],
    call: AttentionCall,
    visible: Tensor | None,
    *,
    weigh: bool,
) -> tuple[Tensor, Tensor | None]:
    """Attend by the layer's policy."""
    query, key, value = tensors
    if visible is not None and visible.shape[1] != 1:
        raise UnsupportedModelError(
            f"The attention mask {tuple(visible.shape)} differs between heads; a sparse layer "
            "needs one mask for all heads, [batch, 1, q_len, seq]."
        )
    shared, cache = state.shared, _rows_of(state, layer, key, value)
    if shared.observer is not None:
        shared.observer(
            Observation(state.index, query, cache.keys, value, call, visible, state.rotary)
        )
    single, read = query.shape[2] == 1, visible
    wanted = single or shared.mode == "every_query"
    if not wanted or (layer.budget.is_dense(cache.length) and not shared.always_select):
        if single:
            shared.traffic.record(cache, layer, None)
        out = attention.dense(query, cache, layer, call, visible)
    elif single:
        out, selection = attention.decode(query, cache, layer, call, visible)
        shared.traffic.record(cache, layer, selection)
        read = _as_mask(selection, cache.length, query.shape[1]) if weigh else None
    elif weigh:
        raise InputError(
            "output_attentions cannot be had in mode 'every_query'; use attachment.observe, or "
            "mode='decode'."
        )
    else:
        shared.traffic.every_query_calls += 1
        out = attention.every_query(query, cache, layer, call, visible)
    rows_query = layer.selector.query_rows(query) if weigh else query
    return out, _weights(rows_query, cache.keys, call, read) if weigh else None


def _weights(query: Tensor, keys: Tensor, call: AttentionCall, read: Tensor | None) -> Tensor:
    """The soft-max weights of the rows that were read, 0 for the others."""
    if read is None:
        read = ops().causal_mask(query.shape[2], keys.shape[2], query.device)
    logits = ops().score(query, keys, None, call)
    return ops().estimated_weights(logits, read, call).to(query.dtype)


def _as_mask(selection: Selection, length: int, heads: int) -> Tensor:
    """Bool [batch, heads, 1, length]: the rows of a selection."""
    indices = selection.indices
    marks = indices.new_zeros((*indices.shape[:2], length + 1), dtype=torch.bool)
    marks.scatter_(2, indices.masked_fill(indices < 0, length), value=True)
    return marks[..., None, :-1].repeat_interleave(heads // indices.shape[1], 1)


def _rows_of(state: LayerState, layer: LayerPolicy, key: Tensor, value: Tensor) -> LayerCache:
    """The cache behind these keys, or a passing one where the model runs without a cache."""
    if state.layer is None:
        cache = LayerCache(layer.selector)
        cache.append(key, value)
        return cache
    rows = state.layer.rows
    if not (_is_same(key, rows.keys) and _is_same(value, rows.values)):
        raise UnsupportedModelError(
            f"Layer {state.index} changed the keys or values after the cache returned them "
            "(as multi-head latent attention does); such layers cannot be served."
        )
    return rows


def _look(
    state: LayerState, query: Tensor, key: Tensor, value: Tensor, kwargs: dict[str, Any]
) -> Seen:
    """Note what the probe needs to know about a layer."""
    rows = None if state.layer is None else state.layer.rows
    return Seen(
        query_shape=tuple(query.shape),
        key_shape=tuple(key.shape),
        value_shape=tuple(value.shape),
        sliding=kwargs.get("sliding_window") is not None or "Sliding" in state.cache_layer,
        cached=rows is not None,
        handed_off=rows is None or (_is_same(key, rows.keys) and _is_same(value, rows.values)),
    )


def _is_same(given: Tensor, rows: Tensor) -> bool:
    return given.shape == rows.shape and given.data_ptr() == rows.data_ptr()


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


def _visible(
    module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool | None
) -> Tensor | None:
    """Return the mask as bool, or None where every query sees what is before it and itself."""
    if mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if causal or query.shape[2] == 1:
            return None
        return query.new_ones((1, 1, query.shape[2], key.shape[2]), dtype=torch.bool)
    if mask.dtype == torch.bool:
        return mask
    visible = mask == 0
    if bool((mask[~visible] > _HIDDEN_BELOW).any()):
        raise UnsupportedModelError(
            "An additive attention mask came with values between -1000 and 0, a bias; only masks "
            "that show or hide rows can be served."
        )
    return visible


def _rows_read(selection: Selection, cache: LayerCache) -> int:
    """Physical rows: a choice per query head reads the union of its group."""
    kv_heads = cache.keys.shape[1]
    choosers = selection.indices.shape[1]
    if choosers == kv_heads:
        return int(selection.counts.sum())
    marks = _as_mask(selection, cache.length, choosers)
    return int(marks.view(marks.shape[0], kv_heads, -1, cache.length).any(2).sum())
