"""attach: put a policy on a model; everything the model did before still works, more cheaply."""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from loki_attn.attention import LayerPolicy
from loki_attn.basis import Basis
from loki_attn.errors import InputError, LokiAttnError
from loki_attn.integrations.transformers.adopting import Adopter, cache_of
from loki_attn.integrations.transformers.binding import Calibrated, bind_layers
from loki_attn.integrations.transformers.dropping import Dropper
from loki_attn.integrations.transformers.function import (
    IMPLEMENTATION,
    STATE,
    LayerState,
    Observer,
    Shared,
)
from loki_attn.integrations.transformers.identity import identity
from loki_attn.integrations.transformers.probe import (
    check_servable,
    probe_layers,
    quiet,
    short_logits,
    verify,
)
from loki_attn.integrations.transformers.registering import implementations, register
from loki_attn.integrations.transformers.rotary import find_ropes
from loki_attn.integrations.transformers.second_pass import Prompt
from loki_attn.integrations.transformers.traffic import Scales, Traffic
from loki_attn.policy import Policy, as_policy, preset
from loki_attn.profile import Profile
from loki_attn.rope import Rope
from loki_attn.types import LayerShape, Mode

if TYPE_CHECKING:
    from loki_attn.artefact import JSON


def attach(
    model: PreTrainedModel,
    policy: Policy | str = "loki",
    *,
    basis: Basis | str | None = None,
    profile: Profile | str | None = None,
    mode: Mode = "decode",
    reserve_tokens: int = 0,
    verify_first: bool = True,
    **overrides: Any,
) -> "Attachment":
    """Make a model attend by a policy until the returned attachment is detached.

    Plain `model.generate(...)` and `model(...)` work as before; the caches that they make become
    Loki caches, static ones (`cache_implementation="static"`) and compiled steps included. Use it
    as a context manager, or keep the handle and call `detach()`.

    Args:
        model: A causal language model of transformers 5. Models that share its config object, and
            are not attached themselves, go on attending densely.
        policy: A `Policy`, the name of a preset, or the path of a policy's JSON file.
        basis: For methods that need one: a `Basis` or the path of its file.
        profile: For methods that need one: a `Profile` or the path of its file.
        mode: "decode" selects on single-token steps and leaves prefill dense; "every_query"
            lets every query row select for itself (evaluation).
        reserve_tokens: Rows that a new cache allocates at once.
        verify_first: Compare the attached model at full budget with the stock one on a few
            tokens, and refuse on a mismatch.
        overrides: Fields of a preset to replace, for instance `top_k=1024` or `rank=32`.

    Returns:
        The attachment.

    Raises:
        UnsupportedModelError: If the model cannot be served correctly; the text names the reason.
        LokiAttnError: If the model is attached already, or policy, basis and model do not fit.
    """
    chosen = as_policy(policy, **overrides)
    given = Calibrated.load(basis, profile)
    return Attachment(model, chosen, given, mode, reserve_tokens, verify_first=verify_first)


class Attachment:
    """A policy on a model. `traffic` counts what was read; `detach` restores the model.

    Attributes:
        model: The model.
        policy: The policy in use.
        basis: Its basis, or None.
        profile: Its profile, or None.
        shapes: The full-attention layers, the ones that can become sparse, by layer index.
        attached: Whether the model still attends by the policy.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        policy: Policy,
        given: Calibrated,
        mode: Mode,
        reserve_tokens: int,
        *,
        verify_first: bool,
    ) -> None:
        """Probe, bind, verify; on any failure the model is as before."""
        check_servable(model)
        self.model = model
        self.policy = policy
        self.basis, self.profile = given.basis, given.profile
        self.shapes: dict[int, LayerShape] = {}
        self._shared = Shared(mode=_checked_mode(mode))
        self._dropper = Dropper(self._shared)
        self._shared.after = lambda state, q_len: self._dropper.attended(state, q_len, self.shapes)
        self._ropes: dict[int, Rope] | None = None
        self._identity: dict[str, JSON] | None = None
        self._hooks: list[RemovableHandle] = []
        self._states: dict[int, LayerState] = {}
        owner = secrets.token_hex(8)
        self._adopter = Adopter(owner, self._shared, self._states, reserve_tokens)
        self._modules: list[nn.Module] = []
        stock = short_logits(model) if verify_first else None
        self._previous = implementations(model)
        register()
        self.attached = True
        try:
            self._install()
            states = list(self._states.values())
            self.shapes = probe_layers(model, states)
            self.use(policy, given.basis, profile=given.profile)
            if stock is not None:
                verify(model, self._shared, states, stock)
        except BaseException:
            self.detach()
            raise
        self.traffic.reset()

    @property
    def traffic(self) -> Traffic:
        """What attention read since the last `traffic.reset()`."""
        return self._shared.meter.settled()

    @property
    def mode(self) -> Mode:
        """When selection acts."""
        return self._shared.mode

    @mode.setter
    def mode(self, value: Mode) -> None:
        self._shared.mode = _checked_mode(value)

    @property
    def always_select(self) -> bool:
        """Whether steps that would read everything select as well, to check the selection."""
        return self._shared.always_select

    @always_select.setter
    def always_select(self, value: bool) -> None:
        self._shared.always_select = value

    def use(
        self,
        policy: Policy | str,
        basis: Basis | str | None = None,
        mode: Mode | None = None,
        profile: Profile | str | None = None,
    ) -> None:
        """Change the policy, what it was calibrated with, or the mode.

        Caches of unrotated rows follow by themselves; what an eviction had learnt is forgotten.

        Args:
            policy: The new policy, as in `attach`.
            basis: Its basis; None keeps the one in use.
            mode: None keeps the one in use.
            profile: Its profile; None keeps the one in use.

        Raises:
            LokiAttnError: If policy, basis, profile and model do not fit; the old policy stays.
        """
        if not self.attached:
            raise LokiAttnError("This attachment was detached; attach the model anew.")
        chosen = as_policy(policy)
        given = Calibrated.load(basis or self.basis, profile or self.profile)
        wanted = self._shared.mode if mode is None else _checked_mode(mode)
        used = given.used_by(chosen)
        if used != Calibrated():
            if self._identity is None:
                self._identity = identity(self.model)
            used.check_model(self.shapes, self._identity)
        ropes = self._rope_of_layers() if chosen.evict.moves_keys else {}
        bound = bind_layers(self.model, self.shapes, chosen, used, ropes)
        for index, state in self._states.items():
            state.policy = bound.get(index)
        self.policy, self._shared.mode = chosen, wanted
        self.basis, self.profile = given.basis, given.profile

    def compress(self, cache: Cache, prompt: Prompt | None = None) -> int:
        """Evict from a cache whose prompt was read densely, with its queries recorded.

        The same rows go as if the policy had been in use while the prompt was read in one forward.

        Args:
            cache: A cache of this attachment that was filled inside `recording()`.
            prompt: What it was filled with: methods that read it a second time (KVzip) need that,
                and no recording.

        Returns:
            Rows dropped, summed over layers and KV heads.

        Raises:
            CacheError: If its queries were not recorded, or rows have gone already.
            InputError: If the prompt is needed and missing, or not the one in the cache.
        """
        return self._dropper.compress(self.model, self._states.values(), cache, prompt)

    def weigh(self) -> Scales:
        """Return scales that weigh the cache of the forwards from now on, layer by layer."""
        self._shared.scales = Scales()
        return self._shared.scales

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keep the queries of prompts that are read inside the block, for `compress`."""
        self._shared.recording = True
        try:
            yield
        finally:
            self._shared.recording = False

    def observe(self, observer: Observer | None) -> None:
        """Call `observer` with what each full-attention layer sees in every forward; None ends."""
        self._shared.observer = observer

    def cache(self, reserve_tokens: int | None = None) -> Cache:
        """Return an empty cache for `past_key_values=`, of one conversation or batch."""
        made = DynamicCache(config=self.model.config)
        for index in self.shapes:
            if index < len(made.layers) and type(made.layers[index]) is DynamicLayer:
                made.layers[index] = self._adopter.new_layer(index, reserve_tokens)
        return made

    def detach(self) -> None:
        """Restore the model exactly; caches of this attachment refuse further updates."""
        if not self.attached:
            return
        self.attached = False
        for hook in self._hooks:
            hook.remove()
        for state in self._states.values():
            _let_go(state)
        for module in self._modules:
            if hasattr(module, STATE):
                delattr(module, STATE)
        for config, implementation in self._previous:
            config._attn_implementation = implementation
        self._hooks, self._modules = [], []
        self._states.clear()

    def __enter__(self) -> Self:
        """Return the attachment."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Detach."""
        self.detach()

    def _install(self) -> None:
        for module in self.model.modules():
            index = getattr(module, "layer_idx", None)
            if not isinstance(index, int) or "attention" not in type(module).__name__.lower():
                continue
            new = LayerState(index, self._shared, first=not self._states)
            state = self._states.setdefault(index, new)
            setattr(module, STATE, state)
            self._modules.append(module)
            self._hooks += [
                module.register_forward_pre_hook(self._before, with_kwargs=True),
                module.register_forward_hook(self._after, always_call=True),
            ]
        self.model.set_attn_implementation(IMPLEMENTATION)

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Hand the layer's rows of this forward's cache to the attention function."""
        state: LayerState = getattr(module, STATE)
        cache = cache_of(args, kwargs)
        state.called = state.static = False
        if cache is not None:
            self._adopter.adopt(cache, state)
        state.rotary = kwargs.get("position_embeddings")

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Let go of the forward's cache, and notice when the attention function was passed by."""
        del args
        state: LayerState = getattr(module, STATE)
        _let_go(state)
        failed = output is None
        if not failed and state.policy is not None and not state.called:
            raise LokiAttnError(
                f"Layer {state.index} attended without the attached policy, because the model's "
                f"attention implementation was changed to {self.model.config._attn_implementation}"
                " meanwhile; detach first, then change it."
            )

    def _rope_of_layers(self) -> dict[int, Rope]:
        """The rotary embedding of every layer where it is known, found once."""
        if self._ropes is None:
            shared, policies = self._shared, [state.policy for state in self._states.values()]
            observer, mode = shared.observer, shared.mode
            plain = bind_layers(self.model, self.shapes, preset("dense"), Calibrated(), {})
            for index, state in self._states.items():
                state.policy = plain.get(index)
            shared.mode = "decode"
            with quiet(self.model):
                self._ropes = find_ropes(self.model, self)
            shared.observer, shared.mode = observer, mode
            for state, policy in zip(self._states.values(), policies, strict=True):
                state.policy = policy
        return self._ropes


def bound_layers(attachment: Attachment) -> dict[int, LayerPolicy]:
    """The bound policies of an attachment's full-attention layers, by layer index."""
    return {i: s.policy for i, s in attachment._states.items() if s.policy is not None}


def _checked_mode(mode: Mode) -> Mode:
    if mode not in ("decode", "every_query"):
        raise InputError(f"mode must be 'decode' or 'every_query', got {mode!r}.")
    return mode


def _let_go(state: LayerState) -> None:
    """End a forward: its cache may not be updated by anybody else."""
    if state.layer is not None:
        state.layer.armed = False
    if state.fixed is not None:
        state.fixed.armed = False
    state.layer = state.fixed = state.rotary = None
