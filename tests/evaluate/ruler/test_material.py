"""Material: plain words, whole sentences, stretches of any length."""

import random
import re
from itertools import islice

import pytest

from loki_attn.errors import InputError
from loki_attn.evaluate.ruler.material import (
    cut,
    key_words,
    letters,
    numbers,
    sentences,
    stretch,
    words,
)


def test_words_are_plain_many_and_in_order():
    assert len(words()) > 1000
    assert list(words()) == sorted(set(words()))
    assert all(re.fullmatch("[a-z]{4,9}", word) for word in words())
    assert not {"that", "with", "there"} & set(words())


def test_sentences_end_where_sentences_end():
    text = 'He came.  "Who?" said\nMr. Holmes. "I see!" (No.) Then 3.5 of them went'
    assert sentences(text) == (
        "He came.",
        '"Who?" said Mr. Holmes.',
        '"I see!"',
        "(No.)",
        "Then 3.5 of them went",
    )


def test_an_empty_text_has_no_sentences():
    with pytest.raises(InputError, match="The haystack is empty; expected public-domain text"):
        sentences(" \n ")


@pytest.mark.parametrize("num_words", [1, 2, 5, 7, 100])
def test_a_stretch_has_the_words_asked_for_and_starts_again(num_words):
    text = "One two three. Four five."
    taken = stretch(random.Random(0), text, num_words)
    assert sum(len(one.split()) for one in taken) == num_words
    assert all(one.endswith(".") for one in taken)
    assert set(taken[:-1]) <= set(sentences(text))


def test_a_cut_sentence_ends_like_a_sentence():
    assert cut(["so,", "he", "went"], 1) == "so."
    assert cut(["so,", "he", "went!"], 3) == "so, he went!"


def test_names_and_values_come_once():
    draw = random.Random(0)
    assert len(set(islice(key_words(draw), 3000))) == 3000
    assert sorted(map(int, islice(numbers(draw, 1), 9))) == list(range(1, 10))
    assert sorted(islice(letters(draw, "ab", 2), 4)) == ["aa", "ab", "ba", "bb"]
