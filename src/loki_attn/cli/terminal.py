"""What every command says the same way: results on stdout, news and progress on stderr."""

import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Final, Protocol, final

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Column, Table
from rich.text import Text

_WIDTH_WITHOUT_TERMINAL: Final = 120


class Advance(Protocol):
    """Called with the work done so far, a line of news, which may be empty, and a new total."""

    def __call__(self, done: int, news: str = "", total: int | None = None) -> None:
        """Show it."""


def stdout() -> Console:
    """The console of results, wide enough where nobody watches."""
    return _console(to_stderr=False)


def stderr() -> Console:
    """The console of news."""
    return _console(to_stderr=True)


def say(news: str) -> None:
    """Print a line of news."""
    stderr().print(news, style="dim", markup=False, highlight=False, soft_wrap=True)


def fail(message: str) -> None:
    """Print an error, on one line."""
    line = " ".join(message.split("\n"))
    stderr().print(f"[bold red]error:[/] {escape(line)}", highlight=False, soft_wrap=True)


def emit(result: Any) -> None:
    """Print a result as JSON; numbers that JSON does not know become null."""
    sys.stdout.write(json.dumps(_plain(result), indent=2, ensure_ascii=False) + "\n")


def write(text: str) -> None:
    """Write text to stdout at once, as it is."""
    sys.stdout.write(text)
    sys.stdout.flush()


def table(
    title: str, columns: list[str], rows: list[list[str]], *, note: str = "", left: bool = False
) -> None:
    """Print a table on stdout; columns after the first are numbers unless everything is `left`."""
    made = Table(box=SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        number = index > 0 and not left
        made.add_column(
            column,
            justify="right" if number else "left",
            no_wrap=index == 0,
            overflow="fold",
        )
    for row in rows:
        made.add_row(*(escape(cell) for cell in row))
    console = stdout()
    console.print(title, style="bold", markup=False, highlight=False, soft_wrap=True)
    console.print(made)
    if note:
        console.print(note, style="dim", markup=False, highlight=False, soft_wrap=True)


@contextmanager
def progress(description: str, total: int, unit: str, start: int = 0) -> Iterator[Advance]:
    """Show a bar with rate and remaining time on stderr.

    Args:
        description: What is being done.
        total: The work, in `unit`.
        unit: Plural noun of the rate.
        start: Work that was done before; it does not enter the rate.

    Yields:
        The function to call after each step.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:>3.0f}%"),
        _RateColumn(unit, start),
        TimeElapsedColumn(),
        TextColumn("{task.fields[news]}", style="dim", table_column=_one_line()),
    )
    with Progress(*columns, console=stderr()) as bar:
        task = bar.add_task(description, total=total, completed=start, news="")

        def advance(done: int, news: str = "", total: int | None = None) -> None:
            bar.update(task, completed=done, news=escape(news), total=total)

        yield advance


@contextmanager
def waiting(description: str) -> Iterator[None]:
    """Show that something of unknown length goes on."""
    console = stderr()
    if not console.is_terminal:
        say(description)
        yield
        return
    with console.status(escape(description)):
        yield


@final
class _RateColumn(ProgressColumn):
    """The mean rate since the start and the time that the rest takes at it.

    Rich's own estimate forgets after half a minute, which is less than one of our steps may take.
    """

    def __init__(self, unit: str, start: int) -> None:
        super().__init__(_one_line())
        self._unit = unit
        self._start = start

    def render(self, task: Task) -> Text:
        """For instance "261 tokens/s, 0:00:27 left"."""
        done, elapsed_s = task.completed - self._start, task.finished_time or task.elapsed
        if done <= 0 or not elapsed_s:
            return Text(f"? {self._unit}/s", style="dim")
        rate = done / elapsed_s
        shown = f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
        left = timedelta(seconds=math.ceil((task.remaining or 0) / rate))
        return Text(f"{shown} {self._unit}/s, {left} left")


def _one_line() -> Column:
    return Column(no_wrap=True, overflow="ellipsis")


def _console(*, to_stderr: bool) -> Console:
    console = Console(stderr=to_stderr)
    if not console.is_terminal:
        console.width = max(console.width, _WIDTH_WITHOUT_TERMINAL)
    return console


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
