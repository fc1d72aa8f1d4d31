"""Can this model be served correctly? Find out by looking, not by name."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import torch
from torch import Tensor
from transformers import PreTrainedModel

from loki_attn.errors import LokiAttnError, UnsupportedModelError
from loki_attn.integrations.transformers.function import STATE, LayerState, Shared
from loki_attn.types import LayerShape

_PROMPT_TOKENS: Final = 10
_STEPS: Final = 3
_TOLERANCE: Final = {torch.float64: 1e-3, torch.float32: 2e-3, torch.float16: 0.1}
_COARSE_TOLERANCE: Final = 0.35


def check_servable(model: object) -> None:
    """Refuse what can be refused before anything is touched.

    Raises:
        UnsupportedModelError: If the model is no causal LM of transformers, has no attention
            interface, or is an encoder-decoder.
        LokiAttnError: If it is attached already.
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
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(f"{name} is an encoder-decoder; only decoders are served.")
    if not model._can_set_attn_implementation():
        raise UnsupportedModelError(
            f"{name} has no attention interface (its attention is written out in its class), so "
            "no attention function can be put in."
        )


def short_logits(model: PreTrainedModel) -> Tensor:
    """Stock logits of a few tokens, float32 [1, steps + 1, vocab], from one plain forward."""
    with quiet(model):
        logits = model(input_ids=_probe_tokens(model), use_cache=False).logits
    return logits[:, -_STEPS - 1 :].float()


def probe_layers(model: PreTrainedModel, states: Sequence[LayerState]) -> dict[int, LayerShape]:
    """Run a few tokens densely and read off which layers can become sparse.

    Returns:
        The shapes of the full-attention layers by layer index.

    Raises:
        UnsupportedModelError: If no layer calls the attention function, if a layer does not hand
            the cache's keys on, or if none is full attention.
    """
    name = type(model).__name__
    with quiet(model):
        model(input_ids=_probe_tokens(model), use_cache=True)
    called = [s for s in states if s.seen]
    if not called:
        raise UnsupportedModelError(
            f"{name} never called the attention function that was set: it has no attention "
            "interface, or none of its layers is attention."
        )
    shapes = {}
    for state in called:
        seen = state.seen
        if not seen["handed_off"] or (seen["cached"] and seen["key"][1] * 0 != 0):
            raise UnsupportedModelError(
                f"Layer {state.index} of {name} changes the keys after the cache returned them "
                "(multi-head latent attention does); such layers cannot be served."
            )
        if seen["cached"] and not seen["sliding"]:
            shapes[state.index] = LayerShape(
                index=state.index,
                num_heads=seen["query"][1],
                num_kv_heads=seen["key"][1],
                head_dim=seen["key"][3],
                value_dim=seen["value"][3],
            )
    if not shapes:
        raise UnsupportedModelError(
            f"No layer of {name} is plain full attention over a dynamic cache: they are sliding "
            "windows, linear, or natively sparse."
        )
    return shapes


def verify(model: PreTrainedModel, shared: Shared, stock: Tensor) -> None:
    """Compare the attached model, selecting at full budget, with the stock logits.

    Raises:
        UnsupportedModelError: If they differ by more than rounding explains.
    """
    tokens = _probe_tokens(model)
    rows = []
    shared.force_selection = True
    mode, shared.mode = shared.mode, "decode"
    try:
        with quiet(model):
            out = model(input_ids=tokens[:, :-_STEPS], use_cache=True)
            rows.append(out.logits[:, -1:])
            for step in range(tokens.shape[1] - _STEPS, tokens.shape[1]):
                out = model(
                    input_ids=tokens[:, step : step + 1],
                    past_key_values=out.past_key_values,
                    use_cache=True,
                )
                rows.append(out.logits[:, -1:])
    finally:
        shared.force_selection, shared.mode = False, mode
    ours = torch.cat(rows, 1).float()
    worst = float((ours - stock).abs().max())
    allowed = _TOLERANCE.get(model.dtype, _COARSE_TOLERANCE) * max(float(stock.std()), 1e-3)
    if not worst <= allowed:
        raise UnsupportedModelError(
            f"At full budget {type(model).__name__} gives other logits than the stock model: "
            f"they differ by {worst:.3g}, rounding in {model.dtype} explains {allowed:.3g}."
        )


@contextmanager
def quiet(model: PreTrainedModel) -> Iterator[None]:
    """Inference without gradients and dropout; the model's training flag is restored."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def _probe_tokens(model: PreTrainedModel) -> Tensor:
    vocabulary = model.config.get_text_config().vocab_size
    draw = torch.Generator().manual_seed(0)
    count = _PROMPT_TOKENS + _STEPS
    tokens = torch.randint(min(5, vocabulary - 1), vocabulary, (1, count), generator=draw)
    return tokens.to(model.device)
