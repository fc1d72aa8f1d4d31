"""Origin: what the rows were measured with, where, when and by which command."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

_Row = Mapping[str, Any]

MISSING: Final = "-"


def facts(rows: Sequence[_Row]) -> dict[str, list[str]]:
    """Model, commit, versions, machine, threads, times and commands, each without repetition.

    Args:
        rows: Rows of results.

    Returns:
        Values by name of the fact; what no row states has none, but a command is left out.
    """
    origins = [row["provenance"] for row in rows]
    models = {str(row["model"].get("id")): _digest(row) for row in rows}
    times = sorted(str(o["time"]) for o in origins if o.get("time"))
    span = f"{times[0]} to {times[-1]}" if times and times[0] != times[-1] else "".join(times[:1])
    commands = _distinct(o.get("command") for o in origins)
    return {
        "model": [name + digest for name, digest in models.items()],
        "commit": _distinct(o.get("commit") for o in origins),
        "versions": _distinct(_versions(o) for o in origins),
        "machine": _distinct(_machine(o) for o in origins),
        "threads": _distinct(o.get("threads") for o in origins),
        "time": _distinct([span or None]),
        **({"command": commands} if commands else {}),
    }


def policy_text(row: _Row) -> str:
    """A row's policy as JSON, without its name."""
    policy = {name: value for name, value in row["policy"].items() if name != "name"}
    return json.dumps(policy, sort_keys=True)


def basis_text(basis: object) -> str:
    """A basis in a few words."""
    if not isinstance(basis, Mapping):
        return MISSING
    corpus = basis.get("corpus")
    named = f" of {corpus.get('name')}" if isinstance(corpus, Mapping) else ""
    return f"{basis.get('kind')}, {basis.get('tokens', 'unknown')} tokens{named}"


def _digest(row: _Row) -> str:
    # The bench times a shape, which has no weights.
    found = row["model"].get("hash")
    return (
        f" (weights {str(found)[:12]})" if found else " (weights unknown)" if row["policy"] else ""
    )


def _distinct(values: Iterable[object]) -> list[str]:
    return list(dict.fromkeys(str(value) for value in values if value is not None))


def _versions(origin: _Row) -> str:
    versions = origin.get("versions")
    known = dict(versions) if isinstance(versions, Mapping) else {}
    parts = [f"{name} {version}" for name, version in known.items() if version]
    return ", ".join([*parts, f"Python {origin.get('python', 'unknown')}"])


def _machine(origin: _Row) -> str:
    named = [origin.get(name) for name in ("gpu", "processor", "machine")]
    return ", ".join(str(name) for name in named if name) or "unknown"
