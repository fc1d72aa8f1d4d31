"""Intervals: a sampled number has one or is not printed; what is counted needs none."""

import math

import pytest
from page_rows import bounded, row

from loki_attn.report.intervals import counted, estimate, measured_names


def test_bounds_of_the_row_come_first():
    found = estimate(row("needle", **bounded("score", 0.5, 0.1), score_standard_error=9), "score")
    assert (found.low, found.high, found.n) == (0.4, 0.6, 20)


@pytest.mark.parametrize("name", ["kl_standard_error", "kl_to_dense_standard_error"])
def test_standard_errors_make_a_normal_interval(name):
    found = estimate(row("perplexity", kl_to_dense=1.0, **{name: 0.1}), "kl_to_dense")
    assert (found.low, found.high) == (pytest.approx(0.804), pytest.approx(1.196))
    assert "1.96" in found.how


def test_accuracy_gets_wilsons_interval():
    found = estimate(row("passkey", n=20, accuracy=1.0), "accuracy")
    assert found.high == 1.0
    assert found.low == pytest.approx(0.839, abs=1e-3)


@pytest.mark.parametrize(
    "metrics",
    [
        {},
        {"recall": 0.5},
        {"recall": "high"},
        {"recall": math.nan},
        {"recall": True},
        {"recall": 0.5, "recall_low": math.nan, "recall_high": 0.6},
    ],
)
def test_nothing_is_made_up(metrics):
    assert estimate(row("fidelity", **metrics), "recall") is None


def test_companions_are_no_metrics_of_their_own():
    metrics = {**bounded("score", 0.5, 0.1), "kl_to_dense": 1, "kl_standard_error": 1, "low": 2}
    metrics |= {"nll_delta": 1, "nll_delta_standard_error": 1, "by_depth": [], "intervals": "95 %"}
    names = measured_names(row("needle", **metrics))
    assert names == ["score", "kl_to_dense", "low", "nll_delta"]


@pytest.mark.parametrize(
    ("task", "metric", "verdict"),
    [
        ("perplexity", "read_bytes_share", True),
        ("perplexity", "kl_to_dense", False),
        ("agreement", "shared_share", False),
        ("tune", "predicted_step_us", True),
        ("spectrum", "rank_at_90_mean", True),
        ("bench decode", "gb_per_s", True),
        ("ruler", "selecting_calls", True),
    ],
)
def test_what_is_counted_needs_no_interval(task, metric, verdict):
    assert counted(row(task), metric) is verdict
