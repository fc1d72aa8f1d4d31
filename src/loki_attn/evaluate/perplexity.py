"""Perplexity and divergence from dense attention, by two protocols that are never mixed."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import torch
from torch import Tensor
from torch.nn import functional

from loki_attn.errors import InputError, LokiAttnError
from loki_attn.evaluate.protocol import Contender, LanguageModel, check_names
from loki_attn.evaluate.results import Row, make_row

Protocol = Literal["every_query", "decode"]
Progress = Callable[[str], None]
Advance = Callable[[int], None]

PROTOCOLS: Final[dict[Protocol, str]] = {
    "every_query": (
        "teacher-forced windows, no cache: every query row of every layer selects for itself "
        "(the accuracy protocol of arXiv 2406.02542); token perplexity of all but the first token"
    ),
    "decode": (
        "prefix read densely, the rest teacher-forced through the decode path, one token per "
        "step; token perplexity of the forced tokens"
    ),
}


def perplexity(  # noqa: PLR0913 - each is a choice of its own, by keyword
    lm: LanguageModel,
    ids: Sequence[int],
    contenders: Sequence[Contender],
    *,
    protocol: Protocol = "decode",
    windows: int = 4,
    window_tokens: int = 1024,
    prefix_tokens: int = 4096,
    corpus: str = "unnamed",
    progress: Progress | None = None,
    advance: Advance | None = None,
) -> list[Row]:
    """Measure contenders against dense attention on the same tokens.

    Args:
        lm: The model.
        ids: Tokens of the text; windows are taken from its start, one after the other.
        contenders: What to compare; dense is always measured beside them.
        protocol: "every_query" or "decode", see `PROTOCOLS`.
        windows: How many windows.
        window_tokens: Scored tokens per window.
        prefix_tokens: Tokens read before them ("decode" only).
        corpus: Name of the text, for the record.
        progress: Called with a line of news.
        advance: Called with the scored tokens so far, of windows * contenders * window_tokens.

    Returns:
        One row per contender, with mean and paired standard error of the mean.

    Raises:
        InputError: If the text is too short, the windows exceed the model's context or are too
            few or too short to score anything, or two contenders have the same name.
        LokiAttnError: If a contender never selected anything: its figure would be dense's.
    """
    check_names(contenders)
    before = prefix_tokens if protocol == "decode" else 0
    if windows < 1 or window_tokens < 2 or (protocol == "decode" and before < 2):
        raise InputError(
            "Perplexity needs a window of at least 2 tokens, behind a prefix of at least 2 in "
            f"protocol 'decode'; got {windows} windows of {window_tokens} tokens, prefix "
            f"{prefix_tokens}."
        )
    span = before + window_tokens
    if span > lm.context_tokens:
        raise InputError(
            f"{span} tokens per window exceed the model's context of {lm.context_tokens}."
        )
    if len(ids) < windows * span:
        raise InputError(
            f"{windows} windows of {span} tokens need {windows * span} tokens, the text has "
            f"{len(ids)}; give more text, fewer or shorter windows."
        )
    tallies = {contender.name: _Tally() for contender in contenders}
    count = _Counter(advance)
    for index in range(windows):
        window = torch.tensor([ids[index * span : (index + 1) * span]])
        run = _decode_window if protocol == "decode" else _whole_window
        for contender, tally in run(lm, window, before, contenders, tallies, count):
            if progress is not None:
                progress(f"window {index + 1}/{windows}  {contender:24s} {tally.summary()}")
    settings = {
        "corpus": corpus,
        "windows": windows,
        "window_tokens": window_tokens,
        "prefix_tokens": before,
    }
    return [_row(lm, c, protocol, settings, tallies[c.name]) for c in contenders]


class _Counter:
    """Adds up scored tokens and passes the sum on."""

    def __init__(self, advance: Advance | None) -> None:
        self._advance = advance
        self._done = 0

    def __call__(self, tokens: int) -> None:
        """Add tokens."""
        self._done += tokens
        if self._advance is not None:
            self._advance(self._done)


@dataclass
class _Tally:
    """Per-token figures of one contender, over all windows."""

    nll: list[Tensor] = field(default_factory=list)
    dense_nll: list[Tensor] = field(default_factory=list)
    kl: list[Tensor] = field(default_factory=list)
    agrees: list[Tensor] = field(default_factory=list)
    calls: int = 0
    read_bytes: int = 0
    dense_bytes: int = 0

    def add(self, logits: Tensor, dense: Tensor, targets: Tensor) -> None:
        """Add rows: float32 [n, vocabulary] of the contender and of dense, int64 [n]."""
        ours, theirs = logits.log_softmax(-1), dense.log_softmax(-1)
        self.nll.append(functional.nll_loss(ours, targets, reduction="none"))
        self.dense_nll.append(functional.nll_loss(theirs, targets, reduction="none"))
        self.kl.append((theirs.exp() * (theirs - ours)).sum(-1))
        self.agrees.append((logits.argmax(-1) == dense.argmax(-1)).double())

    def summary(self) -> str:
        """A line of news."""
        nll, dense = torch.cat(self.nll), torch.cat(self.dense_nll)
        return f"ppl {nll.mean().exp():.3f} (dense {dense.mean().exp():.3f})"

    def metrics(self) -> dict[str, Any]:
        """Means and standard errors."""
        nll, dense = torch.cat(self.nll).double(), torch.cat(self.dense_nll).double()
        kl, agrees = torch.cat(self.kl).double(), torch.cat(self.agrees)
        delta = nll - dense
        found = {
            "perplexity": math.exp(float(nll.mean())),
            "perplexity_dense": math.exp(float(dense.mean())),
            "nll_delta": float(delta.mean()),
            "nll_delta_standard_error": _standard_error(delta),
            "kl_to_dense": float(kl.mean()),
            "kl_standard_error": _standard_error(kl),
            "top1_agreement": float(agrees.mean()),
            "selecting_calls": self.calls,
        }
        if self.dense_bytes:
            found["read_bytes_share"] = self.read_bytes / self.dense_bytes
        return found


def _whole_window(
    lm: LanguageModel,
    window: Tensor,
    before: int,
    contenders: Sequence[Contender],
    tallies: dict[str, _Tally],
    count: _Counter,
) -> Iterator[tuple[str, _Tally]]:
    del before
    dense = torch.cat(list(lm.extend(None, window)))[:-1]
    targets = window[0, 1:]
    for contender in contenders:
        tally = tallies[contender.name]
        with lm.using(contender.policy, contender.basis, "every_query"):
            done = 0
            for block in lm.extend(None, window):
                rows = slice(done, min(done + len(block), len(targets)))
                done += len(block)
                tally.add(block[: rows.stop - rows.start], dense[rows], targets[rows])
            tally.calls += lm.traffic.every_query_calls
        count(window.shape[1])
        yield contender.name, tally


def _decode_window(
    lm: LanguageModel,
    window: Tensor,
    before: int,
    contenders: Sequence[Contender],
    tallies: dict[str, _Tally],
    count: _Counter,
) -> Iterator[tuple[str, _Tally]]:
    prefix = lm.prefill(window[:, : before - 1])
    forced, targets = window[:, before - 1 : -1], window[0, before:]
    dense = torch.cat(list(lm.extend(lm.fork(prefix), forced)))
    for contender in contenders:
        tally, cache = tallies[contender.name], lm.fork(prefix)
        with lm.using(contender.policy, contender.basis, "decode"):
            steps = []
            for token in forced.T[:, None]:
                steps.append(next(lm.extend(cache, token)))
                count(1)
            tally.calls += lm.traffic.sparse_calls
            tally.read_bytes += lm.traffic.read_bytes
            tally.dense_bytes += lm.traffic.dense_bytes
        tally.add(torch.cat(steps), dense, targets)
        yield contender.name, tally


def _row(
    lm: LanguageModel,
    contender: Contender,
    protocol: Protocol,
    settings: dict[str, Any],
    tally: _Tally,
) -> Row:
    if tally.calls == 0 and not contender.policy.budget.reads_everything:
        raise LokiAttnError(
            f"{contender.name} never selected anything: its budget covers the whole context, so "
            "its figures would be dense's. Lower the budget or dense_below, or lengthen the text."
        )
    return make_row(
        lm,
        contender,
        task="perplexity",
        protocol=f"{protocol}: {PROTOCOLS[protocol]}",
        settings=settings,
        metrics=tally.metrics(),
        n=sum(len(part) for part in tally.nll),
    )


def _standard_error(values: Tensor) -> float:
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else float("nan")
