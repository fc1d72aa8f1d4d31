"""Words of answers, as LongBench's metrics count them: English by spaces, Chinese by a segmenter.

The published evaluation cuts Chinese with jieba. Where it is installed, so do we; elsewhere every
Chinese character is a word, and scores are a little higher or lower. `segmenter` says which.
"""

import importlib
import importlib.util
import re
import string
import warnings
from functools import cache
from typing import Any, Final, Literal

_ARTICLES: Final = re.compile(r"\b(?:a|an|the)\b")
# Runs of Latin letters and digits stay whole; anything else that is not a space stands alone.
_CHARACTERS: Final = re.compile(r"[A-Za-z0-9]+|[^\sA-Za-z0-9]")
# The full-width and Chinese marks that the published evaluation drops, by first and last code. It
# leaves some that one would expect here, U+300A and U+FF0E among them.
_MARKS: Final = (
    (0x2013, 0x2014),
    (0x2018, 0x2019),
    (0x201B, 0x201F),
    (0x2026, 0x2027),
    (0x3001, 0x3003),
    (0x300B, 0x3011),
    (0x3014, 0x301F),
    (0x3030, 0x3030),
    (0x303E, 0x303F),
    (0xFE4F, 0xFE4F),
    (0xFF01, 0xFF0D),
    (0xFF0F, 0xFF0F),
    (0xFF1A, 0xFF20),
    (0xFF3B, 0xFF40),
    (0xFF5B, 0xFF64),
)
_NO_ASCII_MARKS: Final = str.maketrans("", "", string.punctuation)
_NO_MARKS: Final = _NO_ASCII_MARKS | {
    code: None for first, last in _MARKS for code in range(first, last + 1)
}


def english_words(text: str) -> list[str]:
    """Return the words of a text in lower case, without punctuation and articles."""
    return _ARTICLES.sub(" ", text.lower().translate(_NO_ASCII_MARKS)).split()


def chinese_words(text: str) -> list[str]:
    """Return the words of a Chinese text in lower case, without punctuation."""
    bare = ("".join(word.lower().translate(_NO_MARKS).split()) for word in segments(text))
    return [word for word in bare if word]


def segments(text: str) -> list[str]:
    """Return a Chinese text cut into words, punctuation included."""
    if segmenter() == "characters":
        return _CHARACTERS.findall(text)
    return list(_jieba().cut(text))


@cache
def segmenter() -> Literal["jieba", "characters"]:
    """Return what cuts Chinese into words here: "jieba" where it is installed."""
    return "characters" if importlib.util.find_spec("jieba") is None else "jieba"


@cache
def _jieba() -> Any:
    # Its sources are older than today's warnings about them.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        jieba = importlib.import_module("jieba")
        jieba.setLogLevel("ERROR")
        jieba.initialize()
    return jieba
