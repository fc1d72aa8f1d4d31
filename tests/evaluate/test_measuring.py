"""Measuring: nothing twice, nothing lost by a kill, dense first, no figure of an idle policy."""

from dataclasses import asdict

import pytest
from scripted import CountingTask, ScriptedLM, contender, dense, recites

from loki_attn.errors import InputError, LokiAttnError
from loki_attn.evaluate.journal import Journal
from loki_attn.evaluate.measuring import is_dense, measure, total_of
from loki_attn.evaluate.protocol import Contender
from loki_attn.policy import Policy, preset
from loki_attn.select.exact_topk import ExactTopK

LM = ScriptedLM(recites({}))
TWO = [contender("one"), contender("two", top_k=9)]
IDLE = "idle never selected anything, nor evicted: its budget covers the whole context, or every"


def run(task, contenders=TWO, **more):
    return measure(task, LM, contenders, **more)


def told(rows):
    """Rows without the time at which they were made."""
    return [{k: v for k, v in asdict(row).items() if k != "provenance"} for row in rows]


def test_every_contender_is_measured_on_every_item_once():
    task = CountingTask()
    rows = run(task)
    assert task.log == [(item, name) for item in "abc" for name in ("one", "two")]
    assert [row.contender for row in rows] == ["one", "two"]
    for row in rows:
        assert (row.task, row.protocol, row.settings) == ("counting", "made up", {"seed": 3})
        assert row.metrics["of"] == ["a", "b", "c"]
        assert row.metrics["who"] == [[row.contender]] * 3
        assert row.n == 6  # two observations of each item
        assert row.model == {"id": "scripted", "dtype": "float32"}


@pytest.mark.parametrize("needs_dense", [False, True])
def test_a_killed_run_goes_on_where_it_stopped(tmp_path, needs_dense):
    """Killed at every measurement in turn: nothing is measured twice, and the rows are the same."""
    whole = CountingTask(needs_dense=needs_dense)
    wanted = told(run(whole))
    assert len(whole.log) == (9 if needs_dense else 6)
    for dies_at in range(len(whole.log)):
        file = tmp_path / f"{dies_at}.jsonl"
        killed = CountingTask(needs_dense=needs_dense, dies_at=dies_at)
        with pytest.raises(KeyboardInterrupt):
            run(killed, journal=Journal(file))
        resumed = CountingTask(needs_dense=needs_dense)
        assert told(run(resumed, journal=Journal(file))) == wanted
        assert killed.log + resumed.log == whole.log


def test_a_run_killed_after_every_measurement_ends_all_the_same(tmp_path):
    file, log = tmp_path / "journal.jsonl", []
    for _ in range(8):
        task = CountingTask(needs_dense=True, dies_at=1)
        with pytest.raises(KeyboardInterrupt):
            run(task, journal=Journal(file))
        log += task.log
    last, whole = CountingTask(needs_dense=True, dies_at=1), CountingTask(needs_dense=True)
    assert told(run(last, journal=Journal(file))) == told(run(whole))
    assert log + last.log == whole.log


def test_a_finished_run_measures_nothing(tmp_path):
    first, again, counts = CountingTask(), CountingTask(), []
    file = tmp_path / "journal.jsonl"
    rows = run(first, journal=Journal(file))
    kept = file.read_bytes()
    same = run(again, journal=Journal(file), progress=lambda *news: counts.append(news))
    assert told(same) == told(rows)
    assert (again.log, counts, file.read_bytes()) == ([], [], kept)


def test_a_contender_that_comes_later_is_measured_alone(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl")
    first, later = CountingTask(needs_dense=True), CountingTask(needs_dense=True)
    run(first, TWO[:1], journal=journal)
    rows = run(later, TWO, journal=journal)
    assert later.log == [("a", "two"), ("b", "two"), ("c", "two")]
    assert told(rows) == told(run(CountingTask(needs_dense=True)))
    known = {item: later.seen_dense[item, "two"] for item in "abc"}
    assert [known[item].notes["who"] for item in "abc"] == [["dense"]] * 3


def test_an_item_that_comes_later_is_measured_alone(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl")
    run(CountingTask(names=("a", "c")), journal=journal)
    later = CountingTask()
    run(later, journal=journal)
    assert later.log == [("b", "one"), ("b", "two")]


def test_contenders_are_found_by_their_policy_not_by_their_label(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl")
    run(CountingTask(), TWO[:1], journal=journal)
    renamed = CountingTask()
    (row,) = run(renamed, [contender("new name")], journal=journal)
    assert (renamed.log, row.contender) == ([], "new name")
    other = CountingTask()
    run(other, [contender("one", top_k=11)], journal=journal)
    assert len(other.log) == 3


def test_another_task_or_model_finds_nothing(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl")
    run(CountingTask(), journal=journal)
    for task in (CountingTask(name="other"), CountingTask(protocol="other")):
        run(task, journal=journal)
        assert len(task.log) == 6
    for change in ({"identity": {"id": "other"}}, {"dtype": "bfloat16"}):
        task = CountingTask()
        measure(task, ScriptedLM(recites({}), **change), TWO, journal=journal)
        assert len(task.log) == 6


def test_dense_is_added_first_where_the_task_compares_with_it():
    task = CountingTask(needs_dense=True)
    rows = run(task)
    assert [row.contender for row in rows] == ["dense", "one", "two"]
    assert rows[0].policy["select"]["method"] == "dense"
    assert [name for _, name in task.log] == ["dense", "one", "two"] * 3
    assert "score_delta" not in rows[0].metrics
    assert rows[1].metrics["score_delta"] == pytest.approx(
        rows[1].metrics["score"] - rows[0].metrics["score"]
    )


def test_a_dense_contender_is_taken_as_it_is_and_measured_first():
    """Rows keep the order that was given."""
    task = CountingTask(needs_dense=True)
    rows = run(task, [TWO[0], dense("plain"), TWO[1]])
    assert [row.contender for row in rows] == ["one", "plain", "two"]
    assert [name for _, name in task.log] == ["plain", "one", "two"] * 3
    assert set(task.seen_dense.values()) == {None}  # all in one call, dense first


def test_dense_that_is_known_already_is_handed_to_the_task():
    journal = Journal()
    run(CountingTask(needs_dense=True), [dense("plain")], journal=journal)
    task = CountingTask(needs_dense=True)
    run(task, [dense("plain"), *TWO], journal=journal)
    assert task.log == [(item, name) for item in "abc" for name in ("one", "two")]
    assert {record.notes["who"][0] for record in task.seen_dense.values()} == {"plain"}


def test_dense_is_not_added_where_the_task_does_not_need_it():
    task = CountingTask()
    assert [row.contender for row in run(task)] == ["one", "two"]
    assert set(task.seen_dense.values()) == {None}
    assert all("score_delta" not in row.metrics for row in run(task, [dense(), *TWO]))


def test_labels_make_rows():
    labels = {
        "a": {"kind": "x", "depth": 1},
        "b": {"kind": "y", "depth": 2},
        "c": {"kind": "x", "depth": 3},
    }
    task = CountingTask(labels=labels, row_labels=("kind",), needs_dense=True)
    rows = run(task, TWO[:1])
    described = [(row.contender, row.settings, row.metrics["of"], row.n) for row in rows]
    assert described == [
        ("dense", {"seed": 3, "kind": "x"}, ["a", "c"], 4),
        ("dense", {"seed": 3, "kind": "y"}, ["b"], 2),
        ("one", {"seed": 3, "kind": "x"}, ["a", "c"], 4),
        ("one", {"seed": 3, "kind": "y"}, ["b"], 2),
    ]
    for plain, sparse in zip(rows[:2], rows[2:], strict=True):
        delta = sparse.metrics["score"] - plain.metrics["score"]
        assert sparse.metrics["score_delta"] == pytest.approx(delta)
    both = CountingTask(labels=labels, row_labels=("kind", "depth"))
    assert [row.metrics["of"] for row in run(both, TWO[:1])] == [["a"], ["b"], ["c"]]


@pytest.mark.parametrize("missing", [{"idle": ("idle",)}, {"only_long": ("idle",)}])
def test_a_policy_that_never_selected_while_decoding_has_no_row(missing):
    with pytest.raises(LokiAttnError, match=IDLE):
        run(CountingTask(**missing), [TWO[0], contender("idle", top_k=5)])


def test_a_task_that_does_not_decode_counts_longer_steps():
    (row,) = run(CountingTask(decodes=False, only_long=("one",)), TWO[:1])
    assert row.contender == "one"
    with pytest.raises(LokiAttnError, match=IDLE):
        run(CountingTask(decodes=False, idle=("idle",)), [contender("idle")])


def test_refusals_are_told_and_the_others_have_their_rows():
    refused = []
    task = CountingTask(idle=("idle",), needs_dense=True)
    rows = run(task, [contender("idle", top_k=5), *TWO], refused=refused.append)
    assert [row.contender for row in rows] == ["dense", "one", "two"]
    (error,) = refused
    assert str(error).startswith(IDLE)
    assert "Lower the budget or dense_below, or lengthen the text." in str(error)


def test_a_row_is_refused_where_its_own_items_were_never_selected_on():
    """Others of the same contender stand."""

    class Partly(CountingTask):
        def record(self, item, one):
            self.idle = ("one",) if item.name == "b" else ()
            return super().record(item, one)

    labels = {name: {"kind": name} for name in "abc"}
    refused = []
    rows = run(Partly(labels=labels, row_labels=("kind",)), TWO[:1], refused=refused.append)
    assert [row.settings["kind"] for row in rows] == ["a", "c"]
    assert len(refused) == 1


def test_a_policy_that_reads_everything_on_purpose_is_not_idle():
    whole = Contender(name="whole", policy=Policy(select=ExactTopK()))
    rows = run(CountingTask(), [dense(), TWO[0], whole])
    assert [row.contender for row in rows] == ["dense", "one", "whole"]


def test_progress_counts_to_the_whole_and_begins_with_what_was_known(tmp_path):
    file, seen = tmp_path / "journal.jsonl", []

    def tell(done, total, news):
        seen.append((done, total, news))

    run(CountingTask(names=("b",)), TWO[1:], journal=Journal(file))
    run(CountingTask(needs_dense=True), journal=Journal(file), progress=tell)
    assert [news[:2] for news in seen] == [(done, 9) for done in range(2, 10)]
    assert [news[2] for news in seen[:4]] == ["a  dense", "a  one", "a  two", "b  dense"]
    assert "b  two" not in [news[2] for news in seen]


def test_news_of_a_measurement_comes_when_it_is_safe(tmp_path):
    file, kept = tmp_path / "journal.jsonl", []
    run(
        CountingTask(),
        journal=Journal(file),
        progress=lambda done, total, news: kept.append(file.read_bytes().count(b"\n") == done),
    )
    assert kept == [True] * 6


def test_the_total_is_known_beforehand():
    for task in (CountingTask(), CountingTask(needs_dense=True)):
        for contenders in (TWO, [dense(), *TWO]):
            expected = total_of(task, LM, contenders)
            task.log.clear()
            run(task, contenders)
            assert len(task.log) == expected


def test_items_of_one_name_are_refused():
    task = CountingTask(names=("a", "b", "a"))
    with pytest.raises(InputError, match=r"Two items have the same name; give each a name of its"):
        run(task)
    assert task.log == []


@pytest.mark.parametrize("needs_dense", [False, True])
@pytest.mark.parametrize(
    ("contenders", "name"),
    [([*TWO, TWO[0]], "one"), ([dense(), dense(), *TWO], "dense")],
)
def test_contenders_of_one_name_are_refused(needs_dense, contenders, name):
    with pytest.raises(InputError, match=f"Contender '{name}' is given twice; give each a name"):
        run(CountingTask(needs_dense=needs_dense), contenders)


def test_the_name_of_dense_is_its_own():
    """Where dense attention is added, nobody else may go by its name."""
    with pytest.raises(InputError, match="Contender 'dense' is given twice"):
        run(CountingTask(needs_dense=True), [contender("dense")])
    assert run(CountingTask(), [contender("dense")])[0].contender == "dense"


@pytest.mark.parametrize(
    ("task", "contenders", "message"),
    [
        (CountingTask(names=()), TWO, "Nothing to measure: 0 items, 2 contenders."),
        (CountingTask(), [], "Nothing to measure: 3 items, 0 contenders."),
    ],
)
def test_nothing_to_measure_is_refused(task, contenders, message):
    with pytest.raises(InputError, match=message):
        run(task, contenders)


def test_dense_is_a_method_not_a_name():
    assert is_dense(dense("plain"))
    assert not is_dense(contender("dense"))
    assert not is_dense(contender("wide", fraction=1.0))
    assert preset("dense").select.method == "dense"
