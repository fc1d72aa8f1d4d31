"""The generation bench, with speakers that are made up: gates, turns, ratios, refusals."""

from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch

from loki_attn.bench.generate import GenerateBench, measure_generation
from loki_attn.errors import InputError

NAMES = ("stock dynamic", "stock static", "attached dense", "attached loki")
BENCH = GenerateBench(model="made up", contexts=(100,), positions=1000, new_tokens=4, repeats=3)


@dataclass
class Speech:
    tokens: tuple
    first_s: float
    steps_s: tuple
    logits: torch.Tensor | None


class MadeUp:
    """Says the numbers from 0 on; a step takes `step_s`."""

    def __init__(self, policy="stock", step_s=0.1, log=None, name=""):
        self.policy, self.step_s, self.name = policy, step_s, name
        self.log = [] if log is None else log
        self.sparse_calls, self.cache_bytes = 0, 1000
        self.peak_cache_bytes, self.evicts, self.evicted_rows = 1500, False, 0
        self.selects = self.expects = self.policy == "loki"
        self.slip, self.slip_at_full = None, None
        self.at_full, self.said = False, 0
        self.prompts = []

    def selects_at(self, context):
        self.asked_context = context
        return self.expects

    def begin(self, ids, room):
        self.prompts.append((tuple(ids.shape), room))
        self.said, self.sparse_calls = 0, 0

    def speak(self, count, *, keep_logits=False):
        self.log.append((self.name, count, keep_logits))
        tokens = list(range(self.said, self.said + count))
        slip = self.slip_at_full if self.at_full else self.slip
        if slip is not None:
            tokens[slip] += 1
        self.said += count
        self.sparse_calls += count if self.selects else 0
        logits = torch.nn.functional.one_hot(torch.tensor(tokens), 64).float()
        steps = (self.step_s,) * (count - 1)
        return Speech(tuple(tokens), 2.0, steps, logits if keep_logits else None)

    def end(self):
        self.sparse_calls = 0

    @contextmanager
    def full_budget(self):
        self.at_full = True
        yield
        self.at_full = False


def crowd(**changes):
    log = []
    policies = {"attached dense": "dense", "attached loki": "loki"}
    found = {name: MadeUp(policies.get(name, "stock"), log=log, name=name) for name in NAMES}
    found["stock static"].step_s, found["attached loki"].step_s = 0.2, 0.05
    for name, change in changes.items():
        vars(found[name.replace("_", " ")]).update(change)
    return found, log


def far(ours, stock):
    assert ours.shape == stock.shape
    return float((ours - stock).abs().max()), 0.5


def close(ours, stock):
    return float((ours - stock).abs().max()), 2.0


def measured(speakers, bench=BENCH, distance=far, ids=(5, 6, 7)):
    return measure_generation(bench, speakers, ids, torch.float32, distance, lambda news: None)


def test_rows_tell_rates_and_ratios():
    speakers, _ = crowd()
    outcome = measured(speakers)
    assert outcome.failures == {}
    rows = {row.contender: row for row in outcome.rows}
    assert tuple(rows) == NAMES
    assert rows["stock dynamic"].tokens_per_s == pytest.approx(10)
    assert rows["attached loki"].ratio_stock_dynamic == pytest.approx(2)
    assert rows["attached loki"].ratio_stock_static == pytest.approx(4)
    assert rows["stock static"].ratio_stock_dynamic == pytest.approx(0.5)
    for row in rows.values():
        assert (row.prefill_s, row.prefill_ratio, row.samples) == (2.0, 1.0, 9)
        assert (row.context, row.shape, row.dtype) == (100, "made up", "fp32")
        assert row.cache_bytes == 1000
        assert row.gate["verdict"] == "passed"
        assert row.note == ""
    assert rows["attached loki"].sparse_calls == 12
    assert rows["attached dense"].sparse_calls == 0


def test_the_context_is_what_the_cache_holds_in_the_end():
    speakers, _ = crowd()
    measured(speakers)
    for speaker in speakers.values():
        (_, (shape, room)) = speaker.prompts
        assert (shape, room) == ((1, 100 - 16), 16)


def test_the_median_of_several_prefills_counts():
    speakers, _ = crowd()
    loki, times = speakers["attached loki"], iter((9.0, 1.0, 4.0, 3.0, 9.0, 9.0, 9.0))

    def speak(count, keep_logits=False):
        said = MadeUp.speak(loki, count, keep_logits=keep_logits)
        said.first_s = next(times)
        return said

    loki.speak = speak
    bench = GenerateBench(**{**vars(BENCH), "prefills": 3})
    rows = {row.contender: row for row in measured(speakers, bench).rows}
    # The first call of all is the check at full budget.
    assert rows["attached loki"].prefill_s == 3.0
    assert rows["attached loki"].prefill_ratio == pytest.approx(2 / 3)


def test_turns_are_taken_in_changing_order():
    speakers, log = crowd()
    measured(speakers)
    turns = [name for name, count, kept in log if count == 4 and not kept]
    assert turns == [*NAMES, *NAMES[1:], NAMES[0], *NAMES[2:], *NAMES[:2]]


def test_a_budget_that_reads_the_whole_context_is_called_dense():
    speakers, _ = crowd(attached_loki={"expects": False})
    loki = speakers["attached loki"]

    def speak(count, keep_logits=False):
        said = MadeUp.speak(loki, count, keep_logits=keep_logits)
        loki.sparse_calls = 1 if loki.at_full else 0
        return said

    loki.speak = speak
    rows = {row.contender: row for row in measured(speakers).rows}
    assert rows["attached loki"].note == "dense"
    # The last token of all is never read.
    assert loki.asked_context == 99


def test_loki_that_never_selected_where_it_should_have_gets_no_row():
    speakers, _ = crowd(attached_loki={"selects": False})
    outcome = measured(speakers)
    assert outcome.failures == {"attached loki": "it never selected in the check at full budget"}
    assert [row.contender for row in outcome.rows] == list(NAMES[:3])

    speakers, _ = crowd()
    loki = speakers["attached loki"]
    loki.begin = lambda ids, room: (
        MadeUp.begin(loki, ids, room) or vars(loki).update(selects=loki.at_full)
    )
    outcome = measured(speakers)
    assert outcome.failures == {"attached loki at 100 tokens": "it never selected in its turns"}
    assert [row.contender for row in outcome.rows] == list(NAMES[:3])


@pytest.mark.parametrize("name", NAMES[1:])
def test_a_contender_that_says_something_else_at_full_budget_gets_no_row(name):
    speakers, _ = crowd(**{name.replace(" ", "_"): {"slip_at_full": 2}})
    outcome = measured(speakers)
    assert set(outcome.failures) == {name}
    assert "parts from the stock model after 2 tokens" in outcome.failures[name]
    assert name not in {row.contender for row in outcome.rows}


@pytest.mark.parametrize("name", NAMES[1:3])
def test_a_dense_contender_that_says_something_else_at_the_context_gets_no_row(name):
    speakers, _ = crowd(**{name.replace(" ", "_"): {"slip": 1}})
    outcome = measured(speakers)
    assert set(outcome.failures) == {f"{name} at 100 tokens"}
    assert name not in {row.contender for row in outcome.rows}


def test_tokens_may_part_where_rounding_explains_it():
    speakers, _ = crowd(attached_dense={"slip": 1})
    outcome = measured(speakers, distance=close)
    assert outcome.failures == {}
    (row,) = [row for row in outcome.rows if row.contender == "attached dense"]
    assert (row.gate["equal_tokens"], row.gate["largest_error"]) == (1, 1.0)


def test_sparse_attention_may_say_something_else_at_the_context():
    speakers, _ = crowd(attached_loki={"slip": 0})
    assert len(measured(speakers).rows) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"contexts": (1001,)}, "1,001 tokens is beyond the 1,000 positions of made up"),
        ({"contexts": (16,)}, "16 tokens leaves no prompt before 16 new ones"),
        ({"contexts": ()}, "There are no contexts"),
        ({"new_tokens": 1}, "2 new tokens or more"),
        ({"repeats": 0}, "repeats must be 1 or more"),
        ({"prefills": 0}, "prefills must be 1 or more"),
    ],
)
def test_refusals(change, message):
    settings = {"model": "made up", "contexts": (100,), "positions": 1000, "new_tokens": 4}
    with pytest.raises(InputError, match=message):
        GenerateBench(**(settings | change))


def test_refuses_a_run_without_text_or_without_stock():
    speakers, _ = crowd()
    with pytest.raises(InputError, match="no tokens"):
        measured(speakers, ids=())
    del speakers["stock dynamic"]
    with pytest.raises(InputError, match="'stock dynamic'"):
        measured(speakers)
