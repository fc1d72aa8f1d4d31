"""Gates: learn which KV heads must see everything, with the model's weights frozen.

Each KV head's attention becomes a mixture: gate * (attention to everything) + (1 - gate) *
(attention to sinks and recents). Gates start at 1 and are pushed down by their own sum; what the
model loses at answering for passkeys pushes back (DuoAttention, arXiv 2410.10819, section 2.2).

    model, tokenizer = loki_attn.models.load("smollm2-135m", torch.float32)
    profile = optimise_gates(model, tokenizer, text, steps=200, context_tokens=(256, 768), sinks=16,
                             recents=64, passkeys=4, passkey_words=6)
    profile.save(loki_attn.models.profiles.profile_path("smollm2-135m", "duo_attention"))
    attachment = attach(model, "duo-attention", profile=profile, sparsity=0.5)

What differs from the paper: states are compared where a passkey's token comes next; the words of
passkeys are drawn from the filler; the rate rises over the first fifth of the steps and falls over
the last; one text makes a step. A streaming head sees sinks and recents of every query, its own
token among the recents.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from typing import TYPE_CHECKING, Any, Final, final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from loki_attn.budget import require_count
from loki_attn.errors import InputError, unknown_name
from loki_attn.integrations.transformers.attachment import attach
from loki_attn.integrations.transformers.calibration import check_context
from loki_attn.integrations.transformers.function import _read_call, _visible
from loki_attn.integrations.transformers.identity import identity
from loki_attn.integrations.transformers.passkeys import Passkeys
from loki_attn.integrations.transformers.registering import implementations
from loki_attn.kernels import ops
from loki_attn.profile import Profile
from loki_attn.texts import digest
from loki_attn.types import LayerShape

if TYPE_CHECKING:
    from loki_attn.artefact import JSON

METHOD: Final = "duo_attention"
GATES: Final = "gates"
_IMPLEMENTATION: Final = "loki_attn_gates"
# Of the steps: the rate rises over the first fifth and falls over the last.
_RAMP: Final = 0.2


@final
@dataclass(frozen=True, kw_only=True)
class GateSettings:
    """How gates are learnt; the paper's settings by default.

    Attributes:
        steps: Texts, one per step.
        context_tokens: Shortest and longest text; each length is drawn evenly between them.
        lr: Learning rate of Adam.
        sparsity_weight: Factor on the mean gate in the loss.
        sinks: First tokens that a streaming head sees.
        recents: Last tokens that a streaming head sees, its own included.
        passkeys: Passkeys in a text.
        passkey_words: Words of each.
        seed: Of all draws.
    """

    steps: int = 2000
    context_tokens: tuple[int, int] = (1024, 32768)
    lr: float = 0.02
    sparsity_weight: float = 0.05
    sinks: int = 128
    recents: int = 256
    passkeys: int = 10
    passkey_words: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be learnt from."""
        for name, least in (
            ("steps", 1),
            ("sinks", 0),
            ("recents", 1),
            ("passkeys", 1),
            ("passkey_words", 1),
        ):
            require_count(name, getattr(self, name), at_least=least)
        given = tuple(self.context_tokens)
        if len(given) != 2 or not 1 <= given[0] <= given[1]:
            raise InputError(
                f"context_tokens is the shortest and the longest text, got {given!r}; write "
                "(256, 768) say."
            )
        object.__setattr__(self, "context_tokens", given)
        if not self.lr > 0 or self.sparsity_weight < 0:
            raise InputError(
                f"lr is above 0 and sparsity_weight at least 0, got {self.lr!r} and "
                f"{self.sparsity_weight!r}."
            )


def gate_settings(**settings: Any) -> GateSettings:
    """Return settings, the defaults for what is left out.

    Raises:
        UnknownNameError: If there is no such setting.
        InputError: If a setting cannot be used.
    """
    known = {field.name for field in fields(GateSettings)}
    for name in settings:
        if name not in known:
            raise unknown_name(f"setting of {METHOD}", name, known)
    plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
    return GateSettings(**plain)


def optimise_gates(
    model: PreTrainedModel,
    tokenizer: Any,
    text: str,
    *,
    corpus: str = "unnamed",
    progress: Callable[[int, int], None] | None = None,
    **settings: Any,
) -> Profile:
    """Learn one gate per KV head of every full-attention layer (arXiv 2410.10819).

    The loss is the mean squared difference of the last hidden states, where a passkey's token comes
    next, to those of the model as it is, plus `sparsity_weight` times the mean gate. The model is
    left as it was, whatever happens.

    Args:
        model: A causal LM of transformers that `attach` can serve; float32 learns best.
        tokenizer: Its tokenizer.
        text: Filler between the passkeys, any text.
        corpus: Its name, for the record.
        progress: Called with the steps done and the steps to do.
        settings: Fields of `GateSettings`.

    Returns:
        A profile with a float32 tensor "gates" [num_kv_heads] in [0, 1] per full-attention layer.

    Raises:
        UnknownNameError: If there is no such setting.
        InputError: If a setting cannot be used, a text exceeds the model's context, passkeys do not
            fit, or no layer has full attention.
        UnsupportedModelError: If the model cannot be served.
    """
    chosen = gate_settings(**settings)
    check_context(model, chosen.context_tokens[1])
    exams = Passkeys(tokenizer, text, count=chosen.passkeys, words=chosen.passkey_words)
    draw = torch.Generator().manual_seed(chosen.seed)
    exams.draw(chosen.context_tokens[0], torch.Generator().manual_seed(chosen.seed))
    with attach(model, "dense", verify_first=False) as attachment:
        shapes = dict(attachment.shapes)
    if not shapes:
        raise InputError("No layer of this model has full attention; there are no heads to gate.")
    mixture = _Mixture(shapes, chosen, model.device)
    losses, tokens = [], 0
    with _mixing(model, mixture):
        rate = _Rate(mixture.gates, chosen)
        for step in range(chosen.steps):
            total = _between(chosen.context_tokens, draw)
            exam = exams.draw(total, draw)
            losses.append(_step(model, mixture, exam.tokens, exam.asked, rate, step))
            tokens += total
            if progress is not None:
                progress(step + 1, chosen.steps)
    about: dict[str, JSON] = {
        "settings": {**asdict(chosen), "context_tokens": list(chosen.context_tokens)},
        "corpus": {"name": corpus, "sha256": digest(text)},
        "tokens": tokens,
        "distance": _mean(losses[-max(1, chosen.steps // 5) :]),
        "versions": {p: metadata.version(p) for p in ("torch", "transformers")},
    }
    return Profile(
        layers={
            index: {GATES: gate.detach().float().cpu().clone()}
            for index, gate in mixture.gates.items()
        },
        provenance={"model": identity(model), "methods": {METHOD: about}},
    )


@final
class _Mixture:
    """The gates, and the attention that mixes by them.

    Attributes:
        gates: Per full-attention layer float32 [kv_heads].
        mixing: Whether gates act; otherwise every head attends to everything.
    """

    def __init__(
        self, shapes: Mapping[int, LayerShape], settings: GateSettings, device: torch.device
    ) -> None:
        self.gates = {
            index: torch.ones(shape.num_kv_heads, device=device, requires_grad=True)
            for index, shape in shapes.items()
        }
        self.mixing = False
        self._settings = settings

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Attend as transformers asks, differentiable in the gates."""
        del dropout  # the model is in evaluation mode
        call = _read_call(query, scaling, kwargs)
        visible = _visible(module, query, key, attention_mask, kwargs.get("is_causal"))
        out = ops().dense(query, key, value, visible, call, causal=True)
        index = getattr(module, "layer_idx", None)
        gate = self.gates.get(index) if self.mixing and isinstance(index, int) else None
        if gate is not None:
            if visible is None:
                visible = ops().causal_mask(query.shape[2], key.shape[2], query.device)
            near = ops().protect(visible, self._settings.sinks, self._settings.recents)
            streamed = ops().dense(query, key, value, near, call, causal=True)
            share = gate.repeat_interleave(query.shape[1] // key.shape[1]).to(out.dtype)
            share = share[:, None, None]
            # Exactly the model itself where gates are open.
            out = share * out + (1 - share) * streamed
        return out.transpose(1, 2).contiguous(), None


@final
class _Rate:
    """Adam on the gates, with a rate that rises and falls."""

    def __init__(self, gates: Mapping[int, Tensor], settings: GateSettings) -> None:
        self._steps = settings.steps
        self.sparsity_weight = settings.sparsity_weight
        self._optimiser = torch.optim.Adam(gates.values(), lr=settings.lr)
        self._top = settings.lr

    def follow(self, loss: Tensor, gates: Mapping[int, Tensor], step: int) -> None:
        """Move the gates down the slope of a loss, within [0, 1]."""
        ramp = max(1.0, self._steps * _RAMP)
        for group in self._optimiser.param_groups:
            group["lr"] = self._top * min(1.0, (step + 1) / ramp, (self._steps - step) / ramp)
        self._optimiser.zero_grad()
        torch.autograd.backward(loss)
        self._optimiser.step()
        with torch.no_grad():
            for gate in gates.values():
                gate.clamp_(0.0, 1.0)


def _step(
    model: PreTrainedModel,
    mixture: _Mixture,
    tokens: Tensor,
    asked: Tensor,
    rate: _Rate,
    step: int,
) -> float:
    """Learn from one text; returns the distance of the hidden states before the step."""
    ids, places = tokens[None].to(model.device), asked.to(model.device)
    mixture.mixing = False
    with torch.no_grad():
        wanted = _states(model, ids, places)
    mixture.mixing = True
    with torch.enable_grad():
        distance = (_states(model, ids, places).float() - wanted.float()).square().mean()
        size = torch.cat(list(mixture.gates.values())).abs().mean()
        rate.follow(distance + rate.sparsity_weight * size, mixture.gates, step)
    return float(distance.detach())


def _states(model: PreTrainedModel, ids: Tensor, places: Tensor) -> Tensor:
    """Last hidden states [m, hidden] at these places."""
    hidden: Tensor = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    return hidden[0].index_select(0, places)


@contextmanager
def _mixing(model: PreTrainedModel, mixture: _Mixture) -> Iterator[None]:
    """Let a model attend by a mixture, with frozen weights, in evaluation mode; undone on exit."""
    previous = implementations(model)
    training = [module for module in model.modules() if module.training]
    learning = [weight for weight in model.parameters() if weight.requires_grad]
    ALL_ATTENTION_FUNCTIONS[_IMPLEMENTATION] = mixture.attend
    # Masks are looked up among those that are registered for good, which changes no model.
    AttentionMaskInterface.register(_IMPLEMENTATION, sdpa_mask)
    try:
        model.eval()
        for weight in learning:
            weight.requires_grad_(requires_grad=False)
        model.set_attn_implementation(_IMPLEMENTATION)
        yield
    finally:
        for config, implementation in previous:
            config._attn_implementation = implementation
        for weight in learning:
            weight.requires_grad_(requires_grad=True)
        for module in training:
            module.training = True
        del ALL_ATTENTION_FUNCTIONS[_IMPLEMENTATION]


def _between(limits: tuple[int, int], draw: torch.Generator) -> int:
    least, most = limits
    return least + int(torch.randint(most - least + 1, (), generator=draw))


def _mean(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers)
