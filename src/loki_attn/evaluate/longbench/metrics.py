"""The metrics of LongBench, each from an answer and a reference to a number in [0, 1].

They give what the published evaluation gives (arXiv 2308.14508, github.com/THUDM/LongBench), quirks
included; where a quirk is a defect that depends on the machine, a comment says what we do.
"""

import difflib
import re
from collections import Counter
from collections.abc import Sequence
from typing import Final

from loki_attn.errors import InputError
from loki_attn.evaluate.longbench.words import chinese_words, english_words, segments

NUMBERED: Final = {
    "retrieval": re.compile(r"Paragraph (\d+)"),
    "retrieval_zh": re.compile(r"段落(\d+)"),
}
"""What the references of these metrics hold."""

_NUMBER: Final = re.compile(r"\d+")
_COMMENT_SIGNS: Final = ("`", "#", "//")
_CHOICES: Final = (
    re.compile(r"The correct answer is \(([A-D])\)"),
    re.compile(r"The correct answer is ([A-D])"),
)


def qa_f1(text: str, reference: str) -> float:
    """Return the F1 of the English words that an answer and its reference share."""
    return _f1_of_words(english_words(text), english_words(reference))


def qa_f1_zh(text: str, reference: str) -> float:
    """Return the F1 of the Chinese words that an answer and its reference share."""
    return _f1_of_words(chinese_words(text), chinese_words(reference))


def rouge_l(text: str, reference: str) -> float:
    """Return ROUGE-L as PyPI's `rouge` 1.0.1 computes it, the package of the published evaluation.

    Sentences end at full stops. Every sentence of the reference is matched with every one of the
    answer; the words of all their longest common subsequences are united, and count once each, as
    do the words of either text. Letter case and punctuation count.

    Args:
        text: The answer.
        reference: What it is compared with.

    Returns:
        The F1 of precision and recall, 0 where either text has no sentence.

    Source: Lin, "ROUGE: a package for automatic evaluation of summaries" (2004), section 3.2.
    """
    said, wanted = _sentences(text), _sentences(reference)
    if not said or not wanted:
        return 0.0
    # The published program recurses, and gives 0 where sentences exceed Python's stack; not we.
    shared = {word for ours in wanted for theirs in said for word in _common(ours, theirs)}
    precision = len(shared) / len({word for sentence in said for word in sentence})
    recall = len(shared) / len({word for sentence in wanted for word in sentence})
    return _harmonic(precision, recall)


def rouge_l_zh(text: str, reference: str) -> float:
    """Return `rouge_l` of Chinese texts, cut into words."""
    return rouge_l(" ".join(segments(text)), " ".join(segments(reference)))


def classification(text: str, reference: str, classes: Sequence[str]) -> float:
    """Return the share of the right class among all classes that an answer names.

    Args:
        text: The answer.
        reference: The right class.
        classes: All classes.

    Returns:
        One over the number of classes named, where the right one is among them, else 0.
    """
    named: list[str] = []
    skipped = False
    for name in (name for name in classes if name in text):
        # A class within the name of the right one does not count. But the published program
        # removes from the list that it walks, and so never looks at the one after.
        skipped = not skipped and name in reference and name != reference
        if not skipped:
            named.append(name)
    return 1 / len(named) if reference in named else 0.0


def retrieval(text: str, reference: str) -> float:
    """Return the share of the right number among the numbers of an answer: "Paragraph 7"."""
    return _share(text, _numbered(reference, "retrieval"))


def retrieval_zh(text: str, reference: str) -> float:
    """Return the share of the right number among the numbers of a Chinese answer."""
    return _share(text, _numbered(reference, "retrieval_zh"))


def count(text: str, reference: str) -> float:
    """Return the share of the right number among the numbers of an answer."""
    return _share(text, reference)


def code_similarity(text: str, reference: str) -> float:
    """Return how alike the first line of code in an answer and the reference are.

    Lines with a backquote, "#" or "//" are passed over. Alike means twice the characters in
    matching blocks over all characters, in whole percent: `fuzz.ratio` of fuzzywuzzy on the
    standard library's difflib, which is what the published requirements install.

    Args:
        text: The answer.
        reference: The line that it is compared with.

    Returns:
        The likeness, a multiple of 0.01.
    """
    lines = text.lstrip("\n").split("\n")
    code = (line for line in lines if not any(sign in line for sign in _COMMENT_SIGNS))
    line = next(code, "")
    if line == reference:
        return 1.0
    return round(100 * difflib.SequenceMatcher(None, line, reference).ratio()) / 100


def choice(text: str, reference: str) -> float:
    """Return 1 where an answer names the right choice in the form asked for (arXiv 2412.15204)."""
    bare = text.strip().replace("*", "")
    found = next((match for form in _CHOICES if (match := form.search(bare))), None)
    return float(found is not None and found[1] == reference)


def first_line(text: str) -> str:
    """Return the first line of a text, after any empty ones."""
    return text.lstrip("\n").split("\n")[0]


def _f1_of_words(said: list[str], wanted: list[str]) -> float:
    shared = (Counter(said) & Counter(wanted)).total()
    if not shared:
        return 0.0
    return _harmonic(shared / len(said), shared / len(wanted))


def _harmonic(precision: float, recall: float) -> float:
    if not precision + recall:
        return 0.0
    return min(1.0, 2 * precision * recall / (precision + recall))


def _sentences(text: str) -> list[list[str]]:
    # Split at single spaces: a sentence of spaces alone has one empty word, and it counts.
    return [" ".join(piece.split()).split(" ") for piece in text.split(".") if piece]


def _common(first: list[str], second: list[str]) -> set[str]:
    """The words of one longest common subsequence, the one that the published program takes."""
    lengths = [[0] * (len(second) + 1)]
    for word in first:
        above = lengths[-1]
        row = [0]
        for column, other in enumerate(second):
            longest = above[column] + 1 if word == other else max(above[column + 1], row[column])
            row.append(longest)
        lengths.append(row)
    words: set[str] = set()
    i, j = len(first), len(second)
    while i and j:
        if first[i - 1] == second[j - 1]:
            i, j = i - 1, j - 1
            words.add(first[i])
        elif lengths[i - 1][j] > lengths[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return words


def _share(text: str, wanted: str) -> float:
    numbers = _NUMBER.findall(text)
    return numbers.count(wanted) / len(numbers) if numbers else 0.0


def _numbered(reference: str, metric: str) -> str:
    found = NUMBERED[metric].search(reference)
    if found is None:
        raise InputError(
            f"Reference {reference!r} names no paragraph; expected {NUMBERED[metric].pattern}."
        )
    return found[1]
