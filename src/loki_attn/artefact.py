"""Artefact files: tensors with a JSON header in one safetensors file, never half written."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, final

import safetensors
import safetensors.torch
from torch import Tensor

from loki_attn.errors import InputError, LokiAttnError

JSON: TypeAlias = "bool | int | float | str | list[JSON] | dict[str, JSON] | None"


@final
@dataclass(frozen=True, kw_only=True)
class ArtefactKind:
    """What a file claims to be, and what its reader says when it is not.

    Attributes:
        format: Name written into the file.
        version: Version written into the file; only this one is read.
        noun: The user's word for the file, in messages.
        remedy: How to get a good file, a full sentence.
        error: The error that reading raises.
    """

    format: str
    version: str
    noun: str
    remedy: str
    error: type[LokiAttnError]


def to_json(value: Mapping[str, JSON], what: str) -> str:
    """Write a mapping as JSON text.

    Args:
        value: Plain JSON values under string keys.
        what: The mapping's name, in messages.

    Returns:
        One line of JSON with sorted keys.

    Raises:
        InputError: If a value has no JSON form; NaN and infinities have none.
    """
    try:
        return json.dumps(dict(value), sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"The {what} cannot be written as JSON ({error}). "
            "Use only strings, finite numbers, booleans, null, lists and string-keyed mappings."
        ) from error


def write_artefact(
    path: str | os.PathLike[str],
    kind: ArtefactKind,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Write a file so that an interrupt leaves either the old file or the new one.

    Args:
        path: Where the file goes; missing folders are made.
        kind: What the file is.
        tensors: Any shapes, on any device.
        metadata: Further header fields.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    header = {"format": kind.format, "version": kind.version, **metadata}
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    data = safetensors.torch.save(plain, metadata=header)
    # The same folder, because a rename is atomic only inside one file system.
    partial = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def read_artefact(
    path: str | os.PathLike[str], kind: ArtefactKind
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a file written by `write_artefact`.

    Args:
        path: The file.
        kind: What the file must be.

    Returns:
        The tensors on the CPU, and the header fields.

    Raises:
        LokiAttnError: `kind.error`, if the file is missing, damaged, of another format or of
            another version.
    """
    source = Path(path)
    if not source.is_file():
        raise kind.error(f"There is no {kind.noun} file at '{source}'. {kind.remedy}")
    try:
        with safetensors.safe_open(source, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            # Cloned, because a tensor may still be a window on the mapped file.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise kind.error(
            f"The {kind.noun} file '{source}' is corrupt or cut short ({error}). "
            f"Delete it. {kind.remedy}"
        ) from error
    _check_header(source, kind, metadata)
    return tensors, metadata


def read_json_field(
    path: str | os.PathLike[str], kind: ArtefactKind, metadata: Mapping[str, str], field: str
) -> dict[str, JSON]:
    """Parse one header field as a JSON mapping.

    Args:
        path: The file, for messages.
        kind: What the file is.
        metadata: The header fields.
        field: The field's name.

    Returns:
        The mapping.

    Raises:
        LokiAttnError: `kind.error`, if the field is missing or not a JSON mapping.
    """
    try:
        value = json.loads(metadata[field])
    except (KeyError, json.JSONDecodeError) as error:
        raise kind.error(
            f"The {kind.noun} file '{path}' has no readable '{field}' in its header. {kind.remedy}"
        ) from error
    if not isinstance(value, dict):
        raise kind.error(
            f"The header field '{field}' of the {kind.noun} file '{path}' is not a mapping. "
            f"{kind.remedy}"
        )
    return value


def _check_header(source: Path, kind: ArtefactKind, metadata: Mapping[str, str]) -> None:
    """Refuse a file of another format or version."""
    found = metadata.get("format")
    if found != kind.format:
        said = f"format '{found}'" if found else "no format"
        raise kind.error(
            f"'{source}' is a safetensors file but not a {kind.noun}: it says {said}, "
            f"expected '{kind.format}'. {kind.remedy}"
        )
    version = metadata.get("version")
    if version != kind.version:
        raise kind.error(
            f"The {kind.noun} file '{source}' has version '{version}', this library reads "
            f"version '{kind.version}'. Use the library version that wrote it. {kind.remedy}"
        )
