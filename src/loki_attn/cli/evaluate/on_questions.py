"""`loki-attn eval needle|ruler|multi-question|longbench`: long contexts, questions, answers."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from loki_attn.cli import options
from loki_attn.cli.evaluate.measuring import Choices, Command, run
from loki_attn.cli.loading import known
from loki_attn.errors import InputError

if TYPE_CHECKING:
    from loki_attn.evaluate.task import Task
    from loki_attn.integrations.transformers import TransformersLM

_Lengths = Annotated[
    str, typer.Option("--lengths", help="Tokens of the prompts, separated by commas.")
]
_Seed = Annotated[int, typer.Option(help="Of the prompts.")]
_Seen = Annotated[
    str,
    typer.Option(help="after: the context is read without sight of the question; before: with it."),
]


def needle(
    model: options.Model = options.DEFAULT_MODEL,
    policy: options.Policies = None,
    basis: options.BasisFile = None,
    text: options.EvalText = None,
    kinds: Annotated[
        str,
        typer.Option(help="Kinds, separated by commas: number, city, uuid, sentence."),
    ] = "number",
    lengths: _Lengths = "2048,4096",
    depths: Annotated[str, typer.Option(help="Places from 0 (start) to 1 (end).")] = (
        "0,0.25,0.5,0.75,1"
    ),
    per_depth: Annotated[int, typer.Option(min=1, help="Prompts per kind, length, depth.")] = 2,
    seed: _Seed = 0,
    seen: _Seen = "after",
    dtype: options.Dtype = "auto",
    out: options.Rows = Path("rows.jsonl"),
    as_json: options.Json = False,
) -> None:
    """Whether a fact hidden in a long text comes back, by its depth and the text's length."""
    from loki_attn.evaluate.asking import Seen
    from loki_attn.evaluate.suites import needle_task

    chosen: dict[str, Any] = {
        "kinds": _names(kinds),
        "lengths": _numbers("lengths", lengths, int),
        "depths": _numbers("depths", depths, float),
        "per_depth": per_depth,
        "seed": seed,
        "seen": known("order", seen, Seen),
    }

    def build(lm: "TransformersLM", content: str, corpus: str) -> "Task":
        return needle_task(lm, content, corpus=corpus, **chosen)

    run(Choices(model, policy, basis, text, dtype, out, as_json), build)


def ruler(
    model: options.Model = options.DEFAULT_MODEL,
    policy: options.Policies = None,
    basis: options.BasisFile = None,
    text: options.EvalText = None,
    subtasks: Annotated[
        str, typer.Option(help="Sub-tasks separated by commas, niah_single_1 say; empty for all.")
    ] = "",
    lengths: _Lengths = "4096",
    count: Annotated[int, typer.Option(min=1, help="Prompts per sub-task and length.")] = 5,
    answer_tokens: Annotated[
        int | None, typer.Option(min=1, help="End answers earlier than RULER does.")
    ] = None,
    seed: _Seed = 0,
    seen: _Seen = "after",
    dtype: options.Dtype = "auto",
    out: options.Rows = Path("rows.jsonl"),
    as_json: options.Json = False,
) -> None:
    """The 13 tasks of RULER, generated here."""
    from loki_attn.evaluate.asking import Seen
    from loki_attn.evaluate.suites import ruler_task

    chosen: dict[str, Any] = {
        "subtasks": _names(subtasks),
        "lengths": _numbers("lengths", lengths, int),
        "count": count,
        "answer_tokens": answer_tokens,
        "seed": seed,
        "seen": known("order", seen, Seen),
    }

    def build(lm: "TransformersLM", content: str, corpus: str) -> "Task":
        return ruler_task(lm, content, corpus=corpus, **chosen)

    run(Choices(model, policy, basis, text, dtype, out, as_json), build)


def multi_question(
    model: options.Model = options.DEFAULT_MODEL,
    policy: options.Policies = None,
    basis: options.BasisFile = None,
    text: options.EvalText = None,
    lengths: _Lengths = "4096",
    count: Annotated[int, typer.Option(min=1, help="Contexts per length.")] = 4,
    questions: Annotated[int, typer.Option(min=2, help="Questions per context.")] = 5,
    seed: _Seed = 0,
    seen: _Seen = "after",
    dtype: options.Dtype = "auto",
    out: options.Rows = Path("rows.jsonl"),
    as_json: options.Json = False,
) -> None:
    """Several questions about one context, each asked of the cache as it was after reading."""
    from loki_attn.evaluate.asking import Seen
    from loki_attn.evaluate.suites import multi_question_task

    chosen: dict[str, Any] = {
        "lengths": _numbers("lengths", lengths, int),
        "count": count,
        "questions": questions,
        "seed": seed,
        "seen": known("order", seen, Seen),
    }

    def build(lm: "TransformersLM", content: str, corpus: str) -> "Task":
        return multi_question_task(lm, content, corpus=corpus, **chosen)

    run(Choices(model, policy, basis, text, dtype, out, as_json), build)


def longbench(
    path: Annotated[Path, typer.Argument(help="File or folder in LongBench's format.")],
    model: options.Model = options.DEFAULT_MODEL,
    policy: options.Policies = None,
    basis: options.BasisFile = None,
    version: Annotated[int, typer.Option(min=1, max=2, help="1 or 2.")] = 1,
    dataset: Annotated[
        str | None, typer.Option(help="Data set, where the file's name does not say.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Samples per data set.")] = None,
    seen: _Seen = "after",
    dtype: options.Dtype = "auto",
    out: options.Rows = Path("rows.jsonl"),
    as_json: options.Json = False,
) -> None:
    """LongBench v1 or v2 from local files, with its own prompts and metrics."""
    from loki_attn.evaluate.asking import Seen
    from loki_attn.evaluate.suites import longbench_task

    order = known("order", seen, Seen)

    def build(lm: "TransformersLM", content: str, corpus: str) -> "Task":
        del content, corpus
        return longbench_task(lm, path, version=version, dataset=dataset, limit=limit, seen=order)

    run(Choices(model, policy, basis, None, dtype, out, as_json), build)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _numbers(option: str, text: str, kind: type[int] | type[float]) -> list[Any]:
    try:
        found = [kind(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise InputError(f"--{option} takes numbers separated by commas, got {text!r}.") from error
    if not found:
        raise InputError(f"--{option} takes at least one number, got {text!r}.")
    return found


COMMANDS: Final = {
    "needle": Command(needle, "Example: loki-attn eval needle -p loki -p streaming-llm"),
    "ruler": Command(ruler, "Example: loki-attn eval ruler --subtasks vt,fwe -p loki --count 10"),
    "multi-question": Command(
        multi_question, "Example: loki-attn eval multi-question -p loki --questions 5"
    ),
    "longbench": Command(
        longbench, "Example: loki-attn eval longbench hotpotqa.jsonl -p loki --limit 20"
    ),
}
