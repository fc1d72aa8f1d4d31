"""`loki-attn eval`: what a policy costs in quality, as rows and a table."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from loki_attn.cli import options, terminal
from loki_attn.cli.loading import find_basis, known, label, load_model, load_text, parse_policy
from loki_attn.errors import InputError

if TYPE_CHECKING:
    from loki_attn.evaluate.protocol import Contender
    from loki_attn.evaluate.results import Row
    from loki_attn.integrations.transformers import TransformersLM

app = typer.Typer(
    no_args_is_help=True,
    help="Measure what a policy costs in quality.",
    epilog="Example: loki-attn eval perplexity -p loki -p loki:top_k=256 --windows 2",
)

_PERPLEXITY: Final = {
    "perplexity": "ppl",
    "perplexity_dense": "dense",
    "nll_delta": "NLL - dense",
    "kl_to_dense": "KL to dense",
    "top1_agreement": "top-1 equal",
    "read_bytes_share": "KV read",
}
_FIDELITY: Final = {
    "recall": "recall of exact top-k",
    "mass": "mass read",
    "exact_mass": "exact top-k's",
    "output_error": "output error",
}
_PASSKEY: Final = {"accuracy": "keys found", "token_accuracy": "key tokens found"}


@dataclass(frozen=True, kw_only=True)
class _Run:
    """What the three commands share."""

    model: str
    policies: list[str] | None
    basis: Path | None
    text: Path | None
    dtype: str
    out: Path
    as_json: bool


@app.command("perplexity", epilog="Example: loki-attn eval perplexity -p loki -p streaming-llm")
def perplexity(
    model: options.Model = options.DEFAULT_MODEL,
    policy: options.Policies = None,
    basis: options.BasisFile = None,
    text: options.EvalText = None,
    protocol: Annotated[
        str, typer.Option(help="decode: one token per step; every_query: all rows select.")
    ] = "decode",
    windows: Annotated[int, typer.Option(min=1, help="Stretches of the text.")] = 2,
    window_tokens: Annotated[int, typer.Option(min=2, help="Scored tokens in each.")] = 512,
    prefix_tokens: Annotated[
        int, typer.Option(min=2, help="Tokens read before them (decode only).")
    ] = 4096,
    dtype: options.Dtype = "auto",
    out: options.Rows = Path("rows.jsonl"),
    as_json: options.Json = False,
) -> None:
    """Perplexity and divergence from dense attention on the same tokens."""
    from loki_attn.evaluate.perplexity import Protocol
    from loki_attn.evaluate.perplexity import perplexity as measure

    chosen = known("protocol", protocol, Protocol)
    run = _Run(
        model=model, policies=policy, basis=basis, text=text, dtype=dtype, out=out, as_json=as_json
    )

    def work(lm: "TransformersLM", content: str, contenders: "list[Contender]", corpus: str) -> Any:
        total = windows * len(contenders) * window_tokens
        with terminal.progress("perplexity", total, "tokens") as advance:
            news = [""]
            return measure(
                lm,
                lm.encode(content),
                contenders,
                protocol=chosen,
                windows=windows,
                window_tokens=window_tokens,
                prefix_tokens=prefix_tokens,
                corpus=corpus,
                progress=news.append,
                advance=lambda done: advance(done, news[-1]),
            )

    _measure(run, work, _PERPLEXITY)


@app.command("fidelity", epilog="Example: loki-attn eval fidelity -p loki:rank=8 -p loki:rank=16")
def fidelity(
    model: options.Model = options.DEFAULT_MODEL,
    policy: options.Policies = None,
    basis: options.BasisFile = None,
    text: options.EvalText = None,
    windows: Annotated[int, typer.Option(min=1, help="Stretches of the text.")] = 2,
    window_tokens: Annotated[int, typer.Option(min=2, help="Tokens in each.")] = 2048,
    queries: Annotated[int, typer.Option(min=1, help="Queries sampled in each.")] = 64,
    dtype: options.Dtype = "auto",
    out: options.Rows = Path("rows.jsonl"),
    as_json: options.Json = False,
) -> None:
    """Per layer: recall of the exact top-k, attention mass read, error of the output."""
    from loki_attn.evaluate.fidelity import fidelity as measure

    run = _Run(
        model=model, policies=policy, basis=basis, text=text, dtype=dtype, out=out, as_json=as_json
    )

    def work(lm: "TransformersLM", content: str, contenders: "list[Contender]", corpus: str) -> Any:
        with terminal.progress("fidelity", windows * window_tokens, "tokens") as advance:
            return measure(
                lm,
                lm.encode(content),
                contenders,
                windows=windows,
                window_tokens=window_tokens,
                queries=queries,
                corpus=corpus,
                progress=_counting(advance, window_tokens),
            )

    _measure(run, work, _FIDELITY)


@app.command("passkey", epilog="Example: loki-attn eval passkey --length 2048 -p dense -p loki")
def passkey(
    model: options.Model = options.DEFAULT_MODEL,
    policy: options.Policies = None,
    basis: options.BasisFile = None,
    text: options.EvalText = None,
    length: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 2048,
    trials: Annotated[int, typer.Option(min=1, help="Prompts, each with its own key.")] = 20,
    seed: Annotated[int, typer.Option(help="Of the keys and their places.")] = 0,
    dtype: options.Dtype = "auto",
    out: options.Rows = Path("rows.jsonl"),
    as_json: options.Json = False,
) -> None:
    """How often a number hidden in a long text comes back."""
    from loki_attn.evaluate.passkey import passkey as measure

    run = _Run(
        model=model, policies=policy, basis=basis, text=text, dtype=dtype, out=out, as_json=as_json
    )

    def work(lm: "TransformersLM", content: str, contenders: "list[Contender]", corpus: str) -> Any:
        with terminal.progress("passkey", trials, "trials") as advance:
            return measure(
                lm,
                content,
                contenders,
                length_tokens=length,
                trials=trials,
                seed=seed,
                corpus=corpus,
                progress=_counting(advance, 1),
            )

    _measure(run, work, _PASSKEY)


def _measure(
    run: _Run,
    work: "Callable[[TransformersLM, str, list[Contender], str], list[Row]]",
    columns: dict[str, str],
) -> None:
    """Make the contenders, let `work` judge them, keep the rows, print the table."""
    from loki_attn.evaluate.results import append_rows

    contenders = _contenders(run)
    corpus, content = load_text(run.text, "continuation")
    with _language_model(run) as lm:
        rows = work(lm, content, contenders, corpus)
    append_rows(run.out, rows)
    if run.as_json:
        terminal.emit([asdict(row) for row in rows])
        return
    shown = {name: title for name, title in columns.items() if name in rows[0].metrics}
    cells = [
        [row.contender, *(_cell(name, row.metrics) for name in shown), f"{row.n:,}"] for row in rows
    ]
    task, _, how = rows[0].protocol.partition(": ")
    title = f"{rows[0].task} of {run.model} on {corpus}"
    terminal.table(title, ["policy", *shown.values(), "n"], cells, note=how or task)
    terminal.say(f"{len(rows)} rows added to {run.out}")


def _contenders(run: _Run) -> "list[Contender]":
    from loki_attn.evaluate.protocol import Contender

    specs = run.policies or ["loki"]
    twice = sorted({spec for spec in specs if specs.count(spec) > 1})
    if twice:
        raise InputError(f"Policy {twice[0]!r} is given twice; give each once.")
    made = []
    for spec in specs:
        policy, own = parse_policy(spec)
        found = find_basis(policy, run.model, own or run.basis)
        made.append(
            Contender(name=label(spec), policy=policy, basis=None if found is None else found[1])
        )
    return made


@contextmanager
def _language_model(run: _Run) -> "Iterator[TransformersLM]":
    loaded, tokenizer = load_model(run.model, run.dtype)
    from loki_attn.integrations.transformers import TransformersLM

    with TransformersLM(loaded, tokenizer) as lm:
        yield lm


def _counting(advance: terminal.Advance, step: int) -> Callable[[str], None]:
    """Turn a line of news per step into progress."""
    steps = count(1)

    def tell(news: str) -> None:
        advance(next(steps) * step, news)

    return tell


def _cell(name: str, metrics: Mapping[str, Any]) -> str:
    value = metrics[name]
    if name == "nll_delta":
        return f"{value:+.3f}±{metrics['nll_delta_standard_error']:.3f}"
    if name in {"read_bytes_share", "top1_agreement", "recall", "mass", "exact_mass"}:
        return f"{value:.1%}"
    if name.startswith("perplexity"):
        return f"{value:.2f}"
    return f"{value:.2f}" if name.endswith("accuracy") else f"{value:.4f}"
