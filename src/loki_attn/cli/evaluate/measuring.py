"""From options to contenders and a task, and from rows to a table: what all of `eval` shares."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from loki_attn.cli import terminal
from loki_attn.cli.loading import find_calibrated, label, load_model, load_text, parse_policy
from loki_attn.errors import InputError

if TYPE_CHECKING:
    from loki_attn.evaluate.protocol import Contender
    from loki_attn.evaluate.results import Row
    from loki_attn.evaluate.task import Task
    from loki_attn.integrations.transformers import TransformersLM

    Build = Callable[[TransformersLM, str, str], Task]


class Command(NamedTuple):
    """A command of `eval`: what it runs, and an example."""

    run: Callable[..., None]
    EXAMPLE: str


class Choices(NamedTuple):
    """The options that all commands share."""

    model: str
    policies: list[str] | None
    basis: Path | None
    text: Path | None
    dtype: str
    out: Path
    as_json: bool


class _Column(NamedTuple):
    """A metric in a table: its title and how it is written."""

    title: str
    form: str


_COLUMNS: Final[Mapping[str, _Column]] = {
    "score": _Column("score", ".3f"),
    "score_delta": _Column("score - dense", "+.3f"),
    "perplexity": _Column("ppl", ".2f"),
    "nll_delta": _Column("NLL - dense", "+.3f"),
    "kl_to_dense": _Column("KL to dense", ".4f"),
    "top1_agreement": _Column("top-1 equal", ".1%"),
    "shared_tokens": _Column("tokens as dense", ".1f"),
    "identical": _Column("all as dense", ".1%"),
    "recall": _Column("recall of exact top-k", ".1%"),
    "mass": _Column("mass read", ".1%"),
    "exact_mass": _Column("exact top-k's", ".1%"),
    "output_error": _Column("output error", ".4f"),
}
_PLAIN: Final[Mapping[str, _Column]] = {
    "read_bytes_share": _Column("KV read", ".1%"),
    "selecting_calls": _Column("sparse calls", ",d"),
}


def run(choices: Choices, build: "Build") -> None:
    """Make the task and the contenders, measure, keep the rows, print the table."""
    from loki_attn.evaluate.measuring import measure, total_of
    from loki_attn.evaluate.results import append_rows

    contenders = make_contenders(choices.policies or ["loki"], choices.model, choices.basis)
    corpus, content = load_text(choices.text, "continuation")
    with language_model(choices.model, choices.dtype) as lm:
        task = build(lm, content, corpus)
        with terminal.progress(
            task.name, total_of(task, lm, contenders), "measurements"
        ) as advance:
            rows = measure(
                task, lm, contenders, progress=lambda done, total, news: advance(done, news)
            )
    append_rows(choices.out, rows)
    if choices.as_json:
        terminal.emit([asdict(row) for row in rows])
        return
    on = f" on {corpus}" if "corpus" in task.settings else ""
    show(f"{task.name} of {choices.model}{on}", rows)
    terminal.say(f"{len(rows)} rows added to {choices.out}")


def make_contenders(specs: Sequence[str], model: str, basis: Path | None) -> "list[Contender]":
    """Make contenders from policies as they are typed.

    Raises:
        InputError: If one is given twice, or cannot be read.
    """
    twice = sorted({spec for spec in specs if specs.count(spec) > 1})
    if twice:
        raise InputError(f"Policy {twice[0]!r} is given twice; give each once.")
    return [make_contender(spec, model, basis) for spec in specs]


def make_contender(spec: str, model: str, basis: Path | None) -> "Contender":
    """Make a contender from a policy as it is typed, with what was calibrated for it."""
    from loki_attn.evaluate.protocol import Contender

    chosen = parse_policy(spec)
    found = find_calibrated(chosen, model, basis)
    return Contender(
        name=label(spec), policy=chosen.policy, basis=found.basis, profile=found.profile
    )


@contextmanager
def language_model(name: str, dtype: str) -> "Iterator[TransformersLM]":
    """Load a model for evaluation."""
    loaded, tokenizer = load_model(name, dtype)
    from loki_attn.integrations.transformers import TransformersLM

    with TransformersLM(loaded, tokenizer) as lm:
        yield lm


def show(title: str, rows: "Sequence[Row]") -> None:
    """Print rows as a table; a figure without an interval has no place in it."""
    settings = _varying(rows)
    there = {m: c for m, c in _COLUMNS.items() if any(f"{m}_low" in r.metrics for r in rows)}
    plain = {m: c for m, c in _PLAIN.items() if any(m in r.metrics for r in rows)}
    columns = ["policy", *settings, *(c.title for c in (*there.values(), *plain.values())), "n"]
    cells = [
        [
            row.contender,
            *(str(row.settings[name]) for name in settings),
            *(_with_interval(row.metrics, name, column.form) for name, column in there.items()),
            *(_alone(row.metrics, name, column.form) for name, column in plain.items()),
            f"{row.n:,}",
        ]
        for row in rows
    ]
    note = f"{rows[0].protocol}. Intervals: {rows[0].metrics.get('intervals', 'none')}."
    terminal.table(title, columns, cells, note=note)


def _varying(rows: "Sequence[Row]") -> list[str]:
    names = dict.fromkeys(name for row in rows for name in row.settings)
    return [n for n in names if len({str(row.settings.get(n)) for row in rows}) > 1]


def _with_interval(metrics: Mapping[str, Any], name: str, form: str) -> str:
    if f"{name}_low" not in metrics:
        return "-"
    value, low, high = (metrics[key] for key in (name, f"{name}_low", f"{name}_high"))
    return f"{value:{form}} [{low:{form}}, {high:{form}}]".replace("%, ", ", ").replace("% [", " [")


def _alone(metrics: Mapping[str, Any], name: str, form: str) -> str:
    return f"{metrics[name]:{form}}" if name in metrics else "-"
