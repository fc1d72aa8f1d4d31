"""Records of LongBench's files, JSON Lines or a JSON list, checked field by field."""

import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, final

from loki_attn.errors import InputError


@final
@dataclass(frozen=True, kw_only=True)
class Record:
    """One record and where it stands, for messages.

    Attributes:
        where: File and line, or number in the file.
        fields: What it holds.
    """

    where: str
    fields: dict[str, Any]

    def text(self, name: str) -> str:
        """Return a field that is text.

        Raises:
            InputError: If it is missing or something else.
        """
        found = self._field(name)
        if not isinstance(found, str):
            raise self.wrong(name, "text")
        return found

    def number(self, name: str) -> int:
        """Return a field that is a whole number.

        Raises:
            InputError: If it is missing or something else.
        """
        found = self._field(name)
        if not isinstance(found, int) or isinstance(found, bool):
            raise self.wrong(name, "a whole number")
        return found

    def texts(self, name: str) -> tuple[str, ...]:
        """Return a field that is a list of texts, one at least.

        Raises:
            InputError: If it is missing or something else.
        """
        found = self._field(name)
        if not isinstance(found, list) or not found or not all(isinstance(x, str) for x in found):
            raise self.wrong(name, "a list of texts, one at least")
        return tuple(found)

    def one_of(self, name: str, valid: tuple[str, ...]) -> str:
        """Return a field that is one of several texts.

        Raises:
            InputError: If it is missing or none of them.
        """
        found = self.text(name)
        if found not in valid:
            raise self.wrong(name, " or ".join(valid))
        return found

    def wrong(self, name: str, expected: str) -> InputError:
        """Return the error for a field that is not as expected."""
        shown = json.dumps(self.fields[name], ensure_ascii=False)
        shown = shown if len(shown) <= 60 else f"{shown[:60]}..."
        return InputError(f"{self.where}: field {name!r} is {shown}; expected {expected}.")

    def _field(self, name: str) -> Any:
        if name not in self.fields:
            raise InputError(
                f"{self.where}: field {name!r} is missing; there are "
                f"{', '.join(sorted(self.fields)) or 'none'}."
            )
        return self.fields[name]


def read_lines(path: Path, member: str | None = None, limit: int | None = None) -> list[Record]:
    """Read the first records of a JSON Lines file.

    Args:
        path: The file, or the zip that holds it.
        member: Its name in the zip.
        limit: How many records; all of them by default.

    Raises:
        InputError: If the file cannot be read, or a line is not a JSON object.
    """
    check_limit(limit)
    name = str(path) if member is None else f"{path}, {member}"
    try:
        if member is None:
            with path.open("rb") as file:
                return list(islice(_records(file, name), limit))
        with zipfile.ZipFile(path) as archive, archive.open(member) as packed:
            return list(islice(_records(packed, name), limit))
    except (OSError, zipfile.BadZipFile) as error:
        raise InputError(f"Cannot read {name}: {error}.") from error


def read_list(path: Path, limit: int | None = None) -> list[Record]:
    """Read the first records of a file that is one JSON list.

    Args:
        path: The file.
        limit: How many records; all of them by default.

    Raises:
        InputError: If the file cannot be read, or is not a list of JSON objects.
    """
    check_limit(limit)
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"Cannot read {path}: {error}.") from error
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(found, list):
        raise InputError(f"{path} holds no list; expected a JSON list of records.")
    return [
        _record(fields, f"{path}, record {number}")
        for number, fields in enumerate(found[:limit], 1)
    ]


def check_limit(limit: int | None) -> None:
    """Raise `InputError` unless a limit lets a sample through."""
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}; expected 1 or more, or none for all samples.")


def _records(lines: Any, name: str) -> Iterator[Record]:
    # Bytes, because text would also end lines inside of strings, at U+2028 and its like.
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{name}, line {number}"
            try:
                fields = json.loads(line)
            except ValueError as error:
                raise InputError(f"{where} is not valid JSON: {error}.") from error
            yield _record(fields, where)


def _record(fields: Any, where: str) -> Record:
    if not isinstance(fields, dict):
        raise InputError(f"{where} holds no record; expected a JSON object.")
    return Record(where=where, fields=fields)
