"""Variable tracking: the chain is whole, in order, and leads to the references."""

import re

import pytest

from loki_attn.evaluate.ruler.material import NOISE


def read(text):
    """Assignments of a text in order, and what else there is."""
    lines = [line for line in text.split("\n") if line]
    assigned = [re.fullmatch(r"VAR ([A-Z]+) = (?:VAR ([A-Z]+)|(\d+))", line) for line in lines]
    rest = [line for line, found in zip(lines, assigned, strict=True) if not found]
    return [found.groups() for found in assigned if found], rest


def follow(assignments, wanted):
    """Variables that have a value, by executing the assignments from the first to the last."""
    values = {}
    for name, other, number in assignments:
        values[name] = number if number else values[other]
    return [name for name, value in values.items() if value == wanted]


def parts(sample):
    """The example's text, question and answer; the text itself and its question."""
    _, example, text = re.split(r"Keep track of [^\n]*\n\n", sample.context)
    example, question, answer = re.split(r"(?=\nQuestion)|(?<=they are:)", example)
    return example, question, answer, text


@pytest.mark.parametrize("tokenizer", ["words", "pieces"])
def test_executing_the_assignments_gives_the_references(make, tokenizer):
    for sample in make("vt", tokenizer=tokenizer, count=5):
        _, _, _, text = parts(sample)
        asked = sample.questions[0]
        wanted = re.search(r"value (\d{5}) in the text above\?", asked.text)[1]
        assignments, rest = read(text)
        assert len(assignments) == 5  # one value and four hops
        assert [number for _, _, number in assignments] == [wanted, None, None, None, None]
        assert follow(assignments, wanted) == list(asked.references)
        assert all(re.fullmatch("[A-Z]{5}", name) for name in asked.references)
        assert len(set(asked.references)) == 5
        assert set(rest) == set(NOISE)
        assert asked.text.endswith(f"5 variables have the value {wanted}, they are:")


def test_every_hop_is_from_the_variable_before(make):
    for sample in make("vt", count=3):
        assignments, _ = read(parts(sample)[3])
        assert [other for _, other, _ in assignments[1:]] == list(
            sample.questions[0].references[:-1]
        )


def test_the_worked_example_is_right_and_another_one(make):
    for sample in make("vt", count=3):
        example, question, answer, _ = parts(sample)
        wanted = re.search(r"value (\d{5}) in", question)[1]
        assert wanted not in sample.questions[0].text
        assignments, _ = read(example)
        assert follow(assignments, wanted) == answer.split()
        assert len(answer.split()) == 5
        assert all(len(name) == 3 for name in answer.split())
        assert question.replace(wanted, "") == re.sub(r"\d{5}", "", sample.questions[0].text)


def test_the_chain_is_spread_over_the_text(make):
    firsts, lasts = [], []
    for sample in make("vt", count=20, tokenizer="words", length_tokens=900):
        lines = parts(sample)[3].split("\n")
        places = [index for index, line in enumerate(lines) if line.startswith("VAR")]
        firsts.append(places[0] / len(lines))
        lasts.append(places[-1] / len(lines))
    assert sum(firsts) / 20 < 0.35
    assert sum(lasts) / 20 > 0.65
