"""A long text continued twice, token by token: by dense attention and by Loki."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, final

import torch
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from torch import Tensor

from loki_attn import texts
from loki_attn.demo.stage import DENSE, Stage, dense_contender, note, plain_table, token_bar
from loki_attn.evaluate.protocol import Contender
from loki_attn.kernels import backends
from loki_attn.select.loki import Loki

CORPUS: Final = "continuation"
PROTOCOL: Final = (
    "the prompt is read densely once; both contenders continue a copy of that cache, one after "
    "the other, with stock model.generate on preallocated storage, sampling with the same random "
    "numbers; a step is the median time between two tokens, screen excluded, first step left out"
)
_CHUNK_TOKENS: Final = 512
_SHOWN_PROMPT_TOKENS: Final = 40
_FRAME_COLUMNS: Final = 5
_KIB: Final = 1024
_SAMPLED: Final[dict[str, Any]] = {
    "do_sample": True,
    "num_beams": 1,
    "temperature": 0.7,
    "top_k": 40,
    "top_p": None,
    "pad_token_id": 0,
}
_SEED: Final = 0
GREEDY: Final[dict[str, Any]] = {
    "do_sample": False,
    "num_beams": 1,
    "temperature": None,
    "top_k": None,
    "top_p": None,
    "pad_token_id": 0,
}
"""Greedy decoding, whatever the model's own generation settings are."""


@final
@dataclass
class Column:
    """One side of the screen, and the streamer that `generate` writes its tokens to.

    Attributes:
        name: The contender.
        decode: Tokens to text.
        refresh: Draws the screen.
        tokens: Generated so far.
        steps_s: Time of every step, screen excluded.
    """

    name: str
    decode: Callable[[list[int]], str]
    refresh: Callable[[], None]
    tokens: list[int] = field(default_factory=list)
    steps_s: list[float] = field(default_factory=list)
    _since_s: float = 0.0

    def put(self, value: Tensor) -> None:
        """Take what `generate` hands over: the prompt first, then one token at a time."""
        now_s = time.perf_counter()
        if self._since_s:
            self.steps_s.append(now_s - self._since_s)
            self.tokens += value.flatten().tolist()
            self.refresh()
        self._since_s = time.perf_counter()

    def end(self) -> None:
        """Nothing follows."""

    @property
    def step_s(self) -> float:
        """Median step; the first, which may encode planes for the whole prompt, left out."""
        steps = self.steps_s[1:] or self.steps_s
        return statistics.median(steps) if steps else float("nan")


def continue_text(stage: Stage, loki: Contender) -> None:
    """Continue the packaged text with both, show it as it comes, and keep what was measured."""
    console, lm, plan = stage.console, stage.lm, stage.plan
    ids = lm.encode(texts.load(CORPUS))[: plan.prompt]
    console.print(
        f"{_described(loki)}\nA prompt of {len(ids):,} tokens from the packaged text {CORPUS!r}. "
        "Prefill is dense for both, so it is done once and its cache copied."
    )
    start_s = time.perf_counter()
    with token_bar(console, "prefill", len(ids) - 1) as bar:
        prefix = lm.prefill(
            torch.tensor([ids[:-1]]),
            reserve_tokens=plan.new + 1,
            chunk_tokens=_CHUNK_TOKENS,
            progress=bar,
        )
    prefill_s = time.perf_counter() - start_s
    note(
        console,
        "Both run stock model.generate on our preallocated cache and sample with the same random "
        "numbers: dense attention gets the same storage, so the comparison is fair.",
    )
    sides = _stream(stage, [dense_contender(), loki], torch.tensor([ids]), prefix)
    _keep(stage, sides, len(ids), prefill_s)


@final
@dataclass(frozen=True)
class _Side:
    contender: Contender
    column: Column
    traffic: dict[str, int]


def _stream(stage: Stage, contenders: list[Contender], ids: Tensor, prefix: Any) -> list[_Side]:
    lm, plan = stage.lm, stage.plan
    before = " ".join(lm.decode(ids[0, -_SHOWN_PROMPT_TOKENS:].tolist()).split())
    sides: list[_Side] = []
    columns: list[Column] = []
    with Live(console=stage.console, auto_refresh=False, vertical_overflow="visible") as live:

        def refresh() -> None:
            live.update(_screen(columns, before, plan.new, stage.console), refresh=True)

        columns += [Column(c.name, lm.decode, refresh) for c in contenders]
        for contender, column in zip(contenders, columns, strict=True):
            cache = lm.fork(prefix)
            with lm.using(contender.policy, contender.basis), torch.random.fork_rng(devices=[]):
                torch.manual_seed(_SEED)
                lm.model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    past_key_values=cache,
                    streamer=column,
                    max_new_tokens=plan.new,
                    min_new_tokens=plan.new,
                    **_SAMPLED,
                )
                sides.append(_Side(contender, column, dict(vars(lm.traffic))))
    if not stage.console.is_terminal:
        stage.console.line()
    return sides


def _screen(columns: list[Column], before: str, new: int, console: Console) -> Table:
    texts_shown = []
    for column in columns:
        text = Text(f"...{before}\n\n", style="dim")
        texts_shown.append(text.append(column.decode(column.tokens).strip(), style="not dim bold"))
    width = console.width // len(columns) - _FRAME_COLUMNS
    height = 2 + max(len(text.wrap(console, width)) for text in texts_shown)
    grid = Table.grid(expand=True, padding=(0, 1))
    panels = []
    for column, text in zip(columns, texts_shown, strict=True):
        grid.add_column(ratio=1)
        speed = f", {1 / column.step_s:.1f} tokens/s" if column.steps_s else ""
        done = f"{len(column.tokens)}/{new} tokens{speed}"
        panels.append(Panel(text, title=column.name, subtitle=done, height=height))
    grid.add_row(*panels)
    return grid


def _described(loki: Contender) -> str:
    """The policy in words, for those who see it for the first time."""
    select, budget = loki.policy.select, loki.policy.budget
    dim = loki.basis.head_dim if loki.basis else 0
    scored = select.coordinates(dim) if isinstance(select, Loki) else dim
    rows = f"{budget.top_k:,}" if budget.top_k else f"a {budget.fraction or budget.mass} share of"
    return (
        f"Loki reads {rows} rows per KV head and step: the best by {scored} of "
        f"{dim} coordinates, with {budget.sinks} first and {budget.recents} last tokens always "
        "among them. Nothing is evicted: every step chooses anew."
    )


def _keep(stage: Stage, sides: list[_Side], prompt_tokens: int, prefill_s: float) -> None:
    settings = {
        "corpus": CORPUS,
        "prompt_tokens": prompt_tokens,
        "new_tokens": stage.plan.new,
        "prefill_s": round(prefill_s, 1),
    }
    dense = sides[0]
    found = [_metrics(side, dense) for side in sides]
    stage.keep(
        [
            stage.row(
                side.contender,
                task="generation",
                protocol=PROTOCOL,
                settings=settings,
                metrics=metrics,
                n=len(side.column.tokens),
            )
            for side, metrics in zip(sides, found, strict=True)
        ]
    )
    _show(stage, found, prompt_tokens, prefill_s)


def _metrics(side: _Side, dense: _Side) -> dict[str, Any]:
    steps = len(side.column.tokens)
    same = [a == b for a, b in zip(side.column.tokens, dense.column.tokens, strict=True)]
    return {
        "tokens_per_s": 1 / side.column.step_s,
        "step_ms": 1000 * side.column.step_s,
        "first_step_ms": 1000 * side.column.steps_s[0],
        "read_bytes_per_token": side.traffic["read_bytes"] / steps,
        "dense_bytes_per_token": side.traffic["dense_bytes"] / steps,
        "read_bytes_share": side.traffic["read_bytes"] / side.traffic["dense_bytes"],
        "rows_share": side.traffic["rows_read"] / side.traffic["rows_held"],
        "selecting_calls": side.traffic["sparse_calls"],
        "same_tokens": same.index(False) if False in same else steps,
    }


def _show(stage: Stage, found: list[dict[str, Any]], prompt_tokens: int, prefill_s: float) -> None:
    dense, loki = found
    lines = [
        ("decode tokens/s (median step)", "tokens_per_s", ".2f", 1.0),
        ("ms per step", "step_ms", ".0f", 1.0),
        ("ms of the first step (Loki: encodes)", "first_step_ms", ".0f", 1.0),
        ("KV KiB read per token", "read_bytes_per_token", ",.0f", _KIB),
        ("rows attended to", "rows_share", ".1%", 1.0),
        ("layer calls that selected", "selecting_calls", ",d", 1),
    ]
    table = plain_table("decode", DENSE, "loki", "loki / dense")
    for text, name, form, unit in lines:
        values = [side[name] / unit if unit != 1 else side[name] for side in found]
        ratio = f"{values[1] / values[0]:.3f}" if values[0] else ""
        table.add_row(text, *(format(value, form) for value in values), ratio)
        if name in {"tokens_per_s", "read_bytes_per_token"}:
            stage.summary.append((text, format(values[0], form), format(values[1], form)))
    stage.console.print(table)
    same, new = loki["same_tokens"], stage.plan.new
    parted = "The texts are the same." if same == new else f"The texts part at token {same + 1}."
    share, slower = loki["read_bytes_share"], loki["step_ms"] / dense["step_ms"]
    stage.console.print(
        f"Prefill took {prefill_s:.0f} s ({prompt_tokens / prefill_s:,.0f} tokens/s). Loki read "
        f"{share:.1%} of the bytes that dense attention read. {parted}"
    )
    words = f"A Loki step took {slower:.2f} times as long as a dense one."
    if slower > 1 and backends.resolve().name == "reference":
        words += (
            " Fewer bytes, but not faster here: the reference backend runs the selection as a "
            "dozen plain PyTorch operations instead of one kernel."
        )
    note(stage.console, words)
