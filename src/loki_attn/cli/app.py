"""The app: commands put together, errors as one line, Ctrl-C as exit code 130."""

import errno
import sys
from typing import Annotated, Any, Final, final

import typer
from typer.core import TyperGroup

import loki_attn
from loki_attn.cli import (
    bench,
    calibrate,
    demo,
    doctor,
    evaluate,
    generate,
    inspect,
    methods,
    profile,
    report,
    tune,
)
from loki_attn.cli.terminal import fail, stderr
from loki_attn.errors import LokiAttnError

ERROR_EXIT: Final = 2
INTERRUPT_EXIT: Final = 130


@final
class Guarded(TyperGroup):
    """Shows the library's errors and the disk's as one line; `--debug` shows where they arose."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except (LokiAttnError, OSError) as error:
            # A reader that went away (| head) is no error of ours.
            if ctx.params.get("debug") or getattr(error, "errno", None) == errno.EPIPE:
                raise
            fail(_message(error))
            raise typer.Exit(ERROR_EXIT) from error
        except KeyboardInterrupt as interrupt:
            what = f": {interrupt}" if str(interrupt) else "; nothing was left half written"
            stderr().print(f"\ninterrupted{what}", markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(INTERRUPT_EXIT) from interrupt


app = typer.Typer(
    name="loki-attn",
    cls=Guarded,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    epilog="Example: loki-attn calibrate && loki-attn generate --prompt 'Once upon a time'",
)


def _show_version(asked: bool) -> None:
    if asked:
        sys.stdout.write(f"loki-attn {loki_attn.__version__}\n")
        raise typer.Exit


@app.callback()
def _root(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    """Sparse attention for pretrained language models, without training."""
    del debug, version  # read where they act


def _message(error: LokiAttnError | OSError) -> str:
    if isinstance(error, LokiAttnError) or error.strerror is None:
        return str(error)
    place = f": {error.filename!r}" if error.filename is not None else ""
    return f"{error.strerror}{place}."


for _module in (calibrate, profile, inspect, generate, tune, report, methods, doctor, demo):
    app.command(_module.NAME, epilog=_module.EXAMPLE)(_module.command)
app.add_typer(evaluate.app, name="eval")
app.add_typer(bench.app, name="bench")
