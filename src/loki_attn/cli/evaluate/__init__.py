"""`loki-attn eval`: what a policy costs in quality, as rows and a table."""

import typer

from loki_attn.cli.evaluate import on_questions, on_text, sweep

app = typer.Typer(
    no_args_is_help=True,
    help="Measure what a policy costs in quality.",
    epilog="Example: loki-attn eval perplexity -p loki -p loki:top_k=256 --windows 2",
)
for _module in (on_text, on_questions, sweep):
    for _name, _command in _module.COMMANDS.items():
        app.command(_name, epilog=_command.EXAMPLE)(_command.run)
