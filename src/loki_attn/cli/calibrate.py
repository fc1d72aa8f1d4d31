"""`loki-attn calibrate`: from text to a basis, interruptible."""

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from loki_attn.cli import options, terminal
from loki_attn.cli.loading import known, load_model, load_text
from loki_attn.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable

    from loki_attn.artefact import JSON
    from loki_attn.basis import Basis
    from loki_attn.key_stats import KeyStats

NAME: Final = "calibrate"
EXAMPLE: Final = "Example: loki-attn calibrate --model smollm2-135m --text novel.txt"


def command(
    model: options.Model = options.DEFAULT_MODEL,
    text: Annotated[
        Path | None, typer.Option(help="UTF-8 text file; without it, a packaged text.")
    ] = None,
    kind: Annotated[str, typer.Option(help="mixed, balanced, pca, random or identity.")] = "mixed",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of the text to use.")] = 24_576,
    window: Annotated[int, typer.Option(min=2, help="Tokens per forward pass.")] = 2048,
    out: Annotated[
        Path | None,
        typer.Option(help="The basis file; without it, one in the cache, where `generate` looks."),
    ] = None,
    dtype: options.Dtype = "auto",
    resume: Annotated[
        bool, typer.Option(help="Continue an interrupted calibration where it stopped.")
    ] = True,
    side: Annotated[str, typer.Option(help="For pca: keys after RoPE (post) or before (pre).")] = (
        "post"
    ),
    sharpness: Annotated[
        float, typer.Option(help="Share in [0, 1] given to queries that look far back.")
    ] = 0.0,
    pca_columns: Annotated[
        int | None, typer.Option(help="For mixed: balanced columns before each pca column.")
    ] = None,
    stats: Annotated[
        Path | None, typer.Option(help="Fit from statistics kept by --stats-out; runs no model.")
    ] = None,
    stats_out: Annotated[
        Path | None, typer.Option(help="Keep the statistics, to fit other bases from them.")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Fit a basis for a model on a text.

    Ctrl-C keeps what is done; the same command continues it.
    """
    began = time.monotonic()
    fitting: dict[str, Any] = {"side": side, "sharpness": sharpness, "pca_columns": pca_columns}
    fit = _rehearsed(kind, fitting)
    if stats is not None:
        if text is not None:
            raise InputError("--stats holds what its text gave; drop --text, or drop --stats.")
        moments, provenance, out = _reuse(stats, kind, out)
        partial = None
    else:
        out = writable(out or _cached_basis(model, kind))
        partial = out.with_name(out.name + ".partial")
        moments, provenance = _collect(model, text, dtype, tokens, window, partial, resume)
    if stats_out is not None:
        moments.save(writable(stats_out), provenance)
    basis = fit(moments, provenance)
    basis.save(out)
    if partial is not None:
        partial.unlink(missing_ok=True)
    _show(basis, out, stats_out, time.monotonic() - began, as_json=as_json)


def _rehearsed(kind: str, fitting: dict[str, Any]) -> "Callable[..., Basis]":
    """Return the fit with its options bound, after a run on toy statistics.

    A refused option must not cost the minutes that a calibration takes.
    """
    import torch

    from loki_attn.basis import BasisKind
    from loki_attn.fitting import fit
    from loki_attn.key_stats import KeyStats

    chosen = known("basis kind", kind, BasisKind)

    def bound(stats: KeyStats, provenance: "dict[str, JSON] | None" = None) -> "Basis":
        return fit(stats, chosen, provenance=provenance, **fitting)

    toy = KeyStats()
    rows = torch.eye(2)[None, None]
    toy.update(0, rows, rows, pre_key=rows, query_weight=torch.ones(1, 1, 2))
    bound(toy)
    return bound


def _reuse(stats: Path, kind: str, out: Path | None) -> "tuple[KeyStats, dict[str, JSON], Path]":
    """Read kept statistics; the model that they name gives the default file."""
    from loki_attn.key_stats import KeyStats

    moments, provenance = KeyStats.load(stats)
    of = provenance.get("model")
    name = str(of.get("id")) if isinstance(of, dict) else "unnamed"
    return moments, provenance, writable(out or _cached_basis(name, kind))


def _collect(
    model: str,
    text: Path | None,
    dtype: str,
    tokens: int,
    window: int,
    partial: Path,
    resume: bool,
) -> "tuple[KeyStats, dict[str, JSON]]":
    """Run the model over the text, keeping what is done beside the basis file."""
    from loki_attn.texts import digest

    corpus, content = load_text(text, "calibration")
    loaded, tokenizer = load_model(model, dtype)
    from loki_attn.integrations.transformers import collect_stats

    read = tokenizer(content, return_tensors="pt", add_special_tokens=False, verbose=False)
    ids = read.input_ids[0]
    total = max(window, min(ids.numel(), tokens) // window * window)
    start = _kept_tokens(partial, resume=resume)
    reached = start
    with terminal.progress(f"calibrating {model}", total, "tokens", start) as advance:

        def count(done: int, total: int) -> None:
            nonlocal reached
            reached = done
            advance(done, f"{done:,} of {total:,} tokens")

        try:
            return collect_stats(
                loaded,
                ids,
                tokens=tokens,
                window=window,
                corpus={"name": corpus, "sha256": digest(content)},
                partial=partial,
                progress=count,
            )
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"{reached:,} tokens are kept; the same command continues."
            ) from None


def _kept_tokens(partial: Path, *, resume: bool) -> int:
    """How many tokens an interrupted run left, which are forgotten without `resume`."""
    from loki_attn.key_stats import KeyStats

    if not resume:
        partial.unlink(missing_ok=True)
    if not partial.exists():
        return 0
    kept = KeyStats.load(partial)[0].tokens
    terminal.say(f"continuing after {kept:,} tokens; --no-resume starts anew")
    return kept


def _cached_basis(model: str, kind: str) -> Path:
    from loki_attn.models import basis_path

    return basis_path(model, kind)


def writable(path: Path) -> Path:
    """Refuse a place that cannot be written before the work, not after it.

    Raises:
        InputError: If it is a folder, or in one that cannot be written.
    """
    if path.is_dir():
        raise InputError(f"{str(path)!r} is a folder; give the path of a file.")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"Nothing can be written into {str(path.parent)!r}; choose another --out.")
    return path


def _show(
    basis: "Basis", out: Path, stats_out: Path | None, took_s: float, *, as_json: bool
) -> None:
    rank = float(basis.rank_at(0.9).double().mean())
    if as_json:
        terminal.emit(
            {
                "basis": str(out),
                "kind": basis.kind,
                "side": basis.side,
                "layers": len(basis.layers),
                "num_kv_heads": basis.num_kv_heads,
                "head_dim": basis.head_dim,
                "tokens": basis.provenance["tokens"],
                "mean_rank_at_90": rank,
                "stats": None if stats_out is None else str(stats_out),
                "seconds": took_s,
            }
        )
        return
    terminal.say(
        f"{basis.kind} basis of {len(basis.layers)} layers x {basis.num_kv_heads} KV heads from "
        f"{basis.provenance['tokens']:,} tokens in {took_s:.0f} s; 90 % of its spectrum lies in "
        f"{rank:.1f} of {basis.head_dim} columns (mean)"
    )
    terminal.write(f"{out}\n")
