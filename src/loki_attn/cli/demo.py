"""`loki-attn demo`: everything once, on a real model."""

from pathlib import Path
from typing import Annotated, Final

import typer

from loki_attn.cli import options, terminal

NAME: Final = "demo"
EXAMPLE: Final = "Example: loki-attn demo --fast"


def command(
    model: options.Model = options.DEFAULT_MODEL,
    out: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("demo"),
    fast: Annotated[bool, typer.Option("--fast", help="Shorter texts, fewer measurements.")] = (
        False
    ),
    as_json: options.Json = False,
) -> None:
    """Calibrate, generate with dense and with Loki attention, measure, write a report."""
    from loki_attn.demo import run

    code = run(model, out, terminal.stderr() if as_json else terminal.stdout(), fast)
    if as_json:
        terminal.emit({"out": str(out), "model": model, "exit_code": code})
    raise typer.Exit(code)
