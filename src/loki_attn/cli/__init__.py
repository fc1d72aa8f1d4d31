"""The command line: each command builds one spec, calls one function, prints one table.

Nothing here computes. stdout carries the result (with `--json` only that), stderr the news.
"""

import sys


def main() -> None:
    """Run `loki-attn`, or say in one line what it lacks."""
    try:
        from loki_attn.cli.app import app
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in {"rich", "typer"}:
            raise
        sys.stderr.write(
            f'error: The command line needs {package}; run: pip install "loki-attn[all]"\n'
        )
        raise SystemExit(1) from None
    app()
