"""`loki-attn report`: from rows to a page."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from loki_attn.cli import options, terminal
from loki_attn.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

NAME: Final = "report"
EXAMPLE: Final = "Example: loki-attn report rows.jsonl growth.jsonl --out report.html"


def command(
    rows: Annotated[
        list[Path],
        typer.Argument(help="Files of rows, written by eval or bench.", metavar="ROWS.jsonl..."),
    ],
    out: Annotated[
        Path,
        typer.Option(
            help="What to write, by its ending: .html, one page with all in it; .md, a page with "
            "figures beside it; .csv, a line per number."
        ),
    ] = Path("report.md"),
    figures: Annotated[
        bool, typer.Option(help="Draw the figures of a .md page (needs matplotlib).")
    ] = True,
    as_json: options.Json = False,
) -> None:
    """Write a report from the rows of `eval` and `bench`; runs no model."""
    from loki_attn.evaluate.results import read_rows

    found = [row for path in rows for row in read_rows(path)]
    if not found:
        names = ", ".join(repr(str(path)) for path in rows)
        raise InputError(f"There are no rows in {names}; `loki-attn eval` writes them.")
    written = _write(found, out, figures=figures)
    if as_json:
        terminal.emit({"report": str(written), "rows": len(found)})
        return
    terminal.say(f"{len(found)} rows")
    terminal.write(f"{written}\n")


def _write(found: "Sequence[Mapping[str, Any]]", out: Path, *, figures: bool) -> Path:
    if out.suffix == ".html":
        from loki_attn.report import write_html

        return write_html(found, out)
    if out.suffix == ".csv":
        from loki_attn.report import write_csv

        return write_csv(found, out)
    if out.suffix != ".md" and not out.is_dir():
        raise InputError(
            f"The ending of --out says what to write: .html, .md or .csv; got {str(out)!r}."
        )
    from loki_attn.report import write_markdown

    return write_markdown(found, out, figures=figures)
