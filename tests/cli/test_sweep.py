"""eval sweep: a process for each model, killed at any point, finished as if nothing had been."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

SPEC = """
models: [{models}]
policies:
  - dense
  - {{policy: exact-topk, top_k: [8, 24], recents: 2, min_k: 1}}
tasks:
  - {{task: perplexity, prefix_tokens: [64, 96], window_tokens: 16, windows: 2}}
  - task: agreement
    prompts: 2
    prompt_tokens: 64
    new_tokens: 6
"""
MEASUREMENTS = 2 * 2 * 3 + 2 * 3  # windows x prefixes x policies, prompts x policies
ROWS = 2 * 3 + 3


@pytest.fixture
def spec(write, model):
    return write("spec.yaml", SPEC.format(models=model))


def rows_of(path):
    """Rows without what tells when, where and how fast they were made."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row["metrics"].pop("tokens_per_s", None)
    return [{k: v for k, v in row.items() if k != "provenance"} for row in rows]


def kill_after(records, spec, out, only):
    """Run the sweep of one model in a process of its own, until so many records are kept."""
    command = [sys.executable, "-m", "loki_attn.cli", "eval", "sweep", spec, "--out", out]
    running = subprocess.Popen(
        [*map(str, command), "--only", only], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while running.poll() is None and lines(out.with_name(f"{out.name}.journal")) < records:
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.wait()


def lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_every_model_has_a_process_and_one_that_fails_stops_no_other(loki, write, model, tmp_path):
    spec = write("spec.yaml", SPEC.format(models=f"{tmp_path / 'none'}, {model}"))
    out = tmp_path / "rows.jsonl"
    done = loki("eval", "sweep", spec, "--out", out, "--json")
    assert done.code == 2
    assert done.json == {"rows": ROWS, "out": str(out), "failed": [str(tmp_path / "none")]}
    assert "The sweep did not finish for" in done.stderr
    rows = rows_of(out)
    assert {row["model"]["id"] for row in rows} == {"tiny"}
    assert {row["task"] for row in rows} == {"perplexity", "agreement"}
    assert lines(tmp_path / "rows.jsonl.journal") == MEASUREMENTS
    assert loki("eval", "sweep", spec, "--out", out, "--only", model).code == 0
    assert rows_of(out) == rows
    assert lines(tmp_path / "rows.jsonl.journal") == MEASUREMENTS


def test_a_killed_sweep_resumed_equals_an_uninterrupted_one(loki, spec, model, tmp_path):
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    assert loki("eval", "sweep", spec, "--out", whole, "--only", model).code == 0
    journal = tmp_path / "killed.jsonl.journal"
    for records in (2, MEASUREMENTS - 2):
        kill_after(records, spec, killed, model)
    # As if the power had gone in the middle of a line.
    os.truncate(journal, journal.stat().st_size - 7)
    assert loki("eval", "sweep", spec, "--out", killed, "--only", model).code == 0
    assert rows_of(killed) == rows_of(whole)
    assert len(rows_of(whole)) == ROWS
    records = [json.loads(x)["key"] for x in journal.read_text().splitlines() if x.endswith("}")]
    assert len(records) == len(set(records)) == MEASUREMENTS


def test_policies_that_never_select_have_no_row_and_stop_nothing(loki, write, model, tmp_path):
    idle = SPEC.format(models=model).replace("top_k: [8, 24]", "top_k: [8, 900]")
    out = tmp_path / "rows.jsonl"
    done = loki("eval", "sweep", write("idle.yaml", idle), "--out", out, "--only", model)
    assert done.code == 0, done.stderr
    assert "no row: exact-topk:top_k=900" in done.stderr.replace("\n", " ")
    assert len(rows_of(out)) == ROWS - 3


def test_only_takes_a_model_of_the_sweep(loki, spec, tmp_path):
    out = tmp_path / "rows.jsonl"
    done = loki("eval", "sweep", spec, "--out", out, "--only", "other")
    assert "model of the sweep 'other'" in done.error
    assert not out.exists()


def test_a_policy_that_stands_twice_is_refused_before_anything_is_measured(
    loki, write, model, tmp_path
):
    text = SPEC.format(models=model) + "    policies: [dense, dense]\n"
    out = tmp_path / "rows.jsonl"
    done = loki("eval", "sweep", write("twice.yaml", text), "--out", out, "--only", model)
    assert "Contender 'dense' is given twice" in done.error
    assert not out.exists()
    assert lines(tmp_path / "rows.jsonl.journal") == 0


# Of every task, the smallest run that decodes; a task without an entry fails the test below.
SMALLEST = {
    "perplexity": "prefix_tokens: 64, window_tokens: 8, windows: 1",
    "fidelity": "window_tokens: 64, windows: 1, queries: 4",
    "agreement": "prompts: 1, prompt_tokens: 64, new_tokens: 4",
    "needle": "kinds: [number], lengths: [400], depths: [0.5], per_depth: 1",
    "ruler": "subtasks: [niah_single_1], lengths: [500], count: 1, answer_tokens: 4",
    "multi-question": "lengths: [600], count: 1, questions: 2",
    "longbench": "path: hotpotqa.jsonl",
}
NEVER_DECODES = {"fidelity"}  # one dense forward, judged


def test_every_task_really_decodes(loki, write, model, tmp_path, monkeypatch):
    from loki_attn.evaluate.sweep.spec import OPTIONS

    assert set(SMALLEST) == set(OPTIONS)
    sample = {"input": "Who kept the light?", "context": "Ellen kept the light. " * 20}
    sample |= {"answers": ["Ellen"], "length": 80, "dataset": "hotpotqa", "language": "en"}
    write("hotpotqa.jsonl", json.dumps({**sample, "all_classes": None, "_id": "1"}) + "\n")
    monkeypatch.chdir(tmp_path)
    tasks = [f"  - {{task: {name}, {options}}}" for name, options in SMALLEST.items()]
    head = f"models: [{model}]\npolicies: ['exact-topk:top_k=24,recents=2,min_k=1']\ntasks:\n"
    spec, out = write("all.yaml", head + "\n".join(tasks)), tmp_path / "rows.jsonl"
    done = loki("eval", "sweep", spec, "--out", out, "--only", model)
    assert done.code == 0, done.stderr
    sparse = {row["task"]: row for row in rows_of(out) if row["contender"] != "dense"}
    assert set(sparse) == set(OPTIONS)
    for name in set(OPTIONS) - NEVER_DECODES:
        metrics = sparse[name]["metrics"]
        assert metrics["selecting_calls"] > 0, name
        assert metrics["read_bytes_share"] < 1, name
