"""The data sets of LongBench v1, and how each is asked and scored.

Names, languages, metrics and answer lengths are those of the benchmark (arXiv 2308.14508 and
github.com/THUDM/LongBench). The wording of the prompts is ours: it asks for the same kind
of answer, in the form that the metric expects, in the data set's language.
"""
# ruff: noqa: RUF001 - Chinese prompts have Chinese punctuation

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal, final

from loki_attn.evaluate.longbench.prompts import Prompt

Language = Literal["en", "zh", "code"]
Metric = Literal[
    "qa_f1",
    "qa_f1_zh",
    "rouge_l",
    "rouge_l_zh",
    "classification",
    "retrieval",
    "retrieval_zh",
    "count",
    "code_similarity",
]

V2: Final = "longbench-v2"


@final
@dataclass(frozen=True, kw_only=True)
class Dataset:
    """One data set of LongBench v1.

    Attributes:
        language: Of context and answer: "en", "zh" or "code".
        metric: Name of the function that scores an answer.
        max_new_tokens: Where an answer ends at the latest, as published.
        prompt: What stands before the context and after it, in our words.
        first_line: Whether only the first line of an answer counts.
    """

    language: Language
    metric: Metric
    max_new_tokens: int
    prompt: Prompt
    first_line: bool = False


_PASSAGES: Final = Prompt(
    before="Several passages follow; one question is asked about them at the end.\n\n",
    after=(
        "\n\nReply to this question from the passages above. Write the bare answer and nothing "
        "else.\nQuestion: {input}\nAnswer:"
    ),
)
_STORY: Final = Prompt(
    before="Here is a story, from a book or a film script.\n\n",
    after=(
        "\n\nReply to this question about the story in as few words as will do, without "
        "explaining.\nQuestion: {input}\nAnswer:"
    ),
)
_PAPER: Final = Prompt(
    before="Here is a research paper.\n\n",
    after=(
        "\n\nReply to this question about the paper with a phrase or a single sentence, without "
        'explaining. To a yes/no question say "yes" or "no"; where the paper does not tell, say '
        '"unanswerable".\nQuestion: {input}\nAnswer:'
    ),
)
_TEXT: Final = Prompt(
    before="Here is a text.\n\n",
    after=(
        "\n\nReply to this question about the text. Write the bare answer and nothing else.\n"
        "Question: {input}\nAnswer:"
    ),
)
_TEXT_ZH: Final = Prompt(
    before="下面是一篇文章。\n\n",
    after="\n\n根据这篇文章用中文作答，只写答案本身，不加其他内容。\n问题：{input}\n答案：",
)
_ARTICLES_ZH: Final = Prompt(
    before="下面是几篇文章。\n\n",
    after="\n\n根据这些文章回答问题。\n问题：{input}\n答案：",
)
_REPORT: Final = Prompt(
    before="Here is a report of a public authority.\n\n",
    after="\n\nSummarize this report on about one page.\nSummary:",
)
_MEETING: Final = Prompt(
    before="Here is the transcript of a meeting.\n\n",
    after=(
        "\n\nReply to this request about the meeting in a few sentences.\nRequest: {input}\nAnswer:"
    ),
)
_NEWS: Final = Prompt(
    before="Here are articles from the news.\n\n",
    after="\n\nSummarize all of these articles together on about one page.\nSummary:",
)
_MEETING_ZH: Final = Prompt(
    before="下面是一次会议的记录。\n\n", after="\n\n用一段话概括这次会议的内容。\n概括："
)
_KINDS_OF_QUESTIONS: Final = Prompt(
    before="Say of what type each question is, as in these examples.\n\n", after="\n{input}"
)
_QUESTIONS_BY_EXAMPLE: Final = Prompt(
    before=(
        "Each question is about the passage before it. Write the bare answer and nothing else, as "
        "in these examples.\n\n"
    ),
    after="\n\n{input}",
)
_DIALOGUES: Final = Prompt(
    before="Summarize each dialogue in a sentence or two, as in these examples.\n\n",
    after="\n\n{input}",
)
_KINDS_OF_NEWS_ZH: Final = Prompt(
    before="仿照下面的例子，判断新闻属于哪一类。\n\n", after="\n{input}"
)
_DUPLICATES: Final = Prompt(
    before=(
        "Below are numbered paragraphs from an encyclopedia, some of them more than once. Find out "
        "how many different paragraphs there are.\n\n"
    ),
    after=(
        "\n\nHow many different paragraphs are there, counting repeated ones once? Write only the "
        "number.\nNumber: "
    ),
)
_WHICH_PARAGRAPH: Final = Prompt(
    before="Below are 30 numbered paragraphs from an encyclopedia.\n\n",
    after=(
        "\n\nThis summary was written from one of the paragraphs:\n\n{input}\n\nWhich one? Reply "
        'in the form "Paragraph 7".\nAnswer: '
    ),
)
_WHICH_PARAGRAPH_ZH: Final = Prompt(
    before="下面是若干个编了号的段落。\n\n",
    after="\n\n这份摘要概括了其中一个段落：\n\n{input}\n\n是哪一段？按“段落7”的形式作答。\n答案：",
)
_CODE: Final = Prompt(
    before="Here is some code that breaks off; write the line that comes next.\n",
    after="{input}The line that comes next:\n",
)


def _dataset(
    language: Language,
    metric: Metric,
    max_new_tokens: int,
    prompt: Prompt,
    first_line: bool = False,
) -> Dataset:
    return Dataset(
        language=language,
        metric=metric,
        max_new_tokens=max_new_tokens,
        prompt=prompt,
        first_line=first_line,
    )


_MAIN: Final = {
    "narrativeqa": _dataset("en", "qa_f1", 128, _STORY),
    "qasper": _dataset("en", "qa_f1", 128, _PAPER),
    "multifieldqa_en": _dataset("en", "qa_f1", 64, _TEXT),
    "multifieldqa_zh": _dataset("zh", "qa_f1_zh", 64, _TEXT_ZH),
    "hotpotqa": _dataset("en", "qa_f1", 32, _PASSAGES),
    "2wikimqa": _dataset("en", "qa_f1", 32, _PASSAGES),
    "musique": _dataset("en", "qa_f1", 32, _PASSAGES),
    "dureader": _dataset("zh", "rouge_l_zh", 128, _ARTICLES_ZH),
    "gov_report": _dataset("en", "rouge_l", 512, _REPORT),
    "qmsum": _dataset("en", "rouge_l", 512, _MEETING),
    "multi_news": _dataset("en", "rouge_l", 512, _NEWS),
    "vcsum": _dataset("zh", "rouge_l_zh", 512, _MEETING_ZH),
    "trec": _dataset("en", "classification", 64, _KINDS_OF_QUESTIONS, first_line=True),
    "triviaqa": _dataset("en", "qa_f1", 32, _QUESTIONS_BY_EXAMPLE, first_line=True),
    "samsum": _dataset("en", "rouge_l", 128, _DIALOGUES, first_line=True),
    "lsht": _dataset("zh", "classification", 64, _KINDS_OF_NEWS_ZH, first_line=True),
    "passage_count": _dataset("en", "count", 32, _DUPLICATES),
    "passage_retrieval_en": _dataset("en", "retrieval", 32, _WHICH_PARAGRAPH),
    "passage_retrieval_zh": _dataset("zh", "retrieval_zh", 32, _WHICH_PARAGRAPH_ZH),
    "lcc": _dataset("code", "code_similarity", 64, _CODE),
    "repobench-p": _dataset("code", "code_similarity", 64, _CODE),
}

EXTENDED: Final = (
    "qasper",
    "multifieldqa_en",
    "hotpotqa",
    "2wikimqa",
    "gov_report",
    "multi_news",
    "trec",
    "triviaqa",
    "samsum",
    "passage_count",
    "passage_retrieval_en",
    "lcc",
    "repobench-p",
)
"""Data sets that LongBench-E has too, with even shares of lengths; there, "_e" ends their names."""

DATASETS: Final[Mapping[str, Dataset]] = MappingProxyType(
    _MAIN | {f"{name}_e": _MAIN[name] for name in EXTENDED}
)
"""The 21 data sets of LongBench v1 and the 13 of LongBench-E, by name."""
