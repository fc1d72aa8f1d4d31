"""TransformersLM: what `evaluate` needs of a language model, served by transformers."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Final, Self
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from loki_attn.artefact import JSON
from loki_attn.basis import Basis
from loki_attn.integrations.transformers.attachment import Attachment, attach
from loki_attn.integrations.transformers.function import Observer
from loki_attn.integrations.transformers.identity import identity
from loki_attn.integrations.transformers.layers import cache_bytes
from loki_attn.integrations.transformers.second_pass import Prompt
from loki_attn.integrations.transformers.traffic import Traffic
from loki_attn.policy import Policy, as_policy
from loki_attn.profile import Profile
from loki_attn.types import Mode

Progress = Callable[[int, int], None]

_LOGIT_ROWS: Final = 256


class TransformersLM:
    """A transformers model under changing policies; dense unless `using` says otherwise.

    Args:
        model: A causal LM that `attach` can serve.
        tokenizer: Its tokenizer.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any) -> None:
        """Attach the dense policy, verified against the stock model."""
        self.model = model
        self.tokenizer = tokenizer
        self._attachment: Attachment = attach(model, "dense")
        self._prompts: WeakKeyDictionary[Cache, Tensor] = WeakKeyDictionary()

    def __enter__(self) -> Self:
        """Return the model."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Detach."""
        self._attachment.detach()

    @property
    def identity(self) -> dict[str, JSON]:
        """Id, weight hash, RoPE settings."""
        return identity(self.model)

    @property
    def dtype(self) -> str:
        """Dtype of the model, "bfloat16" say."""
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def context_tokens(self) -> int:
        """Longest context that the model was trained for, in tokens."""
        return int(self.model.config.get_text_config().max_position_embeddings)

    @property
    def num_layers(self) -> int:
        """Layers of the model, those that stay dense included."""
        return int(self.model.config.get_text_config(decoder=True).num_hidden_layers)

    @property
    def head_dim(self) -> int:
        """Size of a key row of the full-attention layers, in elements."""
        return next(iter(self._attachment.shapes.values())).head_dim

    @property
    def traffic(self) -> Traffic:
        """What attention read."""
        return self._attachment.traffic

    @property
    def end_tokens(self) -> frozenset[int]:
        """Tokens that end a text, by the model's generation settings and its tokenizer."""
        settings = getattr(self.model, "generation_config", None)
        named = getattr(settings, "eos_token_id", None)
        ends = named if isinstance(named, list) else [named]
        return frozenset(t for t in (*ends, self.tokenizer.eos_token_id) if t is not None)

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, without special tokens."""
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    def decode(self, ids: list[int]) -> str:
        """Text of tokens."""
        return str(self.tokenizer.decode(ids))

    @contextmanager
    def using(
        self,
        policy: Policy | str,
        basis: Basis | None = None,
        mode: Mode = "decode",
        profile: Profile | None = None,
    ) -> Iterator[None]:
        """Attend by a policy inside the block, densely after it; counts traffic from zero."""
        # A basis holds for one block: the next policy must not find what the last one left.
        self._attachment.basis = self._attachment.profile = None
        self._attachment.use(as_policy(policy), basis, mode, profile)
        self.traffic.reset()
        try:
            yield
        finally:
            self._attachment.use("dense", mode="decode")

    def switch(self, mode: Mode) -> None:
        """Change when the policy acts, until the block of `using` ends; counts go on."""
        self._attachment.mode = mode

    @contextmanager
    def observing(self, observer: Observer) -> Iterator[None]:
        """Call `observer` with what every full-attention layer sees inside the block."""
        self._attachment.observe(observer)
        try:
            yield
        finally:
            self._attachment.observe(None)

    def prefill(
        self,
        ids: Tensor,
        *,
        reserve_tokens: int = 64,
        chunk_tokens: int | None = None,
        progress: Progress | None = None,
        record: bool = False,
    ) -> Cache:
        """Read tokens int64 [batch, n] into a new cache; logits are not computed.

        Args:
            ids: The tokens.
            reserve_tokens: Room for tokens that will follow.
            chunk_tokens: Tokens per forward; None reads all at once.
            progress: Called after every forward with the tokens done and the tokens to do.
            record: Keep queries and tokens with the cache, so that `compress` can judge its rows.
        """
        total = ids.shape[1]
        cache, done = self._attachment.cache(reserve_tokens=total + reserve_tokens), 0
        for chunk in torch.split(ids, chunk_tokens or total, dim=1):
            recording = self._attachment.recording() if record else nullcontext()
            with recording, torch.inference_mode():
                self.model.base_model(
                    input_ids=chunk.to(self.model.device), past_key_values=cache, use_cache=True
                )
            done += chunk.shape[1]
            if progress is not None:
                progress(done, total)
        if record:
            self._prompts[cache] = ids
        return cache

    def fork(self, cache: Cache) -> Cache:
        """Return an independent copy of a cache that was read densely."""
        twin = copy.deepcopy(cache)
        if cache in self._prompts:
            self._prompts[twin] = self._prompts[cache]
        return twin

    def compress(self, cache: Cache) -> int:
        """Drop from a cache that was read with `record` what the policy drops after a prompt."""
        ids = self._prompts.get(cache)
        prompt = None if ids is None else Prompt(ids=ids, tokenizer=self.tokenizer)
        return self._attachment.compress(cache, prompt)

    def held_bytes(self, cache: Cache) -> int:
        """Bytes that a cache holds, unused room included."""
        return cache_bytes(cache)

    def crop(self, cache: Cache, tokens: int) -> None:
        """Forget the last `tokens` tokens of a cache."""
        if tokens:
            cache.crop(-tokens)
        if cache in self._prompts:
            self._prompts[cache] = self._prompts[cache][:, : cache.get_seq_length()]

    def extend(self, cache: Cache | None, ids: Tensor) -> Iterator[Tensor]:
        """Read tokens int64 [1, n] in one forward and yield the logits after each, in blocks.

        Args:
            cache: What was read before; it grows. None for a window that stands alone.
            ids: The tokens.

        Yields:
            float32 [rows, vocabulary] on the CPU, at most 256 rows at a time.
        """
        with torch.inference_mode():
            logits = self.model(
                input_ids=ids.to(self.model.device),
                past_key_values=cache,
                use_cache=cache is not None,
            ).logits[0]
        for rows in logits.split(_LOGIT_ROWS):
            yield rows.float().cpu()
