"""Needles: one at the depth asked for, an answer that only the context gives."""

import random
import re
from itertools import islice

import pytest

from loki_attn import texts
from loki_attn.errors import InputError, UnknownNameError
from loki_attn.evaluate import needles
from loki_attn.evaluate.ruler.material import sentences

HAYSTACK = texts.load("continuation")
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
LOOKS = {
    "number": r"[1-9]\d{4}",
    "city": r"[1-9]\d{4}",
    "uuid": r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}",
    "sentence": r"[a-z]+ [a-z]+",
}
# The needle as a reader would look for it.
NEEDLES = {
    "number": r"The pass key is (\S+)\.",
    "city": r"The magic number of (\w+) is (\S+)\.",
    "uuid": r"The seal of the archive reads (\S+)\.",
    "sentence": (
        r"At the ([A-Z]\w+ [A-Z]\w+) that evening, (.+?) ordered the (\w+ \w+) and ate alone\."
    ),
}


def encode_words(text):
    return text.split()


def encode_letters(text):
    return list(text)


def make(kind, *, length_tokens=700, depths=DEPTHS, per_depth=2, encode=encode_words, **options):
    return needles.samples(
        kind,
        length_tokens=length_tokens,
        depths=depths,
        per_depth=per_depth,
        encode=encode,
        **{"haystack": HAYSTACK, **options},
    )


def test_the_kinds_are_the_ones_tested_here():
    assert set(needles.KINDS) == set(LOOKS) == set(NEEDLES)


@pytest.mark.parametrize("kind", LOOKS)
def test_the_answer_stands_once_in_the_context_and_not_in_the_question(kind):
    for sample in make(kind):
        (question,) = sample.questions
        (answer,) = question.references
        assert re.fullmatch(LOOKS[kind], answer)
        (found,) = re.finditer(NEEDLES[kind], sample.context)
        assert found.groups()[-1] == answer
        assert all(word in question.text for word in found.groups()[:-1])
        assert sample.context.count(answer) == 1
        assert answer not in question.text
        assert answer not in HAYSTACK


@pytest.mark.parametrize("kind", LOOKS)
def test_the_needle_stands_at_the_sentence_boundary_nearest_to_its_depth(kind):
    for sample in make(kind, length_tokens=1500):
        text = sample.context.split("\n\n", 1)[1]
        needle = re.search(NEEDLES[kind], text)
        before, after = text[: needle.start()], text[needle.end() :]
        depth = sample.labels["depth"]
        assert bool(before) == (depth > 0)
        assert bool(after) == (depth < 1)
        assert not before or before.rstrip()[-1] in ".!?\"')"
        assert abs(len(before) / (len(before) + len(after)) - depth) < 0.06
        assert set(sentences(HAYSTACK)) >= {*sentences(before or after)[:1]}


@pytest.mark.parametrize("kind", LOOKS)
@pytest.mark.parametrize(
    ("encode", "length_tokens"),
    [(encode_words, 333), (encode_words, 4097), (encode_letters, 1501), (encode_letters, 12_000)],
)
def test_a_sample_fills_its_length_and_does_not_exceed_it(kind, encode, length_tokens):
    for sample in make(kind, encode=encode, length_tokens=length_tokens, depths=(0.3,)):
        (question,) = sample.questions
        answer_tokens = len(encode(question.references[0]))
        assert answer_tokens + 4 <= question.max_new_tokens <= answer_tokens + 12
        assert question.stop == ("\n",)
        used = len(encode(sample.context + question.text)) + question.max_new_tokens
        assert 0.95 * length_tokens <= used <= length_tokens


@pytest.mark.parametrize("kind", LOOKS)
def test_a_sample_depends_on_its_own_labels_alone(kind):
    one_depth = make(kind, depths=(0.5,), per_depth=1)
    assert make(kind, depths=(0.1, 0.5), per_depth=3)[3:4] == one_depth
    assert make(kind, depths=(0.5,), per_depth=1, seed=1) != one_depth
    names = [sample.name for sample in make(kind)]
    assert len(set(names)) == 10
    assert one_depth[0].labels == {"kind": kind, "length_tokens": 700, "depth": 0.5}


@pytest.mark.parametrize("kind", LOOKS)
def test_stretches_and_answers_differ_and_no_answer_is_frequent(kind):
    made = make(kind, depths=(0.5,), per_depth=12, length_tokens=200)
    assert len({sample.context[-200:] for sample in made}) == 12
    draw = random.Random(0)
    answers = [needles.KINDS[kind](draw).answer for _ in range(800)]
    assert len(set(answers)) >= 100
    assert max(map(answers.count, set(answers))) <= 20


def test_answers_that_the_haystack_holds_are_not_hidden():
    draw = random.Random(3)
    dishes = {
        needle.answer for needle in islice(iter(lambda: needles.KINDS["sentence"](draw), 0), 3000)
    }
    told = sorted(dishes)[:-5]
    haystack = " ".join(f"They had {dish} for their supper." for dish in told)
    for sample in make("sentence", haystack=haystack, per_depth=1):
        assert sample.questions[0].references[0] in set(dishes) - set(told)
    everything = haystack + " ".join(f"They had {dish} too." for dish in dishes)
    with pytest.raises(
        InputError, match="holds the answers of needles of kind 'sentence' already; give another"
    ):
        make("sentence", haystack=everything)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"length_tokens": 60}, r"60 tokens are too few for a needle of kind 'number': its "),
        ({"depths": (0.5, 1.5)}, r"depth is 1\.5; expected a share of the text from 0 to 1"),
        ({"depths": (0.5, 0.5)}, r"depths are \[0\.5, 0\.5\]; expected each of them once"),
        ({"depths": (float("nan"),)}, r"depth is nan; expected a share"),
        ({"per_depth": -1}, r"per_depth is -1; expected 0 or more samples at each depth"),
        ({"haystack": " "}, r"The haystack is empty"),
    ],
)
def test_what_cannot_be_made_is_refused(options, text):
    with pytest.raises(InputError, match=text):
        make("number", **options)


def test_a_kind_that_is_not_there_is_refused():
    with pytest.raises(UnknownNameError, match=r"Unknown kind of needle 'numbers'\. Did you mean"):
        make("numbers")
