"""Documents: a reader with the question finds the answer, over one hop or over two."""

import re

import pytest

from loki_attn.errors import InputError
from loki_attn.evaluate.ruler.names import GIVEN_NAMES, SURNAMES, TOWNS

LIFE = re.compile(
    r"(.+) was born in (\w+) and became a \w+\. The teacher of (.+) was (.+)\.", flags=re.DOTALL
)


def documents(sample):
    body = sample.context.split("These are the documents.\n\n")[1]
    found = re.split(r"(?:^|\n\n)Document (\d+):\n", body)[1:]
    assert [int(number) for number in found[::2]] == list(range(1, len(found) // 2 + 1))
    return found[1::2]


@pytest.mark.parametrize("tokenizer", ["words", "pieces"])
def test_the_quoted_half_stands_in_one_document_and_the_reference_follows(make, tokenizer):
    for sample in make("qa_1", tokenizer=tokenizer, count=5):
        asked = sample.questions[0]
        quoted = re.search(r'a sentence begins with "(.+)"\. Which words', asked.text)[1]
        holding = [one for one in documents(sample) if quoted in one]
        assert len(holding) == 1
        going_on = holding[0].split(quoted)[1]
        (reference,) = asked.references
        assert len(reference.split()) == 3
        assert reference == " ".join(going_on.split()[:3]).strip(".,;:!?\"'()")
        assert 6 <= len(quoted.split()) <= 30
        assert reference not in asked.text


def test_passages_are_of_the_haystack(make, haystack):
    known = " ".join(haystack.split())
    shown = documents(make("qa_1", count=1)[0])
    assert sum(one not in known for one in shown) <= 1  # the last, cut to fit
    assert len(shown) > 5


def test_two_hops_lead_to_the_town(make):
    for sample in make("qa_2", count=8):
        asked = sample.questions[0]
        lives = [LIFE.fullmatch(one).groups() for one in documents(sample)]
        born = {name: town for name, town, _, _ in lives}
        teacher = {name: other for _, _, name, other in lives}
        assert len(born) == len(teacher) == len(lives)
        assert set(born) == set(teacher) >= set(teacher.values())
        assert all(name != other for name, other in teacher.items())
        name = re.search(r"In which town was the teacher of (.+) born\?", asked.text)[1]
        assert asked.references == (born[teacher[name]],)
        assert born[name] not in asked.references
        assert asked.text.endswith(f"The teacher of {name} was born in")
        assert teacher[name] not in asked.text


def test_the_document_asked_for_stands_anywhere(make):
    places = []
    for sample in make("qa_2", count=20, tokenizer="words", length_tokens=500):
        name = re.search(r"The teacher of (.+) was born in$", sample.questions[0].text)[1]
        shown = documents(sample)
        places.append([one.startswith(name) for one in shown].index(True) / len(shown))
    assert min(places) < 0.3
    assert max(places) > 0.7


@pytest.mark.parametrize("names", [GIVEN_NAMES, SURNAMES, TOWNS])
def test_no_name_is_found_inside_of_another(names):
    assert len(set(names)) == len(names)
    assert not [(a, b) for a in names for b in names if a != b and a.lower() in b.lower()]


def test_a_text_without_a_sentence_to_ask_for_is_refused(make):
    with pytest.raises(InputError, match="No sentence of the haystack can be asked for: expected "):
        make("qa_1", haystack="Too short. Again too short.")
