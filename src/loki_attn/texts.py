"""Texts: the packaged public-domain ones, the user's files, and quizzes with known answers.

``data/README.md`` says where each packaged text comes from and under which terms.
"""

import gzip
import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import accumulate, cycle
from pathlib import Path
from typing import final

from loki_attn.errors import InputError, unknown_name

_NAMES = ("calibration", "continuation", "question")
_KEY_DIGITS = 5


@final
@dataclass(frozen=True, kw_only=True)
class Quiz:
    """A text, a question about it, and the word that a right answer contains."""

    text: str
    question: str
    keyword: str

    @property
    def prompt(self) -> str:
        """What the user says to an instruct model, before its chat template is put around it."""
        return f"{self.text}\n\nQuestion: {self.question} Answer in one short sentence."

    def answered_by(self, answer: str) -> bool:
        """Whether an answer contains the keyword, in any case."""
        return self.keyword.casefold() in answer.casefold()


def names() -> tuple[str, ...]:
    """The names of the packaged texts."""
    return _NAMES


@cache
def load(name: str) -> str:
    """Return a packaged text.

    Raises:
        UnknownNameError: No packaged text has that name.
    """
    if name not in _NAMES:
        raise unknown_name("text", name, _NAMES)
    packed = files("loki_attn").joinpath("data", f"{name}.txt.gz").read_bytes()
    return gzip.decompress(packed).decode("utf-8")


def read_file(path: str | Path) -> str:
    """Read a text file of the user's, UTF-8 with or without a byte order mark.

    Raises:
        InputError: The file is missing, is a folder, cannot be read, is empty or is not UTF-8.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        raise InputError(f"{str(path)!r} is a folder; expected one UTF-8 text file")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError as error:
        raise InputError(
            f"No text file at {str(path)!r}; give the path of a UTF-8 text file"
        ) from error
    except OSError as error:
        raise InputError(f"Cannot read {str(path)!r}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"{str(path)!r} is not UTF-8 (byte 0x{error.object[error.start]:02x} at offset "
            f"{error.start:,}); convert it first, for example: iconv -f LATIN1 -t UTF-8"
        ) from error
    if not text.strip():
        raise InputError(f"{str(path)!r} is empty; expected some text")
    return text


def digest(text: str) -> str:
    """The sha256 of a text in hex, as recorded in the provenance of what was made from it."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def quiz() -> Quiz:
    """A short story (about 350 tokens) and a question that even a 135M model answers."""
    return Quiz(
        text=load("question").strip(),
        question="What did the fisherman give to Ellen?",
        keyword="whistle",
    )


def passkey(
    max_tokens: int, count_tokens: Callable[[str], int], *, depth: float = 0.5, seed: int = 0
) -> Quiz:
    """Hide a random number between the paragraphs of a story (passkeys, arXiv 2305.16300).

    Args:
        max_tokens: Upper limit of the prompt, which fills it to within a paragraph; a chat template
            comes on top.
        count_tokens: Number of tokens of a string, by the model's tokenizer.
        depth: Where the number stands, from 0 (start) to 1 (end).
        seed: Chooses the number.

    Raises:
        InputError: ``depth`` is outside [0, 1], or ``max_tokens`` leaves no room for any story.
    """
    if not 0.0 <= depth <= 1.0:
        raise InputError(f"depth is {depth}; expected a share of the text from 0 to 1")
    key = str(random.Random(seed).randrange(10 ** (_KEY_DIGITS - 1), 10**_KEY_DIGITS))
    story = load("continuation").strip().split("\n\n")
    hidden = _hide(key, [], depth)
    used_tokens = count_tokens(hidden.prompt)
    kept: list[str] = []
    for paragraph in cycle(story):
        used_tokens += count_tokens(paragraph + "\n\n")
        if used_tokens > max_tokens:
            break
        kept.append(paragraph)
    # Token counts of parts do not add up exactly, so the whole is counted once more.
    while kept and count_tokens((hidden := _hide(key, kept, depth)).prompt) > max_tokens:
        kept.pop()
    if not kept:
        raise InputError(f"A passkey quiz does not fit into {max_tokens} tokens; use 256 or more")
    return hidden


def _hide(key: str, paragraphs: list[str], depth: float) -> Quiz:
    ends = list(accumulate(map(len, paragraphs), initial=0))
    place = min(range(len(ends)), key=lambda i: abs(ends[i] - depth * ends[-1]))
    needle = f"The pass key is {key}. Remember it. {key} is the pass key."
    return Quiz(
        text="\n\n".join([*paragraphs[:place], needle, *paragraphs[place:]]),
        question="What is the pass key mentioned in the text?",
        keyword=key,
    )
