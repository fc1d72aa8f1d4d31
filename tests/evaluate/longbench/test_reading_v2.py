import json
import re

import pytest

from loki_attn.errors import InputError
from loki_attn.evaluate import longbench


def test_a_record_becomes_a_sample(record_v2, write):
    (sample,) = longbench.read_v2(write("data.jsonl", record_v2()))
    (question,) = sample.questions
    assert sample.name == "longbench-v2/b1"
    assert sample.context.endswith("\n\nA lamp shines over the sea.")
    choices = "\n(A) The sea\n(B) The lamp\n(C) The {moon}\n(D) Nothing\n"
    assert f"Question: What shines?{choices}" in question.text
    assert "The correct answer is (" in question.text
    assert (question.references, question.max_new_tokens) == (("B",), 128)
    assert sample.labels == {
        "subtask": "longbench-v2",
        "difficulty": "easy",
        "length": "short",
        "domain": "Single-Document QA",
        "sub_domain": "Literary",
        "prompts": "ours",
    }


def test_a_list_reads_like_lines(record_v2, write):
    records = [record_v2(), record_v2(_id="b2", answer="D")]
    as_list = write("list/data.json", json.dumps(records, indent=1))
    as_lines = write("lines/data.jsonl", *records)
    assert longbench.read_v2(as_list) == longbench.read_v2(as_lines)
    assert longbench.read_v2(as_list.parent) == longbench.read_v2(as_lines)
    assert len(longbench.read_v2(as_list, limit=1)) == 1


def test_the_prompt_beside_the_data_is_used(record_v2, write):
    write("0shot.txt", "<{x}>$DOC$</{x}> $Q$ A $C_A$ B $C_B$ C $C_C$ D $C_D$")
    (sample,) = longbench.read_v2(write("data.jsonl", record_v2()))
    assert sample.context == "<{x}>A lamp shines over the sea."
    asked = "</{x}> What shines? A The sea B The lamp C The {moon} D Nothing\n"
    assert sample.questions[0].text == asked
    assert sample.labels["prompts"] == "0shot.txt"


@pytest.mark.parametrize(
    ("text", "message"),
    [("$Q$", "does not name $DOC$"), ("$DOC$ $DOC$ $Q$", "names context, context, question")],
)
def test_prompts_of_another_form_are_refused(record_v2, write, text, message):
    write("0shot.txt", text)
    with pytest.raises(InputError, match=re.escape(message)):
        longbench.read_v2(write("data.jsonl", record_v2()))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"answer": "E"}, "field 'answer' is \"E\"; expected A or B or C or D."),
        ({"difficulty": "fair"}, "field 'difficulty' is \"fair\"; expected easy or hard."),
        ({"length": 12}, "field 'length' is 12; expected text."),
        ({"choice_C": None}, "field 'choice_C' is null; expected text."),
    ],
)
def test_a_field_of_another_kind_is_named(record_v2, write, changed, message):
    records = json.dumps([record_v2(), record_v2(**changed)])
    with pytest.raises(InputError, match=rf"data\.json, record 2: {re.escape(message)}"):
        longbench.read_v2(write("data.json", records))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[{]", "data.json is not valid JSON: "),
        ("[]", "data.json holds no records"),
        ("[3]", "data.json, record 1 holds no record; expected a JSON object."),
        ('{"a": 1}', "data.json, line 1: field 'context' is missing; there are a."),
    ],
)
def test_a_file_of_another_form_is_refused(write, text, message):
    with pytest.raises(InputError, match=re.escape(message)):
        longbench.read_v2(write("data.json", text))


def test_a_folder_with_several_files_is_refused(record_v2, write):
    write("one.jsonl", record_v2())
    folder = write("two.jsonl", record_v2()).parent
    with pytest.raises(
        InputError, match=r"has 2 files that end in \.json or \.jsonl; expected one"
    ):
        longbench.read_v2(folder)
