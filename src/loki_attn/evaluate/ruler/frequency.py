"""Common and frequent words: which words of a list, or of a coded text, come most often?

Section 3.3 of arXiv 2404.06654: CWE over two fixed counts, FWE over a zeta distribution.
"""

import math
import random
from itertools import islice
from string import ascii_lowercase
from typing import Final

from loki_attn.evaluate.ruler.draft import Draft, Setting
from loki_attn.evaluate.ruler.material import key_words, letters, words

COMMON_WORDS: Final = 10
# Upstream lowers the counts below this length; common words and others, in the list and in the
# worked example, which has so many words.
_FULL_LENGTH_TOKENS: Final = 4096
_FULL: Final = ((30, 3), (10, 3), 40)
_SHORT: Final = ((6, 1), (3, 1), 20)
_CODED_LETTERS: Final = 6
_TOKENS_PER_CODED_WORD: Final = 50
_LEAST_CODED_WORDS: Final = 8
_FREQUENT_WORDS: Final = 3
_ZETA_2: Final = math.pi**2 / 6
_DOTS: Final = "..."
_LIST_INTRODUCTION: Final = (
    "The numbered list below holds words, some of them more often than others. Keep in mind those "
    "that come most often.\n"
)
_LIST_QUESTION: Final = (
    f"\nQuestion: Which {COMMON_WORDS} words come most often in the list above?\nAnswer: The "
    f"{COMMON_WORDS} words that come most often in the list are:"
)
_CODE_INTRODUCTION: Final = (
    "The text below is coded. Count how often each coded word comes, and find the three that come "
    "most often.\n"
)
_CODE_QUESTION: Final = (
    "\nQuestion: Which three words come most often in the coded text above? Leave out the dots "
    "'...' and explain nothing.\nAnswer: The three words that come most often in the coded text "
    "above are:"
)


def common_words(draw: random.Random, units: int, setting: Setting) -> Draft:
    """Make a draft with so many different words beside the common ones.

    Args:
        draw: The source of chance.
        units: Different words that are not common.
        setting: Its length decides how often words come.
    """
    full = setting.length_tokens >= _FULL_LENGTH_TOKENS
    counts, example_counts, example_words = _FULL if full else _SHORT
    example, example_common = _numbered_list(draw, example_words - COMMON_WORDS, example_counts)
    listed, common = _numbered_list(draw, units, counts)
    return Draft(
        context=(
            f"{_LIST_INTRODUCTION}{example}{_LIST_QUESTION} {_numbered(example_common)}\n\n"
            f"{_LIST_INTRODUCTION}{listed}"
        ),
        question=_LIST_QUESTION,
        references=tuple(common),
    )


def frequent_words(draw: random.Random, units: int, setting: Setting) -> Draft:
    """Make a draft of about so many coded words, the commonest of them dots.

    Args:
        draw: The source of chance.
        units: Words that the zeta distribution (alpha 2) is spread over.
        setting: Its length decides how many different words there are.
    """
    different = max(setting.length_tokens // _TOKENS_PER_CODED_WORD, _LEAST_CODED_WORDS)
    ranked = [_DOTS, *islice(letters(draw, ascii_lowercase, _CODED_LETTERS), different - 1)]
    coded = [
        word
        for rank, word in enumerate(ranked, start=1)
        for _ in range(int(units / (rank**2 * _ZETA_2)))
    ]
    draw.shuffle(coded)
    return Draft(
        context=_CODE_INTRODUCTION + " ".join(coded),
        question=_CODE_QUESTION,
        references=tuple(ranked[1 : 1 + _FREQUENT_WORDS]),
    )


def _numbered_list(
    draw: random.Random, num_others: int, counts: tuple[int, int]
) -> tuple[str, list[str]]:
    """A shuffled list of the common words and the others, and the common words."""
    pool = draw.sample(words(), len(words()))
    common: list[str] = []
    for word in pool:
        # A reference inside of another would be found where only that one was named.
        if not any(word in other or other in word for other in common):
            common.append(word)
        if len(common) == COMMON_WORDS:
            break
    others = [word for word in pool if word not in common][:num_others]
    # Very long lists have more places than there are single words.
    others += islice(key_words(draw), num_others - len(others))
    often, seldom = counts
    drawn = common * often + others * seldom
    draw.shuffle(drawn)
    return _numbered(drawn), common


def _numbered(listed: list[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(listed, start=1))
