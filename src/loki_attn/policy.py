"""Policy: which method reads what, at which budget; named presets; plain JSON."""

import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, final, get_args

from loki_attn.budget import Budget
from loki_attn.errors import PolicyError, unknown_name
from loki_attn.types import GroupReduce

if TYPE_CHECKING:
    from loki_attn.select.base import Select

VERSION: Final = 1

_PRESETS: Final[dict[str, dict[str, Any]]] = {
    "dense": {"select": {"method": "dense"}},
    "exact-topk": {
        "select": {"method": "exact_topk"},
        "budget": {"top_k": 512, "sinks": 4, "recents": 64, "min_k": 128},
    },
    "loki": {
        "select": {"method": "loki", "layout": "planes", "plane_dtype": "int8"},
        # Up to three times top_k, dense attention is as fast (docs/results/README.md).
        "budget": {"top_k": 512, "sinks": 4, "recents": 64, "min_k": 128, "dense_below": 1536},
    },
    "loki-paper": {
        "select": {"method": "loki", "layout": "rotated", "rank": 0.25},
        "budget": {"fraction": 0.25},
        "group_reduce": "none",
    },
    "streaming-llm": {
        "select": {"method": "streaming_llm"},
        "budget": {"top_k": 512, "sinks": 4},
    },
}


@final
@dataclass(frozen=True, kw_only=True)
class Policy:
    """How attention is made cheaper: one choice per verb, and a budget.

    Attributes:
        select: What a query reads; a specification from `loki_attn.select`.
        budget: How much, and what always.
        group_reduce: How the query heads of a group agree on one choice.
        name: A label for tables.
        version: Version of this record; bumped when the meaning of a field changes.
    """

    select: "Select"
    budget: Budget = field(default_factory=Budget)
    group_reduce: GroupReduce = "softmax_sum"
    name: str = "custom"
    version: int = VERSION

    def __post_init__(self) -> None:
        """Refuse parts that do not fit each other."""
        if self.group_reduce not in get_args(GroupReduce):
            raise unknown_name("group_reduce", str(self.group_reduce), get_args(GroupReduce))
        if self.version != VERSION:
            raise PolicyError(f"Policy version {self.version} is not {VERSION}, the one known.")
        method = self.select.method
        if method == "dense" and not self.budget.reads_everything:
            raise PolicyError("The dense method reads everything; drop the budget's amount.")
        if method == "streaming_llm" and self.budget.mass is not None:
            raise PolicyError("streaming_llm estimates no mass; give top_k or fraction.")

    def to_json(self) -> str:
        """Return the policy as JSON text that `from_json` reads back as an equal policy."""
        record = {
            "version": self.version,
            "name": self.name,
            "group_reduce": self.group_reduce,
            "select": {
                "method": self.select.method,
                **{f.name: getattr(self.select, f.name) for f in fields(self.select)},  # type: ignore[arg-type]
            },
            "budget": self.budget.to_json(),
        }
        return json.dumps(record, indent=2)

    @classmethod
    def from_json(cls, text: str) -> "Policy":
        """Read a policy from JSON text.

        Raises:
            PolicyError: If the text is not a JSON object with a select part.
            UnknownNameError: If a field or the method is not known.
        """
        try:
            record = json.loads(text)
        except json.JSONDecodeError as error:
            raise PolicyError(f"This policy is not JSON ({error}).") from error
        if not isinstance(record, dict):
            raise PolicyError(f"A policy is a JSON object, got {type(record).__name__}.")
        return _from_record(record)


def presets() -> tuple[str, ...]:
    """Names of the policies that come with the library."""
    return tuple(_PRESETS)


def preset(name: str, /, **overrides: Any) -> Policy:
    """Return a named policy, with some of its fields replaced.

    Args:
        name: One of `presets()`.
        overrides: Fields of the policy, of its method or of its budget. A new amount (top_k,
            fraction or mass) replaces the preset's; recents that were not given shrink to a
            quarter of a smaller top_k or cap, min_k to all of it, and dense_below to three times;
            a fraction or a mass has no dense_below of its own.

    Raises:
        UnknownNameError: If the preset or a field is not known.
    """
    if name not in _PRESETS:
        raise unknown_name("policy", name, _PRESETS)
    record = {"name": name, **{k: _copy(v) for k, v in _PRESETS[name].items()}}
    select, budget = record["select"], record.setdefault("budget", {})
    choices = _field_names(methods()[select["method"]])
    own = {"name", "group_reduce"}
    for key, value in overrides.items():
        if key in choices:
            select[key] = value
        elif key in _field_names(Budget):
            budget[key] = value
        elif key in own:
            record[key] = value
        else:
            raise unknown_name("policy field", key, choices | _field_names(Budget) | own)
    _settle_amount(budget, overrides)
    return _from_record(record)


def as_policy(policy: "Policy | str", **overrides: Any) -> Policy:
    """Return a policy from a preset's name, a JSON file's path, or a policy.

    Raises:
        PolicyError: If overrides come with anything but a preset's name.
    """
    if isinstance(policy, str) and not policy.endswith(".json"):
        return preset(policy, **overrides)
    if overrides:
        raise PolicyError("Only a preset's name takes overrides; build the policy you want.")
    if isinstance(policy, Policy):
        return policy
    path = Path(policy)
    if not path.is_file():
        raise PolicyError(f"There is no policy file {policy!r}.")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise PolicyError(f"The policy file {policy!r} is not UTF-8 text.") from error
    return Policy.from_json(text)


def methods() -> dict[str, "type[Select]"]:
    """Selection methods by name, found by their files."""
    folder = Path(__file__).parent / "select"
    names = (f.stem for f in sorted(folder.glob("*.py")) if f.stem not in {"__init__", "base"})
    return {name: _method_in(name) for name in names}


def _method_in(name: str) -> "type[Select]":
    module = importlib.import_module(f"loki_attn.select.{name}")
    found: type[Select] = next(
        v for v in vars(module).values() if getattr(v, "method", None) == name
    )
    return found


def _from_record(record: Mapping[str, Any]) -> Policy:
    _refuse_unknown("policy field", record, _field_names(Policy))
    for part in ("select", "budget"):
        if not isinstance(record.get(part, {}), Mapping):
            raise PolicyError(f"The {part} part of a policy is an object, got {record[part]!r}.")
    if "method" not in record.get("select", {}):
        raise PolicyError('A policy needs a select part with a method, e.g. {"method": "loki"}.')
    select, budget = dict(record["select"]), record.get("budget", {})
    method = str(select.pop("method"))
    known = methods()
    if method not in known:
        raise unknown_name("method", method, known)
    _refuse_unknown(f"field of {method}", select, _field_names(known[method]))
    _refuse_unknown("budget field", budget, _field_names(Budget))
    rest = {k: v for k, v in record.items() if k not in {"select", "budget"}}
    return Policy(select=known[method](**select), budget=Budget.from_json(budget), **rest)


def _settle_amount(budget: dict[str, Any], overrides: Mapping[str, Any]) -> None:
    given = [n for n in ("top_k", "fraction", "mass") if overrides.get(n) is not None]
    if given:
        for name in {"top_k", "fraction", "mass"} - set(given):
            budget.pop(name, None)
        if "top_k" not in given and "dense_below" not in overrides:
            budget.pop("dense_below", None)
    table = budget.get("per_layer", ()) if "top_k" in budget else ()
    limits = [budget.get("top_k"), budget.get("cap"), *table]
    tokens = [limit for limit in limits if isinstance(limit, int) and limit > 0]
    if tokens:
        limit = min(tokens)
        room = max(0, min(limit // 4, limit - budget.get("sinks", 0)))
        for name, most in (("recents", room), ("min_k", limit), ("dense_below", 3 * limit)):
            if name in budget and name not in overrides:
                budget[name] = min(budget[name], most)


def _refuse_unknown(kind: str, record: Mapping[str, Any], valid: set[str]) -> None:
    for name in record:
        if name not in valid:
            raise unknown_name(kind, name, valid)


def _field_names(record_type: type) -> set[str]:
    return {f.name for f in fields(record_type)}


def _copy(value: Any) -> Any:
    return dict(value) if isinstance(value, dict) else value
