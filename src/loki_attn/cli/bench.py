"""`loki-attn bench`: what a decode step and a generation cost here, beside what torch users run."""

import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from loki_attn.cli import options, terminal
from loki_attn.cli.bench_tables import show_speech, show_steps
from loki_attn.cli.loading import find_calibrated, label, load_model, load_text, parse_policy
from loki_attn.errors import InputError

if TYPE_CHECKING:
    from loki_attn.basis import Basis
    from loki_attn.bench.decode import Outcome
    from loki_attn.bench.shapes import Shape
    from loki_attn.bench.speaking import Speaker
    from loki_attn.policy import Policy
    from loki_attn.profile import Profile

    Attached = tuple[Policy, Basis | None, Profile | None]

app = typer.Typer(
    no_args_is_help=True,
    help="Measure time and memory, with a check of every result first.",
    epilog="Example: loki-attn bench decode --contexts 8192,32768 --parts",
)

FAILED_GATE_EXIT: Final = 1
_GIB: Final = 1 << 30
_GROWTH: Final = "2048,4096,8192,16384,32768,65536,131072"

_Shape = Annotated[str, typer.Option("--shape", "-s", help="A model's layer, by name.")]
_Heads = Annotated[int | None, typer.Option(help="Query heads of a shape of your own.")]
_KvHeads = Annotated[int | None, typer.Option(help="KV heads of it.")]
_HeadDim = Annotated[int | None, typer.Option(help="Size of its rows.")]
_Contexts = Annotated[str, typer.Option(help="Tokens in the cache; several, with commas.")]
_Amounts = Annotated[
    str, typer.Option("--k", help="Rows that a step reads: numbers or parts like T/8; several.")
]
_Planes = Annotated[
    str, typer.Option(help="Number formats of Loki's lead plane: int8, bf16, int4, fp32; several.")
]
_Rank = Annotated[int | None, typer.Option(help="Coordinates of the plane.  [default: Loki's own]")]
_Dtype = Annotated[str, typer.Option(help="Of keys and values: bf16, fp16 or fp32.")]
_Batches = Annotated[str, typer.Option("--batch", help="Sequences at once; several, with commas.")]
_Device = Annotated[str, typer.Option(help="Where to run: cpu or cuda.")]
_Repeats = Annotated[int, typer.Option(help="Rounds of turns that count.")]
_Layers = Annotated[
    int | None,
    typer.Option(help="Layer caches in turn.  [default: enough to keep each visit cold]"),
]
_Memory = Annotated[
    float | None, typer.Option(help="GiB that the caches may take.  [default: half of the free]")
]
_Threads = Annotated[int | None, typer.Option(help="Threads of torch.  [default: as they are]")]
_Out = Annotated[
    Path | None, typer.Option("--out", help="JSON-lines file that the rows are added to.")
]


@app.command("decode", epilog="Example: loki-attn bench decode --contexts 8192 --k T/8,512")
def decode(
    shape: _Shape = "llama-3.1-8b",
    heads: _Heads = None,
    kv_heads: _KvHeads = None,
    head_dim: _HeadDim = None,
    contexts: _Contexts = "8192,32768",
    amounts: _Amounts = "T/8",
    planes: _Planes = "int8",
    rank: _Rank = None,
    dtype: _Dtype = "bf16",
    batch: _Batches = "1",
    device: _Device = "cpu",
    repeats: _Repeats = 20,
    layers: _Layers = None,
    memory_gib: _Memory = None,
    threads: _Threads = None,
    parts: Annotated[
        bool, typer.Option("--parts", help="Time score, choose and attend apart as well.")
    ] = False,
    out: _Out = None,
    figure: Annotated[
        Path | None, typer.Option(help="Draw time against context into this .svg or .png.")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """One decode step of one layer: Loki beside dense attention as torch users write it."""
    outcome = _measure_steps(
        threads,
        _shape(shape, heads, kv_heads, head_dim),
        contexts=_numbers("contexts", contexts),
        amounts=_listed(amounts),
        planes=_listed(planes),
        rank=rank,
        dtype=dtype,
        batches=_numbers("batch", batch),
        device=device,
        repeats=repeats,
        layers=layers,
        memory_bytes=None if memory_gib is None else int(memory_gib * _GIB),
        parts=parts,
    )
    _publish(outcome, out, figure, as_json=as_json, show=show_steps)


@app.command("growth", epilog="Example: loki-attn bench growth --figure growth.svg")
def growth(
    shape: _Shape = "llama-3.1-8b",
    heads: _Heads = None,
    kv_heads: _KvHeads = None,
    head_dim: _HeadDim = None,
    contexts: _Contexts = _GROWTH,
    amounts: _Amounts = "T/8",
    planes: _Planes = "int8",
    dtype: _Dtype = "bf16",
    repeats: _Repeats = 10,
    layers: _Layers = None,
    memory_gib: _Memory = None,
    threads: _Threads = None,
    rows: Annotated[
        Path | None, typer.Option(help="Draw these rows of `bench decode`; measure nothing.")
    ] = None,
    out: _Out = None,
    figure: Annotated[Path, typer.Option(help="The picture, .svg or .png.")] = Path("growth.svg"),
    as_json: options.Json = False,
) -> None:
    """Time against context, with the parts of a Loki step, as a figure."""
    if rows is not None:
        from loki_attn.evaluate.results import read_rows

        found = [row for row in read_rows(rows) if row.get("task") == "bench decode"]
        _draw(found, figure)
        if as_json:
            terminal.emit(found)
        return
    outcome = _measure_steps(
        threads,
        _shape(shape, heads, kv_heads, head_dim),
        contexts=_numbers("contexts", contexts),
        amounts=_listed(amounts),
        planes=_listed(planes),
        dtype=dtype,
        repeats=repeats,
        layers=layers,
        memory_bytes=None if memory_gib is None else int(memory_gib * _GIB),
        parts=True,
    )
    _publish(outcome, out, figure, as_json=as_json, show=show_steps)


@app.command("generate", epilog="Example: loki-attn bench generate --contexts 2048,8192")
def generate(
    model: options.Model = options.DEFAULT_MODEL,
    policy: options.Policies = None,
    basis: options.BasisFile = None,
    text: options.EvalText = None,
    contexts: Annotated[
        str, typer.Option(help="Tokens at the end, prompt and new ones; several, with commas.")
    ] = "512,2048,8192",
    new_tokens: Annotated[int, typer.Option(help="Tokens of a turn.")] = 16,
    repeats: Annotated[int, typer.Option(help="Turns that count.")] = 3,
    prefills: Annotated[int, typer.Option(help="Times that a prompt is read.")] = 1,
    dtype: options.Dtype = "auto",
    backend: Annotated[
        str | None, typer.Option(help="Backend of the attached contenders.  [default: the best]")
    ] = None,
    threads: _Threads = None,
    out: _Out = None,
    as_json: options.Json = False,
) -> None:
    """Tokens per second of plain `generate`: stock, and attached to a policy."""
    from loki_attn.bench import machine

    specs = policy or ["loki"]
    lengths = _numbers("contexts", contexts)
    with machine.threads(threads), machine.asked_backend(backend):
        loaded, tokenizer = load_model(model, dtype)
        _, content = load_text(text, "continuation")
        outcome = _measure_speech(
            loaded,
            tokenizer(content, add_special_tokens=False, verbose=False).input_ids,
            _policies(specs, model, basis),
            model=model,
            contexts=lengths,
            new_tokens=new_tokens,
            repeats=repeats,
            prefills=prefills,
        )
    _publish(outcome, out, None, as_json=as_json, show=show_speech)


def _policies(specs: list[str], model: str, basis: Path | None) -> "dict[str, Attached]":
    """Policies with their bases, by the names of their contenders."""
    found: dict[str, Attached] = {}
    for spec in specs:
        chosen = parse_policy(spec)
        fitting = find_calibrated(chosen, model, basis)
        name = f"attached {label(spec)}"
        if name in found:
            raise InputError(f"Policy {spec!r} is given twice; give each once.")
        found[name] = chosen.policy, fitting.basis, fitting.profile
    return found


def _measure_speech(
    loaded: Any, ids: list[int], policies: "dict[str, Attached]", *, model: str, **settings: Any
) -> "Outcome":
    from loki_attn.bench.generate import (
        STOCK_DYNAMIC,
        STOCK_STATIC,
        GenerateBench,
        measure_generation,
    )
    from loki_attn.integrations.transformers.probe import logit_distance
    from loki_attn.integrations.transformers.speaker import Speaker as Speaking
    from loki_attn.integrations.transformers.speaker import attached_twin
    from loki_attn.policy import preset

    positions = loaded.config.get_text_config().max_position_embeddings
    bench = GenerateBench(model=model, positions=positions, command=_command(), **settings)
    speakers: dict[str, Speaker] = {
        STOCK_DYNAMIC: Speaking(loaded),
        STOCK_STATIC: Speaking(loaded, static=True),
    }
    plain = {"attached dense": (preset("dense"), None, None)}
    for name, (policy, basis, profile) in {**plain, **policies}.items():
        speakers[name] = attached_twin(loaded, policy, basis, profile)
    return measure_generation(
        bench,
        speakers,
        ids,
        loaded.dtype,
        lambda ours, stock: logit_distance(ours, stock, loaded.dtype),
        terminal.say,
    )


def _measure_steps(
    threads: int | None, shape: "Shape", *, batches: Sequence[int] = (1,), **settings: Any
) -> "Outcome":
    from loki_attn.bench import machine
    from loki_attn.bench.decode import DecodeBench, Outcome, measure_decode, place_named

    # All are refused before the first is measured.
    benches = [
        DecodeBench(shape=shape, command=_command(), batch=batch, **settings) for batch in batches
    ]
    if len(set(batches)) != len(batches) or not batches:
        raise InputError("--batch takes different numbers, at least one of them.")
    outcome = Outcome()
    with machine.threads(threads):
        place = place_named(benches[0].device)
        for bench in benches:
            outcome.add(measure_decode(bench, terminal.say, _advancing, place))
    return outcome


def _advancing(title: str, turns: int) -> Any:
    return terminal.progress(title, turns, "turns")


def _publish(
    outcome: "Outcome",
    out: Path | None,
    figure: Path | None,
    *,
    as_json: bool,
    show: "Callable[[Any], None]",
) -> None:
    """Keep, draw and print the rows; fail where a contender was wrong."""
    from loki_attn.evaluate.results import append_rows

    rows = outcome.rows
    if out is not None and rows:
        append_rows(out, rows)
        terminal.say(f"{len(rows)} rows added to {out}")
    if figure is not None and rows:
        _draw([asdict(row) for row in rows], figure)
    if as_json:
        terminal.emit([asdict(row) for row in rows])
    else:
        show(rows)
    for name, why in outcome.left_out.items():
        terminal.say(f"left out: {name}: {why}")
    _fail_where_wrong(outcome)


def _fail_where_wrong(outcome: "Outcome") -> None:
    for name, why in outcome.failures.items():
        terminal.fail(f"{name} has no timing, because it is wrong: {why}.")
    if outcome.failures:
        raise typer.Exit(FAILED_GATE_EXIT)


def _draw(rows: Sequence[dict[str, Any]], figure: Path) -> None:
    from loki_attn.report.growth import draw_growth

    terminal.say(f"drawn: {draw_growth(rows, figure)}")


def _shape(name: str, heads: int | None, kv_heads: int | None, head_dim: int | None) -> "Shape":
    from loki_attn.bench.shapes import custom_shape, shape_named

    if (heads, kv_heads, head_dim) == (None, None, None):
        return shape_named(name)
    return custom_shape(heads, kv_heads, head_dim)


def _listed(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _numbers(name: str, text: str) -> tuple[int, ...]:
    """Read whole numbers with commas between them.

    Raises:
        InputError: If something else came.
    """
    try:
        return tuple(int(part) for part in _listed(text))
    except ValueError as error:
        raise InputError(
            f"--{name} takes whole numbers with commas between them, got {text!r}."
        ) from error


def _command() -> str:
    """The command as it was typed."""
    return shlex.join(["loki-attn", *sys.argv[1:]])
