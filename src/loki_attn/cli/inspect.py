"""`loki-attn inspect`: what a basis file holds."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from loki_attn.cli import options, terminal

if TYPE_CHECKING:
    from loki_attn.basis import Basis

NAME: Final = "inspect"
EXAMPLE: Final = "Example: loki-attn inspect basis.safetensors"

_SHARES: Final = (80, 90, 95)
_BALANCED: Final = ("balanced", "mixed")


def command(
    basis: Annotated[Path, typer.Argument(help="A basis file.", metavar="BASIS")],
    rows: Annotated[
        Path | None,
        typer.Option(help="JSON-lines file that the spectrum is added to, for `report`."),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Show how many columns of a basis matter, layer by layer, and where it comes from."""
    from loki_attn.basis import Basis

    loaded = Basis.load(basis)
    found = _measure(loaded)
    if rows is not None:
        from loki_attn.evaluate.results import append_rows
        from loki_attn.evaluate.spectrum import spectrum

        append_rows(rows, [spectrum(loaded)])
        terminal.say(f"1 row added to {rows}")
    if as_json:
        terminal.emit({"basis": str(basis), **found})
        return
    size, kind = found["head_dim"], found["kind"]
    of = "mean-square score" if kind in _BALANCED else "key variance"
    cells = [_cells(str(row["layer"]), row, size) for row in found["layers"]]
    terminal.table(
        f"{kind} basis, {found['num_kv_heads']} KV heads of {size} per layer, {found['side']}-RoPE "
        "keys",
        ["layer", *(f"rank at {share} %" for share in _SHARES)],
        [*cells, _cells("mean", found["mean"], size)],
        note=f"rank at p %: columns that hold p % of the {of}, mean over the KV heads",
    )
    for name, value in _origin(found["provenance"]):
        terminal.stdout().print(f"{name:10s}{value}", markup=False, highlight=False, soft_wrap=True)


def _measure(basis: "Basis") -> dict[str, Any]:
    import torch

    ranks = torch.stack([basis.rank_at(share / 100).double().mean(1) for share in _SHARES], 1)
    names = [f"rank_at_{share}" for share in _SHARES]
    return {
        "kind": basis.kind,
        "side": basis.side,
        "orthogonal": basis.orthogonal,
        "num_kv_heads": basis.num_kv_heads,
        "head_dim": basis.head_dim,
        "layers": [
            {"layer": layer, **dict(zip(names, row, strict=True))}
            for layer, row in zip(basis.layer_indices, ranks.tolist(), strict=True)
        ],
        "mean": dict(zip(names, ranks.mean(0).tolist(), strict=True)),
        "provenance": dict(basis.provenance),
    }


def _cells(name: str, row: dict[str, float], size: int) -> list[str]:
    ranks = [row[f"rank_at_{share}"] for share in _SHARES]
    return [name, *(f"{rank:.1f} ({rank / size:.0%})" for rank in ranks)]


def _origin(provenance: dict[str, Any]) -> list[tuple[str, str]]:
    """What a person wants to know of the provenance, as lines."""
    lines = []
    for name, value in provenance.items():
        if isinstance(value, dict):
            kept = ((k, str(v)) for k, v in value.items() if v is not None)
            # A hash is there to be compared by machines; its beginning tells two apart.
            value = ", ".join(f"{k} {v[:12] if k in {'hash', 'sha256'} else v}" for k, v in kept)
        lines.append((name, f"{value:,}" if isinstance(value, int) else str(value)))
    return lines
