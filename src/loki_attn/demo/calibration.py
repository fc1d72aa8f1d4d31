"""The basis: fitted on the packaged text, or taken from an earlier run; and the rank table."""

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import torch
from rich.console import Console
from torch import Tensor

from loki_attn import texts
from loki_attn.basis import Basis, BasisKind, Side
from loki_attn.demo.plan import Plan
from loki_attn.demo.stage import Stage, note, plain_table, token_bar
from loki_attn.errors import BasisError, InputError
from loki_attn.evaluate.protocol import Contender
from loki_attn.evaluate.results import Row
from loki_attn.fitting import DEFAULT_KIND, fit
from loki_attn.integrations.transformers import collect_stats
from loki_attn.models import cache_root
from loki_attn.select.loki import Loki

KIND: Final = DEFAULT_KIND
CORPUS: Final = "calibration"
VARIANCE: Final = 0.9
PROTOCOL: Final = (
    "eigenvalues of the centred key covariance per layer and KV head; rank is the fewest "
    "coordinates that hold 90 % of the variance, mean over layers and KV heads"
)
_LEVELS: Final = "▁▂▃▄▅▆▇█"
_PLAIN_LEVELS: Final = "01234567"


@final
@dataclass(frozen=True)
class _Fit:
    """One basis of the demo: how its file ends, and what it is called on the screen."""

    suffix: str
    kind: BasisKind
    side: Side
    label: str


_MAIN: Final = _Fit(KIND, KIND, "post", "mixed (query and key), after RoPE")
_PCA: Final = (
    _Fit("pca", "pca", "post", "pca, after RoPE"),
    _Fit("pca-pre", "pca", "pre", "pca, before RoPE"),
)

Bases = dict[str, Basis]
"""The bases by their files' suffix; `KIND` is the one that Loki uses."""


def obtain(
    model: Any, tokenizer: Any, identity: Mapping[str, Any], name: str, plan: Plan, console: Console
) -> Bases:
    """Return the bases of a model, from the cache where they fit this model, text and size.

    Args:
        model: A causal LM of transformers, not attached.
        tokenizer: Its tokenizer.
        identity: Who it is.
        name: Names the files.
        plan: The sizes.
        console: Where to show what happens.
    """
    stem = re.sub(r"[^\w.-]+", "--", name)
    folder = cache_root() / "bases"
    files = {f.suffix: folder / f"{stem}-{f.suffix}.safetensors" for f in (_MAIN, *_PCA)}
    text = texts.load(CORPUS)
    about = {"name": CORPUS, "sha256": texts.digest(text)}
    found = _cached(files, identity, about, plan)
    if found:
        note(console, f"Found a basis of this model, text and size: {files[KIND]}; using it.")
        return found
    console.print(
        f"Reading {plan.calibration:,} tokens of the packaged text {CORPUS!r} (public domain), "
        "and summing up second moments of keys and queries."
    )
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False, verbose=False).input_ids
    partial = folder / f"{stem}-{plan.calibration}.partial.safetensors"
    start_s = time.perf_counter()
    with token_bar(console, "calibrate", plan.calibration) as bar:
        sizes: dict[str, Any] = {"tokens": plan.calibration, "window": plan.window}
        rest: dict[str, Any] = {**sizes, "corpus": about, "partial": partial, "progress": bar}
        try:
            stats, origin = collect_stats(model, ids[0], **rest)
        except InputError:
            if not partial.exists():
                raise
            # The beginning of a run with other versions: of no use any more.
            partial.unlink()
            stats, origin = collect_stats(model, ids[0], **rest)
    bases = {}
    for one in (_MAIN, *_PCA):
        if one.side == "pre" and not _has_pre(stats):
            continue
        bases[one.suffix] = fit(stats, one.kind, side=one.side, provenance=origin)
        bases[one.suffix].save(files[one.suffix])
    partial.unlink(missing_ok=True)
    note(console, f"{time.perf_counter() - start_s:.0f} s. Kept as {files[KIND]}.")
    return bases


def show_ranks(stage: Stage, bases: Bases) -> None:
    """Print the rank table and keep its rows."""
    dim = bases[KIND].head_dim
    table = plain_table("basis", "mean", "lowest", "highest", "layer by layer")
    levels = _LEVELS if stage.console.encoding.lower().startswith("utf") else _PLAIN_LEVELS
    for one in (*_PCA, _MAIN):
        if one.suffix in bases:
            layers = _layer_ranks(bases[one.suffix])
            marks = [levels[min(int(r / dim * len(levels)), len(levels) - 1)] for r in layers]
            values = (f"{v:.1f}" for v in (sum(layers) / len(layers), min(layers), max(layers)))
            table.add_row(one.label, *values, "".join(marks))
    stage.console.print(
        f"How many of {dim} coordinates hold 90 %: of the key variance (pca), or of what the "
        "query-key scores vary by (mixed, the basis that Loki uses). A mark is a layer; a full "
        "block would be all coordinates."
    )
    stage.console.print(table)
    rows = [_row(stage, one.label, bases[one.suffix]) for one in _PCA if one.suffix in bases]
    stage.keep(rows)
    select = stage.plan.policy.select
    scored = select.coordinates(dim) if isinstance(select, Loki) else dim
    mean = rows[0].metrics["rank_at_90"]
    stage.summary.append(
        (f"key coordinates that score (90 % of variance: {mean:.1f})", str(dim), str(scored))
    )


def _row(stage: Stage, label: str, basis: Basis) -> Row:
    layers = _layer_ranks(basis)
    tokens = int(str(basis.provenance["tokens"]))
    return stage.row(
        Contender(name=label, policy=stage.plan.policy, basis=basis),
        task="calibration",
        protocol=PROTOCOL,
        settings={"corpus": CORPUS, "tokens": tokens},
        metrics={
            "rank_at_90": sum(layers) / len(layers),
            "rank_at_90_lowest": min(layers),
            "rank_at_90_highest": max(layers),
            "head_dim": basis.head_dim,
            "layers": {"index": list(basis.layer_indices), "rank_at_90": layers},
        },
        n=tokens,
    )


def _layer_ranks(basis: Basis) -> Sequence[float]:
    ranks: Tensor = basis.rank_at(VARIANCE).to(torch.float64).mean(1)
    return list(ranks.tolist())


def _cached(
    files: Mapping[str, Path], identity: Mapping[str, Any], about: Mapping[str, str], plan: Plan
) -> Bases | None:
    """Read the cached bases, if each is of this model, text and size."""
    count = plan.calibration // plan.window * plan.window
    bases = {}
    for suffix, file in files.items():
        if suffix == "pca-pre" and not file.is_file():
            continue
        try:
            basis = Basis.load(file, model=identity)
        except BasisError:
            return None
        known = (basis.provenance.get("corpus"), basis.provenance.get("tokens"))
        if known != (about, count) or basis.provenance.get("window") != plan.window:
            return None
        bases[suffix] = basis
    return bases


def _has_pre(stats: Any) -> bool:
    try:
        for layer in stats.layers:
            stats.moments(layer, "pre")
    except InputError:
        return False
    return True
