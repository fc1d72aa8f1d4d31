import json
import re
import zipfile

import pytest

from loki_attn.errors import InputError, UnknownNameError
from loki_attn.evaluate import longbench
from loki_attn.evaluate.longbench.words import segmenter


def without(fields, name):
    return {key: value for key, value in fields.items() if key != name}


def test_a_record_becomes_a_sample(record, write):
    path = write("hotpotqa.jsonl", record())
    (sample,) = longbench.read_v1(path)
    (question,) = sample.questions
    assert sample.name == "hotpotqa/a1"
    assert sample.context.endswith("\n\nEllen Marsh kept the light {here}.")
    assert question.text.endswith("\nQuestion: Who kept the light?\nAnswer:")
    assert question.references == ("Ellen Marsh", "Ellen")
    assert question.max_new_tokens == 32
    assert sample.labels == {"subtask": "hotpotqa", "length": 6, "prompts": "ours"}


def test_the_data_set_is_chosen_told_by_the_file_or_by_the_record(record, write):
    other = without(record(), "dataset")
    chosen = longbench.read_v1(write("some.jsonl", other), "qasper")
    by_file = longbench.read_v1(write("musique.jsonl", other))
    by_record = longbench.read_v1(write("more.jsonl", record()))
    names = [sample.labels["subtask"] for (sample,) in (chosen, by_file, by_record)]
    assert names == ["qasper", "musique", "hotpotqa"]


def test_a_folder_is_read_in_the_order_of_the_data_sets(record, write):
    write("lcc.jsonl", record(dataset="lcc"), record(dataset="lcc", _id="a2"))
    write("hotpotqa.jsonl", record(), record(_id="a2"), record(_id="a3"))
    folder = write("notes.jsonl", "not read").parent
    assert [sample.name for sample in longbench.read_v1(folder, limit=2)] == [
        "hotpotqa/a1",
        "hotpotqa/a2",
        "lcc/a1",
        "lcc/a2",
    ]
    assert [sample.name for sample in longbench.read_v1(folder, "lcc", limit=1)] == ["lcc/a1"]


def test_a_zip_reads_like_the_folder_it_holds(record, write, tmp_path):
    path = write("lcc.jsonl", record(dataset="lcc"))
    packed = tmp_path / "data.zip"
    with zipfile.ZipFile(packed, "w") as archive:
        archive.write(path, "data/lcc.jsonl")
        archive.writestr("data/__notes.txt", "not read")
    assert longbench.read_v1(packed) == longbench.read_v1(path)
    packed.write_bytes(packed.read_bytes()[:40])
    with pytest.raises(InputError, match=r"Cannot read .*data\.zip: .*not a zip"):
        longbench.read_v1(packed)


@pytest.mark.parametrize(
    ("length", "expected"), [(3999, "0-4k"), (4000, "4-8k"), (7999, "4-8k"), (8000, "8k+")]
)
def test_extended_data_sets_are_divided_by_length(record, write, length, expected):
    path = write("hotpotqa_e.jsonl", record(length=length))
    (sample,) = longbench.read_v1(path)
    assert sample.name == "hotpotqa_e/a1"
    assert sample.labels["length_range"] == expected


def test_classes_and_the_cutting_of_chinese_are_on_the_label(record, write):
    classes = ["Date", "Place"]
    (trec,) = longbench.read_v1(write("trec.jsonl", record(dataset="trec", all_classes=classes)))
    (chinese,) = longbench.read_v1(write("dureader.jsonl", record(dataset="dureader")))
    assert trec.labels["all_classes"] == classes
    assert chinese.labels["words"] == segmenter()


def test_names_stay_unique_where_ids_repeat(record, write):
    samples = longbench.read_v1(write("hotpotqa.jsonl", record(), record(), record(_id="a2")))
    assert [sample.name for sample in samples] == ["hotpotqa/a1", "hotpotqa/a1#2", "hotpotqa/a2"]


def test_a_line_ends_at_a_newline_only(record, write):
    line = json.dumps(record(context="one\u2028two\x85three"), ensure_ascii=False)
    (sample,) = longbench.read_v1(write("hotpotqa.jsonl", "", line, " "))
    assert sample.context.endswith("one\u2028two\x85three")


def test_prompts_beside_the_data_are_used(record, write):
    templates = {"hotpotqa": "Read.\n{context}\nAsk: {input} {{}}"}
    folder = write("dataset2prompt.json", templates).parent
    write("hotpotqa_e.jsonl", record())
    write("lcc.jsonl", record(dataset="lcc"))
    lcc, extended = sorted(longbench.read_v1(folder), key=lambda sample: sample.name, reverse=True)
    assert extended.context == "Read.\nEllen Marsh kept the light {here}."
    assert extended.questions[0].text == "\nAsk: Who kept the light? {}"
    assert extended.labels["prompts"] == "dataset2prompt.json"
    assert lcc.labels["prompts"] == "ours"


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("{", "dataset2prompt.json is not valid JSON: "),
        ('["x"]', "does not hold templates; expected a JSON object of texts"),
        ('{"lcc": 3}', "does not hold templates; expected a JSON object of texts"),
        (
            '{"lcc": "{input}"}',
            "'lcc' names input; expected context once, and otherwise only input",
        ),
        ('{"lcc": "{context}{context}?"}', "'lcc' names context, context; expected context once"),
        ('{"lcc": "{context} {other}"}', "'lcc' names context, other; expected context once"),
        ('{"lcc": "{input} {context}"}', "'lcc' ends with its context; expected a question after"),
        ('{"lcc": "{context} }"}', "'lcc' is not a template: "),
    ],
)
def test_prompts_of_another_form_are_refused(record, write, prompts, message):
    write("dataset2prompt.json", prompts)
    with pytest.raises(InputError, match=re.escape(message)):
        longbench.read_v1(write("hotpotqa.jsonl", record()))


@pytest.mark.parametrize("field", ["input", "context", "answers", "length", "_id"])
def test_a_missing_field_is_named_with_file_and_line(record, write, field):
    path = write("hotpotqa.jsonl", record(), without(record(), field))
    message = rf"hotpotqa\.jsonl, line 2: field '{field}' is missing; there are .*dataset"
    with pytest.raises(InputError, match=message):
        longbench.read_v1(path)


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("lcc", {"dataset": "lcc", "context": 3}, "field 'context' is 3; expected text."),
        ("lcc", {"dataset": "lcc", "length": True}, "'length' is true; expected a whole number."),
        ("lcc", {"dataset": "lcc", "answers": []}, "'answers' is []; expected a list of texts"),
        ("lcc", {"dataset": "lcc", "answers": [1]}, "'answers' is [1]; expected a list of texts"),
        ("trec", {"dataset": "trec"}, "'all_classes' is null; expected a list of texts, one at"),
        ("lcc", {}, "'dataset' is \"hotpotqa\"; expected 'lcc', after the file or the choice"),
        (
            "passage_retrieval_en",
            {"dataset": "passage_retrieval_en"},
            "expected texts with Paragraph",
        ),
    ],
)
def test_a_field_of_another_kind_is_named(record, write, name, changed, message):
    path = write(f"{name}.jsonl", record(**changed))
    with pytest.raises(InputError, match=rf"{name}\.jsonl, line 1: .*{re.escape(message)}"):
        longbench.read_v1(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{oops", "hotpotqa.jsonl, line 2 is not valid JSON: "),
        ("[1]", "hotpotqa.jsonl, line 2 holds no record; expected a JSON object."),
    ],
)
def test_a_bad_line_is_named(record, write, line, message):
    path = write("hotpotqa.jsonl", record(), line)
    with pytest.raises(InputError, match=re.escape(message)):
        longbench.read_v1(path)
    assert len(longbench.read_v1(path, limit=1)) == 1


def test_bytes_that_are_no_text_are_refused(write):
    path = write("hotpotqa.jsonl")
    path.write_bytes(b'{"input": "\xff"}\n')
    with pytest.raises(InputError, match=r"line 1 is not valid JSON: .*utf-8"):
        longbench.read_v1(path)


def test_what_is_not_there_is_said(record, write):
    path = write("hotpotqa.jsonl", record())
    with pytest.raises(UnknownNameError, match=r"LongBench data set 'hotpot'\. Did you mean"):
        longbench.read_v1(path, "hotpot")
    with pytest.raises(InputError, match=r"has no lcc\.jsonl; it has hotpotqa\."):
        longbench.read_v1(path.parent, "lcc")
    with pytest.raises(InputError, match="limit is 0; expected 1 or more"):
        longbench.read_v1(path, limit=0)
    with pytest.raises(InputError, match="holds no records"):
        longbench.read_v1(write("lcc.jsonl"))
    with pytest.raises(UnknownNameError, match=r"more\.jsonl, line 1: 'else'"):
        longbench.read_v1(write("more.jsonl", record(dataset="else")))
