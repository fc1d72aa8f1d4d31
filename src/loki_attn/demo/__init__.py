"""The demo: a real model with dense and with Loki attention side by side, and a report.

model --calibrate--> basis --continue--> two texts --ask--> answers --measure--> rows --> report
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console
from rich.panel import Panel
from rich.table import Table

from loki_attn import models
from loki_attn.demo import calibration, continuation, measurement, questions
from loki_attn.demo.plan import LOKI, plan_for
from loki_attn.demo.stage import DENSE, Stage, heading, note
from loki_attn.evaluate.results import read_rows
from loki_attn.integrations.transformers import TransformersLM
from loki_attn.integrations.transformers.identity import identity
from loki_attn.kernels import backends
from loki_attn.report import write_markdown

INTERRUPTED: Final = 130
_THREADS_VARIABLE: Final = "OMP_NUM_THREADS"


def run(model: str, out: Path, console: Console, fast: bool) -> int:
    """Show the library at work on a model, and write rows and a report of what was measured.

    Args:
        model: Anything that `loki_attn.models.load` understands.
        out: Folder for `rows.jsonl` and `report.md`; made where missing.
        console: Where to show it; a terminal or a log.
        fast: Do as little as shows that everything works.

    Returns:
        0, or 130 after Ctrl-C.

    Raises:
        LokiAttnError: If the model cannot be had or served, or something cannot be written.
    """
    start_s = time.perf_counter()
    try:
        with _modest_threads():
            page = _run(model, out, console, fast=fast, start_s=start_s)
    except KeyboardInterrupt:
        console.print("\n[bold]Stopped.[/bold] What was finished is kept; run it again any time.")
        return INTERRUPTED
    note(console, f"{time.perf_counter() - start_s:.0f} s in all.")
    console.print(f"Report with figures: [bold]{page}[/bold]", highlight=False, soft_wrap=True)
    return 0


def _run(name: str, out: Path, console: Console, *, fast: bool, start_s: float) -> Path:
    heading(console, 1, "The model")
    model, tokenizer = models.load(name, progress=lambda line: note(console, line))
    name = Path(name).name if Path(name).is_dir() else name
    _introduce(name, model, console, time.perf_counter() - start_s)
    context = int(model.config.get_text_config().max_position_embeddings)
    plan = plan_for(context, fast=fast, embedded=name == models.DEFAULT_MODEL)

    heading(console, 2, "Calibration: in which coordinates do its keys live?")
    label = f"{name}-fast" if fast else name
    bases = calibration.obtain(model, tokenizer, identity(model), label, plan, console)

    with TransformersLM(model, tokenizer) as lm:
        stage = Stage(console=console, lm=lm, plan=plan, out=out)
        calibration.show_ranks(stage, bases)
        contenders = plan.contenders(bases[calibration.KIND])
        loki = contenders[0]

        heading(console, 3, "A long text, continued by dense attention and by Loki")
        continuation.continue_text(stage, loki)

        heading(console, 4, "Questions")
        questions.ask_short(stage, loki)
        questions.ask_long(stage, loki)

        heading(console, 5, "What it costs")
        measurement.measure(stage, contenders)

    heading(console, 6, "Summary")
    console.print(_summary(stage))
    return write_markdown(
        read_rows(stage.rows_file),
        out / "report.md",
        title=f"Demo: {name}",
        introduction=f"Written by `loki-attn demo --model {name}`; "
        f"the rows are in [{stage.rows_file.name}]({stage.rows_file.name}).",
    )


def _introduce(name: str, model: Any, console: Console, load_s: float) -> None:
    text = model.config.get_text_config()
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    dtype = str(model.dtype).removeprefix("torch.")
    console.print(
        f"[bold]{name}[/bold]: {millions:,.0f} million parameters, {text.num_hidden_layers} "
        f"layers, {heads} query and {kv_heads} KV heads, context "
        f"{text.max_position_embeddings:,}, {dtype}, ready in {load_s:.1f} s.",
        highlight=False,
    )
    note(console, f"Backend {backends.resolve().name}, threads: {torch.get_num_threads()}.")


def _summary(stage: Stage) -> Panel:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for index, column in enumerate(("measured in this run", DENSE, LOKI)):
        table.add_column(column, justify="left" if index == 0 else "right")
    for line in stage.summary:
        table.add_row(*line)
    return Panel(table, expand=False)


@contextmanager
def _modest_threads() -> Iterator[None]:
    """Leave half of the cores to others, unless the user said how many threads to take.

    A thread pool waits for its slowest member at every operation: on a busy machine of two cores,
    a decode step took ten times as long with two threads as with one.
    """
    before = torch.get_num_threads()
    if _THREADS_VARIABLE not in os.environ:
        torch.set_num_threads(max(1, before // 2))
    try:
        yield
    finally:
        torch.set_num_threads(before)
