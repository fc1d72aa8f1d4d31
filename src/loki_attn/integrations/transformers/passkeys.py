"""Passkeys: texts in which some phrases must be found again, far behind; data for head gates.

A text is filler with several statements like "Passkey 3 is: harbour candle ...", in any order, and
at its end a question for each. The words of a phrase are drawn from the filler, so nothing but its
statement tells the phrase, and any language will do.
"""

import re
from dataclasses import dataclass
from typing import Any, Final, final

import torch
from torch import Tensor

from loki_attn.errors import InputError

_WORD: Final = re.compile(r"[^\W\d_]{4,8}")
_SHALLOWEST: Final = 0.05
_DEEPEST: Final = 0.95
_LEAST_FILLER: Final = 0.25
_LEAST_WORDS: Final = 32


@final
@dataclass(frozen=True, eq=False)
class Exam:
    """One text with passkeys.

    Attributes:
        tokens: int64 [n].
        asked: int64 [m]: the positions whose next token belongs to an answer.
    """

    tokens: Tensor
    asked: Tensor


@final
class Passkeys:
    """Draws texts.

    Args:
        tokenizer: The model's tokenizer.
        text: Filler, in its order; pieces of it begin anywhere.
        count: Passkeys in a text.
        words: Words of a passkey.
    """

    def __init__(self, tokenizer: Any, text: str, *, count: int, words: int) -> None:
        """Tokenise the filler once."""
        self._tokenizer, self._count, self._words = tokenizer, count, words
        self._filler = self._encoded(text)
        self._choice = sorted(set(_WORD.findall(text.lower())))
        if len(self._choice) < _LEAST_WORDS:
            raise InputError(
                f"The text has {len(self._choice)} different words of 4 to 8 letters, passkeys are "
                f"drawn from at least {_LEAST_WORDS}; give more text."
            )
        first = getattr(tokenizer, "bos_token_id", None)
        begins = first is not None and list(tokenizer("").input_ids)[:1] == [first]
        self._begin = torch.tensor([first] if begins else [], dtype=torch.long)

    def draw(self, total: int, draw: torch.Generator) -> Exam:
        """Draw a text of exactly `total` tokens.

        Args:
            total: Tokens of the text.
            draw: Decides words, places, order and filler.

        Raises:
            InputError: If there is no room for the passkeys, or too little filler.
        """
        phrases = [self._phrase(draw) for _ in range(self._count)]
        order = _shuffled(self._count, draw)
        told = [self._encoded(f"\nPasskey {i + 1} is: {phrases[i]}.\n") for i in order]
        questions, asked = self._questions(phrases, draw)
        used = len(self._begin) + sum(len(piece) for piece in told) + len(questions)
        room = total - used
        if room < total * _LEAST_FILLER:
            raise InputError(
                f"{self._count} passkeys of {self._words} words take {used} of {total} tokens, "
                "and a quarter at least should be filler; use longer contexts, or fewer or "
                "shorter passkeys."
            )
        if room > len(self._filler):
            raise InputError(
                f"A context of {total} tokens needs {room} tokens of filler, the text has "
                f"{len(self._filler)}; give more text or use shorter contexts."
            )
        start = int(torch.randint(len(self._filler) - room + 1, (), generator=draw))
        filler = self._filler[start : start + room]
        depths = torch.rand(self._count, generator=draw) * (_DEEPEST - _SHALLOWEST) + _SHALLOWEST
        cuts = (depths.sort().values * room).long().tolist()
        pieces, last = [self._begin], 0
        for cut, piece in zip(cuts, told, strict=True):
            pieces += [filler[last:cut], piece]
            last = cut
        tokens = torch.cat([*pieces, filler[last:], questions])
        return Exam(tokens, asked + total - len(questions))

    def _questions(self, phrases: list[str], draw: torch.Generator) -> tuple[Tensor, Tensor]:
        """The tokens of all questions with answers, and which of them an answer's token follows."""
        tokens: list[Tensor] = []
        asked, length = [], 0
        for i in _shuffled(self._count, draw):
            question = self._encoded(f"\nQuestion: what is passkey {i + 1}? Answer:")
            answer = self._encoded(f" {phrases[i]}.")
            tokens += [question, answer]
            length += len(question)
            asked.append(torch.arange(length - 1, length + len(answer) - 1))
            length += len(answer)
        return torch.cat(tokens), torch.cat(asked)

    def _phrase(self, draw: torch.Generator) -> str:
        chosen = torch.randint(len(self._choice), (self._words,), generator=draw)
        return " ".join(self._choice[i] for i in chosen.tolist())

    def _encoded(self, text: str) -> Tensor:
        read = self._tokenizer(text, add_special_tokens=False, verbose=False)
        return torch.tensor(read.input_ids, dtype=torch.long)


def _shuffled(count: int, draw: torch.Generator) -> list[int]:
    order: list[int] = torch.randperm(count, generator=draw).tolist()
    return order
