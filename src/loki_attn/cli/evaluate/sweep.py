"""`loki-attn eval sweep`: everything that a YAML file asks for, a process for each model."""

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from loki_attn.cli import options, terminal
from loki_attn.cli.evaluate.measuring import Command, language_model, make_contender
from loki_attn.cli.loading import load_text
from loki_attn.errors import LokiAttnError

if TYPE_CHECKING:
    from loki_attn.evaluate.protocol import Contender


def sweep(
    spec: Annotated[Path, typer.Argument(help="A YAML file: models, policies, tasks.")],
    out: options.Rows = Path("rows.jsonl"),
    journal: Annotated[
        Path | None,
        typer.Option(help="Where every measurement is kept; without it, OUT.journal beside OUT."),
    ] = None,
    only: Annotated[
        str | None, typer.Option(help="Measure this model only, in this process.")
    ] = None,
    basis: options.BasisFile = None,
    dtype: options.Dtype = "auto",
    as_json: options.Json = False,
) -> None:
    """Models x policies x tasks from a YAML file; killed at any point, it goes on where it was."""
    from loki_attn.evaluate.results import read_rows
    from loki_attn.evaluate.sweep import read_spec

    chosen = read_spec(spec)
    kept = journal or out.with_name(f"{out.name}.journal")
    if only is not None:
        _measure(spec, only, out, kept, basis, dtype)
        return
    failed = []
    for model in chosen.models:
        terminal.say(f"model {model}")
        # A process of its own: its memory is free for the next, and its fall takes nobody along.
        command = [sys.executable, "-m", "loki_attn.cli", "eval", "sweep", str(spec)]
        command += ["--only", model, "--out", str(out), "--journal", str(kept), "--dtype", dtype]
        command += ["--basis", str(basis)] if basis is not None else []
        if subprocess.run(command, check=False).returncode:
            failed.append(model)
    rows = list(read_rows(out)) if out.is_file() else []
    if as_json:
        terminal.emit({"rows": len(rows), "out": str(out), "failed": failed})
    else:
        terminal.write(f"{len(rows)} rows in {out}\n")
    if failed:
        raise LokiAttnError(
            f"The sweep did not finish for {', '.join(failed)}; the reason stands above. Run the "
            "same command again: what was measured is kept."
        )


def _measure(
    spec: Path, model: str, out: Path, journal: Path, basis: Path | None, dtype: str
) -> None:
    from loki_attn.errors import unknown_name
    from loki_attn.evaluate.sweep import Host, read_spec, run_model

    chosen = read_spec(spec)
    if model not in chosen.models:
        raise unknown_name("model of the sweep", model, chosen.models)

    def contender(typed: str) -> "Contender":
        return make_contender(typed, model, basis)

    def text(name: str | None) -> tuple[str, str]:
        return load_text(None if name is None else Path(name), "continuation")

    with (
        language_model(model, dtype) as lm,
        terminal.progress(model, 1, "measurements") as advance,
    ):
        host = Host(
            contender=contender,
            text=text,
            progress=lambda done, total, news: advance(done, news, total),
            news=terminal.say,
        )
        added = run_model(lm, chosen.of_model(model), host, out, journal)
    terminal.say(f"{len(added)} rows added to {out}")


COMMANDS: Final = {
    "sweep": Command(sweep, "Example: loki-attn eval sweep spec.yaml --out all.jsonl")
}
