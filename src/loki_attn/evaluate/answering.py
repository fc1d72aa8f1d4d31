"""Answering: a question read and answered greedily on top of a cache, by a policy."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from loki_attn.evaluate.contending import contending, spent
from loki_attn.evaluate.protocol import Contender, LanguageModel


@final
@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a contender said, and what it read meanwhile.

    Attributes:
        text: The answer, without the string that ended it.
        tokens: Its tokens, those of that string included.
        decode_calls: Single-token layer calls that selected.
        every_query_calls: Multi-token layer calls in which every query selected.
        read_bytes: Cache bytes that single-token calls read.
        dense_bytes: What dense attention over all tokens would have read in the same calls.
        kept_bytes: What the rows held then, planes and marks included.
        evicted_rows: Rows that were dropped, summed over layers and KV heads.
    """

    text: str
    tokens: tuple[int, ...]
    decode_calls: int
    every_query_calls: int
    read_bytes: int
    dense_bytes: int
    kept_bytes: int = 0
    evicted_rows: int = 0

    @property
    def spent(self) -> dict[str, int]:
        """What attention did, as fields of a `Record`."""
        return {name: value for name, value in vars(self).items() if name not in {"text", "tokens"}}


def answer(
    lm: LanguageModel,
    cache: Any,
    asked: Tensor,
    contender: Contender,
    *,
    max_new_tokens: int,
    stop: tuple[str, ...] = (),
    enough: Callable[[str], bool] = lambda text: False,
) -> Answer:
    """Read the last tokens of a prompt by a policy, then decode greedily, token by token.

    Every one of the last tokens selects for itself. A policy that evicts first drops what it drops
    after a prompt, then reads them one by one, because what it holds may change with each.

    Args:
        lm: The model.
        cache: What was read before, with `record` for policies that evict; a copy of it grows.
        asked: int64 [1, n], n >= 1.
        contender: The policy.
        max_new_tokens: Where to stop at the latest, at least 1.
        stop: Strings that end the answer.
        enough: Whether a text needs no further token, because none could change its score.

    Returns:
        The answer. The last of its tokens is not read any more.
    """
    with contending(lm, cache, contender, "every_query") as own:
        if contender.policy.evicts:
            lm.switch("decode")
            for token in asked.T[:, None]:
                logits = _last(lm, own, token)
        else:
            logits = _last(lm, own, asked)
            lm.switch("decode")
        tokens: list[int] = []
        text = ""
        while True:
            token = int(logits.argmax())
            if token in lm.end_tokens:
                break
            tokens.append(token)
            text = lm.decode(tokens)
            ends = [place for place in (text.find(s) for s in stop) if place >= 0]
            if ends:
                text = text[: min(ends)]
            if ends or len(tokens) >= max_new_tokens or enough(text):
                break
            logits = _last(lm, own, torch.tensor([[token]]))
        return Answer(text=text, tokens=tuple(tokens), **spent(lm))


def _last(lm: LanguageModel, cache: Any, ids: Tensor) -> Tensor:
    """The logits after the last of these tokens."""
    *_, rows = lm.extend(cache, ids)
    return rows[-1]
