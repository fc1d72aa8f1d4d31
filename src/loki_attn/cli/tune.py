"""`loki-attn tune`: the fastest policy within a bound on quality, on the user's own text."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from loki_attn.cli import options, terminal
from loki_attn.cli.loading import Found, Typed, find_calibrated, known, load_model, load_text
from loki_attn.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from loki_attn.basis import Basis
    from loki_attn.evaluate.results import Row
    from loki_attn.tune import Bound, Spec, Tuning

NAME: Final = "tune"
EXAMPLE: Final = "Example: loki-attn tune --max-kl 0.02 --context 8192 --text mine.txt"


_MaxKl = Annotated[
    float | None, typer.Option(help="Most divergence from dense attention, nats per token.")
]
_MaxPplDelta = Annotated[
    float | None, typer.Option(help="Most perplexity above dense attention's.")
]
_Context = Annotated[
    int | None,
    typer.Option(
        help="Tokens to tune at (default: 4096, or the model's context where that is less).",
        show_default=False,
    ),
]
_Out = Annotated[Path, typer.Option(help="The policy's file.")]
_Rows = Annotated[
    Path, typer.Option("--rows", help="JSON-lines file that the evidence is added to.")
]
_Journal = Annotated[
    Path | None,
    typer.Option(help="File that keeps what is measured, so that a run can be taken up again."),
]
_Minutes = Annotated[
    float,
    typer.Option(help="How long to search; the best by then is still confirmed and timed."),
]
_Cost = Annotated[
    str, typer.Option(help="time: the fastest here; bytes: the fewest bytes, for any machine.")
]
_Windows = Annotated[int, typer.Option(min=1, help="Stretches of the text to judge on.")]
_Heldout = Annotated[int, typer.Option(min=1, help="Further ones to confirm on.")]
_Scored = Annotated[int, typer.Option(help="Scored tokens at the end of each.")]
_Rounds = Annotated[int, typer.Option(min=1, help="Turns of each contender that is timed.")]
_Seed = Annotated[int, typer.Option(help="Which stretches of the text are taken.")]


def command(
    model: options.Model = options.DEFAULT_MODEL,
    max_kl: _MaxKl = None,
    max_ppl_delta: _MaxPplDelta = None,
    context: _Context = None,
    text: options.EvalText = None,
    basis: options.BasisFile = None,
    out: _Out = Path("policy.json"),
    rows: _Rows = Path("rows.jsonl"),
    journal: _Journal = None,
    minutes: _Minutes = 10.0,
    cost: _Cost = "time",
    windows: _Windows = 3,
    heldout_windows: _Heldout = 2,
    window_tokens: _Scored = 128,
    rounds: _Rounds = 5,
    seed: _Seed = 0,
    dtype: options.Dtype = "auto",
    as_json: options.Json = False,
) -> None:
    """Search for the fastest policy within a bound on quality, on your text, and write it."""
    from loki_attn.evaluate.journal import Journal
    from loki_attn.evaluate.results import append_rows
    from loki_attn.policy import preset
    from loki_attn.tune import Cost, Spec, check_policy_path, tune, write_policy

    bound = _bound(max_kl, max_ppl_delta)
    check_policy_path(out)
    found = _basis(find_calibrated(Typed(preset("loki")), model, basis))
    corpus, content = load_text(text, "continuation")
    spec = Spec(
        bound=bound,
        windows=windows,
        heldout_windows=heldout_windows,
        window_tokens=window_tokens,
        minutes=minutes,
        cost=known("cost", cost, Cost),
        rounds=rounds,
        seed=seed,
        corpus=corpus,
        context=Spec.context if context is None else context,
    )
    loaded, tokenizer = load_model(model, dtype)
    from loki_attn.integrations.transformers import TransformersLM

    with TransformersLM(loaded, tokenizer) as lm:
        if context is None:
            spec = replace(spec, context=min(spec.context, lm.context_tokens))
        ids = lm.encode(content)
        tuning = tune(lm, ids, found, spec, journal=Journal(journal), tell=terminal.say)
        made = tuning.rows(lm)
    write_policy(tuning, out)
    append_rows(rows, made)
    if as_json:
        terminal.emit({"policy": str(out), "rows": [asdict(row) for row in made]})
        return
    _show(model, tuning, made)
    terminal.say(f"{len(made)} rows added to {rows}")
    terminal.write(f"{out}\n")


def _bound(max_kl: float | None, max_ppl_delta: float | None) -> "Bound":
    from loki_attn.tune import Bound

    if (max_kl is None) == (max_ppl_delta is None):
        raise InputError("Give the bound either as --max-kl NATS or as --max-ppl-delta DELTA.")
    return Bound("kl", max_kl) if max_kl is not None else Bound("ppl", max_ppl_delta or 0.0)


def _basis(found: "Found") -> "Basis":
    if found.basis is None:
        raise InputError("The policies that are tuned need a basis; give --basis FILE.")
    return found.basis


def _show(model: str, tuning: "Tuning", rows: "list[Row]") -> None:
    """Print the finalists beside dense attention, a column each, and what to make of them."""
    spec = tuning.spec
    columns = [*(_figures(row, spec) for row in rows), _dense_figures(rows[0])]
    heads = ["chosen", *("also within" for _ in rows[1:]), "dense"]
    terminal.table(
        f"{spec.bound.words} <= {spec.bound.limit:g} for {model} at {spec.context:,} tokens of "
        f"{spec.corpus}",
        ["", *heads],
        [[title, *(column.get(title, "") for column in columns)] for title in columns[0]],
        note=_note(tuning),
    )


def _figures(row: "Row", spec: "Spec") -> dict[str, str]:
    """What is said of one finalist, by title."""
    metrics, select, budget = row.metrics, row.policy["select"], row.policy["budget"]
    error = "kl_to_dense" if spec.bound.measure == "kl" else "perplexity_delta"
    return {
        "rank": str(select["rank"]),
        "plane": str(select["plane_dtype"]),
        "top_k": f"{budget['top_k']:,}",
        "dense layers": ", ".join(map(str, budget.get("dense_layers", ()))) or "none",
        spec.bound.words: _interval(metrics, error),
        "  on held-out text": _interval(metrics, f"heldout_{error}"),
        "cache bytes read, predicted": f"{metrics['predicted_read_bytes_share']:.1%}",
        "  measured": f"{metrics['read_bytes_share']:.1%}",
        "speed over dense, predicted": f"{metrics['predicted_speedup']:.2f}",
        "  measured, median": f"{metrics['speedup']:.2f}",
        "ms per step, predicted": f"{metrics['predicted_step_us'] / 1000:.2f}",
        **_step(metrics, ""),
        "scored tokens": f"{row.n:,}",
    }


def _dense_figures(row: "Row") -> dict[str, str]:
    """The same of dense attention, which a row of a finalist holds as well."""
    return {"cache bytes read, predicted": "100.0%", **_step(row.metrics, "dense_")}


def _note(tuning: "Tuning") -> str:
    counts = tuning.counts
    ended = (
        "the search ended by itself"
        if tuning.final
        else f"the time was over with {counts.open} still open, so a cheaper one may exist"
    )
    slower = (
        ""
        if tuning.speedup > 1
        else " Measured, it is no faster than dense attention at this context."
    )
    return (
        f"Chosen: {tuning.speedup:.2f} times as fast as dense per step.{slower} "
        f"{counts.predicted} policies predicted, {counts.cheaper} of them cheaper than dense, "
        f"{counts.screened} screened, {counts.frontier} in question, {counts.measured} measured, "
        f"{counts.confirmed} on held-out text; {ended}. Means with "
        "95 % intervals; predicted times are of quiet steps, to be held against p20."
    )


def _interval(metrics: "Mapping[str, Any]", name: str) -> str:
    if name not in metrics:
        return "not asked"
    mean, low, high = (metrics[f"{name}{end}"] for end in ("", "_low", "_high"))
    return f"{mean:.4g} [{low:.4g}, {high:.4g}]"


def _step(metrics: "Mapping[str, Any]", prefix: str) -> dict[str, str]:
    middle, low, high = (
        metrics[f"{prefix}{name}_step_us"] / 1000 for name in ("median", "p20", "p80")
    )
    return {"  measured median": f"{middle:.2f}", "  p20 - p80": f"{low:.2f} - {high:.2f}"}
