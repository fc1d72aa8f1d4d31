import pytest

from loki_attn.errors import InputError, UnknownNameError
from loki_attn.evaluate import longbench
from loki_attn.evaluate.samples import Question, Sample


def sample(*references, **labels):
    question = Question(text="?", references=references, max_new_tokens=8)
    return Sample(name="s", context="", questions=(question,), labels=labels)


# What each metric gives full and no marks for: (reference, right answer, wrong answer).
ANSWERS = {
    "qa_f1": ("Ellen Marsh", "ellen marsh.", "the sea"),
    "qa_f1_zh": ("灯塔", "灯塔。", "大海"),
    "rouge_l": ("Rain fell", "Rain fell", "Sun"),
    "rouge_l_zh": ("灯塔", "灯塔", "大海"),
    "classification": ("Date", "Date", "Place"),
    "retrieval": ("Paragraph 7", "It is paragraph 7", "8"),
    "retrieval_zh": ("段落7", "段落7", "段落17"),
    "count": ("7", "7", "8"),
    "code_similarity": ("return x", "return x\n", "!"),
}


@pytest.mark.parametrize("dataset", longbench.DATASETS)
def test_every_data_set_scores_by_its_metric(dataset):
    reference, right, wrong = ANSWERS[longbench.DATASETS[dataset].metric]
    asked = sample(reference, all_classes=["Date", "Place"])
    assert longbench.score(dataset, right, asked) == 1
    assert longbench.score(dataset, wrong, asked) == 0


@pytest.mark.parametrize("dataset", ["trec", "triviaqa", "samsum", "lsht"])
def test_only_the_first_line_counts_after_examples(dataset):
    asked = sample("Date", all_classes=["Date", "Place"])
    assert longbench.score(dataset, "\nDate\nPlace, and Place", asked) == 1
    assert longbench.score(dataset, "Place\nDate", asked) == 0


def test_all_lines_count_elsewhere():
    assert longbench.score("hotpotqa", "The sea,\nor Ellen", sample("Ellen")) == 0.5


def test_the_best_reference_counts():
    asked = sample("nobody", "Ellen Marsh", "Ellen")
    assert longbench.score("hotpotqa", "Ellen", asked) == 1


def test_v2_counts_the_letter():
    assert longbench.score("longbench-v2", "The correct answer is (C).", sample("C")) == 1
    assert longbench.score("longbench-v2", "The correct answer is (C).", sample("A")) == 0


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(UnknownNameError, match=r"LongBench data set 'hotpot'\. Did you mean"):
        longbench.score("hotpot", "x", sample("x"))
    with pytest.raises(InputError, match="'s' of trec has no label 'all_classes'; expected the"):
        longbench.score("trec", "x", sample("x"))
    with pytest.raises(InputError, match="'s' has no reference to score with"):
        longbench.score("hotpotqa", "x", sample())


def test_a_sample_read_is_a_sample_scored(record, record_v2, write):
    path = write("trec.jsonl", record(dataset="trec", answers=["Date"], all_classes=["Date"]))
    (read,) = longbench.read_v1(path)
    assert longbench.score(read.labels["subtask"], " Date\n", read) == 1
    (read,) = longbench.read_v2(write("data.json", record_v2()))
    assert longbench.score(read.labels["subtask"], "The correct answer is (B)", read) == 1
