"""The attention function that transformers calls, and the state that it finds on the module."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn

from loki_attn.attention import LayerPolicy
from loki_attn.errors import InputError, LokiAttnError, UnsupportedModelError
from loki_attn.eviction import Turn
from loki_attn.integrations.transformers.layers import LokiLayer
from loki_attn.integrations.transformers.static_layers import LokiStaticLayer, dense_over_slots
from loki_attn.integrations.transformers.traffic import Meter, Scales, as_mask
from loki_attn.kernels import ops
from loki_attn.serving import How, Served, rows_for, rows_of_tokens, serve
from loki_attn.types import AttentionCall, Mode

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
class Shared:
    """What all layers of one attachment share.

    `always_select` sends steps that would read everything through the selection as well: at full
    budget the result must not change, which is how an attachment verifies itself. `recording`
    keeps the queries of forwards of several tokens with the cache. `scales` weigh the layers, if
    anybody wants to know. `after` is called when a layer
    has attended, with the number of query tokens.
    """

    mode: Mode = "decode"
    always_select: bool = False
    observer: Observer | None = None
    meter: Meter = field(default_factory=Meter)
    recording: bool = False
    scales: Scales | None = None
    after: Callable[["LayerState", int], None] = lambda state, q_len: None


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
        fixed: The same, of a static cache.
        cache_layer: Class name of the stock cache layer that the probe found.
        rotary: The model's (cos, sin) of the forward that runs now.
        seen: What the probe saw.
        called: Whether the forward that runs now called the attention function.
        static: Whether the cache of the forward that runs now has fixed slots here, ours or the
            host's.
        first: Whether this is the model's first attention layer.
    """

    index: int
    shared: Shared
    policy: LayerPolicy | None = None
    layer: LokiLayer | None = None
    fixed: LokiStaticLayer | None = None
    cache_layer: str = ""
    rotary: tuple[Tensor, Tensor] | None = None
    seen: Seen | None = None
    called: bool = False
    static: bool = False
    first: bool = False


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
    rows = query, key, value
    if state is not None and (state.policy is not None or state.static):
        with torch.no_grad():
            if state.static or state.policy is None:
                out, weights = _serve_static(state, rows, call, visible, weigh=weigh), None
            else:
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
    shared, turn = state.shared, _turn_of(state, layer, key, value)
    whole = turn.rows.whole
    if shared.observer is not None and whole is not None:
        shared.observer(
            Observation(state.index, query, whole.keys, value, call, visible, state.rotary)
        )
    single = query.shape[2] == 1
    how: How = "decode" if single else "dense"
    if not single and shared.mode == "every_query":
        how = "every_query"
    if weigh and (how == "every_query" or whole is None):
        raise InputError(
            "output_attentions cannot be had in mode 'every_query', or of a layer whose heads hold "
            "different numbers of rows; use attachment.observe, or mode='decode'."
        )
    out, done = serve(query, turn, layer, call, visible, how, always=shared.always_select)
    for served in done if single else ():
        shared.meter.record(served)
    shared.meter.counts.every_query_calls += any(served.how == "every_query" for served in done)
    weights = _weights_of(done[0], query, call, visible) if weigh else None
    if state.layer is not None:
        if shared.recording and not single:
            state.layer.record(query)
        shared.after(state, query.shape[2])
    return out, weights


def _serve_static(
    state: LayerState,
    tensors: tuple[Tensor, Tensor, Tensor],
    call: AttentionCall,
    visible: Tensor | None,
    *,
    weigh: bool,
) -> Tensor:
    """Attend over the slots of a static cache, a compiled step's included."""
    query, key, value = tensors
    if weigh:
        raise InputError(
            "output_attentions cannot be had of an attached model with a static cache, which does "
            "not return what it read; drop cache_implementation='static'."
        )
    if state.fixed is None:
        return dense_over_slots(query, key, value, None, call, visible)
    if query.shape[2] == 1 and not torch.compiler.is_compiling():
        state.shared.meter.counts.static_calls += 1
    return state.fixed.attend(query, key, call, visible)


def _weights_of(
    served: Served, query: Tensor, call: AttentionCall, visible: Tensor | None
) -> Tensor:
    """The soft-max weights of the rows that a call read, 0 for the others."""
    cache, read = served.shard.cache, visible
    if served.selection is not None:
        read = as_mask(served.selection, cache.length, query.shape[1])
    elif visible is not None:
        read = rows_of_tokens(served.shard, visible)
    return _weights(served.layer.selector.query_rows(query), cache.keys, call, read)


def _weights(query: Tensor, keys: Tensor, call: AttentionCall, read: Tensor | None) -> Tensor:
    """The soft-max weights of the rows that were read, 0 for the others."""
    if read is None:
        read = ops().causal_mask(query.shape[2], keys.shape[2], query.device)
    logits = ops().score(query, keys, None, call)
    return ops().estimated_weights(logits, read, call).to(query.dtype)


def _turn_of(state: LayerState, layer: LayerPolicy, key: Tensor, value: Tensor) -> Turn:
    """The rows behind these keys, or passing ones where the model runs without a cache."""
    if state.layer is None:
        rows = rows_for(layer)
        rows.append(key, value)
        return Turn(rows=rows)
    held = state.layer
    if not (_is_same(key, held.keys) and _is_same(value, held.values)):
        raise UnsupportedModelError(
            f"Layer {state.index} changed the keys or values after the cache returned them "
            "(as multi-head latent attention does); such layers cannot be served."
        )
    return held.turn


def _look(
    state: LayerState, query: Tensor, key: Tensor, value: Tensor, kwargs: dict[str, Any]
) -> Seen:
    """Note what the probe needs to know about a layer."""
    held = state.layer
    return Seen(
        query_shape=tuple(query.shape),
        key_shape=tuple(key.shape),
        value_shape=tuple(value.shape),
        sliding=kwargs.get("sliding_window") is not None or "Sliding" in state.cache_layer,
        cached=held is not None,
        handed_off=held is None or (_is_same(key, held.keys) and _is_same(value, held.values)),
    )


def _is_same(given: Tensor, rows: Tensor | None) -> bool:
    return rows is not None and given.shape == rows.shape and given.data_ptr() == rows.data_ptr()


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
