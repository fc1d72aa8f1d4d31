"""Common and frequent words: counting gives the references, with the published frequencies."""

import math
import re
from collections import Counter

import pytest


def lists(sample):
    """The example's words and answer, and the words of the list."""
    _, example, listed = re.split(r"The numbered list below [^\n]*\n", sample.context)
    example, answer = re.split(r"\nQuestion[^\n]*\nAnswer[^:]*:", example)
    return numbered(example), numbered(answer), numbered(listed)


def numbered(text):
    found = re.findall(r"(\d+)\. (\S+)", text)
    assert [int(number) for number, _ in found] == list(range(1, len(found) + 1))
    return [word for _, word in found]


@pytest.mark.parametrize(
    ("tokenizer", "length_tokens", "often", "seldom", "example_often", "example_seldom"),
    [
        ("words", 4095, 6, 1, 3, 1),
        ("words", 4096, 30, 3, 10, 3),
        ("pieces", 3001, 6, 1, 3, 1),
        ("pieces", 9001, 30, 3, 10, 3),
    ],
)
def test_ten_words_come_more_often_than_all_others(
    make, tokenizer, length_tokens, often, seldom, example_often, example_seldom
):
    for sample in make("cwe", tokenizer=tokenizer, length_tokens=length_tokens):
        example, answer, listed = lists(sample)
        counted = Counter(listed)
        common = {word for word, count in counted.items() if count == often}
        assert common == set(sample.questions[0].references)
        assert len(common) == len(sample.questions[0].references) == 10
        assert {count for word, count in counted.items() if word not in common} == {seldom}
        example_counted = Counter(example)
        assert {example_counted[word] for word in answer} == {example_often}
        assert len(set(answer)) == 10
        assert set((example_counted - Counter(answer * example_often)).values()) == {example_seldom}
        assert len(example_counted) == (20 if often == 6 else 40)


def test_no_common_word_lies_inside_of_another(make):
    for sample in make("cwe", count=20, tokenizer="words"):
        words = sample.questions[0].references
        assert not [(a, b) for a in words for b in words if a != b and a in b]


def test_a_list_longer_than_the_dictionary_is_filled_with_pairs(make):
    sample = make("cwe", count=1, tokenizer="words", length_tokens=40_001)[0]
    _, _, listed = lists(sample)
    assert any("-" in word for word in listed)
    assert len(listed) == Counter(Counter(listed).values())[3] * 3 + 10 * 30


def test_the_words_are_shuffled(make):
    sample = make("cwe", count=1, tokenizer="words", length_tokens=4097)[0]
    _, _, listed = lists(sample)
    for word in sample.questions[0].references:
        assert 0 < listed[: len(listed) // 2].count(word) < 30


@pytest.mark.parametrize(
    ("tokenizer", "length_tokens"), [("words", 300), ("words", 5001), ("pieces", 4099)]
)
def test_coded_words_follow_a_zeta_distribution_and_the_dots_lead_it(
    make, tokenizer, length_tokens
):
    for sample in make("fwe", tokenizer=tokenizer, length_tokens=length_tokens, count=3):
        coded = sample.context.split("\n", 1)[1].split()
        (dots, most), *ranked = Counter(coded).most_common()
        assert dots == "..."
        assert [word for word, _ in ranked[:3]] == list(sample.questions[0].references)
        assert all(re.fullmatch("[a-z]{6}", word) for word, _ in ranked)
        assert ranked[2][1] > ranked[3][1]
        # The counts are those of one sum, rounded down: alpha 2 and no other.
        possible = [
            total
            for total in range(most, 3 * most)
            if all(
                count == math.floor(total * 6 / math.pi**2 / rank**2)
                for rank, count in enumerate([most, *(count for _, count in ranked)], start=1)
            )
        ]
        assert possible
        assert len(ranked) + 1 <= max(length_tokens // 50, 8)


def test_coded_words_are_different_ones_in_each_sample(make):
    first, second = make("fwe")
    assert not set(first.questions[0].references) & set(second.questions[0].references)
