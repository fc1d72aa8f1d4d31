"""Needles: as many as published, and the answer is what a reader of the context finds."""

import re
from collections import defaultdict

import pytest

from loki_attn.evaluate.ruler.material import NOISE

NEEDLE = re.compile(r"One of the special magic (\w+)s for (\S+) is: (\S+)\.(?=\s|$)")
ASKED = re.compile(
    r"The special magic (\w+?)(s?) for (.+) mentioned in the provided text (is|are)$"
)
WORD = r"[a-z]{4,9}-[a-z]{4,9}"
NUMBER = r"[1-9]\d{6}"
UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
# Task: what is around the needles, keys, values of each, keys asked for, look of keys and values.
PUBLISHED = {
    "niah_single_1": ("noise", 1, 1, 1, WORD, NUMBER),
    "niah_single_2": ("prose", 1, 1, 1, WORD, NUMBER),
    "niah_single_3": ("prose", 1, 1, 1, WORD, UUID),
    "niah_multikey_1": ("prose", 4, 1, 1, WORD, NUMBER),
    "niah_multikey_2": ("needles", None, 1, 1, WORD, NUMBER),
    "niah_multikey_3": ("needles", None, 1, 1, UUID, UUID),
    "niah_multivalue": ("prose", 1, 4, 1, WORD, NUMBER),
    "niah_multiquery": ("prose", 4, 1, 4, WORD, NUMBER),
}


def read(sample):
    """The values of each key in the context, and the keys that the question names."""
    held = defaultdict(list)
    for _, key, value in NEEDLE.findall(sample.context):
        held[key].append(value)
    asked = ASKED.search(sample.questions[0].text)
    return held, re.split(r", and |, ", asked[3]), asked


@pytest.mark.parametrize("task", PUBLISHED)
def test_a_reader_of_the_context_finds_the_references_and_nothing_else(make, task):
    _, keys, values, queries, key_look, value_look = PUBLISHED[task]
    for sample in make(task, count=4):
        held, asked, _ = read(sample)
        assert len(held) == keys if keys else len(held) > 20
        assert {len(of) for of in held.values()} == {values}
        assert len(asked) == len(set(asked)) == queries
        references = sample.questions[0].references
        assert sorted(references) == sorted(value for key in asked for value in held[key])
        assert len(set(references)) == queries * values
        for key, of in held.items():
            assert re.fullmatch(key_look, key)
            assert all(re.fullmatch(value_look, value) for value in of)
            assert all(sample.context.count(value) == 1 for value in of)


@pytest.mark.parametrize("task", PUBLISHED)
def test_around_the_needles_is_what_the_task_is_named_for(make, haystack, task):
    introduction, text = make(task, count=1)[0].context.split("\n", 1)
    rest = NEEDLE.sub("", text)
    if PUBLISHED[task][0] == "noise":
        assert set(re.split(r"(?<=\.)\s+", rest.strip())) == set(NOISE)
    elif PUBLISHED[task][0] == "needles":
        assert not rest.strip()
    else:
        known = set(haystack.split())
        strange = [word for word in rest.split() if word not in known]
        assert len(strange) <= 1, strange  # the last word, which was cut from its sentence
    assert "after the text." in introduction


@pytest.mark.parametrize("task", PUBLISHED)
def test_the_question_begins_the_answer_in_the_right_number(make, task):
    _, _, values, queries, _, look = PUBLISHED[task]
    _, _, asked = read(make(task, count=1)[0])
    several = values * queries > 1
    assert (asked[1], asked[2], asked[4]) == (
        "uuid" if look is UUID else "number",
        "s" if several else "",
        "are" if several else "is",
    )


@pytest.mark.parametrize("task", ["niah_single_1", "niah_single_2", "niah_multikey_2"])
def test_the_needle_asked_for_stands_anywhere(make, task):
    depths = []
    for sample in make(task, count=30, tokenizer="words", length_tokens=700):
        at = sample.context.index(sample.questions[0].references[0])
        depths.append(at / len(sample.context))
    assert min(depths) < 0.3
    assert max(depths) > 0.7
    assert sum(0.3 < depth < 0.7 for depth in depths) >= 3


def test_needles_in_prose_stand_between_sentences(make):
    for sample in make("niah_multikey_1", count=4):
        text = sample.context.split("\n", 1)[1]
        for needle in NEEDLE.finditer(text):
            before = text[: needle.start()].rstrip()
            assert not before or before[-1] in ".!?\"')"
