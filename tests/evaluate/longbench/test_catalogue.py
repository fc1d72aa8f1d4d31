import pytest

from loki_attn.evaluate import longbench

MAIN = [name for name in longbench.DATASETS if not name.endswith("_e")]


def test_there_are_21_data_sets_and_13_extended_ones():
    assert len(MAIN) == 21
    assert len(longbench.DATASETS) == 34
    for name in longbench.EXTENDED:
        assert longbench.DATASETS[f"{name}_e"] == longbench.DATASETS[name]


def test_answers_are_as_long_as_published():
    tokens = {name: longbench.DATASETS[name].max_new_tokens for name in MAIN}
    assert {name for name in MAIN if tokens[name] == 512} == {
        "gov_report",
        "qmsum",
        "multi_news",
        "vcsum",
    }
    assert {name for name in MAIN if tokens[name] == 128} == {
        "narrativeqa",
        "qasper",
        "dureader",
        "samsum",
    }
    assert {name for name in MAIN if tokens[name] == 64} == {
        "multifieldqa_en",
        "multifieldqa_zh",
        "trec",
        "lsht",
        "lcc",
        "repobench-p",
    }
    assert sum(n == 32 for n in tokens.values()) == 7


def test_first_lines_count_where_examples_set_the_form():
    counted = {name for name in MAIN if longbench.DATASETS[name].first_line}
    assert counted == {"trec", "triviaqa", "samsum", "lsht"}


@pytest.mark.parametrize("name", longbench.DATASETS)
def test_prompts_ask_after_the_context(name):
    before, after = longbench.DATASETS[name].prompt.around("{CONTEXT} ", {"input": "{INPUT}"})
    assert before.endswith("{CONTEXT} ")
    no_question = ("gov_report", "multi_news", "vcsum", "passage_count")
    asks = name.removesuffix("_e") not in no_question
    assert after.count("{INPUT}") == asks
    assert after.strip()
