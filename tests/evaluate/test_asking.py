"""Asking: contexts read once, every question on an untouched cache, scores beside dense."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted import LAYERS, ROW_BYTES, Read, ScriptedLM, contender, dense, recites

from loki_attn.errors import InputError, LokiAttnError, UnknownNameError
from loki_attn.evaluate.asking import PROTOCOLS, Asking
from loki_attn.evaluate.journal import Journal, key_of
from loki_attn.evaluate.measuring import measure
from loki_attn.evaluate.samples import Question, Sample
from loki_attn.statistics import mean_interval, paired_interval

CONTEXT = "Cats eat fish. Dogs chew bones. Cows graze."
WHO = Question(text=" Who grazes?", references=("Cows",), max_new_tokens=8, stop=("\n",))
WHAT = Question(text=" What do cats eat?", references=("fish",), max_new_tokens=6)
SAMPLE = Sample(name="zoo", context=CONTEXT, questions=(WHO,), labels={"depth": 0.5})
EXACT = contender()


def holds(sample, question, text):
    """1 where the answer contains the reference."""
    return float(any(reference in text for reference in question.references))


def zoo(*samples, **more):
    chosen = {"name": "zoo", "about": "animals and food", "score": holds, **more}
    return Asking(samples=samples or (SAMPLE,), **chosen)


def ask(task, answers, contenders=(EXACT,), **more):
    """The model after the task, and the rows."""
    lm = ScriptedLM(recites({"dense": "", **answers}))
    return lm, measure(task, lm, contenders, **more)


def reads_of(lm, name):
    return [read for read in lm.reads if read.policy == name]


def several(count):
    """Samples that differ in their context."""
    return [replace(SAMPLE, name=f"zoo {i}", context=f"{i}. {CONTEXT}") for i in range(count)]


class Knowing(ScriptedLM):
    """Knows the answers to some samples, by policy and number of the sample."""

    def __init__(self, known):
        def says(name, text):
            right = int(text.partition(".")[0]) in known[name]
            return recites({name: "Cows" if right else "Fish"})(name, text)

        super().__init__(says)


def test_the_question_comes_after_the_context_was_read():
    lm, _ = ask(zoo(), {"exact": "Cows", "dense": "Cows\n"})
    assert set(lm.prefills) == {CONTEXT}
    assert reads_of(lm, "exact") == [
        Read("exact", "every_query", CONTEXT, WHO.text),
        *(
            Read("exact", "decode", CONTEXT + WHO.text + "Cows"[:i], letter)
            for i, letter in enumerate("Cows")
        ),
    ]
    assert [read.mode for read in reads_of(lm, "dense")] == ["every_query", *["decode"] * 4]


def test_a_question_seen_before_is_read_whole_but_for_its_last_token():
    lm, (_, row) = ask(zoo(seen="before"), {"exact": "Cows"})
    whole = CONTEXT + WHO.text
    assert set(lm.prefills) == {whole[:-1]}
    first, *others = reads_of(lm, "exact")
    assert (first.before, first.text) == (whole[:-1], "?")
    assert "".join(read.text for read in others) == "Cows"
    assert row.metrics["selecting_calls"] == LAYERS * 5
    assert "every_query_calls" not in row.metrics


@pytest.mark.parametrize("seen", PROTOCOLS)
def test_every_question_is_asked_of_an_untouched_cache(seen):
    """Whatever the order and the contender: nobody sees what was asked or answered before."""
    sample = replace(SAMPLE, questions=(WHO, WHAT, WHO))
    other = contender("other", top_k=9)
    lm, rows = ask(zoo(sample, seen=seen), {"exact": "Cows", "other": "fish"}, [EXACT, other])
    whole = [CONTEXT + question.text[:-1] for question in sample.questions]
    untouched = [CONTEXT] * 3 if seen == "after" else whole
    names = ("dense", "exact", "other")
    assert lm.starts == [(name, before) for name in names for before in untouched]
    assert [row.n for row in rows] == [3, 3, 3]
    assert [row.metrics["score"] for row in rows] == pytest.approx([0, 2 / 3, 1 / 3])


def test_contenders_share_what_was_read_densely():
    """A context is read once, however many contenders there are."""
    others = [contender(name, top_k=k) for k, name in enumerate(("one", "two", "three"), 8)]
    answers = dict.fromkeys(("one", "two", "three"), "Cows")
    lm, _ = ask(zoo(*several(2)), answers, others)
    assert len(lm.prefills) == 2
    assert len(lm.starts) == 2 * 4


@pytest.mark.parametrize("seen", PROTOCOLS)
def test_sparse_steps_and_bytes_are_counted(seen):
    """Two questions: all tokens of the answers but the last; the question's last where `before`."""
    sample = replace(SAMPLE, questions=(WHO, replace(WHAT, max_new_tokens=3)))
    lm, (plain, row) = ask(
        zoo(sample, seen=seen), {"exact": "Cows and oxen", "dense": "Cows\n"}, [dense(), EXACT]
    )
    single = [read for read in reads_of(lm, "exact") if len(read.text) == 1]
    assert len(single) == (7 + 2 if seen == "after" else 8 + 3)
    assert row.metrics["selecting_calls"] == LAYERS * len(single)
    held = sum(len(read.before) + 1 for read in single)
    assert row.metrics["read_bytes_share"] == len(single) * 8 * ROW_BYTES / (held * ROW_BYTES)
    assert (plain.metrics["selecting_calls"], plain.metrics["read_bytes_share"]) == (0, 1.0)
    if seen == "after":
        assert row.metrics["every_query_calls"] == LAYERS * 2


@pytest.mark.parametrize("seen", PROTOCOLS)
def test_a_policy_that_never_selects_is_refused(seen):
    wide = contender("wide", top_k=500)
    with pytest.raises(LokiAttnError, match="wide never selected anything"):
        ask(zoo(seen=seen), {"wide": "Cows"}, [wide])


def test_a_policy_that_selects_in_the_question_only_is_refused():
    """An answer of one token is never decoded sparsely."""
    sample = replace(SAMPLE, questions=(replace(WHO, max_new_tokens=1),))
    with pytest.raises(LokiAttnError, match="exact never selected anything"):
        ask(zoo(sample), {"exact": "Cows"})


def test_scores_are_means_with_intervals_and_paired_differences():
    """Of 8 samples dense answers 7, the policy 4 of these and none beside them."""
    lm = Knowing({"dense": set(range(7)), "exact": {0, 2, 3, 5}})
    plain, row = measure(zoo(*several(8)), lm, [EXACT])
    ours = [1.0, 0, 1, 1, 0, 1, 0, 0]
    theirs = [1.0] * 7 + [0.0]
    for metrics, values in ((plain.metrics, theirs), (row.metrics, ours)):
        interval = mean_interval(values)
        assert interval.method == "wilson"
        assert (metrics["score"], metrics["score_low"], metrics["score_high"]) == (
            interval.mean,
            interval.low,
            interval.high,
        )
    paired = paired_interval(ours, theirs)
    assert row.metrics["score_delta"] == paired.mean == -3 / 8
    assert row.metrics["score_delta_low"] == paired.low
    assert row.metrics["score_delta_high"] == paired.high
    assert "score_delta" not in plain.metrics
    assert (
        "resamples of samples, seed 0; differences to dense are paired" in row.metrics["intervals"]
    )


def test_questions_of_one_context_are_drawn_together():
    samples = [replace(s, questions=(WHO, WHAT)) for s in several(4)]
    lm = Knowing({"dense": {0, 1, 2, 3}, "exact": {0, 3}})
    _, row = measure(zoo(*samples), lm, [EXACT])
    values, groups = [1.0, 0, 0, 0, 0, 0, 1, 0], [0, 0, 1, 1, 2, 2, 3, 3]
    interval = mean_interval(values, groups)
    assert row.n == 8
    assert (row.metrics["score_low"], row.metrics["score_high"]) == (interval.low, interval.high)
    assert interval.method == "bootstrap"


def test_contexts_are_scored_by_their_labels():
    samples = [replace(s, labels={"depth": i % 2}) for i, s in enumerate(several(4))]
    lm = Knowing({"dense": set(), "exact": {0, 2, 3}})
    rows = measure(zoo(*samples, row_labels=("depth",)), lm, [EXACT])[2:]
    assert [(row.settings["depth"], row.metrics["score"], row.n) for row in rows] == [
        (0, 1.0, 2),
        (1, 0.5, 2),
    ]


def test_the_score_sees_sample_question_and_answer_without_its_stop_string():
    seen = []

    def score(sample, question, text):
        seen.append((sample.name, question, text))
        return 0.5

    ask(zoo(score=score), {"exact": "Cows\nand oxen", "dense": "None"})
    assert seen == [("zoo", WHO, "None"), ("zoo", WHO, "Cows")]


@given(
    script=st.text(st.sampled_from("Cows an\n"), max_size=8),
    place=st.integers(0, 8),
    limit=st.integers(2, 14),
    stop=st.sampled_from([(), ("\n",), ("s",), ("Cow", "\n")]),
)
def test_an_answer_that_ends_early_scores_the_same(script, place, limit, stop):
    """`monotone` spares tokens where the score is full already, and nothing else."""
    script = script[:place] + "Cows" + script[place:]
    sample = replace(SAMPLE, questions=(replace(WHO, max_new_tokens=limit, stop=stop),))
    results, lengths = [], []
    for monotone in (False, True):
        lm, rows = ask(
            zoo(sample, monotone=monotone, seen="before"), {"exact": script, "dense": script}
        )
        results.append([row.metrics["score"] for row in rows])
        lengths.append(len(lm.reads))
    assert results[0] == results[1]
    assert lengths[1] <= lengths[0]


def test_monotone_really_spares_tokens():
    lengths = [
        len(ask(zoo(monotone=m), {"exact": "Cows and oxen", "dense": "Oxen"})[0].reads)
        for m in (False, True)
    ]
    assert lengths == [8 + 5, 4 + 5]


def test_an_answer_goes_on_until_its_score_is_full():
    def score(sample, question, text):
        return ("Co" in text) / 2 + ("ox" in text) / 2

    sample = replace(SAMPLE, questions=(replace(WHO, max_new_tokens=20),))
    lm, (_, row) = ask(zoo(sample, monotone=True, score=score), {"exact": "Cows and oxen"})
    assert row.metrics["score"] == 1.0
    assert len(reads_of(lm, "exact")) == len("Cows and ox")


def test_answers_are_kept_in_the_journal(tmp_path):
    file = tmp_path / "journal.jsonl"
    task = zoo(replace(SAMPLE, questions=(WHO, WHAT)))
    lm, rows = ask(task, {"exact": "Cows"}, journal=Journal(file))
    model = {**lm.identity, "dtype": lm.dtype}
    record = Journal(file).find(key_of(task, model, task.items(lm)[0], EXACT))
    assert record.notes == {"answers": ["Cows", "Cows"]}
    assert record.values == {"score": [1.0, 0.0]}
    again, same = ask(task, {"exact": "Cows"}, journal=Journal(file))
    assert (again.reads, again.prefills) == ([], [])
    assert [row.metrics for row in same] == [row.metrics for row in rows]


@pytest.mark.parametrize("seen", PROTOCOLS)
def test_what_exceeds_the_context_is_refused(seen):
    """The longest question with its answer counts; one token less is served."""
    sample = replace(SAMPLE, questions=(WHO, WHAT))
    need = len(CONTEXT) + max(len(q.text) + q.max_new_tokens for q in sample.questions)
    for room in (need - 1, need):
        lm = ScriptedLM(recites({"dense": "", "exact": "Cows"}), context_tokens=room)
        if room == need:
            assert len(measure(zoo(sample, seen=seen), lm, [EXACT])) == 2
            continue
        message = f"zoo needs {need} tokens, the model's context is {need - 1}; make it shorter."
        with pytest.raises(InputError, match=message):
            measure(zoo(sample, seen=seen), lm, [EXACT])
        assert lm.prefills == []


def test_a_protocol_says_what_is_asked_and_how():
    assert zoo().protocol == f"animals and food; {PROTOCOLS['after']}"
    assert zoo(seen="before").protocol == f"animals and food; {PROTOCOLS['before']}"
    assert PROTOCOLS["after"] != PROTOCOLS["before"]


def test_items_are_all_that_the_model_is_given():
    """Names and labels may change; what is asked and what is right may not."""
    lm = ScriptedLM(recites({}))

    def digest(sample):
        (item,) = zoo(sample).items(lm)
        assert (item.name, item.labels) == (sample.name, sample.labels)
        return item.digest

    assert digest(replace(SAMPLE, name="other", labels={})) == digest(SAMPLE)
    changes = [
        replace(SAMPLE, context=CONTEXT + "."),
        replace(SAMPLE, questions=(WHO, WHO)),
        *(
            replace(SAMPLE, questions=(replace(WHO, **change),))
            for change in (
                {"text": "Who?"},
                {"references": ("Cow",)},
                {"max_new_tokens": 9},
                {"stop": ("\n", ".")},
            )
        ),
    ]
    assert len({digest(SAMPLE), *map(digest, changes)}) == len(changes) + 1


def test_further_metrics_come_with_the_row():
    def more(items, records):
        return {"names": [item.name for item in items], "said": records[0].notes["answers"]}

    _, (_, row) = ask(zoo(more=more), {"exact": "Cows"})
    assert (row.metrics["names"], row.metrics["said"]) == (["zoo"], ["Cows"])


def test_refusals():
    with pytest.raises(UnknownNameError, match="Unknown order of question and context 'befor'"):
        zoo(seen="befor")
    with pytest.raises(InputError, match=r"Sample 'zoo' needs a context and a question\."):
        zoo(replace(SAMPLE, questions=()))
