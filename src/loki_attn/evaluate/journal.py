"""The journal: every finished measurement, on disk before the next one begins.

A run that is killed at any point goes on where it stopped. Entries are found by what was measured,
not by where it stood in a run, so more items, contenders or lengths may be asked for later.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, final

import torch

from loki_attn.basis import Basis
from loki_attn.errors import InputError
from loki_attn.evaluate.protocol import Contender
from loki_attn.evaluate.task import Item, Record, Task
from loki_attn.profile import Profile


@final
class Journal:
    """Records by task, model, item and contender, in a file of JSON lines or in memory only.

    Args:
        path: The file; it is made when the first record comes. None keeps records in memory.
    """

    def __init__(self, path: Path | None = None) -> None:
        """Read what is there; a last line that a crash cut short is passed over."""
        self._path = path
        self._records: dict[str, Record] = {}
        if path is not None and path.is_file():
            for line in path.read_bytes().split(b"\n"):
                self._read(line)

    def find(self, key: str) -> Record | None:
        """Return a record, if there is one."""
        return self._records.get(key)

    def keep(self, key: str, record: Record) -> None:
        """Add a record; it is on disk when this returns.

        Raises:
            InputError: If the file cannot be written.
        """
        self._records[key] = record
        if self._path is None:
            return
        line = json.dumps({"key": key, **asdict(record)}, sort_keys=True).encode() + b"\n"
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab+") as file:
                if _was_cut(file):
                    line = b"\n" + line
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise InputError(
                f"Cannot write the journal {str(self._path)!r}: {error.strerror or error}."
            ) from error

    def _read(self, line: bytes) -> None:
        try:
            entry = json.loads(line)
            key = entry.pop("key")
            self._records[key] = Record(**entry)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return


def key_of(task: Task, model: Any, item: Item, contender: Contender) -> str:
    """The sha256 of all that a measurement depends on: task, model, item, policy, basis.

    Args:
        task: The task; its name and protocol count, its settings only through the item.
        model: Identity of the model, plain JSON.
        item: The item; its content counts.
        contender: The contender; its policy and basis count, its name does not.
    """
    return keys_of(task, model, [item], [contender])[item.name, contender.name]


def keys_of(
    task: Task, model: Any, items: Sequence[Item], contenders: Sequence[Contender]
) -> dict[tuple[str, str], str]:
    """The keys of all contenders on all items, by the names of both; see `key_of`.

    A basis may have hundreds of megabytes: everything is hashed once.
    """
    same = {"task": task.name, "protocol": task.protocol, "model": model}
    digests = {item.name: item.digest for item in items}
    means = {contender.name: _means(contender) for contender in contenders}
    return {
        (item, contender): _sha256({**same, "item": digest, **how})
        for item, digest in digests.items()
        for contender, how in means.items()
    }


def _means(contender: Contender) -> dict[str, Any]:
    """What a contender does: its policy, without the name, and its basis."""
    policy: dict[str, Any] = json.loads(contender.policy.to_json())
    del policy["name"]
    basis, profile = contender.basis, contender.profile
    given = {"basis": None if basis is None else _digest(basis)}
    if profile is not None:
        given["profile"] = _profile_digest(profile)
    return {"policy": policy, **given}


def _sha256(what: Any) -> str:
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def _profile_digest(profile: Profile) -> str:
    """The sha256 of a profile's tensors, their names and their layers."""
    found = hashlib.sha256()
    for index, layer in profile.layers.items():
        for name, tensor in sorted(layer.items()):
            found.update(f" {index} {name} {tensor.dtype}".encode())
            found.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _digest(basis: Basis) -> str:
    """The sha256 of a basis' maps and of the layers that they belong to."""
    found = hashlib.sha256(f"{basis.kind} {basis.side}".encode())
    for index in basis.layer_indices:
        layer = basis.layer(index)
        found.update(f" {index}".encode())
        for tensor in (layer.key_map, layer.query_map):
            found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()


def _was_cut(file: Any) -> bool:
    if not file.tell():
        return False
    file.seek(-1, os.SEEK_END)
    return bool(file.read(1) != b"\n")
