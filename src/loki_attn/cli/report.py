"""`loki-attn report`: from rows to a page."""

from pathlib import Path
from typing import Annotated, Final

import typer

from loki_attn.cli import options, terminal
from loki_attn.errors import InputError

NAME: Final = "report"
EXAMPLE: Final = "Example: loki-attn report rows.jsonl --out report.md"


def command(
    rows: Annotated[
        list[Path], typer.Argument(help="Files of rows, written by eval.", metavar="ROWS.jsonl...")
    ],
    out: Annotated[Path, typer.Option(help="The Markdown file; figures go beside it.")] = Path(
        "report.md"
    ),
    figures: Annotated[bool, typer.Option(help="Draw figures (needs matplotlib).")] = True,
    as_json: options.Json = False,
) -> None:
    """Write a report from the rows of `eval`; runs no model."""
    from loki_attn.evaluate.results import read_rows
    from loki_attn.report import write_markdown

    found = [row for path in rows for row in read_rows(path)]
    if not found:
        names = ", ".join(repr(str(path)) for path in rows)
        raise InputError(f"There are no rows in {names}; `loki-attn eval` writes them.")
    written = write_markdown(found, out, figures=figures)
    if as_json:
        terminal.emit({"report": str(written), "rows": len(found)})
        return
    terminal.say(f"{len(found)} rows")
    terminal.write(f"{written}\n")
