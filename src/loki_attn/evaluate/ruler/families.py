"""Families: RULER's thirteen tasks by their published names, and how each is made."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal, final

from loki_attn.evaluate.ruler.documents import quoted_sentence, teacher_of
from loki_attn.evaluate.ruler.draft import Make
from loki_attn.evaluate.ruler.frequency import common_words, frequent_words
from loki_attn.evaluate.ruler.niah import Niah
from loki_attn.evaluate.ruler.tracking import variable_tracking


@final
@dataclass(frozen=True, kw_only=True)
class Family:
    """How the samples of one task are made and scored.

    Attributes:
        about: What is asked, in a sentence.
        make: Makes a draft from chance, an amount and a setting.
        least_units: The smallest amount that still makes a task.
        max_new_tokens: Where an answer ends.
        score: Whether "all" references count, by their share, or "any" of them.
    """

    about: str
    make: Make
    least_units: int
    max_new_tokens: int
    score: Literal["all", "any"] = "all"


def _niah(about: str, make: Niah) -> Family:
    least = {"noise": 5, "essay": 40, "needles": 2}[make.haystack]
    return Family(about=about, make=make, least_units=least, max_new_tokens=128)


TASKS: Final[Mapping[str, Family]] = MappingProxyType(
    {
        "niah_single_1": _niah("the number of a word, in noise", Niah(haystack="noise")),
        "niah_single_2": _niah("the number of a word, in prose", Niah(haystack="essay")),
        "niah_single_3": _niah(
            "the uuid of a word, in prose", Niah(haystack="essay", value="uuid")
        ),
        "niah_multikey_1": _niah(
            "the number of one of four words, in prose", Niah(haystack="essay", keys=4)
        ),
        "niah_multikey_2": _niah(
            "the number of a word, among needles of its kind", Niah(haystack="needles")
        ),
        "niah_multikey_3": _niah(
            "the uuid of a uuid, among needles of its kind",
            Niah(haystack="needles", key="uuid", value="uuid"),
        ),
        "niah_multivalue": _niah(
            "the four numbers of a word, in prose", Niah(haystack="essay", values=4)
        ),
        "niah_multiquery": _niah(
            "the numbers of four words, in prose", Niah(haystack="essay", keys=4, queries=4)
        ),
        "vt": Family(
            about="the five variables of a chain of four assignments, in noise",
            make=variable_tracking,
            least_units=10,
            max_new_tokens=30,
        ),
        "cwe": Family(
            about="the ten common words of a list",
            make=common_words,
            least_units=10,
            max_new_tokens=120,
        ),
        "fwe": Family(
            about="the three most frequent words of a coded text",
            make=frequent_words,
            # From here on the fourth word is rarer than the third, whatever the rounding.
            least_units=60,
            max_new_tokens=50,
        ),
        "qa_1": Family(
            about="how a sentence of a passage goes on (one hop)",
            make=quoted_sentence,
            least_units=40,
            max_new_tokens=32,
            score="any",
        ),
        "qa_2": Family(
            about="where somebody's teacher was born (two hops)",
            make=teacher_of,
            least_units=4,
            max_new_tokens=32,
            score="any",
        ),
    }
)

_ESSAYS: Final = "the haystack is the public-domain text given, not Paul Graham's essays"
SUBSTITUTES: Final[Mapping[str, str]] = MappingProxyType(
    {
        **{
            name: _ESSAYS
            for name, family in TASKS.items()
            if isinstance(family.make, Niah) and family.make.haystack == "essay"
        },
        "cwe": "the words are those of a packaged public-domain text, not of wonderwords",
        "qa_1": (
            "passages of the public-domain text and how a quoted sentence of one goes on, not SQuAD"
        ),
        "qa_2": "generated biographies and a question about two of them, not HotpotQA",
    }
)
