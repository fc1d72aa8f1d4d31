"""Variable tracking: which variables got a value, directly or through others.

Section 3.2 of arXiv 2404.06654; one chain of four hops, a worked example before it.
"""

import random
from itertools import islice, pairwise
from string import ascii_uppercase
from typing import Final

from loki_attn.evaluate.ruler.draft import Draft, Setting
from loki_attn.evaluate.ruler.material import NOISE, letters, numbers

HOPS: Final = 4
_NAME_LETTERS: Final = 5
# Names of the example are shorter, so none of them can be mistaken for an answer.
_EXAMPLE_NAME_LETTERS: Final = 3
_EXAMPLE_SENTENCES: Final = 15
_VALUE_DIGITS: Final = 5
_INTRODUCTION: Final = (
    "Keep track of the chain of variable assignments that is hidden in the text below.\n\n"
)


def variable_tracking(draw: random.Random, units: int, setting: Setting) -> Draft:
    """Make a draft with so many sentences of noise.

    Args:
        draw: The source of chance.
        units: Sentences of noise.
        setting: Not used.
    """
    del setting
    example_value, value = islice(numbers(draw, _VALUE_DIGITS), 2)
    example_names = list(islice(letters(draw, ascii_uppercase, _EXAMPLE_NAME_LETTERS), HOPS + 1))
    names = list(islice(letters(draw, ascii_uppercase, _NAME_LETTERS), HOPS + 1))
    example = _hide(draw, example_names, example_value, _EXAMPLE_SENTENCES)
    hidden = _hide(draw, names, value, units)
    return Draft(
        context=(
            f"{_INTRODUCTION}{example}{_question(example_value)} {' '.join(example_names)}\n\n\n"
            f"{_INTRODUCTION}{hidden}"
        ),
        question=_question(value),
        references=tuple(names),
    )


def _hide(draw: random.Random, names: list[str], value: str, num_sentences: int) -> str:
    """Put the assignments between sentences of noise, in the order in which they hold."""
    assignments = [f"VAR {names[0]} = {value}"]
    assignments += [f"VAR {later} = VAR {earlier}" for earlier, later in pairwise(names)]
    lines = [NOISE[index % len(NOISE)] for index in range(num_sentences)]
    places = sorted(draw.choices(range(len(lines) + 1), k=len(assignments)))
    for done, (place, assignment) in enumerate(zip(places, assignments, strict=True)):
        lines.insert(place + done, assignment)
    return "\n".join(lines)


def _question(value: str) -> str:
    return (
        f"\nQuestion: Which variables have the value {value} in the text above?\nAnswer: By the "
        f"chain of assignments in the text above, {HOPS + 1} variables have the value {value}, "
        "they are:"
    )
