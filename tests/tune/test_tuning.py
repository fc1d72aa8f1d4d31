"""Tuning a tiny model, by bytes: what is chosen does not depend on the machine."""

import json
from collections import Counter

import pytest
from tiny_models import prompts

import loki_attn
from loki_attn.errors import InputError
from loki_attn.evaluate.journal import Journal
from loki_attn.evaluate.perplexity import perplexity
from loki_attn.policy import as_policy
from loki_attn.tune import Bound, NothingFoundError, Spec, tune, write_policy
from loki_attn.tune.stopwatch import Stopwatch, steps_per_turn

IDS = prompts(1, 900, seed=5)[0].tolist()
SPEC = {
    "context": 128,
    "windows": 2,
    "heldout_windows": 1,
    "window_tokens": 32,
    "cost": "bytes",
    "queries": 4,
    "rounds": 1,
}
# Random keys have no structure: only policies that read much are near dense attention.
LIMIT = 0.6


@pytest.fixture(scope="module")
def tuned(tiny):
    lm, basis = tiny
    return tune(lm, IDS, basis, Spec(bound=Bound("kl", LIMIT), **SPEC))


def test_the_choice_keeps_the_bound_on_both_texts(tuned):
    assert tuned.final
    assert tuned.chosen.judged.metrics["kl_to_dense_high"] <= LIMIT
    assert tuned.chosen.heldout.metrics["kl_to_dense"] <= LIMIT
    for other in tuned.others:
        assert other.judged.metrics["kl_to_dense_high"] <= LIMIT


def test_no_other_within_the_bound_reads_less(tuned):
    for other in tuned.others:
        assert other.predicted_read_bytes_share >= tuned.chosen.predicted_read_bytes_share, (
            other.candidate
        )


def test_predicted_bytes_are_those_that_were_counted(tuned):
    for one in (tuned.chosen, *tuned.others):
        counted = one.judged.metrics["read_bytes_share"]
        assert one.predicted_read_bytes_share == pytest.approx(counted, rel=1e-12)


def untimed(metrics):
    return {name: value for name, value in metrics.items() if name != "tokens_per_s"}


def test_the_figures_are_those_of_the_perplexity_task(tiny, tuned):
    lm, _ = tiny
    judged, _heldout = tuned.spec.stretches(IDS)
    (row,) = perplexity(
        lm, judged, [tuned.chosen.contender], windows=2, window_tokens=32, prefix_tokens=96
    )
    assert untimed(row.metrics) == untimed(tuned.chosen.judged.metrics)


def test_rows_hold_what_was_predicted_and_measured(tiny, tuned):
    rows = tuned.rows(tiny[0])
    assert len(rows) == 1 + len(tuned.others)
    first = json.loads(json.dumps(rows[0].metrics))
    assert set(first) >= {
        "predicted_read_bytes_share",
        "read_bytes_share",
        "predicted_step_us",
        "predicted_speedup",
        "median_step_us",
        "p20_step_us",
        "p80_step_us",
        "dense_median_step_us",
        *(
            f"{p}{m}{e}"
            for p in ("", "heldout_")
            for m in ("kl_to_dense", "nll_delta")
            for e in ("", "_low", "_high")
        ),
    }
    assert (rows[0].task, rows[0].n, first["heldout_n"]) == ("tune", 64, 32)
    settings = rows[0].settings
    assert (settings["chosen"], settings["bound"]) == (True, LIMIT)
    assert settings["bound_on"] == "KL to dense"
    assert settings["policies_predicted"] > settings["policies_measured"] > 0
    assert [row.settings["chosen"] for row in rows[1:]] == [False] * len(tuned.others)


def test_the_policy_is_written_whole_and_read_back(tuned, tmp_path):
    path = tmp_path / "new" / "policy.json"
    write_policy(tuned, path)
    assert as_policy(str(path)) == tuned.chosen.contender.policy
    assert [p.name for p in path.parent.iterdir()] == ["policy.json"]


def test_another_ending_is_refused(tuned, tmp_path):
    with pytest.raises(InputError, match=r"A policy's file ends in \.json, so that it can be told"):
        write_policy(tuned, tmp_path / "policy.txt")
    assert list(tmp_path.iterdir()) == []


def test_the_same_twice_is_the_same_and_a_journal_saves_the_work(tiny, tuned, tmp_path):
    lm, basis = tiny
    spec, path = Spec(bound=Bound("kl", LIMIT), **SPEC), tmp_path / "journal.jsonl"
    first = tune(lm, IDS, basis, spec, journal=Journal(path))
    held = path.read_bytes()
    again = tune(lm, IDS, basis, spec, journal=Journal(path))
    assert path.read_bytes() == held
    assert held.count(b"\n") > first.counts.measured
    for one in (first, again):
        assert one.chosen.candidate == tuned.chosen.candidate
        assert one.counts == tuned.counts
        assert untimed(one.chosen.judged.metrics) == untimed(tuned.chosen.judged.metrics)


def test_a_time_limit_takes_the_best_so_far_and_says_so(tiny, tuned):
    lm, basis = tiny
    clock = Counter()

    def now():
        clock["reads"] += 1
        # The first reading starts the clock, then one before each measurement.
        return 0.0 if clock["reads"] <= 1 + 1 else 1e9

    spec = Spec(bound=Bound("kl", 20.0), **SPEC)
    cut = tune(lm, IDS, basis, spec, now=now)
    assert cut.counts.measured == 1
    assert not cut.final
    assert cut.rows(lm)[0].settings["search_ended"] == "by its time limit"
    assert cut.chosen.judged.metrics["kl_to_dense_high"] <= 20.0


def test_a_wide_bound_takes_fewer_bytes_than_a_narrow_one(tiny, tuned):
    lm, basis = tiny
    wide = tune(lm, IDS, basis, Spec(bound=Bound("ppl", 1e6), **SPEC))
    assert wide.chosen.predicted_read_bytes_share < tuned.chosen.predicted_read_bytes_share
    above = wide.rows(lm)[0].metrics["perplexity_delta"]
    metrics = wide.chosen.judged.metrics
    assert above == pytest.approx(metrics["perplexity"] - metrics["perplexity_dense"], rel=1e-6)


def test_where_nothing_is_within_the_bound_the_nearest_is_named(tiny):
    lm, basis = tiny
    spec = Spec(bound=Bound("kl", 1e-7), **SPEC)
    message = (
        r"No policy was found within KL to dense <= 1e-07 at 128 tokens. The nearest is "
        r"loki rank=8 \w+ top_k=\d+.*: [\d.e-]+ \[.*\], reading \d+\.\d% of the cache's bytes; "
        r"\d+ measured, none is left that could do better"
    )
    with pytest.raises(NothingFoundError, match=message):
        tune(lm, IDS, basis, spec)


def test_a_limit_before_the_first_measurement_is_said(tiny):
    lm, basis = tiny
    readings = iter([0.0])
    with pytest.raises(NothingFoundError, match="the time was over before one was measured"):
        tune(lm, IDS, basis, Spec(bound=Bound("kl", 1.0), **SPEC), now=lambda: next(readings, 1e9))


def test_a_context_beyond_the_models_is_refused(tiny):
    lm, basis = tiny
    spec = Spec(**{**SPEC, "context": 300}, bound=Bound("kl", 1.0))
    with pytest.raises(InputError, match="300 tokens exceeds the model's context of 256"):
        tune(lm, IDS, basis, spec)


def test_every_turn_starts_from_the_same_prefix(tiny, tuned):
    import torch

    lm, _ = tiny
    tokens = torch.tensor([IDS[: 40 + steps_per_turn()]])
    prefix = lm.prefill(tokens[:, :40])
    watch = Stopwatch(lm=lm, prefix=prefix, tokens=tokens[:, 40:], rounds=2)
    times = watch.times([tuned.chosen.contender])
    assert {name: found.samples for name, found in times.items()} == {
        tuned.chosen.contender.name: 2 * (steps_per_turn() - 2)
    }
    assert prefix.get_seq_length() == 40
    # Contexts up to half of the one tuned at are read whole.
    assert lm.traffic.sparse_calls == 0


def test_the_written_policy_attaches(tuned, tmp_path):
    from tiny_models import build, greedy, random_basis

    path, model = tmp_path / "policy.json", build("Llama")
    write_policy(tuned, path)
    with loki_attn.attach(model, str(path), basis=random_basis(model)) as attachment:
        greedy(model, prompts(1, 120), 4)
        assert attachment.traffic.sparse_calls > 0
