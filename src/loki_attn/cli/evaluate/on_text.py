"""`loki-attn eval perplexity|fidelity|agreement`: tasks on the tokens of a text."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from loki_attn.cli import options
from loki_attn.cli.evaluate.measuring import Choices, Command, run
from loki_attn.cli.loading import known

if TYPE_CHECKING:
    from loki_attn.evaluate.task import Task
    from loki_attn.integrations.transformers import TransformersLM


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
    from loki_attn.evaluate.perplexity import Perplexity, Protocol

    how = known("protocol", protocol, Protocol)

    def build(lm: "TransformersLM", content: str, corpus: str) -> "Task":
        return Perplexity(
            ids=tuple(lm.encode(content)),
            how=how,
            windows=windows,
            window_tokens=window_tokens,
            prefix_tokens=prefix_tokens,
            corpus=corpus,
        )

    run(Choices(model, policy, basis, text, dtype, out, as_json), build)


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
    from loki_attn.evaluate.fidelity import Fidelity

    def build(lm: "TransformersLM", content: str, corpus: str) -> "Task":
        return Fidelity(
            ids=tuple(lm.encode(content)),
            windows=windows,
            window_tokens=window_tokens,
            queries=queries,
            corpus=corpus,
        )

    run(Choices(model, policy, basis, text, dtype, out, as_json), build)


def agreement(
    model: options.Model = options.DEFAULT_MODEL,
    policy: options.Policies = None,
    basis: options.BasisFile = None,
    text: options.EvalText = None,
    prompts: Annotated[int, typer.Option(min=1, help="Stretches of the text.")] = 4,
    prompt_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each.")] = 4096,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens generated after each.")] = 64,
    dtype: options.Dtype = "auto",
    out: options.Rows = Path("rows.jsonl"),
    as_json: options.Json = False,
) -> None:
    """How long a greedy continuation stays what dense attention says."""
    from loki_attn.evaluate.agreement import Agreement

    def build(lm: "TransformersLM", content: str, corpus: str) -> "Task":
        return Agreement(
            ids=tuple(lm.encode(content)),
            prompts=prompts,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            corpus=corpus,
        )

    run(Choices(model, policy, basis, text, dtype, out, as_json), build)


COMMANDS: Final = {
    "perplexity": Command(
        perplexity, "Example: loki-attn eval perplexity -p loki -p streaming-llm"
    ),
    "fidelity": Command(
        fidelity, "Example: loki-attn eval fidelity -p loki:rank=8 -p loki:rank=16"
    ),
    "agreement": Command(agreement, "Example: loki-attn eval agreement -p loki --prompts 8"),
}
