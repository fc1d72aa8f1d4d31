"""Perplexity and divergence from dense attention, by two protocols that are never mixed."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Final, Literal, final

import torch
from torch import Tensor
from torch.nn import functional

from loki_attn.errors import InputError, unknown_name
from loki_attn.evaluate.contending import contending, read, spent
from loki_attn.evaluate.journal import Journal
from loki_attn.evaluate.measuring import Progress, measure
from loki_attn.evaluate.protocol import Contender, LanguageModel
from loki_attn.evaluate.results import Row
from loki_attn.evaluate.summary import flatten, spelt, summarise, traffic_of
from loki_attn.evaluate.task import Item, Record
from loki_attn.evaluate.windows import cut, require_text
from loki_attn.statistics import paired_interval

Protocol = Literal["every_query", "decode"]

PROTOCOLS: Final[dict[Protocol, str]] = {
    "every_query": (
        "teacher-forced windows, no cache: every query row of every layer selects for itself "
        "(the accuracy protocol of arXiv 2406.02542); token perplexity of all but the first token"
    ),
    "decode": (
        "prefix read densely, what evicts drops rows of it, the rest teacher-forced through the "
        "decode path, one token per step; token perplexity of the forced tokens"
    ),
}
_BLOCK_TOKENS: Final = 8


def perplexity(
    lm: LanguageModel,
    ids: Sequence[int],
    contenders: Sequence[Contender],
    *,
    journal: Journal | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> list[Row]:
    """Measure contenders against dense attention on the same tokens.

    Args:
        lm: The model.
        ids: Tokens of the text; windows are taken from its start, one after the other.
        contenders: What to compare; dense attention in one forward is always measured beside them.
        journal: Holds what is measured already, and keeps the rest.
        progress: Called after every window of a contender.
        options: Fields of `Perplexity`.

    Returns:
        One row per contender, with means and intervals.

    Raises:
        InputError: If the text is too short, the windows exceed the model's context or are too
            few or too short to score anything, or two contenders have the same name.
        LokiAttnError: If a contender never selected anything: its figure would be dense's.
    """
    task = Perplexity(ids=tuple(ids), **options)
    return measure(task, lm, contenders, journal=journal, progress=progress)


@final
@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """The task.

    Attributes:
        ids: Tokens of the text; windows are taken from its start, one after the other.
        how: "every_query" or "decode", see `PROTOCOLS`.
        windows: How many windows.
        window_tokens: Scored tokens per window.
        prefix_tokens: Tokens read before them ("decode" only).
        corpus: Name of the text, for the record.
    """

    ids: tuple[int, ...]
    how: Protocol = "decode"
    windows: int = 4
    window_tokens: int = 1024
    prefix_tokens: int = 4096
    corpus: str = "unnamed"
    name: str = "perplexity"
    row_labels: tuple[str, ...] = ()
    needs_dense: bool = False  # one dense forward per window stands in for it
    decodes: bool = False

    def __post_init__(self) -> None:
        """Refuse windows that could not score anything."""
        if self.how not in PROTOCOLS:
            raise unknown_name("protocol", self.how, PROTOCOLS)
        decode = self.how == "decode"
        if self.windows < 1 or self.window_tokens < 2 or (decode and self.prefix_tokens < 2):
            raise InputError(
                "Perplexity needs a window of at least 2 tokens, behind a prefix of at least 2 in "
                f"protocol 'decode'; got {self.windows} windows of {self.window_tokens} tokens, "
                f"prefix {self.prefix_tokens}."
            )
        require_text(self.ids, self.windows, self._span, "window")

    @property
    def protocol(self) -> str:
        """Its name and what it means."""
        return f"{self.how}: {PROTOCOLS[self.how]}"

    @property
    def settings(self) -> dict[str, Any]:
        """What defines the run."""
        return {
            "corpus": self.corpus,
            "windows": self.windows,
            "window_tokens": self.window_tokens,
            "prefix_tokens": self._before,
        }

    def items(self, lm: LanguageModel) -> list[Item]:
        """The windows."""
        if self._span > lm.context_tokens:
            raise InputError(
                f"{self._span} tokens per window exceed the model's context of {lm.context_tokens}."
            )
        content = {"prefix_tokens": self._before}
        return cut(self.ids, self.windows, self._span, "window", content)

    def measure(
        self,
        lm: LanguageModel,
        item: Item,
        contenders: Sequence[Contender],
        dense: Record | None,
    ) -> Iterator[tuple[Contender, Record]]:
        """Run the contenders over one window, beside one dense forward."""
        del dense
        window = torch.tensor([item.content["ids"]])
        run = _decode_window if self.how == "decode" else _whole_window
        yield from run(lm, window, item.content["prefix_tokens"], contenders)

    def metrics(
        self, items: Sequence[Item], records: Sequence[Record], dense: Sequence[Record] | None
    ) -> dict[str, Any]:
        """Means and intervals over blocks of tokens, because neighbours are not independent."""
        del items, dense
        plain = [_without(record, "nll_dense") for record in records]
        found = summarise(plain, None, block=_BLOCK_TOKENS, what=f"{_BLOCK_TOKENS}-token blocks")
        nll, groups = flatten(records, "nll", _BLOCK_TOKENS)
        reference, _ = flatten(records, "nll_dense", _BLOCK_TOKENS)
        found |= {
            "perplexity": math.exp(found["nll"]),
            "perplexity_low": math.exp(found["nll_low"]),
            "perplexity_high": math.exp(found["nll_high"]),
            "perplexity_dense": math.exp(math.fsum(reference) / len(reference)),
            **spelt("nll_delta", paired_interval(nll, reference, groups)),
        }
        return {**found, **traffic_of(records), **_pace(records)}

    @property
    def _before(self) -> int:
        return self.prefix_tokens if self.how == "decode" else 0

    @property
    def _span(self) -> int:
        return self._before + self.window_tokens


def compare(logits: Tensor, dense: Tensor, targets: Tensor) -> dict[str, list[float]]:
    """Compare next-token distributions, token by token.

    Args:
        logits: float32 [n, vocabulary] of the contender.
        dense: The same of dense attention.
        targets: int64 [n]: the tokens that followed.

    Returns:
        Losses and divergence in nats, and 1 where both rank the same token first.
    """
    ours, theirs = logits.log_softmax(-1), dense.log_softmax(-1)
    return {
        "nll": _list(functional.nll_loss(ours, targets, reduction="none")),
        "nll_dense": _list(functional.nll_loss(theirs, targets, reduction="none")),
        "kl_to_dense": _list((theirs.exp() * (theirs - ours)).sum(-1)),
        "top1_agreement": _list((logits.argmax(-1) == dense.argmax(-1)).double()),
    }


def _whole_window(
    lm: LanguageModel, window: Tensor, before: int, contenders: Sequence[Contender]
) -> Iterator[tuple[Contender, Record]]:
    del before
    dense = torch.cat(list(lm.extend(None, window)))[:-1]
    targets = window[0, 1:]
    for contender in contenders:
        values: dict[str, list[float]] = {}
        with lm.using(contender.policy, contender.basis, "every_query", contender.profile):
            done = 0
            for block in lm.extend(None, window):
                rows = slice(done, min(done + len(block), len(targets)))
                done += len(block)
                found = compare(block[: rows.stop - rows.start], dense[rows], targets[rows])
                values = {name: values.get(name, []) + more for name, more in found.items()}
            calls = lm.traffic.every_query_calls
        yield contender, Record(values=values, every_query_calls=calls)


def _decode_window(
    lm: LanguageModel, window: Tensor, before: int, contenders: Sequence[Contender]
) -> Iterator[tuple[Contender, Record]]:
    prefix = read(lm, window[:, : before - 1], contenders)
    forced, targets = window[:, before - 1 : -1], window[0, before:]
    dense = torch.cat(list(lm.extend(lm.fork(prefix), forced)))
    for contender in contenders:
        with contending(lm, prefix, contender) as cache:
            began = perf_counter()
            steps = [next(lm.extend(cache, token)) for token in forced.T[:, None]]
            took = perf_counter() - began
            notes = {"steps": len(steps), "seconds": took, "held_bytes": lm.held_bytes(cache)}
            values = compare(torch.cat(steps), dense, targets)
            yield contender, Record(values=values, **spent(lm), notes=notes)


def _pace(records: Sequence[Record]) -> dict[str, float]:
    """Steps per second, and what the cache held at the end, of records that know."""
    notes = [record.notes for record in records if record.notes.get("seconds")]
    if not notes:
        return {}
    return {
        "tokens_per_s": sum(note["steps"] for note in notes) / sum(n["seconds"] for n in notes),
        "held_bytes": max(note["held_bytes"] for note in notes),
    }


def _without(record: Record, metric: str) -> Record:
    return Record(values={name: v for name, v in record.values.items() if name != metric})


def _list(values: Tensor) -> list[float]:
    found: list[float] = values.double().tolist()
    return found
