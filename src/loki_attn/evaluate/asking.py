"""Asking: the task behind needles, RULER, LongBench and several questions: read, ask, score."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, final, get_args

import torch

from loki_attn.errors import InputError, unknown_name
from loki_attn.evaluate.answering import answer
from loki_attn.evaluate.contending import read
from loki_attn.evaluate.protocol import Contender, LanguageModel
from loki_attn.evaluate.samples import Question, Sample
from loki_attn.evaluate.summary import summarise, traffic_of
from loki_attn.evaluate.task import Item, Record

Seen = Literal["after", "before"]
Score = Callable[[Sample, Question, str], float]
MoreMetrics = Callable[[Sequence[Item], Sequence[Record]], dict[str, Any]]

PROTOCOLS: Final[dict[Seen, str]] = {
    "after": (
        "the context is read densely, without sight of the question; then each token of the "
        "question selects for itself, and the answer is decoded greedily, one token per step; "
        "what evicts drops rows of the context before it sees the question"
    ),
    "before": (
        "context and question are read densely, in sight of each other; the last token of the "
        "question and the answer go through the decode path, greedily, one token per step"
    ),
}


@final
@dataclass(frozen=True, kw_only=True)
class Asking:
    """The task.

    Attributes:
        name: Name in rows.
        about: What the samples are and how answers are scored, for the protocol.
        samples: What is asked.
        score: From a sample, its question and an answer to a number in [0, 1].
        seen: Whether the question comes "after" the context was read and, for methods that
            evict, compressed, or "before"; see `PROTOCOLS`.
        settings: What defines the samples, plain JSON.
        row_labels: Labels that make a row of their own.
        monotone: Whether an answer of full score keeps it whatever follows: it then ends there.
        more: Further metrics of a row.
    """

    name: str
    about: str
    samples: tuple[Sample, ...]
    score: Score
    seen: Seen = "after"
    settings: Mapping[str, Any] = field(default_factory=dict)
    row_labels: tuple[str, ...] = ()
    monotone: bool = False
    more: MoreMetrics = lambda items, records: {}
    needs_dense: bool = True
    decodes: bool = True

    def __post_init__(self) -> None:
        """Refuse what could not be asked."""
        if self.seen not in PROTOCOLS:
            raise unknown_name("order of question and context", self.seen, get_args(Seen))
        for sample in self.samples:
            if not sample.questions or not sample.context:
                raise InputError(f"Sample {sample.name!r} needs a context and a question.")
            if any(not asked.text or asked.max_new_tokens < 1 for asked in sample.questions):
                raise InputError(
                    f"A question of sample {sample.name!r} has no text, or no room for an answer; "
                    "give it both."
                )

    @property
    def protocol(self) -> str:
        """What is asked, how it is read, how it is scored."""
        return f"{self.about}; {PROTOCOLS[self.seen]}"

    def items(self, lm: LanguageModel) -> list[Item]:
        """The samples."""
        del lm
        return [
            Item(name=sample.name, content=_content(sample), labels=sample.labels)
            for sample in self.samples
        ]

    def measure(
        self,
        lm: LanguageModel,
        item: Item,
        contenders: Sequence[Contender],
        dense: Record | None,
    ) -> Iterator[tuple[Contender, Record]]:
        """Read the context once, and let every contender answer its questions."""
        del dense
        sample = next(sample for sample in self.samples if sample.name == item.name)
        context = lm.encode(sample.context)
        questions = [lm.encode(question.text) for question in sample.questions]
        longest = max(
            len(ids) + question.max_new_tokens
            for ids, question in zip(questions, sample.questions, strict=True)
        )
        if len(context) + longest > lm.context_tokens:
            raise InputError(
                f"{sample.name} needs {len(context) + longest} tokens, the model's context is "
                f"{lm.context_tokens}; make it shorter."
            )
        asked = list(self._read(lm, context, questions, contenders))
        for contender in contenders:
            found = [
                self._ask(lm, cache, last, contender, sample, question)
                for (cache, last), question in zip(asked, sample.questions, strict=True)
            ]
            yield contender, _together(found)

    def metrics(
        self, items: Sequence[Item], records: Sequence[Record], dense: Sequence[Record] | None
    ) -> dict[str, Any]:
        """The score with its interval, and its difference to dense."""
        found = summarise(records, dense, what="samples")
        return {**found, **traffic_of(records), **self.more(items, records)}

    def _read(
        self,
        lm: LanguageModel,
        context: list[int],
        questions: Sequence[list[int]],
        contenders: Sequence[Contender],
    ) -> Iterator[tuple[Any, list[int]]]:
        """Per question, the cache of what is read densely, and what is left to read."""
        if self.seen == "after":
            shared = read(lm, torch.tensor([context]), contenders)
            yield from ((shared, question) for question in questions)
            return
        for question in questions:
            whole = context + question
            yield read(lm, torch.tensor([whole[:-1]]), contenders), whole[-1:]

    def _ask(
        self,
        lm: LanguageModel,
        cache: Any,
        last: list[int],
        contender: Contender,
        sample: Sample,
        question: Question,
    ) -> Record:
        def enough(text: str) -> bool:
            return self.monotone and self.score(sample, question, text) >= 1

        said = answer(
            lm,
            cache,
            torch.tensor([last]),
            contender,
            max_new_tokens=question.max_new_tokens,
            stop=question.stop,
            enough=enough,
        )
        return Record(
            values={"score": [self.score(sample, question, said.text)]},
            **said.spent,
            notes={"answers": [said.text]},
        )


def _content(sample: Sample) -> dict[str, Any]:
    asked = [
        [question.text, list(question.references), question.max_new_tokens, list(question.stop)]
        for question in sample.questions
    ]
    return {"context": sample.context, "questions": asked}


def _together(records: Sequence[Record]) -> Record:
    """One record of a sample's questions."""
    return Record(
        values={"score": [value for record in records for value in record.values["score"]]},
        decode_calls=sum(record.decode_calls for record in records),
        every_query_calls=sum(record.every_query_calls for record in records),
        read_bytes=sum(record.read_bytes for record in records),
        dense_bytes=sum(record.dense_bytes for record in records),
        kept_bytes=sum(record.kept_bytes for record in records),
        evicted_rows=sum(record.evicted_rows for record in records),
        notes={"answers": [text for record in records for text in record.notes["answers"]]},
    )
