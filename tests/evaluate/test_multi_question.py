"""Several questions of one context: every needle stands once, every question has its code."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loki_attn.errors import InputError
from loki_attn.evaluate import multi_question

HAYSTACK = " ".join(f"Line {i} of a tale that goes on." for i in range(600))


def encode(text):
    return [ord(character) for character in text]


def decode(tokens):
    return "".join(map(chr, tokens))


def made(**changes):
    chosen = {"length_tokens": 3000, "count": 2, "questions": 4, "haystack": HAYSTACK, **changes}
    return multi_question.samples(encode=encode, decode=decode, **chosen)


@given(length=st.integers(1500, 6000), questions=st.integers(2, 9), seed=st.integers(0, 9))
def test_every_needle_stands_once_and_everything_fits(length, questions, seed):
    for sample in made(length_tokens=length, questions=questions, seed=seed):
        assert len(sample.questions) == questions
        places = []
        for question in sample.questions:
            (code,) = question.references
            owner = question.text.rpartition("locker of ")[2].partition(" ")[0]
            needle = f"The locker of {owner} opens with the code {code}."
            assert sample.context.count(needle) == 1
            assert sample.context.count(code) == 1
            assert code not in question.text
            assert question.text.endswith("opens with the code")
            places.append(sample.context.index(needle))
            whole = len(encode(sample.context + question.text)) + question.max_new_tokens
            assert 0.93 * length - 100 <= whole <= length
        assert places == sorted(places)
        gaps = [b - a for a, b in pairwise(places)]
        assert max(gaps) < 2.5 * length / questions


def test_samples_do_not_depend_on_how_many_are_made():
    assert made(count=3)[:2] == made(count=2)
    assert made(seed=1) != made(seed=2)
    assert made(count=2)[0].context != made(count=2)[1].context


def test_scores():
    sample = made()[0]
    question = sample.questions[0]
    (code,) = question.references
    assert multi_question.score(sample, question, f" {code}.") == 1.0
    assert multi_question.score(sample, question, f" {int(code) + 1}") == 0.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"questions": 1}, "Ask 2 to 34 questions of one context or more, got 1 of 2"),
        ({"questions": 99}, "Ask 2 to 34 questions"),
        ({"count": 0}, "got 4 of 0"),
        ({"length_tokens": 300}, "4 questions about 300 tokens leave -"),
        ({"haystack": HAYSTACK[:500]}, "the haystack has 500"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(InputError, match=message):
        made(**changes)
