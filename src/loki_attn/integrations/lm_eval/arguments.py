"""From the arguments of a model in lm-eval to a policy and its basis."""

import inspect
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Final

from lm_eval.models.huggingface import HFLM

from loki_attn.basis import Basis
from loki_attn.budget import Budget
from loki_attn.errors import InputError, unknown_name
from loki_attn.keep_budget import KeepBudget
from loki_attn.models import bases, profiles
from loki_attn.policy import ROOMS, Policy, methods
from loki_attn.profile import Profile

OWN: Final = frozenset({"policy", "basis", "profile", "mode", "prefix_tokens"})


def split(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tell lm-eval's own arguments from those that change a policy.

    Args:
        options: What was given beside the model and `OWN`.

    Returns:
        Arguments of `HFLM`, and fields of a policy; lists become tuples in the latter.

    Raises:
        UnknownNameError: If a name is neither; the text lists what is known.
    """
    host, changes = _host_names(), _policy_fields()
    for name in options:
        if name not in host | changes:
            raise unknown_name("argument of loki-attn", name, OWN | host | changes)
    return (
        {name: value for name, value in options.items() if name in host},
        {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in options.items()
            if name not in host
        },
    )


def label(policy: Policy | str, changes: Mapping[str, Any]) -> str:
    """Name a policy as it was asked for: "loki:top_k=256,rank=16", a file's stem, its own name."""
    if isinstance(policy, Policy):
        return policy.name
    if policy.endswith(".json"):
        return Path(policy).stem
    spelt = ",".join(f"{name}={_spelt(value)}" for name, value in changes.items())
    return f"{policy}:{spelt}" if spelt else policy


def find_basis(policy: Policy, given: Basis | str | Path | None, model: str) -> Basis | None:
    """Return the basis that a policy needs: the given one, or the cached one of the model.

    Args:
        policy: The policy.
        given: A basis or the path of its file; None looks into the cache.
        model: The model, by the name or the folder that it was loaded from.

    Returns:
        The basis, or None where the method needs none.

    Raises:
        BasisError: If there is none, or it cannot be read.
    """
    if isinstance(given, Basis):
        return given if policy.select.needs_basis else None
    found = bases.find_basis(policy, model, given)
    return None if found is None else found[1]


def find_profile(policy: Policy, given: Profile | str | Path | None, model: str) -> Profile | None:
    """Return the profile that a policy may need, as `find_basis` does.

    Raises:
        ProfileError: If a file cannot be read.
    """
    return given if isinstance(given, Profile) else profiles.find_profile(policy, model, given)


def check_batch_size(given: object) -> None:
    """Refuse a batch size that lm-eval would find by trying.

    Raises:
        InputError: If it is "auto".
    """
    if str(given).startswith("auto"):
        raise InputError(
            f"batch_size={given!r} makes lm-eval try lengths out, which would count as evaluation; "
            "give a number."
        )


def check_prefix(given: object) -> None:
    """Refuse a prefix that is no number of tokens.

    Raises:
        InputError: If it is not a whole number, or negative.
    """
    if isinstance(given, bool) or not isinstance(given, int) or given < 0:
        raise InputError(f"prefix_tokens must be a whole number of tokens >= 0, got {given!r}.")


def _host_names() -> frozenset[str]:
    parameters = inspect.signature(HFLM.__init__).parameters.values()
    named = {p.name for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD}
    return frozenset(named - {"self", "pretrained"})


def _policy_fields() -> frozenset[str]:
    own = {"name", "group_reduce", "reuse_above", *ROOMS}
    parts: dict[str, list[Any]] = {"budget": [Budget], "keep": [KeepBudget]}
    parts |= {room: list(methods(room).values()) for room in ROOMS}
    for part, kinds in parts.items():
        for name in set[str]().union(*(_names_of(kind) for kind in kinds)):
            own |= {name, f"{part}.{name}"}
    return frozenset(own)


def _names_of(method: type) -> set[str]:
    return {field.name for field in fields(method)}


def _spelt(value: object) -> str:
    if isinstance(value, tuple):
        return "[" + ",".join(str(part) for part in value) + "]"
    return str(value)
