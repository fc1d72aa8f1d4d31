"""lm-eval's command line with "loki-attn" registered, and rows from what it wrote."""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from lm_eval.__main__ import cli_evaluate

from loki_attn.errors import InputError, LokiAttnError
from loki_attn.integrations.lm_eval.language_model import NAME
from loki_attn.integrations.lm_eval.rows import read_results, rows
from loki_attn.models import SOURCES, resolve

_PRETRAINED: Final = re.compile(r"(?<![^,])(pretrained|tokenizer)=([^,]+)")
_CHOOSES_A_MODEL: Final = re.compile(r"--model(=.*)?|-M.*|--config(=.*)?|-C.*")
_OTHER_COMMANDS: Final = frozenset({"ls", "validate", "-h", "--help"})


def run(argv: Sequence[str]) -> int:
    """Run lm-eval's command line in this process.

    Args:
        argv: What follows `python -m loki_attn.integrations.lm_eval`: the words of lm-eval, whose
            model is loki-attn unless they say otherwise, and in which a short model name may stand
            for its folder; or "rows" and what --output_path was, to print rows as JSON lines.

    Returns:
        The exit status: 2 for what loki-attn refuses, with the reason on stderr.
    """
    try:
        if argv[:1] == ["rows"]:
            _print_rows(argv[1:])
        else:
            _hand_over(argv)
    except LokiAttnError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


def _print_rows(paths: Sequence[str]) -> None:
    if not paths:
        raise InputError("rows needs what was given as --output_path, got nothing.")
    # All are read before the first is printed.
    made = [row for path in paths for results in read_results(Path(path)) for row in rows(results)]
    sys.stdout.write("".join(json.dumps(row, sort_keys=True) + "\n" for row in made))


def _hand_over(argv: Sequence[str]) -> None:
    """Let lm-eval read the words; it reads them from `sys.argv` only."""
    words = [_PRETRAINED.sub(_folder, word) for word in argv]
    evaluates = bool(words) and _OTHER_COMMANDS.isdisjoint(words)
    if evaluates and not any(_CHOOSES_A_MODEL.fullmatch(word) for word in words):
        words += ["--model", NAME]
    before = sys.argv
    sys.argv = ["lm-eval", *words]
    try:
        cli_evaluate()
    finally:
        sys.argv = before


def _folder(found: re.Match[str]) -> str:
    """RULER's tasks look the tokenizer up by the same name, and know no short ones."""
    name = found[2]
    return f"{found[1]}={resolve(name) if name in SOURCES else name}"
