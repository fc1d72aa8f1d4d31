"""Streaming: the model's own greedy `generate`, its text handed out as it comes, and timed."""

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any, final

import torch
from torch import Tensor
from transformers import PreTrainedModel, TextStreamer

from loki_attn.models.noise import quiet


@final
@dataclass(frozen=True, kw_only=True)
class Generation:
    """What a model said, and how fast.

    Attributes:
        text: The new text, without special tokens.
        tokens: The new tokens.
        prompt_tokens: Tokens that were read first.
        first_token_s: From the call to the first new token: reading the prompt, mostly.
        rest_s: From the first new token to the last.
    """

    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    first_token_s: float
    rest_s: float

    @property
    def tokens_per_s(self) -> float | None:
        """Rate of decoding, the first token apart; None for a single token."""
        return (len(self.tokens) - 1) / self.rest_s if len(self.tokens) > 1 else None


def stream(
    model: PreTrainedModel,
    tokenizer: Any,
    ids: Tensor,
    *,
    max_new_tokens: int,
    write: Callable[[str], None] = lambda text: None,
) -> Generation:
    """Generate greedily through plain `model.generate`, attached or not.

    Args:
        model: A causal LM.
        tokenizer: Its tokenizer.
        ids: int64 [1, n]: the prompt.
        max_new_tokens: Where to stop at the latest.
        write: Called with pieces of the text, whole words at a time.

    Returns:
        The text, its tokens and the times.
    """
    streamer = _Streamer(tokenizer, write)
    ids = ids.to(model.device)
    began = perf_counter()
    with quiet(), torch.inference_mode():
        whole = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            streamer=streamer,
        )
    tokens = whole[0, ids.shape[1] :].tolist()
    return Generation(
        text=str(tokenizer.decode(tokens, skip_special_tokens=True)),
        tokens=tuple(tokens),
        prompt_tokens=int(ids.shape[1]),
        first_token_s=streamer.times[0] - began,
        rest_s=streamer.times[-1] - streamer.times[0],
    )


class _Streamer(TextStreamer):
    """Hands text to a function instead of printing it, and notes when each token came."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.times: list[float] = []
        self._write = write

    def put(self, value: Tensor) -> None:
        """Take the prompt (first) or a token."""
        if not self.next_tokens_are_prompt:
            self.times.append(perf_counter())
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Hand out a piece of text."""
        del stream_end
        self._write(text)
