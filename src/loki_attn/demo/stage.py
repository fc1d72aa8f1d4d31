"""What every part of the demo shares: the screen, the model, the sizes, the rows measured."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, final

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from loki_attn.demo.plan import Plan
from loki_attn.evaluate.protocol import Contender
from loki_attn.evaluate.results import Row, append_rows, make_row
from loki_attn.integrations.transformers import TransformersLM
from loki_attn.policy import preset

DENSE: Final = "dense"


@final
@dataclass(kw_only=True)
class Stage:
    """The demo's state.

    Attributes:
        console: Where everything is shown.
        lm: The model.
        plan: The sizes.
        out: The folder for rows and report.
        rows: What was measured so far.
        summary: Lines of the closing table: what, dense, Loki.
    """

    console: Console
    lm: TransformersLM
    plan: Plan
    out: Path
    rows: list[Row] = field(default_factory=list)
    summary: list[tuple[str, str, str]] = field(default_factory=list)

    @property
    def rows_file(self) -> Path:
        """Where the rows are kept."""
        return self.out / "rows.jsonl"

    def keep(self, rows: list[Row]) -> None:
        """Keep rows, in memory and in the file, which starts anew with the run's first."""
        if not self.rows:
            self.rows_file.unlink(missing_ok=True)
        append_rows(self.rows_file, rows)
        self.rows += rows

    def row(self, contender: Contender, **parts: Any) -> Row:
        """Make a row of this model."""
        return make_row(self.lm, contender, **parts)


def dense_contender() -> Contender:
    """The reference."""
    return Contender(name=DENSE, policy=preset("dense"))


def heading(console: Console, number: int, text: str) -> None:
    """Begin a part."""
    console.print()
    console.rule(f"[bold]{number}. {text}", align="left")


def note(console: Console, text: str) -> None:
    """Say something, quietly."""
    console.print(text, style="dim", highlight=False)


def plain_table(*columns: str, title: str | None = None) -> Table:
    """A table whose first column is words and whose others are figures."""
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if index == 0 else "right", overflow="fold")
    return table


@contextmanager
def token_bar(console: Console, text: str, total: int) -> Iterator["TokenBar"]:
    """A progress bar over tokens, with rate and remaining time; one line where not a terminal."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=28),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f} tokens"),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("elapsed,"),
        TimeRemainingColumn(),
        TextColumn("left"),
        console=console,
        refresh_per_second=2,
    )
    with bar:
        yield TokenBar(bar, bar.add_task(text, total=total, rate=""))


@final
class TokenBar:
    """Moves a bar. The rate counts from the first call on: a resumed run begins with a jump."""

    def __init__(self, bar: Progress, task: TaskID) -> None:
        self._bar, self._task = bar, task
        self._first: tuple[float, int] | None = None

    def __call__(self, done: int, total: int) -> None:
        """Show that `done` of `total` tokens are done."""
        now_s = time.perf_counter()
        self._first = self._first or (now_s, done)
        start_s, start = self._first
        rate = f"{(done - start) / (now_s - start_s):,.0f}/s" if done > start else ""
        self._bar.update(self._task, completed=done, total=total, rate=rate)
