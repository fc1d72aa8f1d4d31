"""Passkey: does a number hidden in a long text come back when asked for?"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Final

import torch
from torch import Tensor

from loki_attn.errors import InputError, LokiAttnError
from loki_attn.evaluate.protocol import Contender, LanguageModel, check_names
from loki_attn.evaluate.results import Row, make_row

PROTOCOL: Final = (
    "a five-digit key stands once at a random depth of a public-domain text that is read densely; "
    "the question's and the answer's tokens each select for themselves; correct means that greedy "
    "decoding emits every token of the key"
)
_INTRODUCTION: Final = (
    "A pass key is hidden in the long text below. Find it and remember it; the question about it "
    "comes at the end.\n\n"
)
_NEEDLE: Final = "\n\nThe pass key is {key}. Remember it: {key} is the pass key.\n\n"
_QUESTION: Final = "\n\nQuestion: what is the pass key in the text above?\nAnswer: The pass key is"

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Trial:
    """One prompt: what is read first, then the question and the tokens of the answer."""

    context: Tensor
    question: Tensor
    answer: Tensor


def passkey(
    lm: LanguageModel,
    haystack: str,
    contenders: Sequence[Contender],
    *,
    length_tokens: int = 2048,
    trials: int = 20,
    seed: int = 0,
    corpus: str = "unnamed",
    progress: Progress | None = None,
) -> list[Row]:
    """Measure how often each contender recovers the key.

    Args:
        lm: The model.
        haystack: The text around the key.
        contenders: What to compare; give a dense one to know what the model can do.
        length_tokens: Prompt length, the answer included.
        trials: Prompts; the same for all contenders.
        seed: Of keys and depths.
        corpus: Name of the haystack, for the record.
        progress: Called with a line of news.

    Returns:
        One row per contender; `accuracy` in [0, 1] with n = trials.

    Raises:
        InputError: If the haystack is too short, the length exceeds the model's context, or two
            contenders have the same name.
        LokiAttnError: If a contender never selected anything: its figure would be dense's.
    """
    check_names(contenders)
    if length_tokens > lm.context_tokens:
        raise InputError(
            f"{length_tokens} tokens exceed the model's context of {lm.context_tokens}."
        )
    source = lm.encode(haystack)
    draw = random.Random(seed)
    hits = dict.fromkeys((c.name for c in contenders), 0)
    shares = dict.fromkeys(hits, 0.0)
    for index in range(trials):
        trial = make_trial(lm, source, length_tokens, draw)
        prefix = lm.prefill(trial.context)
        for contender in contenders:
            correct, share = _ask(lm, trial, prefix, contender)
            hits[contender.name] += correct
            shares[contender.name] += share
        if progress is not None:
            progress(f"{length_tokens} tokens, trial {index + 1}/{trials}: {hits}")
    settings = {"corpus": corpus, "length_tokens": length_tokens, "trials": trials, "seed": seed}
    return [
        make_row(
            lm,
            c,
            task="passkey",
            protocol=PROTOCOL,
            settings=settings,
            metrics={
                "accuracy": hits[c.name] / trials,
                "token_accuracy": shares[c.name] / trials,
            },
            n=trials,
        )
        for c in contenders
    ]


def make_trial(
    lm: LanguageModel, source: Sequence[int], length_tokens: int, draw: random.Random
) -> Trial:
    """Hide a new key at a random depth of a random stretch of the haystack."""
    key = str(draw.randrange(10_000, 100_000))
    introduction, needle, question = (
        lm.encode(part.format(key=key)) for part in (_INTRODUCTION, _NEEDLE, _QUESTION)
    )
    # Some tokenizers join the end of the question to the key: then that belongs to the answer.
    asked = lm.encode(f"{_QUESTION} {key}")
    both = zip(question, asked, strict=False)
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], both))
    question, answer = asked[:shared], asked[shared:]
    room = length_tokens - len(introduction) - len(needle) - len(question) - len(answer)
    if room < 1 or len(source) <= room:
        raise InputError(
            f"A passkey prompt of {length_tokens} tokens needs a haystack of more than "
            f"{max(room, 1)} tokens and room for the question; the haystack has {len(source)}."
        )
    start = draw.randrange(len(source) - room)
    stretch = list(source[start : start + room])
    depth = draw.randrange(room + 1)
    context = introduction + stretch[:depth] + needle + stretch[depth:]
    return Trial(*(torch.tensor([part]) for part in (context, question, answer)))


def _ask(
    lm: LanguageModel, trial: Trial, prefix: object, contender: Contender
) -> tuple[bool, float]:
    """Whether all answer tokens are what greedy decoding emits, and the share that are."""
    asked = torch.cat([trial.question, trial.answer], 1)
    cache = lm.fork(prefix)
    with lm.using(contender.policy, contender.basis, "every_query"):
        logits = torch.cat(list(lm.extend(cache, asked)))
        acted = lm.traffic.every_query_calls > 0
    if not (acted or contender.policy.budget.reads_everything):
        raise LokiAttnError(
            f"{contender.name} never selected anything: its budget covers the whole prompt, so "
            "its figures would be dense's. Lower the budget or dense_below, or lengthen the prompt."
        )
    guesses = logits[trial.question.shape[1] - 1 : -1].argmax(-1)
    right = guesses == trial.answer[0]
    return bool(right.all()), float(right.double().mean())
