"""Generating: samples of a task, filled to a length in tokens of a tokenizer."""

import random
from collections.abc import Callable, Sequence
from functools import partial

from loki_attn.errors import InputError, unknown_name
from loki_attn.evaluate.ruler.draft import Draft, Setting
from loki_attn.evaluate.ruler.families import TASKS, Family
from loki_attn.evaluate.ruler.filling import most_units
from loki_attn.evaluate.ruler.scoring import recall_all, recall_any
from loki_attn.evaluate.samples import Question, Sample


def samples(
    task: str,
    *,
    length_tokens: int,
    count: int,
    encode: Callable[[str], list[int]],
    haystack: str,
    seed: int = 0,
) -> list[Sample]:
    """Make samples of a RULER task for a tokenizer and a length.

    Args:
        task: A name from `TASKS`.
        length_tokens: Upper limit of context, question and answer together, in tokens; the
            context is filled up to it as closely as the task allows.
        count: How many; a sample does not depend on how many are made.
        encode: Tokens of a text.
        haystack: Public-domain text, for the tasks that need prose; repeated where too short.
        seed: Of everything drawn.

    Returns:
        `count` samples of one question each.

    Raises:
        UnknownNameError: If there is no such task.
        InputError: If the length is too small for the task, `count` is negative, or the haystack
            is not enough.

    Source: arXiv 2404.06654, section 3.
    """
    family = _family(task)
    if count < 0:
        raise InputError(f"count is {count}; expected 0 or more samples")
    setting = Setting(haystack=haystack, length_tokens=length_tokens)
    made = []
    for index in range(count):
        name = f"{task}/{length_tokens}/{index}"
        draft = _filled(task, family, setting, encode, f"{seed}/{name}")
        question = Question(
            text=draft.question,
            references=draft.references,
            max_new_tokens=family.max_new_tokens,
        )
        made.append(
            Sample(
                name=name,
                context=draft.context,
                questions=(question,),
                labels={"subtask": task, "length_tokens": length_tokens},
            )
        )
    return made


def score(task: str, text: str, references: Sequence[str]) -> float:
    """Score an answer to a RULER task as upstream does.

    Args:
        task: A name from `TASKS`.
        text: The answer.
        references: Those of its question.

    Returns:
        From 0 to 1: the share of the references found, or for qa_1 and qa_2 whether one was.

    Raises:
        UnknownNameError: If there is no such task.
    """
    recall = recall_all if _family(task).score == "all" else recall_any
    return recall(text, references)


def _family(task: str) -> Family:
    if task not in TASKS:
        raise unknown_name("RULER task", task, TASKS)
    return TASKS[task]


def _filled(
    task: str,
    family: Family,
    setting: Setting,
    encode: Callable[[str], list[int]],
    tag: str,
) -> Draft:
    make = partial(_draft, family, setting, tag)

    def cost(units: int) -> int:
        draft = make(units)
        return len(encode(draft.context)) + len(encode(draft.question))

    room_tokens = setting.length_tokens - family.max_new_tokens
    units = most_units(cost, room_tokens, family.least_units)
    if units is None:
        needed = cost(family.least_units) + family.max_new_tokens
        raise InputError(
            f"{setting.length_tokens} tokens are too few for RULER's {task}: its smallest sample "
            f"takes {needed}, {family.max_new_tokens} of them for the answer; ask for a larger "
            "length_tokens"
        )
    return make(units)


def _draft(family: Family, setting: Setting, tag: str, units: int) -> Draft:
    # A fresh source each time: what is drawn depends on the sample alone.
    return family.make(random.Random(tag), units, setting)
