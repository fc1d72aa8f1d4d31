"""Prompts: what stands before a context and after it, and the benchmark's own files of them."""

import json
import string
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

from loki_attn.errors import InputError

V1_FILE: Final = "dataset2prompt.json"
V2_FILE: Final = "0shot.txt"

# The names that a template of version 2 fills in, and ours.
_V2_FIELDS: Final = {
    "$Q$": "{question}",
    "$C_A$": "{choice_A}",
    "$C_B$": "{choice_B}",
    "$C_C$": "{choice_C}",
    "$C_D$": "{choice_D}",
}


@final
@dataclass(frozen=True, kw_only=True)
class Prompt:
    """The text around a context; names in braces are filled in.

    Attributes:
        before: What stands before the context.
        after: What follows it: the question, and how to answer it.
    """

    before: str
    after: str

    def around(self, context: str, fields: Mapping[str, str]) -> tuple[str, str]:
        """Fill in.

        Args:
            context: The context.
            fields: Texts for the names in braces.

        Returns:
            What is read first, ending with the context, and what follows it.
        """
        return self.before.format_map(fields) + context, self.after.format_map(fields)


def read_v1_prompts(path: Path) -> dict[str, Prompt]:
    """Read the benchmark's file of prompts: a JSON object of templates by data set.

    Args:
        path: The file; a template names {context}, once, and may name {input}.

    Returns:
        The prompts by data set.

    Raises:
        InputError: If the file cannot be read, or a template does not have that form.
    """
    try:
        found: Any = json.loads(_text(path))
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(found, dict) or not all(isinstance(one, str) for one in found.values()):
        raise InputError(f"{path} does not hold templates; expected a JSON object of texts.")
    return {
        name: _split(template, f"{path}, {name!r}", {"input"}) for name, template in found.items()
    }


def read_v2_prompt(path: Path) -> Prompt:
    """Read the benchmark's template of version 2.

    Args:
        path: The file; it names $DOC$, once, and $Q$, $C_A$, $C_B$, $C_C$, $C_D$.

    Returns:
        The prompt.

    Raises:
        InputError: If the file cannot be read, or does not have that form.
    """
    text = _text(path).replace("{", "{{").replace("}", "}}")
    if "$DOC$" not in text:
        raise InputError(f"{path} does not name $DOC$, where the context belongs.")
    for theirs, ours in {"$DOC$": "{context}", **_V2_FIELDS}.items():
        text = text.replace(theirs, ours)
    return _split(text, str(path), {one.strip("{}") for one in _V2_FIELDS.values()})


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"Cannot read the prompts in {path}: {error}.") from error


def _split(template: str, where: str, known: set[str]) -> Prompt:
    """A template, divided at its context."""
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise InputError(
            f"{where} is not a template: {error}; double a brace to mean it."
        ) from error
    if names.count("context") != 1 or set(names) - known - {"context"}:
        raise InputError(
            f"{where} names {', '.join(names) or 'nothing'}; expected context once, and otherwise "
            f"only {', '.join(sorted(known))}."
        )
    before, _, after = template.partition("{context}")
    if not after:
        raise InputError(f"{where} ends with its context; expected a question after it.")
    return Prompt(before=before, after=after)
