"""Whole generations: stock `generate` beside the attached model, token by token.

A conversation is read once and then continued in turns, so that every contender decodes at the same
lengths. The context of a row is what the cache holds when the last turn ends.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Final, final

import torch
from torch import Tensor

from loki_attn.bench.clock import Times
from loki_attn.bench.decode import DTYPES, Outcome
from loki_attn.bench.machine import (
    backend_in_use,
    peak_resident_bytes,
    reset_peak,
    resident_bytes,
)
from loki_attn.bench.rows import SpeechRow
from loki_attn.bench.speaking import Speaker, Speech
from loki_attn.errors import InputError
from loki_attn.provenance import provenance

TASK: Final = "bench generate"
STOCK_DYNAMIC: Final = "stock dynamic"
STOCK_STATIC: Final = "stock static"
_GATE_PROMPT_TOKENS: Final = 96
_GATE_NEW_TOKENS: Final = 8

Distance = Callable[[Tensor, Tensor], tuple[float, float]]
"""How far logits [tokens, vocabulary] are from the stock ones, and how far they may be."""


@final
@dataclass(frozen=True, kw_only=True)
class GenerateBench:
    """What is to be measured.

    Attributes:
        model: Name of the model.
        contexts: Tokens at the end of a conversation, prompt and new ones.
        positions: The longest context that the model knows.
        new_tokens: Tokens of a turn.
        repeats: Turns that count; one more, the first, is for the gate and the prefill.
        prefills: How often each contender reads a prompt; the median counts.
        command: The command that makes the rows again.
    """

    model: str
    contexts: tuple[int, ...]
    positions: int
    new_tokens: int = 16
    repeats: int = 3
    prefills: int = 1
    command: str = ""

    def __post_init__(self) -> None:
        """Refuse what cannot be measured."""
        if not self.contexts:
            raise InputError("There are no contexts; give at least one.")
        if self.new_tokens < 2:
            raise InputError(
                f"A turn needs 2 new tokens or more to time a step, got {self.new_tokens}."
            )
        for name in ("repeats", "prefills"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be 1 or more, got {getattr(self, name)}.")
        for context in self.contexts:
            if context > self.positions:
                raise InputError(
                    f"A context of {context:,} tokens is beyond the {self.positions:,} positions "
                    f"of {self.model}; give at most that."
                )
            if context <= self.spoken_tokens:
                raise InputError(
                    f"A context of {context:,} tokens leaves no prompt before {self.spoken_tokens} "
                    f"new ones ({self.repeats} + 1 turns of {self.new_tokens}); give more, or "
                    "lower the turns."
                )

    @property
    def spoken_tokens(self) -> int:
        """New tokens of a conversation."""
        return self.new_tokens * (self.repeats + 1)


@dataclass
class _Record:
    """What is known of one contender at one context."""

    gate: dict[str, Any]
    prefill_s: float
    peak_bytes: int | None
    peak_added_bytes: int | None
    tokens: tuple[int, ...]
    logits: Tensor
    steps_ns: list[float] = field(default_factory=list)


def measure_generation(
    bench: GenerateBench,
    speakers: Mapping[str, Speaker],
    ids: Sequence[int],
    dtype: torch.dtype,
    distance: Distance,
    tell: Callable[[str], None],
) -> Outcome:
    """Measure every context.

    Args:
        bench: What is to be measured.
        speakers: Contenders by name, `STOCK_DYNAMIC` first.
        ids: Tokens of a real text, at least one; repeated where a context is longer.
        dtype: Of the model.
        distance: Compares logits with those of the stock model.
        tell: Called with lines of news.

    Raises:
        InputError: If there is no text, or the first speaker is not the stock model.
    """
    if not ids:
        raise InputError("The text has no tokens; give one with words in it.")
    if next(iter(speakers), None) != STOCK_DYNAMIC:
        raise InputError(f"The first contender is {STOCK_DYNAMIC!r}: others are held to it.")
    outcome = Outcome()
    tell("checking every contender at full budget")
    sound = _sound(speakers, ids, distance, outcome, tell)
    for context in bench.contexts:
        run = _Conversations(bench, context, speakers, sound, outcome)
        prompt = _prompt(ids, context - bench.spoken_tokens)
        outcome.rows.extend(run.rows(prompt, dtype, distance, tell))
    return outcome


def _sound(
    speakers: Mapping[str, Speaker],
    ids: Sequence[int],
    distance: Distance,
    outcome: Outcome,
    tell: Callable[[str], None],
) -> dict[str, dict[str, Any]]:
    """Verdicts on the contenders that say in a short context what the stock model says.

    Those that select do so with the full budget.
    """
    prompt = _prompt(ids, _GATE_PROMPT_TOKENS)
    sound: dict[str, dict[str, Any]] = {}
    stock: Speech | None = None
    for name, speaker in speakers.items():
        with speaker.full_budget():
            speaker.begin(prompt, _GATE_NEW_TOKENS)
            said = speaker.speak(_GATE_NEW_TOKENS, keep_logits=True)
            selected = speaker.sparse_calls
        stock = stock or said
        figures, reason = _agree(said, stock, distance)
        if not reason and _chooses(speaker) and not speaker.evicts and selected == 0:
            reason = "it never selected in the check at full budget"
        if reason:
            _refuse(name, reason, outcome, tell)
        else:
            sound[name] = figures
        speaker.end()
    return sound


class _Conversations:
    """The contenders that passed, at one context."""

    def __init__(
        self,
        bench: GenerateBench,
        context: int,
        speakers: Mapping[str, Speaker],
        verdicts: Mapping[str, dict[str, Any]],
        outcome: Outcome,
    ) -> None:
        self._bench, self._context, self._outcome = bench, context, outcome
        self._speakers = {name: speakers[name] for name in verdicts}
        self._verdicts = verdicts

    def rows(
        self,
        prompt: Tensor,
        dtype: torch.dtype,
        distance: Distance,
        tell: Callable[[str], None],
    ) -> list[SpeechRow]:
        """Read the prompt, go on in turns, and sum up."""
        records: dict[str, _Record] = {}
        for name, speaker in self._speakers.items():
            tell(f"{self._context:,} tokens: {name} reads the prompt")
            record = self._read(name, speaker, prompt)
            if not _chooses(speaker):
                stock = records.get(STOCK_DYNAMIC, record)
                record.gate, reason = _agree(record, stock, distance)
                if reason:
                    _refuse(f"{name} at {self._context:,} tokens", reason, self._outcome, tell)
                    continue
            records[name] = record
        tell(f"{self._context:,} tokens: {self._bench.repeats} turns of {len(records)} contenders")
        calls = self._take_turns(records)
        made = self._sum_up(records, calls, dtype, tell)
        for speaker in self._speakers.values():
            speaker.end()
        return made

    def _read(self, name: str, speaker: Speaker, prompt: Tensor) -> _Record:
        """The first turn, with its prefill, watched for memory."""
        known, before = reset_peak(), resident_bytes()
        first_s = []
        for _ in range(self._bench.prefills):
            speaker.begin(prompt, self._bench.spoken_tokens)
            said = speaker.speak(self._bench.new_tokens, keep_logits=True)
            first_s.append(said.first_s)
        peak = peak_resident_bytes() if known else None
        return _Record(
            gate=self._verdicts[name],
            prefill_s=median(first_s),
            peak_bytes=peak,
            peak_added_bytes=None if peak is None or before is None else peak - before,
            tokens=said.tokens,
            logits=_logits(said),
        )

    def _take_turns(self, records: dict[str, _Record]) -> dict[str, int]:
        """Go on; the first to go changes from turn to turn. How often each one selected."""
        names = list(records)
        before = {name: self._speakers[name].sparse_calls for name in names}
        for turn in range(self._bench.repeats):
            first = turn % len(names)
            for name in (*names[first:], *names[:first]):
                said = self._speakers[name].speak(self._bench.new_tokens)
                records[name].steps_ns += [step * 1e9 for step in said.steps_s]
        return {name: self._speakers[name].sparse_calls - before[name] for name in names}

    def _sum_up(
        self,
        records: Mapping[str, _Record],
        calls: Mapping[str, int],
        dtype: torch.dtype,
        tell: Callable[[str], None],
    ) -> list[SpeechRow]:
        made = []
        origin = {**provenance(), "device": "cpu", "command": self._bench.command}
        times = {name: Times.of(records[name].steps_ns) for name in calls}
        for name, selected in calls.items():
            speaker, record = self._speakers[name], records[name]
            # The last step reads one row less than there are tokens in the end.
            if selected == 0 and speaker.selects_at(self._context - 1):
                reason = "it never selected in its turns"
                _refuse(f"{name} at {self._context:,} tokens", reason, self._outcome, tell)
                continue
            if speaker.evicts and speaker.evicted_rows == 0:
                reason = "it never evicted anything"
                _refuse(f"{name} at {self._context:,} tokens", reason, self._outcome, tell)
                continue
            stock = records[STOCK_DYNAMIC]
            made.append(
                SpeechRow(
                    task=TASK,
                    contender=name,
                    policy=speaker.policy,
                    shape=self._bench.model,
                    batch=1,
                    context=self._context,
                    dtype=_short(dtype),
                    backend=backend_in_use(),
                    threads=torch.get_num_threads(),
                    **vars(times[name]),
                    prefill_s=record.prefill_s,
                    prefill_ratio=stock.prefill_s / record.prefill_s,
                    tokens_per_s=1e6 / times[name].median_us,
                    ratio_stock_dynamic=_ratio(times, STOCK_DYNAMIC, name),
                    ratio_stock_static=_ratio(times, STOCK_STATIC, name),
                    cache_bytes=speaker.cache_bytes,
                    peak_cache_bytes=speaker.peak_cache_bytes,
                    evicted_rows=speaker.evicted_rows,
                    peak_bytes=record.peak_bytes,
                    peak_added_bytes=record.peak_added_bytes,
                    sparse_calls=selected,
                    note=_note(speaker, selected),
                    gate=record.gate,
                    provenance=origin,
                )
            )
        return made


def _agree(said: Any, stock: Any, distance: Distance) -> tuple[dict[str, Any], str]:
    """Compare two greedy speeches: the figures, and what is wrong if rounding cannot explain it."""
    pairs = zip(said.tokens, stock.tokens, strict=True)
    same = next((at for at, (mine, theirs) in enumerate(pairs) if mine != theirs), None)
    # Up to the token that differs, both logits follow the same words.
    compared = len(stock.tokens) if same is None else same + 1
    got, allowed = distance(said.logits[:compared], stock.logits[:compared])
    passed = same is None or got <= allowed
    figures = {
        "verdict": "passed" if passed else "failed",
        "largest_error": got,
        "allowed_error": allowed,
        "equal_tokens": compared if same is None else same,
    }
    reason = (
        f"it parts from the stock model after {same} tokens, with logits {got:.2g} standard "
        f"deviations apart where rounding explains {allowed:.2g}"
    )
    return figures, "" if passed else reason


def _chooses(speaker: Speaker) -> bool:
    """Whether a contender may say something else than the stock model."""
    return speaker.policy not in {"stock", "dense"}


def _note(speaker: Speaker, selected: int) -> str:
    """What a reader must know of a row."""
    if speaker.evicts:
        return f"{speaker.evicted_rows:,} rows evicted"
    return "dense" if _chooses(speaker) and selected == 0 else ""


def _refuse(name: str, reason: str, outcome: Outcome, tell: Callable[[str], None]) -> None:
    outcome.failures[name] = reason
    tell(f"{name} is wrong: {reason}")


def _logits(said: Speech) -> Tensor:
    if said.logits is None:
        raise InputError("The speaker kept no logits, though they were asked for.")
    return said.logits


def _prompt(ids: Sequence[int], count: int) -> Tensor:
    """The first `count` tokens of a text, which is repeated where it is shorter."""
    whole = torch.tensor(ids)
    return whole.repeat(-(-count // len(ids)))[None, :count]


def _ratio(times: Mapping[str, Times], peer: str, name: str) -> float | None:
    return times[peer].median_us / times[name].median_us if peer in times else None


def _short(dtype: torch.dtype) -> str:
    return next((name for name, known in DTYPES.items() if known == dtype), str(dtype))
