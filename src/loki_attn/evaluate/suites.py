"""Suites: needle, ruler, longbench and multi-question as tasks, from the choices of a user."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from loki_attn.errors import InputError, unknown_name
from loki_attn.evaluate import longbench, multi_question, needles, ruler
from loki_attn.evaluate.asking import Asking, Seen
from loki_attn.evaluate.protocol import LanguageModel
from loki_attn.evaluate.samples import Question, Sample
from loki_attn.evaluate.task import Item, Record

NEEDLE: Final = (
    "a needle stands at a set depth of a random stretch of a public-domain text; score is 1 where "
    "the reference is in the first line of the answer"
)
RULER: Final = (
    "RULER (arXiv 2404.06654) from our own generator; score is the share of the references that "
    "the answer contains, of the best one for qa_1 and qa_2"
)
# What the text of cut tokens may take more when it is read again.
_REJOINED_TOKENS: Final = 16
LONGBENCH: Final = (
    "LongBench with its own metrics, contexts too long for the model cut in the middle; prompts: "
    "{prompts}; Chinese words cut by: {words}"
)


def needle_task(  # noqa: PLR0913 - each is a choice of its own, by keyword
    lm: LanguageModel,
    haystack: str,
    *,
    kinds: Sequence[str] = ("number",),
    lengths: Sequence[int] = (4096,),
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    per_depth: int = 2,
    seed: int = 0,
    seen: Seen = "after",
    corpus: str = "unnamed",
) -> Asking:
    """Return the task of finding needles at depths of texts of several lengths.

    Args:
        lm: The model; its tokenizer sets the lengths.
        haystack: Public-domain text around the needles.
        kinds: Kinds of needles, see `needles.KINDS`.
        lengths: Prompt lengths, in tokens.
        depths: Where needles stand, from 0 (start) to 1 (end).
        per_depth: Prompts per kind, length and depth.
        seed: Of needles and stretches.
        seen: Whether the question is known when the context is read.
        corpus: Name of the haystack, for the record.

    Raises:
        InputError: If a length does not hold the needle, or a kind is not known.
    """
    _require_fit(lm, lengths)
    made: list[Sample] = []
    for kind in kinds:
        if kind not in needles.KINDS:
            raise unknown_name("kind of needle", kind, needles.KINDS)
        for length in lengths:
            made += needles.samples(
                kind,
                length_tokens=length,
                depths=depths,
                per_depth=per_depth,
                encode=lm.encode,
                haystack=haystack,
                seed=seed,
            )
    return Asking(
        name="needle",
        about=NEEDLE,
        samples=tuple(made),
        score=_any_reference,
        seen=seen,
        settings={"corpus": corpus, "seed": seed},
        row_labels=("kind", "length_tokens"),
        monotone=True,
        more=_by_depth,
    )


def ruler_task(  # noqa: PLR0913 - each is a choice of its own, by keyword
    lm: LanguageModel,
    haystack: str,
    *,
    subtasks: Sequence[str] = (),
    lengths: Sequence[int] = (4096,),
    count: int = 5,
    answer_tokens: int | None = None,
    seed: int = 0,
    seen: Seen = "after",
    corpus: str = "unnamed",
) -> Asking:
    """Return RULER as a task.

    Args:
        lm: The model; its tokenizer sets the lengths.
        haystack: Public-domain text in place of the essays.
        subtasks: Names from `ruler.TASKS`; all of them if empty.
        lengths: Prompt lengths, in tokens.
        count: Prompts per sub-task and length.
        answer_tokens: Ends answers earlier than RULER does (at 30 to 128 tokens), to save time.
        seed: Of the prompts.
        seen: Whether the question is known when the context is read.
        corpus: Name of the haystack, for the record.

    Raises:
        InputError: If a length is too small for a sub-task, or one is not known.
    """
    _require_fit(lm, lengths)
    names = tuple(subtasks) or tuple(ruler.TASKS)
    made: list[Sample] = []
    for name in names:
        if name not in ruler.TASKS:
            raise unknown_name("RULER task", name, ruler.TASKS)
        for length in lengths:
            made += ruler.samples(
                name,
                length_tokens=length,
                count=count,
                encode=lm.encode,
                haystack=haystack,
                seed=seed,
            )
    replaced = {name: ruler.SUBSTITUTES[name] for name in names if name in ruler.SUBSTITUTES}
    return Asking(
        name="ruler",
        about=" ".join([RULER, *(f"({name}: {how})" for name, how in replaced.items())]),
        samples=tuple(made if answer_tokens is None else _shortened(made, answer_tokens)),
        score=lambda sample, question, text: ruler.score(
            str(sample.labels["subtask"]), text, question.references
        ),
        seen=seen,
        settings={"corpus": corpus, "seed": seed, "answer_tokens": answer_tokens},
        row_labels=("subtask", "length_tokens"),
        monotone=True,
    )


def multi_question_task(
    lm: LanguageModel,
    haystack: str,
    *,
    lengths: Sequence[int] = (4096,),
    count: int = 4,
    questions: int = 5,
    seed: int = 0,
    seen: Seen = "after",
    corpus: str = "unnamed",
) -> Asking:
    """Return the task of asking several questions about one context.

    Args:
        lm: The model; its tokenizer sets the lengths.
        haystack: Public-domain text around the needles.
        lengths: Prompt lengths, in tokens.
        count: Contexts per length.
        questions: Questions per context.
        seed: Of needles and stretches.
        seen: Whether each question is known when the context is read.
        corpus: Name of the haystack, for the record.

    Raises:
        InputError: If the needles do not fit.
    """
    _require_fit(lm, lengths)
    made: list[Sample] = []
    for length in lengths:
        made += multi_question.samples(
            length_tokens=length,
            count=count,
            questions=questions,
            encode=lm.encode,
            decode=lm.decode,
            haystack=haystack,
            seed=seed,
        )
    return Asking(
        name="multi-question",
        about=multi_question.ABOUT,
        samples=tuple(made),
        score=multi_question.score,
        seen=seen,
        settings={"corpus": corpus, "seed": seed, "questions": questions},
        row_labels=("length_tokens",),
        monotone=True,
    )


def longbench_task(
    lm: LanguageModel,
    path: Path,
    *,
    version: int = 1,
    dataset: str | None = None,
    limit: int | None = None,
    seen: Seen = "after",
) -> Asking:
    """Return LongBench's samples of a local file as a task.

    Args:
        lm: The model; contexts that do not fit are cut in the middle.
        path: File or folder in the published format.
        version: 1 or 2.
        dataset: Data set of version 1, where the file's name does not say.
        limit: Samples per data set.
        seen: Whether the question is known when the context is read.

    Raises:
        InputError: If the file is missing or not in that format.
    """
    if version not in (1, 2):
        raise InputError(f"LongBench has versions 1 and 2, got {version}.")
    found = longbench.read_v1(path, dataset, limit=limit) if version == 1 else None
    samples = longbench.read_v2(path, limit=limit) if found is None else found
    return Asking(
        name="longbench",
        about=LONGBENCH.format(
            prompts=_labels(samples, "prompts"), words=_labels(samples, "words")
        ),
        samples=tuple(_fitted(lm, sample) for sample in samples),
        score=_longbench_score,
        seen=seen,
        settings={"version": version, "limit": limit},
        row_labels=("subtask",),
    )


def _fitted(lm: LanguageModel, sample: Sample) -> Sample:
    """A sample whose context fits into the model's, cut in the middle if need be."""
    asked = max(len(lm.encode(q.text)) + q.max_new_tokens for q in sample.questions)
    room = lm.context_tokens - asked
    ids = lm.encode(sample.context)
    if len(ids) <= room:
        return sample
    return replace(
        sample, context=lm.decode(list(longbench.cut_middle(ids, room - _REJOINED_TOKENS)))
    )


def _labels(samples: Sequence[Sample], name: str) -> str:
    """The different values of a label."""
    return ", ".join(sorted({str(s.labels[name]) for s in samples if name in s.labels})) or "none"


def _longbench_score(sample: Sample, question: Question, text: str) -> float:
    return longbench.score(str(sample.labels["subtask"]), text, sample)


def _shortened(samples: Sequence[Sample], most_tokens: int) -> list[Sample]:
    """Samples whose answers have at most so many tokens."""
    if most_tokens < 1:
        raise InputError(f"An answer has at least one token, got answer_tokens={most_tokens}.")
    return [
        replace(
            sample,
            questions=tuple(
                replace(asked, max_new_tokens=min(asked.max_new_tokens, most_tokens))
                for asked in sample.questions
            ),
        )
        for sample in samples
    ]


def _any_reference(sample: Sample, question: Question, text: str) -> float:
    del sample
    return float(any(wanted.lower() in text.lower() for wanted in question.references))


def _by_depth(items: Sequence[Item], records: Sequence[Record]) -> dict[str, Any]:
    """The score at each depth."""
    cells: dict[float, list[float]] = {}
    for item, record in zip(items, records, strict=True):
        cells.setdefault(float(item.labels["depth"]), []).extend(record.values["score"])
    return {
        "by_depth": [
            {"depth": depth, "score": sum(found) / len(found), "n": len(found)}
            for depth, found in sorted(cells.items())
        ]
    }


def _require_fit(lm: LanguageModel, lengths: Sequence[int]) -> None:
    if too_long := [length for length in lengths if length > lm.context_tokens]:
        raise InputError(
            f"{max(too_long)} tokens exceed the model's context of {lm.context_tokens}."
        )
