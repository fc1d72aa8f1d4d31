"""Rows, checked and sorted into sections of what may stand in one table."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, final

from loki_attn.errors import InputError

_Row = Mapping[str, Any]

_FIELDS: Final[dict[str, type]] = {
    "task": str,
    "protocol": str,
    "contender": str,
    "model": Mapping,
    "policy": Mapping,
    "settings": Mapping,
    "metrics": Mapping,
    "provenance": Mapping,
    "n": int,
}
_REQUIRED: Final[dict[str, tuple[str, ...]]] = {
    "perplexity": ("perplexity", "kl_to_dense"),
    "fidelity": ("recall", "mass"),
    "passkey": ("accuracy",),
    "calibration": ("rank_at_90",),
    "generation": ("tokens_per_s", "read_bytes_per_token"),
    "quiz": ("correct",),
}
AMOUNTS: Final = ("top_k", "fraction", "mass")
_BUDGET_TOKEN: Final = re.compile(
    r"(?<!\w)(?:top_k|fraction|mass|k)=\d+(?:\.\d*)?(?:e[+-]?\d+)?(?:[\s,]+|$)"
)
# Settings whose values tell by themselves what they are.
_SELF_EVIDENT: Final = {"corpus", "dataset", "kind", "mode", "subtask"}
_NOUNS: Final = {str: "a text", int: "a whole number", Mapping: "an object"}


@final
@dataclass(frozen=True, kw_only=True)
class Section:
    """Rows of one task, model and protocol.

    Attributes:
        task: What was measured.
        model: Id of the model.
        protocol: How it was measured.
        rows: The newest row of each contender and setting, where the oldest of them arrived.
        common: Settings that all rows share.
        varying: Names of the settings that differ between them.
        superseded: Older rows of the same contender and settings, left out.
    """

    task: str
    model: str
    protocol: str
    rows: tuple[_Row, ...]
    common: Mapping[str, Any] = field(default_factory=dict)
    varying: tuple[str, ...] = ()
    superseded: int = 0


def sections(rows: Iterable[_Row]) -> list[Section]:
    """Check rows and sort them by task, model and protocol, in order of arrival.

    Raises:
        InputError: If there are none, or one lacks something; the text says which and what.
    """
    groups: dict[tuple[str, str, str], list[_Row]] = {}
    for number, row in enumerate(rows, 1):
        _check(row, number)
        place = (row["task"], str(row["model"].get("id", "unnamed")), row["protocol"])
        groups.setdefault(place, []).append(row)
    if not groups:
        raise InputError("There are no rows to report; measure something first.")
    return [_section(*place, found) for place, found in groups.items()]


def is_dense(row: _Row) -> bool:
    """Whether a row is of the dense reference."""
    select = row["policy"].get("select")
    dense = isinstance(select, Mapping) and select.get("method") == "dense"
    return dense and "evict" not in row["policy"]


def series_name(contender: str) -> str:
    """A contender's name without how much it reads: "pca top_k=64 rank=8" is of "pca rank=8"."""
    return _BUDGET_TOKEN.sub("", contender).rstrip(" ,:") or contender


def amounts(row: _Row) -> dict[str, Any]:
    """How much a contender reads, by name of the amount; empty where its policy does not say."""
    budget = row["policy"].get("budget")
    known = budget if isinstance(budget, Mapping) else {}
    return {name: known[name] for name in AMOUNTS if known.get(name) is not None}


def basis_kind(row: _Row) -> str | None:
    """Kind of a row's basis, if it has one that says."""
    basis = row.get("basis")
    return str(basis["kind"]) if isinstance(basis, Mapping) and "kind" in basis else None


def by_setting(section: Section) -> list[Section]:
    """One section for each combination of the settings that differ, in order of arrival."""
    groups: dict[str, list[_Row]] = {}
    for row in section.rows:
        key = _spelt([row["settings"].get(name) for name in section.varying])
        groups.setdefault(key, []).append(row)
    place = (section.task, section.model, section.protocol)
    return [_section(*place, rows) for rows in groups.values()]


def labels_of(rows: Sequence[_Row]) -> list[str]:
    """A name for each row's contender; where two go by one name, what tells them apart is added."""
    identities: dict[str, set[str]] = {}
    for row in rows:
        identities.setdefault(row["contender"], set()).add(_identity(row))
    return [
        row["contender"]
        if len(identities[row["contender"]]) == 1
        else f"{row['contender']} ({_identity(row)})"
        for row in rows
    ]


def differing(row: _Row, names: Iterable[str]) -> str:
    """Some of a row's settings, in words."""
    return ", ".join(
        _setting_in_words(name, row["settings"][name])
        for name in names
        if row["settings"].get(name) is not None
    )


def apart(groups: Iterable[Sequence[_Row]]) -> tuple[str, ...]:
    """Names of the settings by which groups of rows differ, each group being of one setting."""
    firsts = [group[0]["settings"] for group in groups]
    names = dict.fromkeys(name for settings in firsts for name in settings)
    return tuple(n for n in names if len({_spelt(settings.get(n)) for settings in firsts}) > 1)


def _section(task: str, model: str, protocol: str, rows: Sequence[_Row]) -> Section:
    newest: dict[str, _Row] = {}
    for row in rows:
        # Not the whole policy: a re-run by a newer version may spell more of it out.
        key = _spelt([row["contender"], amounts(row), basis_kind(row), row["settings"]])
        if key not in newest or _time(row) >= _time(newest[key]):
            newest[key] = row
    kept = tuple(newest.values())
    names = dict.fromkeys(name for row in kept for name in row["settings"])
    varying = tuple(n for n in names if len({_spelt(row["settings"].get(n)) for row in kept}) > 1)
    return Section(
        task=task,
        model=model,
        protocol=protocol,
        rows=kept,
        common={n: v for n, v in kept[0]["settings"].items() if n not in varying},
        varying=varying,
        superseded=len(rows) - len(kept),
    )


def _identity(row: _Row) -> str:
    said = [f"{name}={amount}" for name, amount in amounts(row).items()]
    kind = basis_kind(row)
    return ", ".join([*said, *([f"{kind} basis"] if kind else [])])


def _setting_in_words(name: str, value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        said = f"{value:,}"
        if name.endswith("_tokens"):
            # "4,096 tokens" rather than "length tokens 4,096".
            kind = name.removesuffix("_tokens").replace("_", " ")
            return f"{said} tokens" if kind == "length" else f"{said} {kind} tokens"
        return f"{name.replace('_', ' ')} {said}"
    said = str(value).replace(",", ", ")
    return said if name in _SELF_EVIDENT else f"{name.replace('_', ' ')} {said}"


def _time(row: _Row) -> str:
    return str(row["provenance"].get("time") or "")


def _check(row: object, number: int) -> None:
    if not isinstance(row, Mapping):
        raise InputError(f"Row {number} is {type(row).__name__}; expected an object.")
    where = f"Row {number} (task {row.get('task')!r}, contender {row.get('contender')!r})"
    for name, kind in _FIELDS.items():
        if not isinstance(row.get(name), kind) or isinstance(row.get(name), bool):
            got = "nothing" if name not in row else repr(row[name])[:60]
            raise InputError(f"{where} needs {_NOUNS[kind]} under {name!r}, got {got}.")
    if row["n"] < 1:
        raise InputError(f"{where} averages over n={row['n']} items; expected 1 or more.")
    for name in _REQUIRED.get(row["task"], ()):
        value = row["metrics"].get(name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            got = "nothing" if name not in row["metrics"] else repr(value)[:60]
            raise InputError(f"{where} needs a number under 'metrics.{name}', got {got}.")
    _check_layers(row, where)


def _check_layers(row: _Row, where: str) -> None:
    layers = row["metrics"].get("layers")
    if layers is None:
        return
    if not isinstance(layers, Mapping) or not all(isinstance(v, list) for v in layers.values()):
        raise InputError(f"{where} needs lists under 'metrics.layers', one number per layer.")
    if "index" not in layers or len({len(v) for v in layers.values()}) != 1:
        raise InputError(
            f"{where} has lists of different lengths under 'metrics.layers', or no 'index' there; "
            "expected one number per layer in each."
        )


def _spelt(value: object) -> str:
    return json.dumps(value, sort_keys=True, default=str)
