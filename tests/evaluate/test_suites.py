"""Suites: what a user chooses becomes a task, and what does not fit is refused or cut."""

import json

import pytest

from loki_attn import texts
from loki_attn.errors import InputError
from loki_attn.evaluate import suites
from loki_attn.evaluate.task import Item, Record

HAYSTACK = texts.load("continuation")[:60_000]


class Characters:
    """As much of a language model as suites ask for: tokens are characters."""

    context_tokens = 8000

    def encode(self, text):
        return [ord(character) for character in text]

    def decode(self, tokens):
        return "".join(map(chr, tokens))


LM = Characters()


def test_needles_of_every_kind_length_and_depth():
    task = suites.needle_task(
        LM, HAYSTACK, kinds=["number", "city"], lengths=[2000, 3000], depths=[0, 1], per_depth=3
    )
    labels = [tuple(item.labels.values()) for item in task.items(LM)]
    wanted = {
        (kind, length, depth)
        for kind in ("number", "city")
        for length in (2000, 3000)
        for depth in (0.0, 1.0)
    }
    assert set(labels) == wanted
    assert len(labels) == 3 * len(wanted)
    assert task.row_labels == ("kind", "length_tokens")


def test_scores_by_depth():
    items = [Item(name=str(i), content=i, labels={"depth": i % 2}) for i in range(4)]
    records = [Record(values={"score": [score]}) for score in (1.0, 0.0, 0.5, 1.0)]
    task = suites.needle_task(LM, HAYSTACK, lengths=[2000])
    assert task.more(items, records)["by_depth"] == [
        {"depth": 0.0, "score": 0.75, "n": 2},
        {"depth": 1.0, "score": 0.5, "n": 2},
    ]


def test_ruler_is_all_of_it_unless_told_otherwise():
    task = suites.ruler_task(LM, HAYSTACK, lengths=[7900], count=1)
    assert len({item.labels["subtask"] for item in task.items(LM)}) == 13
    assert "SQuAD" in task.protocol


def test_shorter_answers_are_said_and_meant():
    whole = suites.ruler_task(LM, HAYSTACK, subtasks=["vt", "fwe"], lengths=[5000], count=1)
    cut = suites.ruler_task(
        LM, HAYSTACK, subtasks=["vt", "fwe"], lengths=[5000], count=1, answer_tokens=40
    )
    room = [[q.max_new_tokens for s in t.samples for q in s.questions] for t in (whole, cut)]
    assert room == [[30, 50], [30, 40]]
    assert (whole.settings["answer_tokens"], cut.settings["answer_tokens"]) == (None, 40)
    with pytest.raises(InputError, match="at least one token, got answer_tokens=0"):
        suites.ruler_task(LM, HAYSTACK, subtasks=["vt"], lengths=[5000], answer_tokens=0)


def test_scores_of_answers():
    task = suites.ruler_task(LM, HAYSTACK, subtasks=["vt"], lengths=[5000], count=1)
    (sample,) = task.samples
    (question,) = sample.questions
    assert task.score(sample, question, ", ".join(question.references[:2])) == 0.4


@pytest.fixture
def hotpot(tmp_path):
    def write(words):
        record = {
            "input": "Who kept the light?",
            "context": f"Ellen kept the light. {'They rowed on. ' * words}The gulls cried.",
            "answers": ["Ellen"],
            "length": words,
            "dataset": "hotpotqa",
            "language": "en",
            "all_classes": None,
            "_id": "1",
        }
        path = tmp_path / "hotpotqa.jsonl"
        path.write_text(json.dumps(record) + "\n")
        return path

    return write


def test_contexts_that_fit_are_left_alone_and_others_lose_their_middle(hotpot):
    (short,) = suites.longbench_task(LM, hotpot(10)).samples
    assert short.context.count("They rowed on.") == 10
    (long,) = suites.longbench_task(LM, hotpot(2000)).samples
    assert "Ellen kept the light." in long.context
    assert long.context.endswith(short.context[-20:])
    (question,) = long.questions
    whole = len(long.context) + len(question.text) + question.max_new_tokens
    assert LM.context_tokens - 40 <= whole <= LM.context_tokens


def test_longbench_scores_and_says_whose_prompts(hotpot):
    task = suites.longbench_task(LM, hotpot(10))
    (sample,) = task.samples
    (question,) = sample.questions
    assert task.score(sample, question, "Ellen") == 1.0
    assert task.score(sample, question, "Nobody") == 0.0
    assert "prompts: " in task.protocol
    with pytest.raises(InputError, match="LongBench has versions 1 and 2, got 3"):
        suites.longbench_task(LM, hotpot(10), version=3)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: suites.needle_task(LM, HAYSTACK, lengths=[8200]),
            "8200 tokens exceed",
        ),
        (
            lambda: suites.needle_task(LM, HAYSTACK, kinds=["x"], lengths=[900]),
            "kind of needle 'x'",
        ),
        (lambda: suites.ruler_task(LM, HAYSTACK, subtasks=["x"], lengths=[900]), "RULER task 'x'"),
        (lambda: suites.ruler_task(LM, HAYSTACK, lengths=[8001]), "8001 tokens exceed"),
        (lambda: suites.multi_question_task(LM, HAYSTACK, lengths=[9000]), "9000 tokens exceed"),
    ],
)
def test_refusals(build, message):
    with pytest.raises(InputError, match=message):
        build()
