"""Speakers: one conversation each, through plain `generate`, timed token by token."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from time import perf_counter
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel, StaticCache
from transformers.generation.streamers import BaseStreamer

from loki_attn.basis import Basis
from loki_attn.budget import Budget
from loki_attn.errors import InputError
from loki_attn.integrations.transformers.attachment import Attachment, attach
from loki_attn.integrations.transformers.layers import cache_bytes
from loki_attn.models.noise import quiet
from loki_attn.policy import Policy, preset
from loki_attn.profile import Profile

if TYPE_CHECKING:
    from loki_attn.integrations.transformers.traffic import Scales


@final
@dataclass(frozen=True)
class Speech:
    """Tokens that one call of `generate` made.

    Attributes:
        tokens: The new tokens.
        first_s: From the call to the first of them.
        steps_s: From each token to the next.
        logits: float32 [tokens, vocabulary], where they were asked for.
    """

    tokens: tuple[int, ...]
    first_s: float
    steps_s: tuple[float, ...]
    logits: Tensor | None


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """Copy a model but not its weights, so that one of the two can be attached."""
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    copied: PreTrainedModel = copy.deepcopy(model, dict(shared))
    return copied


class Speaker:
    """A model, stock or attached, and the cache of its conversation.

    Args:
        model: A causal LM.
        attachment: The attachment that `model` has, if any.
        static: Whether to allocate a static cache beforehand; for stock models.
    """

    def __init__(
        self, model: PreTrainedModel, attachment: Attachment | None = None, *, static: bool = False
    ) -> None:
        """Start without a conversation."""
        self.model = model
        self.attachment = attachment
        self._static = static
        self._ids: Tensor | None = None
        self._cache: Cache | None = None
        self._scales: Scales | None = None

    @property
    def policy(self) -> str:
        """Name of the attached policy; "stock" without one."""
        return "stock" if self.attachment is None else self.attachment.policy.name

    @property
    def sparse_calls(self) -> int:
        """Single-token layer calls that selected since `begin`."""
        return 0 if self.attachment is None else self.attachment.traffic.sparse_calls

    @property
    def cache_bytes(self) -> int:
        """What the cache holds, unused room included."""
        return 0 if self._cache is None else cache_bytes(self._cache)

    @property
    def peak_cache_bytes(self) -> int | None:
        """The most that the cache held since `begin`; None for the stock model."""
        return None if self._scales is None else self._scales.peak_bytes

    @property
    def evicts(self) -> bool:
        """Whether the attached policy drops rows."""
        return self.attachment is not None and self.attachment.policy.evicts

    @property
    def evicted_rows(self) -> int:
        """Rows that were dropped since `begin`, summed over layers and KV heads."""
        return 0 if self.attachment is None else self.attachment.traffic.evicted_rows

    def selects_at(self, context: int) -> bool:
        """Whether steps at this many tokens are expected to select."""
        if self.attachment is None or self.evicts:
            return False
        layers = self.model.config.get_text_config(decoder=True).num_hidden_layers
        budget = self.attachment.policy.budget
        own = (budget.for_layer(index, layers) for index in self.attachment.shapes)
        return any(not budget.is_dense(context) for budget in own)

    def begin(self, ids: Tensor, room: int) -> None:
        """Begin a new conversation; the prompt is read by the first `speak`.

        Args:
            ids: int64 [1, n].
            room: Tokens that will follow at the most.
        """
        self.end()
        self._ids = ids.to(self.model.device)
        self._scales = None if self.attachment is None else self.attachment.weigh()
        if self._static:
            self._cache = StaticCache(
                config=self.model.config, max_cache_len=int(ids.shape[1]) + room
            )

    def speak(self, count: int, *, keep_logits: bool = False) -> Speech:
        """Go on by `count` tokens, greedily; the end-of-text token does not end it.

        Raises:
            InputError: If no conversation was begun.
        """
        if self._ids is None:
            raise InputError("There is no conversation to go on with; begin one first.")
        clock = _Clock()
        before = self._ids.shape[1]
        with quiet(), torch.inference_mode():
            began = perf_counter()
            out = self.model.generate(
                input_ids=self._ids,
                attention_mask=torch.ones_like(self._ids),
                past_key_values=self._cache,
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                streamer=clock,
                return_dict_in_generate=True,
                output_logits=keep_logits,
                disable_compile=True,
            )
        self._ids, self._cache = out.sequences, out.past_key_values
        times = [began, *clock.times]
        gaps = [late - early for early, late in pairwise(times)]
        return Speech(
            tokens=tuple(out.sequences[0, before:].tolist()),
            first_s=gaps[0],
            steps_s=tuple(gaps[1:]),
            logits=torch.cat(out.logits).float() if keep_logits else None,
        )

    def end(self) -> None:
        """Forget the conversation and count traffic from zero."""
        self._ids = self._cache = None
        if self.attachment is not None:
            self.attachment.traffic.reset()

    @contextmanager
    def full_budget(self) -> Iterator[None]:
        """Select everything inside the block: the result must be that of dense attention."""
        if self.attachment is None:
            yield
            return
        attachment, policy = self.attachment, self.attachment.policy
        plain = preset("dense")
        whole = replace(
            policy,
            evict=plain.evict,
            keep=plain.keep,
            allocate=plain.allocate,
            reuse_above=None,
        )
        if policy.select.method != "dense":
            whole = replace(whole, budget=Budget())
        attachment.use(whole)
        attachment.always_select = True
        try:
            yield
        finally:
            attachment.always_select = False
            attachment.use(policy)
            self.end()


def attached_twin(
    model: PreTrainedModel,
    policy: Policy,
    basis: Basis | None,
    profile: Profile | None = None,
) -> Speaker:
    """A speaker of the same weights that attends by a policy; the model itself stays stock."""
    other = twin(model)
    return Speaker(other, attach(other, policy, basis=basis, profile=profile))


@final
class _Clock(BaseStreamer):
    """Notes when each token came; the prompt comes first and is none."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._prompt = True

    def put(self, value: Tensor) -> None:
        """Take the prompt or a token."""
        del value
        if not self._prompt:
            self.times.append(perf_counter())
        self._prompt = False

    def end(self) -> None:
        """Nothing more comes."""
