"""Samples: within their length, repeatable, one by one independent, refused where impossible."""

import contextlib
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loki_attn.errors import InputError, UnknownNameError
from loki_attn.evaluate import ruler

# Upstream's room for the answer.
MAX_NEW_TOKENS = {"vt": 30, "cwe": 120, "fwe": 50, "qa_1": 32, "qa_2": 32}
# What cannot be divided, for tasks made of large pieces.
PIECES = {
    "niah_multikey_2": "One of the special magic numbers for blue-lantern is: 1234567.\n" * 2,
    "niah_multikey_3": "One of the special magic uuids for is: ." + 72 * "a1" + "\n",
    "qa_2": "Document 10:\n" + 12 * "Beatrix Longbridge " + "\n\n",
    "cwe": "1000. something " * 3,
}


def used(sample, encode):
    (question,) = sample.questions
    return len(encode(sample.context)) + len(encode(question.text)) + question.max_new_tokens


def test_the_tasks_are_the_thirteen_published_ones():
    assert set(ruler.TASKS) == {
        *(f"niah_single_{number}" for number in (1, 2, 3)),
        *(f"niah_multikey_{number}" for number in (1, 2, 3)),
        *("niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe", "qa_1", "qa_2"),
    }
    rooms = {task: family.max_new_tokens for task, family in ruler.TASKS.items()}
    assert rooms == {task: MAX_NEW_TOKENS.get(task, 128) for task in ruler.TASKS}


def test_every_task_with_other_data_than_upstream_says_so():
    essays = ["single_2", "single_3", "multikey_1", "multivalue", "multiquery"]
    assert set(ruler.SUBSTITUTES) == {*(f"niah_{name}" for name in essays), "cwe", "qa_1", "qa_2"}
    assert "not SQuAD" in ruler.SUBSTITUTES["qa_1"]
    assert "not HotpotQA" in ruler.SUBSTITUTES["qa_2"]


@pytest.mark.parametrize("task", ruler.TASKS)
@pytest.mark.parametrize(
    ("tokenizer", "length_tokens"),
    [
        ("characters", 9001),
        ("characters", 3333),
        ("words", 777),
        ("words", 4097),
        ("pieces", 2999),
        ("pieces", 8192),
    ],
)
def test_a_sample_fills_its_length_and_does_not_exceed_it(
    make, encoders, task, tokenizer, length_tokens
):
    encode = encoders[tokenizer]
    for sample in make(task, tokenizer=tokenizer, length_tokens=length_tokens):
        least = 0.95 * length_tokens - len(encode(PIECES.get(task, "")))
        assert least <= used(sample, encode) <= length_tokens
        assert sample.labels == {"subtask": task, "length_tokens": length_tokens}


@pytest.mark.parametrize("task", ruler.TASKS)
def test_a_sample_depends_on_seed_length_and_number_alone(make, task):
    def run(**options):
        return make(task, tokenizer="words", **{"length_tokens": 901, **options})

    three = run(count=3)
    random.seed(5)
    assert run(count=1) == three[:1]
    assert run(count=3) == three
    assert [sample.name for sample in three] == [f"{task}/901/{index}" for index in range(3)]
    seen = [three[0], three[1], run(count=1, seed=1)[0], run(count=1, length_tokens=902)[0]]
    assert len({sample.questions[0].text + sample.context for sample in seen}) == 4
    assert len({sample.questions[0].references for sample in seen}) == 4


@pytest.mark.parametrize("task", ruler.TASKS)
def test_too_small_a_length_is_refused_with_what_it_takes(make, task):
    room = MAX_NEW_TOKENS.get(task, 128)
    with pytest.raises(
        InputError,
        match=rf"^100 tokens are too few for RULER's {task}: its smallest sample takes \d+, "
        rf"{room} of them for the answer; ask for a larger length_tokens$",
    ):
        make(task, length_tokens=100, count=1)


@settings(deadline=None)
@given(st.sampled_from(sorted(ruler.TASKS)), st.integers(-1, 1500), st.integers(0, 2**40))
def test_any_length_is_kept_or_refused(task, length_tokens, seed):
    def encode(text):
        return text.split()

    story = " ".join(
        f"On day {number} the old man went down to the river with a lamp, a net and a friend."
        for number in range(60)
    )

    def run():
        return ruler.samples(
            task, length_tokens=length_tokens, count=1, encode=encode, haystack=story, seed=seed
        )

    if length_tokens >= 500:
        assert 0.9 * length_tokens <= used(run()[0], encode) <= length_tokens
    elif length_tokens < 128:
        with pytest.raises(InputError, match="tokens are too few"):
            run()
    else:
        with contextlib.suppress(InputError):
            assert used(run()[0], encode) <= length_tokens


def test_no_samples_are_no_samples_and_fewer_are_refused(make):
    assert make("vt", count=0) == []
    with pytest.raises(InputError, match="count is -1; expected 0 or more samples"):
        make("vt", count=-1)


def test_a_task_that_is_not_there_is_refused(make):
    with pytest.raises(UnknownNameError, match="Unknown RULER task 'niah_single_4'"):
        make("niah_single_4", length_tokens=1000)


def test_an_empty_haystack_is_refused_where_prose_is_needed(make):
    for task in ("niah_single_2", "qa_1"):
        with pytest.raises(InputError, match="The haystack is empty"):
            make(task, haystack=" ")
    assert make("vt", haystack="")
