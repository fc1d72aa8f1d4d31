"""Rows: what was measured, how, on what. Append-only JSON lines."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from loki_attn.errors import InputError
from loki_attn.evaluate.protocol import Contender, LanguageModel
from loki_attn.provenance import provenance

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


@final
@dataclass(frozen=True, kw_only=True)
class Row:
    """One result.

    Attributes:
        task: What was measured: "perplexity", "needle", "ruler" and so on.
        protocol: How, in words that leave no doubt.
        model: The model's identity and dtype.
        contender: The policy's label in this comparison.
        policy: The policy as JSON.
        basis: Kind, side and provenance of its basis, or None.
        settings: Numbers that define the run: lengths, windows, seeds, corpus.
        metrics: Numbers measured, units in their names.
        n: How many observations the metrics average over.
        provenance: Time, commit, versions, machine.
    """

    task: str
    protocol: str
    model: Mapping[str, Any]
    contender: str
    policy: Mapping[str, Any]
    basis: Mapping[str, Any] | None
    settings: Mapping[str, Any]
    metrics: Mapping[str, Any]
    n: int
    provenance: Mapping[str, Any] = field(default_factory=provenance)


def make_row(
    lm: LanguageModel,
    contender: Contender,
    *,
    task: str,
    protocol: str,
    settings: Mapping[str, Any],
    metrics: Mapping[str, Any],
    n: int,
) -> Row:
    """Put a result together with what is known of its model, policy and basis."""
    return Row(
        task=task,
        protocol=protocol,
        model={**lm.identity, "dtype": lm.dtype},
        contender=contender.name,
        policy=json.loads(contender.policy.to_json()),
        basis=_origin(contender),
        settings=settings,
        metrics=metrics,
        n=n,
    )


def append_rows(path: Path, rows: "Sequence[DataclassInstance]") -> None:
    """Append rows, dataclasses of JSON values, to a JSON-lines file; a line is written whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(asdict(row), sort_keys=True) + "\n" for row in rows)
    with path.open("ab") as file:
        if file.tell() and not _ends_with_newline(path):
            file.write(b"\n")
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a JSON-lines file; lines cut short by a crash are passed over.

    Raises:
        InputError: If there is no such file.
    """
    if not path.is_file():
        raise InputError(f"There is no results file {str(path)!r}.")
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue


def _origin(contender: Contender) -> dict[str, Any] | None:
    basis = contender.basis
    if basis is None:
        return None
    return {**basis.provenance, "kind": basis.kind, "side": basis.side}


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
