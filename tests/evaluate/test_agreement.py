"""Agreement: lengths of common prefixes, whatever ends a continuation, always beside dense."""

import pytest
import torch
from scripted import LAYERS, ScriptedLM, contender, dense, recites

from loki_attn.errors import InputError, LokiAttnError
from loki_attn.evaluate.agreement import PROTOCOL, Agreement
from loki_attn.evaluate.journal import Journal
from loki_attn.evaluate.measuring import measure
from loki_attn.statistics import mean_interval

PROMPT = "A prompt that is longer than the budget?"
IDS = tuple(map(ord, PROMPT))
EXACT = contender()


def agreement(*prompts, new_tokens=12, **more):
    """The task on prompts of equal length."""
    prompts = prompts or (PROMPT,)
    ids = tuple(ord(character) for prompt in prompts for character in prompt)
    chosen = {"prompts": len(prompts), "prompt_tokens": len(prompts[0]), "corpus": "tale"}
    return Agreement(ids=ids, new_tokens=new_tokens, **{**chosen, **more})


def continued(answers, contenders=(EXACT,), **more):
    """The model after the task, and the rows."""
    lm = ScriptedLM(recites(answers))
    return lm, measure(agreement(**more), lm, contenders)


@pytest.mark.parametrize(
    ("plain", "sparse", "shared", "share", "identical"),
    [
        ("The cat sat.", "The cat sat.", 12, 1.0, 1.0),
        ("The cat sat.", "The cat ran.", 8, 8 / 12, 0.0),
        ("The cat sat.", "A cat sat.", 0, 0.0, 0.0),
        ("The cat sat.", "The", 3, 3 / 12, 0.0),
        ("The", "The cat sat.", 3, 1.0, 0.0),
        ("The", "The", 3, 1.0, 1.0),
        ("abcabcabc", "abcxbcabc", 3, 3 / 9, 0.0),
        ("The cat sat.AAAA", "The cat sat.BBBB", 12, 1.0, 1.0),
        ("", "The", 0, 1.0, 0.0),
    ],
)
def test_the_common_prefix_is_counted(plain, sparse, shared, share, identical):
    """Tokens after the twelfth are never generated; an end token is none."""
    _, (reference, row) = continued({"dense": plain, "exact": sparse})
    for metrics, wanted in (
        (row.metrics, (shared, share, identical)),
        (reference.metrics, (min(len(plain), 12), 1.0, 1.0)),
    ):
        found = tuple(metrics[name] for name in ("shared_tokens", "shared_share", "identical"))
        assert found == pytest.approx(wanted)


def test_both_ended_at_once_agree():
    lm, (_, row) = continued({"dense": "", "exact": ""}, [contender("exact", top_k=8)])
    assert (row.metrics["shared_share"], row.metrics["identical"]) == (1.0, 1.0)
    assert row.metrics["shared_tokens"] == 0
    assert len(lm.reads) == 2


def test_dense_goes_first_and_its_row_stays_where_it_was_asked_for():
    answers = {"plain": "The cat", "exact": "The dog", "other": "The cow"}
    contenders = [EXACT, dense("plain"), contender("other", top_k=9)]
    lm, rows = continued(answers, contenders)
    assert [name for name, _ in lm.starts] == ["plain", "exact", "other"]
    assert [row.contender for row in rows] == ["exact", "plain", "other"]
    assert [row.metrics["shared_tokens"] for row in rows] == [4, 7, 4 + 1]


def test_it_never_compares_with_anything_but_dense():
    lm, task = ScriptedLM(recites({"exact": "The"})), agreement()
    (item,) = task.items(lm)
    with pytest.raises(InputError, match="compares with dense attention; measure that first"):
        list(task.measure(lm, item, [EXACT], None))


def test_the_last_token_of_the_prompt_and_all_new_ones_are_decoded():
    lm, (_, row) = continued({"dense": "The cat sat.", "exact": "The cat ran."})
    assert set(lm.prefills) == {PROMPT[:-1]}
    reads = [read for read in lm.reads if read.policy == "exact"]
    assert "".join(read.text for read in reads) == "?The cat ran"
    assert [read.mode for read in reads[1:]] == ["decode"] * 11
    assert row.metrics["selecting_calls"] == LAYERS * 12
    assert "every_query_calls" not in row.metrics
    assert 0 < row.metrics["read_bytes_share"] < 0.5


def test_prompts_follow_each_other_and_intervals_are_over_them():
    prompts = [f"{i}: a prompt that is long enough, is it?" for i in range(4)]
    cut = [8, 3, 12, 0]

    def says(name, text):
        number = text.rpartition("?")[0][-39:].partition(":")[0]
        said = "x" * 12 if name == "dense" else "x" * cut[int(number)] + "y" * 12
        return recites({name: said})(name, text)

    lm = ScriptedLM(says)
    plain, row = measure(agreement(*prompts), lm, [EXACT])
    assert {text + "?" for text in lm.prefills} == set(prompts)
    assert row.n == 4
    for name, values in (
        ("shared_tokens", cut),
        ("shared_share", [c / 12 for c in cut]),
        ("identical", [0.0, 0, 1, 0]),
    ):
        interval = mean_interval(values)
        assert row.metrics[name] == pytest.approx(interval.mean)
        assert row.metrics[f"{name}_low"] == pytest.approx(interval.low)
        assert row.metrics[f"{name}_high"] == pytest.approx(interval.high)
    assert "resamples of prompts" in row.metrics["intervals"]
    assert plain.settings == {"corpus": "tale", "prompt_tokens": len(prompts[0]), "new_tokens": 12}
    assert (plain.task, plain.protocol) == ("agreement", PROTOCOL)


def test_a_resumed_run_compares_with_the_journals_dense(tmp_path):
    answers = {"dense": "The cat", "exact": "The dog", "other": "The cow"}
    journal, other = Journal(tmp_path / "journal.jsonl"), contender("other", top_k=9)
    measure(agreement(), ScriptedLM(recites(answers)), [EXACT], journal=journal)
    lm = ScriptedLM(recites(answers))
    again = Journal(tmp_path / "journal.jsonl")
    rows = measure(agreement(), lm, [EXACT, other], journal=again)
    assert {read.policy for read in lm.reads} == {"other"}
    assert [row.metrics["shared_tokens"] for row in rows] == [7, 4, 5]


def test_more_new_tokens_are_measured_anew(tmp_path):
    answers, journal = {"dense": "The cat sat.", "exact": "The cat ran."}, Journal()
    for count in (4, 12):
        lm = ScriptedLM(recites(answers))
        _, row = measure(agreement(new_tokens=count), lm, [EXACT], journal=journal)
        assert row.metrics["identical"] == float(count == 4)
        assert row.metrics["shared_tokens"] == min(count, 8)


def test_a_policy_that_never_selects_is_refused():
    with pytest.raises(LokiAttnError, match="wide never selected anything"):
        continued({"dense": "The", "wide": "The"}, [contender("wide", top_k=400)])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": 3}, "3 prompts of 40 tokens need 120 tokens, the text has 40; give more text"),
        ({"prompts": 0}, "a prompt of at least 2 tokens and 2 new tokens, got 0 prompts of 40"),
        ({"prompt_tokens": 1}, "got 1 prompts of 1 tokens, 12 new."),
        ({"new_tokens": 1}, "got 1 prompts of 40 tokens, 1 new."),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(InputError, match=message):
        agreement(**changes)


def test_what_exceeds_the_context_is_refused():
    room = len(PROMPT) + 12
    lm = ScriptedLM(recites({}), context_tokens=room)
    assert len(agreement().items(lm)) == 1
    message = f"Prompt and continuation take {room + 1} tokens, the model's context is {room}."
    with pytest.raises(InputError, match=message):
        agreement(new_tokens=13).items(lm)


def test_items_are_the_prompts():
    (item,) = agreement().items(ScriptedLM(recites({})))
    assert item.name == "prompt 1/1"
    assert tuple(item.content["ids"]) == IDS
    assert torch.tensor([item.content["ids"]]).shape == (1, 40)
