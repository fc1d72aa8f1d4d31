"""Can this model be served correctly? Find out by looking, not by name."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor
from transformers import PreTrainedModel

from loki_attn.budget import Budget
from loki_attn.errors import LokiAttnError, UnsupportedModelError
from loki_attn.integrations.transformers.function import (
    IMPLEMENTATION,
    STATE,
    LayerState,
    Seen,
    Shared,
)
from loki_attn.types import LayerShape

_PROMPT_TOKENS: Final = 10
_STEPS: Final = 3
# Largest difference of logits, in their standard deviations.
_TOLERANCE: Final = {torch.float64: 2e-3, torch.float32: 2e-3}
# In 16 bits one token of a mixture of experts may take another path: their mean square is held.
_COARSE_TOLERANCE: Final = 0.3


def check_servable(model: object) -> None:
    """Refuse what can be refused before anything is touched.

    Raises:
        UnsupportedModelError: If the model is no causal LM of transformers, has no attention
            interface, or is an encoder-decoder.
        LokiAttnError: If it is attached already, or shares its config with a model that is.
    """
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"attach needs a transformers model, got {type(model).__name__}."
        )
    name = type(model).__name__
    if any(hasattr(module, STATE) for module in model.modules()):
        raise LokiAttnError(
            f"{name} is attached already; call attachment.use(policy) to change the policy, or "
            "attachment.detach() first."
        )
    if model.config._attn_implementation == IMPLEMENTATION:
        raise LokiAttnError(
            f"This {name} shares its config object with a model that is attached; build each "
            "model from its own copy.deepcopy(config)."
        )
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(f"{name} is an encoder-decoder; only decoders are served.")
    if not model.can_generate():
        raise UnsupportedModelError(
            f"{name} is not a causal language model; load it with AutoModelForCausalLM."
        )
    if not model._can_set_attn_implementation():
        raise UnsupportedModelError(
            f"{name} has no attention interface (its attention is written out in its class), so "
            "no attention function can be put in."
        )


def short_logits(model: PreTrainedModel) -> Tensor:
    """Stock logits of a few tokens, float32 [1, steps + 1, vocab], from one plain forward."""
    with quiet(model):
        logits: Tensor = model(input_ids=_probe_tokens(model), use_cache=False).logits
    return logits[:, -_STEPS - 1 :].float()


def probe_layers(model: PreTrainedModel, states: Sequence[LayerState]) -> dict[int, LayerShape]:
    """Run a few tokens densely and read off which layers can become sparse.

    Returns:
        The shapes of the full-attention layers by layer index; none where all layers have
        sliding windows, with a warning.

    Raises:
        UnsupportedModelError: If no layer calls the attention function, if a layer does not hand
            the cache's keys on, or if none is attention over a dynamic cache.
    """
    name = type(model).__name__
    with quiet(model):
        model(input_ids=_probe_tokens(model), use_cache=True)
    called = {s.index: (s, s.seen) for s in states if s.seen is not None}
    if not called:
        raise UnsupportedModelError(
            f"{name} never called the attention function that was set: it has no attention "
            "interface, or none of its layers is attention."
        )
    for index, (_, seen) in called.items():
        if not seen.handed_off:
            raise UnsupportedModelError(
                f"Layer {index} of {name} changes the keys or values after the cache returned them "
                "(as multi-head latent attention does); such layers cannot be served."
            )
    shapes = {i: _shape(i, seen) for i, (_, seen) in called.items() if _is_full(seen)}
    if shapes:
        return shapes
    if not all(seen.sliding for _, seen in called.values()):
        kinds = sorted({s.cache_layer or "no layer" for s, _ in called.values()})
        raise UnsupportedModelError(
            f"No layer of {name} is plain attention over a dynamic cache; its cache has "
            f"{', '.join(kinds)} (linear or natively sparse attention)."
        )
    warnings.warn(
        f"Every layer of {name} attends through a sliding window; all of them stay as they are, "
        "nothing becomes sparse.",
        stacklevel=4,
    )
    return {}


def verify(
    model: PreTrainedModel, shared: Shared, states: Sequence[LayerState], stock: Tensor
) -> None:
    """Compare the attached model, selecting at full budget, with the stock logits.

    Raises:
        UnsupportedModelError: If they differ by more than rounding explains.
    """
    with _selecting_everything(shared, states), quiet(model):
        ours = _stepwise_logits(model)
    got, allowed = logit_distance(ours, stock, model.dtype)
    if not got <= allowed:
        raise UnsupportedModelError(
            f"At full budget {type(model).__name__} gives other logits than the stock model: "
            f"they differ by {got:.2g} of their standard deviation, rounding in {model.dtype} "
            f"explains {allowed:.2g}."
        )


def logit_distance(ours: Tensor, stock: Tensor, dtype: torch.dtype) -> tuple[float, float]:
    """How far logits are from the stock ones, and how far rounding in `dtype` may move them.

    Both in standard deviations of the stock logits.
    """
    difference = (ours - stock) / max(float(stock.std()), 1e-3)
    exact = dtype in _TOLERANCE
    got = float(difference.abs().max() if exact else difference.square().mean().sqrt())
    return got, _TOLERANCE.get(dtype, _COARSE_TOLERANCE)


@contextmanager
def quiet(model: PreTrainedModel) -> Iterator[None]:
    """Inference without gradients and dropout; every module's training flag is restored."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _selecting_everything(shared: Shared, states: Sequence[LayerState]) -> Iterator[None]:
    """Give every layer the full budget, evict nothing, and make it select nevertheless."""
    before = [state.policy for state in states]
    mode, always = shared.mode, shared.always_select
    for state in states:
        if state.policy is not None:
            state.policy = replace(state.policy, budget=Budget(), eviction=None, reuse_above=None)
    shared.mode, shared.always_select = "decode", True
    try:
        yield
    finally:
        shared.mode, shared.always_select = mode, always
        for state, policy in zip(states, before, strict=True):
            state.policy = policy


def _stepwise_logits(model: PreTrainedModel) -> Tensor:
    """Logits of the probe's last tokens, decoded one by one, float32 [1, steps + 1, vocab]."""
    tokens = _probe_tokens(model)
    out = model(input_ids=tokens[:, :-_STEPS], use_cache=True)
    rows = [out.logits[:, -1:]]
    for step in torch.split(tokens[:, -_STEPS:], 1, dim=1):
        out = model(input_ids=step, past_key_values=out.past_key_values, use_cache=True)
        rows.append(out.logits[:, -1:])
    return torch.cat(rows, 1).float()


def _is_full(seen: Seen) -> bool:
    return seen.cached and not seen.sliding


def _shape(index: int, seen: Seen) -> LayerShape:
    return LayerShape(
        index=index,
        num_heads=seen.query_shape[1],
        num_kv_heads=seen.key_shape[1],
        head_dim=seen.key_shape[3],
        value_dim=seen.value_shape[3],
    )


def _probe_tokens(model: PreTrainedModel) -> Tensor:
    vocabulary = model.config.get_text_config().vocab_size
    draw = torch.Generator().manual_seed(0)
    count = _PROMPT_TOKENS + _STEPS
    tokens = torch.randint(min(5, vocabulary - 1), vocabulary, (1, count), generator=draw)
    return tokens.to(model.device)
