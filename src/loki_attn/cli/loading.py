"""From what a user types to models, texts, policies and bases."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, get_args

from loki_attn.cli import terminal
from loki_attn.errors import InputError, unknown_name

if TYPE_CHECKING:
    from loki_attn.basis import Basis
    from loki_attn.policy import Policy
    from loki_attn.profile import Profile

_DTYPES: Final = ("auto", "float32", "bfloat16", "float16")
_FILE_FIELD: Final = re.compile(r"([:,](?:basis|profile)=)([^,]+)")
# People leave the zero out, JSON does not let them.
_DECIMAL: Final = re.compile(r"-?\.\d+")
# Commas inside brackets belong to a list, as in dense_layers=[0,1].
_BETWEEN_FIELDS: Final = re.compile(r",(?![^\[]*\])")


def known(what: str, got: str, literal: Any) -> Any:
    """Return `got` if it is one of a `Literal`'s values.

    Raises:
        UnknownNameError: If it is not; the text lists them and the nearest.
    """
    if got not in get_args(literal):
        raise unknown_name(what, got, get_args(literal))
    return got


def load_model(name: str, dtype: str) -> tuple[Any, Any]:
    """Load a model and its tokenizer by a name that `loki_attn.models` understands.

    Raises:
        UnknownNameError: If the dtype or the model is not known.
        ModelError: If the model cannot be had.
    """
    if dtype not in _DTYPES:
        raise unknown_name("dtype", dtype, _DTYPES)
    import torch

    from loki_attn import models

    with terminal.waiting(f"loading {name}"):
        return models.load(
            name, dtype="auto" if dtype == "auto" else getattr(torch, dtype), progress=terminal.say
        )


def load_text(path: Path | None, packaged: str) -> tuple[str, str]:
    """Return the name and the content of the user's text, or of a packaged one.

    Raises:
        InputError: If the file is missing, empty or not UTF-8.
    """
    from loki_attn import texts

    if path is None:
        return f"loki-attn:{packaged}", texts.load(packaged)
    return path.name, texts.read_file(path)


@dataclass(frozen=True)
class Typed:
    """A policy as it was typed, with the files that it names.

    Attributes:
        policy: The policy.
        basis: Its basis: a file or a kind, None where none is named.
        profile: Its profile's file, None where none is named.
    """

    policy: "Policy"
    basis: Path | None = None
    profile: Path | None = None


@dataclass(frozen=True)
class Found:
    """What was calibrated for a policy, and where it was found.

    Attributes:
        basis_path: The basis' file, None without one.
        basis: The basis.
        profile: The profile.
    """

    basis_path: Path | None = None
    basis: "Basis | None" = None
    profile: "Profile | None" = None


def parse_policy(spec: str, **overrides: Any) -> Typed:
    """Read a policy as it is typed: a preset, changes after a colon, or a JSON file.

    Args:
        spec: For instance "loki", "loki:top_k=256,evict=snapkv,capacity=2048,basis=FILE",
            "hata:profile=FILE" or "mine.json".
        overrides: Further fields; None leaves the preset's.

    Returns:
        The policy, and the files that the spec names.

    Raises:
        InputError: If a change is not of the form name=value, or the policy is refused.
    """
    from loki_attn.policy import as_policy

    name, colon, changes = spec.partition(":")
    if spec.endswith(".json"):
        name, colon, changes = spec, "", ""
    fields = {key: value for key, value in overrides.items() if value is not None}
    for change in _BETWEEN_FIELDS.split(changes) if colon else ():
        key, equals, value = change.partition("=")
        if not (key and equals and value):
            raise InputError(
                f"Cannot read {change!r} in policy {spec!r}; write it like loki:top_k=256,rank=16."
            )
        fields[key.strip().replace("-", "_")] = _value(value.strip())
    files = [fields.pop(name, None) for name in ("basis", "profile")]
    basis, profile = (None if given is None else Path(str(given)) for given in files)
    return Typed(as_policy(name, **fields), basis, profile)


def label(spec: str) -> str:
    """A policy's name in tables and records: as it was typed, without the folders of its files."""
    if spec.endswith(".json"):
        return Path(spec).stem
    return _FILE_FIELD.sub(lambda found: found[1] + Path(found[2]).stem, spec)


def find_calibrated(chosen: Typed, model: str, basis: Path | None) -> Found:
    """Load what a policy needs: the files it names, or the cached ones of this model.

    Args:
        chosen: The policy.
        model: Name of the model.
        basis: Where the policy names none: a file, or a kind of basis as a path without a folder,
            whose cached file is meant.

    Raises:
        BasisError: If there is no basis, or it cannot be read.
        ProfileError: If a profile cannot be read.
    """
    from loki_attn.models.bases import find_basis
    from loki_attn.models.profiles import find_profile

    found = find_basis(chosen.policy, model, chosen.basis or basis)
    profile = find_profile(chosen.policy, model, chosen.profile)
    if found is None:
        return Found(profile=profile)
    return Found(basis_path=found[0], basis=found[1], profile=profile)


def _value(text: str) -> Any:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return float(text) if _DECIMAL.fullmatch(text) else text
    return tuple(value) if isinstance(value, list) else value
