"""Policy: what is read and what is kept, at which budgets; named presets; plain JSON."""

import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, final, get_args

from loki_attn.budget import Budget
from loki_attn.errors import PolicyError, unknown_name
from loki_attn.keep_budget import KeepBudget
from loki_attn.named_policies import PRESETS
from loki_attn.types import GroupReduce

if TYPE_CHECKING:
    from loki_attn.allocate.base import Allocate
    from loki_attn.evict.base import Evict
    from loki_attn.select.base import Select

VERSION: Final = 1
ROOMS: Final = ("select", "evict", "allocate")
"""The verbs that have methods of their own."""

_OWN_FIELDS: Final = ("group_reduce", "name", "reuse_above")
_DEFAULTS: Final = {"evict": "keep_all", "allocate": "uniform"}


def _default(room: str) -> Any:
    """The identity of a verb."""
    return _method_in(room, _DEFAULTS[room])()


@final
@dataclass(frozen=True, kw_only=True)
class Policy:
    """How attention is made cheaper: one choice per verb, and its budget.

    Attributes:
        select: What a query reads; a specification from `loki_attn.select`.
        budget: How much, and what always.
        group_reduce: How the query heads of a group agree on one choice.
        evict: What is kept; a specification from `loki_attn.evict`.
        keep: How much, and what always.
        allocate: How that is shared out over layers and heads; from `loki_attn.allocate`.
        reuse_above: Where a step's queries have at least this mean cosine with those of the last
            choice, its rows are read again (arXiv 2510.11292); None always chooses.
        name: A label for tables.
        version: Version of this record; bumped when the meaning of a field changes.
    """

    select: "Select"
    budget: Budget = field(default_factory=Budget)
    group_reduce: GroupReduce = "softmax_sum"
    evict: "Evict" = field(default_factory=lambda: _default("evict"))
    keep: KeepBudget = field(default_factory=KeepBudget)
    allocate: "Allocate" = field(default_factory=lambda: _default("allocate"))
    reuse_above: float | None = None
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
        if self.budget.mass is not None and not self.select.estimates_mass:
            raise PolicyError(f"{method} estimates no mass; give top_k or fraction.")
        if self.reuse_above is not None and not -1 <= self.reuse_above <= 2:
            raise PolicyError(
                f"reuse_above is a cosine (2 never reuses), got {self.reuse_above!r}."
            )
        self._check_evict()

    @property
    def is_dense(self) -> bool:
        """Whether everything is kept and everything is read."""
        return self.select.method == "dense" and not self.evicts

    @property
    def evicts(self) -> bool:
        """Whether rows may go."""
        return self.evict.method != "keep_all"

    def _check_evict(self) -> None:
        """Refuse budgets that do not fit the eviction."""
        if not self.evicts:
            if not self.keep.keeps_everything:
                raise PolicyError(
                    "A capacity was given, but nothing is evicted; name a method, evict='snapkv' "
                    "say, or drop it."
                )
            if self.allocate.method != _DEFAULTS["allocate"]:
                raise PolicyError(
                    f"allocate={self.allocate.method!r} shares a budget out, but nothing is "
                    "evicted; name a method, evict='snapkv' say, or drop it."
                )
            return
        needed = self.evict.needs_budget and self.allocate.needs_budget
        if needed and self.keep.keeps_everything:
            raise PolicyError(f"{self.evict.method} needs an amount: give capacity or keep_share.")
        self.keep.require_room(self.evict.window)

    def to_json(self) -> str:
        """Return the policy as JSON text that `from_json` reads back as an equal policy."""
        record: dict[str, Any] = {
            "version": self.version,
            "name": self.name,
            "group_reduce": self.group_reduce,
            "select": _spelt(self.select),
            "budget": self.budget.to_json(),
        }
        if self.evicts:
            record["evict"] = _spelt(self.evict)
            record["keep"] = self.keep.to_json()
            record["allocate"] = _spelt(self.allocate)
        if self.reuse_above is not None:
            record["reuse_above"] = self.reuse_above
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
    return tuple(_presets())


@cache
def _presets() -> dict[str, dict[str, Any]]:
    """Compositions, and the presets that the methods' files bring along as `PRESETS`."""
    found = dict(PRESETS)
    for room in ROOMS:
        for name in methods(room):
            found |= getattr(importlib.import_module(f"loki_attn.{room}.{name}"), "PRESETS", {})
    return found


def preset(name: str, /, **overrides: Any) -> Policy:
    """Return a named policy, with some of its parts or their fields replaced.

    Args:
        name: One of `presets()`.
        overrides: A method for a verb (`evict="snapkv"`), or fields of the policy, of its methods
            or of its budgets; "evict.window" where two parts have a field of that name. A new
            amount (top_k, fraction or mass; capacity or keep_share) replaces the preset's; recents
            that were not given shrink to a quarter of a smaller top_k or cap, min_k to all of it,
            and dense_below to three times; a fraction or a mass has no dense_below of its own.

    Raises:
        UnknownNameError: If the preset or a field is not known.
        PolicyError: If a field belongs to two parts.
    """
    known_presets = _presets()
    if name not in known_presets:
        raise unknown_name("policy", name, known_presets)
    record = {"name": name, **{k: _copy(v) for k, v in known_presets[name].items()}}
    for room in ROOMS:
        if isinstance(overrides.get(room), str):
            record[room] = {"method": overrides.pop(room)}
    _require_methods(record)
    parts = {room: record.setdefault(room, {"method": _DEFAULTS.get(room)}) for room in ROOMS}
    parts |= {"budget": record.setdefault("budget", {}), "keep": record.setdefault("keep", {})}
    choices = _choices(parts)
    for key, value in overrides.items():
        if key in _OWN_FIELDS:
            record[key] = value
        else:
            parts[_home_of(key, choices, parts)][key.rpartition(".")[2]] = value
    plain = {k.removeprefix("budget.").removeprefix("keep."): v for k, v in overrides.items()}
    _settle_amount(record["budget"], plain)
    for amount, other in (("capacity", "keep_share"), ("keep_share", "capacity")):
        if plain.get(amount) is not None and plain.get(other) is None:
            record["keep"].pop(other, None)
    return _from_record(record)


def _home_of(
    key: str, choices: Mapping[str, set[str]], parts: Mapping[str, Mapping[str, Any]]
) -> str:
    """The part of a policy that has a field, named alone or as "part.field"."""
    part, _, name = key.rpartition(".")
    homes = [home for home, names in choices.items() if name in names and part in ("", home)]
    if not homes:
        raise unknown_name("policy field", key, {*_OWN_FIELDS, *ROOMS}.union(*choices.values()))
    if len(homes) > 1 and parts["select"]["method"] == "dense":
        homes = [home for home in homes if home != "budget"]  # it reads everything
    if len(homes) > 1:
        raise PolicyError(
            f"{key!r} is a field of {' and of '.join(homes)}; say {homes[0]}.{key} or "
            f"{homes[1]}.{key}."
        )
    return homes[0]


def _choices(parts: Mapping[str, Mapping[str, Any]]) -> dict[str, set[str]]:
    """The fields that each part of a policy has."""
    found = {room: _field_names(methods(room)[str(parts[room]["method"])]) for room in ROOMS}
    return {**found, "budget": _field_names(Budget), "keep": _field_names(KeepBudget)}


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


def methods(room: str = "select") -> dict[str, Any]:
    """Methods of a verb by name, found by their files.

    Args:
        room: "select", "evict" or "allocate".
    """
    folder = Path(__file__).parent / room
    names = (f.stem for f in sorted(folder.glob("*.py")) if f.stem not in {"__init__", "base"})
    return {name: _method_in(room, name) for name in names}


def _method_in(room: str, name: str) -> Any:
    module = importlib.import_module(f"loki_attn.{room}.{name}")
    return next(v for v in vars(module).values() if getattr(v, "method", None) == name)


def _from_record(record: Mapping[str, Any]) -> Policy:
    _refuse_unknown("policy field", record, _field_names(Policy))
    for part in (*ROOMS, "budget", "keep"):
        if not isinstance(record.get(part, {}), Mapping):
            raise PolicyError(f"The {part} part of a policy is an object, got {record[part]!r}.")
    if "method" not in record.get("select", {}):
        raise PolicyError('A policy needs a select part with a method, e.g. {"method": "loki"}.')
    _require_methods(record)
    built: dict[str, Any] = {}
    for room in ROOMS:
        if room in record:
            choices = dict(record[room])
            kind = methods(room)[str(choices.pop("method"))]
            _refuse_unknown(f"field of {kind.method}", choices, _field_names(kind))
            built[room] = kind(**{k: _frozen(v) for k, v in choices.items()})
    for part, kind in (("budget", Budget), ("keep", KeepBudget)):
        _refuse_unknown(f"{part} field", record.get(part, {}), _field_names(kind))
        built[part] = kind.from_json(record.get(part, {}))
    rest = {k: v for k, v in record.items() if k not in {*ROOMS, "budget", "keep"}}
    return Policy(**built, **rest)


def _require_methods(record: Mapping[str, Any]) -> None:
    """Refuse methods that no room has."""
    for room in ROOMS:
        name = record.get(room, {}).get("method", _DEFAULTS.get(room))
        if str(name) not in (known := methods(room)):
            kind = "method" if room == "select" else f"{room} method"
            raise unknown_name(kind, str(name), known)


def _spelt(spec: Any) -> dict[str, Any]:
    """A method and its fields, as plain JSON."""
    return {"method": spec.method, **{f.name: getattr(spec, f.name) for f in fields(spec)}}


def _frozen(value: Any) -> Any:
    """JSON lists as tuples, which a frozen record holds."""
    return tuple(_frozen(v) for v in value) if isinstance(value, list) else value


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
        room = max(0, limit - budget.get("sinks", 0))
        if given or {"cap", "per_layer"} & overrides.keys():
            room = min(limit // 4, room)
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
