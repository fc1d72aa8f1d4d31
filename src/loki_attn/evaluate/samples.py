"""Samples: a long context, questions about it, and what a right answer contains."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, final


@final
@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked after a context has been read.

    Attributes:
        text: What follows the context, the beginning of the answer included.
        references: Texts that a right answer contains; how they count is the task's.
        max_new_tokens: Where an answer ends at the latest.
        stop: Strings that end an answer before that; they do not belong to it.
    """

    text: str
    references: tuple[str, ...]
    max_new_tokens: int
    stop: tuple[str, ...] = ()


@final
@dataclass(frozen=True, kw_only=True)
class Sample:
    """One context and its questions.

    Attributes:
        name: Unique in its task.
        context: What is read first, without sight of the questions.
        questions: Asked one by one, each of the untouched context.
        labels: What the sample belongs to, plain JSON: sub-task, length, depth.
    """

    name: str
    context: str
    questions: tuple[Question, ...]
    labels: Mapping[str, Any] = field(default_factory=dict)
