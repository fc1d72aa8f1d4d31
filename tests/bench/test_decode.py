"""The decode bench: rows that agree with each other, refusals, and no timing of what is wrong."""

import json
from contextlib import contextmanager
from dataclasses import asdict, replace

import pytest

from loki_attn.bench import host_place
from loki_attn.bench.clock import STEPS_PER_TURN
from loki_attn.bench.decode import DecodeBench, measure_decode
from loki_attn.bench.gate import Gate, Verdict
from loki_attn.bench.shapes import Shape
from loki_attn.errors import InputError, LokiAttnError

SHAPE = Shape(name="small", num_heads=6, num_kv_heads=2, head_dim=32)
BENCH = DecodeBench(
    shape=SHAPE,
    contexts=(96,),
    amounts=("T/8", "48"),
    planes=("int8", "bf16"),
    rank=8,
    repeats=2,
    warm_up=1,
    layers=2,
    parts=True,
    command="loki-attn bench decode",
)


@contextmanager
def silent(title, turns):
    del title, turns
    yield lambda done, name: None


def measured(bench=BENCH, tell=lambda news: None):
    return measure_decode(bench, tell, silent)


@pytest.fixture(scope="module")
def outcome():
    return measured()


def test_every_contender_has_a_row(outcome):
    names = [row.contender for row in outcome.rows]
    assert outcome.failures == {}
    assert len(set(names)) == len(names)
    expected = {"sdpa-hf", "sdpa-repeat-kv", "sdpa-group-rows", "eager-group-rows"}
    expected |= {f"exact-topk k={k}" for k in (12, 48)}
    loki = {f"loki {plane} k={k}" for plane in ("int8", "bf16") for k in (12, 48)}
    expected |= loki | {f"{n}: {part}" for n in loki for part in ("score", "choose", "attend")}
    # Our own dense kernel competes where there is one, and is accounted for where there is none.
    assert set(names) | set(outcome.left_out) == expected | {"dense-native"}


def test_figures_of_a_row_agree(outcome):
    for row in outcome.rows:
        assert row.p20_us <= row.median_us <= row.p80_us
        assert row.gb_per_s == pytest.approx(row.bytes_touched / row.median_us / 1e3)
        assert row.share_of_bandwidth == pytest.approx(row.gb_per_s / row.read_gb_per_s)
        assert row.gate["verdict"] == "passed"
        assert row.gate["largest_error"] <= row.gate["allowed_error"]
        assert row.samples == BENCH.repeats * STEPS_PER_TURN
        assert (row.layers, row.batch, row.context, row.dtype) == (2, 1, 96, "bf16")
        assert row.provenance["command"] == "loki-attn bench decode"
        assert {"commit", "versions", "device", "processor"} <= set(row.provenance)


def test_ratios_are_of_medians_of_the_same_run(outcome):
    medians = {row.contender: row.median_us for row in outcome.rows if row.part is None}
    best = min(medians[row.contender] for row in outcome.rows if row.kind == "torch")
    for row in outcome.rows:
        if row.part is not None:
            assert row.ratios == {}
            continue
        assert set(row.ratios) == set(medians) - {row.contender}
        for peer, ratio in row.ratios.items():
            assert ratio == pytest.approx(medians[peer] / row.median_us)
        if row.kind != "loki":
            assert row.ratio_best_torch is row.share_of_byte_limit is None
            continue
        assert row.ratio_hf == row.ratios["sdpa-hf"]
        assert row.ratio_best_torch == pytest.approx(best / row.median_us)
        assert row.ratio_dense_native == row.ratios.get("dense-native")
        limit_us = row.bytes_touched / row.read_gb_per_s / 1e3
        assert row.share_of_byte_limit == pytest.approx(limit_us / row.median_us)


def test_rows_are_plain_json(outcome):
    for row in outcome.rows:
        plain = json.loads(json.dumps(asdict(row), allow_nan=False))
        assert plain["task"] == "bench decode"


@pytest.fixture
def gate_against(monkeypatch):
    """Make the gate refuse a contender, or fail to run it."""

    def spoil(name, answer):
        judge = Gate.judge

        def spoilt(self, contender, found=None):
            if contender.name != name:
                return judge(self, contender, found)
            if isinstance(answer, Exception):
                raise answer
            return answer

        monkeypatch.setattr(Gate, "judge", spoilt)

    return spoil


def test_what_is_wrong_gets_no_timing(gate_against):
    wrong = Verdict(passed=False, largest_error=1.0, allowed=0.1, reason="it is wrong")
    gate_against("sdpa-group-rows", wrong)
    news = []
    outcome = measured(replace(BENCH, amounts=("48",), parts=False), news.append)
    assert outcome.failures == {"sdpa-group-rows at 96 tokens": "it is wrong"}
    assert "sdpa-group-rows at 96 tokens is wrong: it is wrong" in news
    assert outcome.rows
    for row in outcome.rows:
        assert row.contender != "sdpa-group-rows"
        assert "sdpa-group-rows" not in row.ratios


def test_what_a_backend_does_not_serve_is_left_out_with_its_reason(gate_against):
    gate_against("loki bf16 k=48", LokiAttnError("no bf16 here"))
    outcome = measured(replace(BENCH, amounts=("48",), parts=False))
    assert outcome.left_out["loki bf16 k=48"] == "no bf16 here"
    assert outcome.failures == {}
    assert "loki bf16 k=48" not in {row.contender for row in outcome.rows}


def test_layers_are_as_many_as_keep_a_visit_cold(monkeypatch):
    monkeypatch.setattr(host_place, "last_level_cache_bytes", lambda: 10_000)
    small = replace(BENCH, amounts=("48",), planes=("int8",), parts=False, layers=None)
    rows = measured(small).rows
    assert rows
    assert all(row.bytes_between_visits >= 4 * 10_000 for row in rows)
    assert min(row.bytes_between_visits for row in rows) < 2 * 4 * 10_000


def test_memory_that_holds_no_layer_is_refused():
    with pytest.raises(InputError, match=r"One layer of 96 tokens takes .* raise the memory limit"):
        measured(replace(BENCH, layers=None, memory_bytes=1000))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "int8"}, "Unknown dtype 'int8'. .*Valid: bf16, fp16, fp32"),
        ({"contexts": (0,)}, "at least 1 token, got 0"),
        ({"contexts": ()}, "There are no contexts"),
        ({"contexts": (96, 96)}, "96 is given twice among the contexts"),
        ({"amounts": ("97",)}, "k=97 reads 97 of 96 tokens"),
        ({"amounts": ("3",)}, "top_k=3 is less than sinks"),
        ({"planes": ("int9",)}, "Unknown plane_dtype 'int9'"),
        ({"rank": 33}, "rank=33 is above head_dim=32 of small"),
        ({"rank": 0}, "rank must be"),
        ({"batch": 0}, "batch must be 1 or more, got 0"),
        ({"layers": 0}, "layers must be 1 or more, got 0"),
        ({"warm_up": -1}, "warm_up must be 0 or more, got -1"),
    ],
)
def test_refusals(change, message):
    with pytest.raises(InputError, match=message):
        replace(BENCH, **change)


def test_amounts_that_fall_together_are_measured_once():
    outcome = measured(replace(BENCH, amounts=("T/2", "48"), planes=("int8",), parts=False))
    names = [row.contender for row in outcome.rows if row.kind == "loki"]
    assert names == ["loki int8 k=48"]
