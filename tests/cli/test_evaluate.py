"""eval and report: rows, tables and refusals."""

import json
import sys
from types import ModuleType

import pytest


@pytest.fixture
def evaluate(loki, model, bases, tmp_path):
    rows = tmp_path / "rows.jsonl"

    def run(what, *arguments):
        return loki("eval", what, "-m", model, "--basis", bases["mixed"], "--out", rows, *arguments)

    def bare(what, *arguments):
        return loki("eval", what, *arguments, "-m", model, "--out", rows)

    run.rows, run.bare = rows, bare
    return run


PERPLEXITY = ("--windows", 2, "--window-tokens", 16, "--prefix-tokens", 64)
FIDELITY = ("--windows", 1, "--window-tokens", 64, "--queries", 4)
NEEDLE = ("--lengths", 400, "--depths", "0,1", "--per-depth", 1)


def test_perplexity(evaluate):
    done = evaluate("perplexity", "-p", "loki:top_k=16,rank=4", "-p", "dense", *PERPLEXITY)
    assert done.code == 0
    assert "loki:top_k=16,rank=4" in done.stdout
    assert "KL to dense" in done.stdout
    assert "one token per step" in done.stdout
    assert "window 2/2" in done.stderr
    assert "2 rows added to " in done.stderr
    first, second = map(json.loads, evaluate.rows.read_text().splitlines())
    assert first["contender"] == "loki:top_k=16,rank=4"
    assert first["settings"]["corpus"] == "loki-attn:continuation"
    assert first["metrics"]["read_bytes_share"] < 1
    assert second["metrics"]["nll_delta"] == pytest.approx(0, abs=1e-5)


def test_json_is_the_rows(evaluate):
    done = evaluate(
        "perplexity", "--json", "-p", "loki:top_k=4", "--protocol", "every_query", *PERPLEXITY
    )
    rows = done.json
    assert rows == [json.loads(line) for line in evaluate.rows.read_text().splitlines()]
    assert rows[0]["protocol"].startswith("every_query: ")
    assert rows[0]["n"] == 30
    assert rows[0]["basis"]["kind"] == "mixed"


def test_fidelity(evaluate, bases):
    pca = f"loki:top_k=16,basis={bases['pca']}"
    done = evaluate("fidelity", "-p", "loki:top_k=16", "-p", pca, *FIDELITY, "--json")
    kinds = {row["contender"]: row["basis"]["kind"] for row in done.json}
    assert kinds == {"loki:top_k=16": "mixed", "loki:top_k=16,basis=pca": "pca"}
    assert set(done.json[0]["metrics"]) >= {"recall", "mass", "exact_mass", "output_error"}
    shown = evaluate("fidelity", "-p", "loki:top_k=16", *FIDELITY)
    assert "recall of exact top-k" in shown.stdout
    assert "window 1/1" in shown.stderr
    assert len(evaluate.rows.read_text().splitlines()) == 3


def test_needle(evaluate):
    done = evaluate("needle", "-p", "loki:top_k=64,dense_below=0", *NEEDLE)
    assert "score" in done.stdout
    assert "needle" in done.stderr
    dense, loki = map(json.loads, evaluate.rows.read_text().splitlines())
    assert (dense["contender"], loki["contender"]) == ("dense", "loki:top_k=64,dense_below=0")
    assert loki["settings"]["length_tokens"] == 400
    assert loki["metrics"]["selecting_calls"] > 0
    assert [cell["depth"] for cell in loki["metrics"]["by_depth"]] == [0.0, 1.0]
    assert loki["n"] == 2
    assert {"score", "score_low", "score_high", "score_delta_low"} <= set(loki["metrics"])


def test_ruler(evaluate):
    options = ("--subtasks", "niah_single_1,fwe", "--lengths", 500, "--count", 2)
    rows = evaluate("ruler", "-p", "streaming-llm:top_k=64", *options, "--json").json
    found = [(row["contender"], row["settings"]["subtask"]) for row in rows]
    sparse = "streaming-llm:top_k=64"
    assert found == [
        ("dense", "niah_single_1"),
        ("dense", "fwe"),
        (sparse, "niah_single_1"),
        (sparse, "fwe"),
    ]
    assert all(row["metrics"]["selecting_calls"] > 0 for row in rows[2:])


def test_multi_question(evaluate):
    options = ("--lengths", 600, "--count", 2, "--questions", 2, "--seen", "before")
    rows = evaluate("multi-question", "-p", "exact-topk:top_k=80", *options, "--json").json
    assert [row["n"] for row in rows] == [4, 4]
    assert "in sight of each other" in rows[0]["protocol"]


def test_agreement(evaluate):
    options = ("--prompts", 2, "--prompt-tokens", 64, "--new-tokens", 6)
    rows = evaluate("agreement", "-p", "exact-topk:top_k=8,recents=2,min_k=1", *options, "--json")
    dense, sparse = rows.json
    assert dense["metrics"]["identical"] == 1.0
    assert 0 <= sparse["metrics"]["shared_tokens"] <= 6


def test_longbench(evaluate, write):
    sample = {
        "input": "Who kept the light?",
        "context": "Ellen kept the light. " * 20,
        "answers": ["Ellen"],
        "length": 80,
        "dataset": "hotpotqa",
        "language": "en",
        "all_classes": None,
        "_id": "1",
    }
    path = write("hotpotqa.jsonl", json.dumps(sample) + "\n")
    rows = evaluate.bare("longbench", path, "-p", "streaming-llm:top_k=64", "--json")
    assert [row["settings"]["subtask"] for row in rows.json] == ["hotpotqa"] * 2
    shown = evaluate.bare("longbench", path, "-p", "streaming-llm:top_k=64").stdout
    assert "longbench of " in shown
    assert "continuation" not in shown  # no text but the file's own


def test_loki_is_the_default_policy_and_a_text_the_users(evaluate, write):
    text = write("novel.txt", "It was a dark and stormy night; the rain fell in torrents. " * 40)
    rows = evaluate("fidelity", "--text", text, *FIDELITY, "--json").json
    assert [row["contender"] for row in rows] == ["loki"]
    assert rows[0]["settings"]["corpus"] == "novel.txt"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["perplexity", "--protocol", "decod"], "Unknown protocol 'decod'. Did you mean 'decode'?"),
        (["perplexity", "-p", "dense", "-p", "dense"], "Policy 'dense' is given twice"),
        (["perplexity", "-p", "exact"], "Unknown policy 'exact'. Did you mean 'exact-topk'?"),
        (["perplexity"], "exceed the model's context of 1024"),
        (["perplexity", *PERPLEXITY], "loki never selected anything"),
        (["fidelity"], "exceed the model's context of 1024"),
        (["fidelity", "--windows", 9999, "--window-tokens", 64], "give more text, fewer or"),
        (["needle"], "4096 tokens exceed the model's context of 1024"),
        (["needle", "--lengths", "2,x"], "--lengths takes numbers separated by commas, got '2,x'"),
        (["needle", "--kinds", "nmber", "--lengths", 400], "Did you mean 'number'?"),
        (["needle", "--lengths", "9000"], "9000 tokens exceed the model's context of 1024"),
        (["ruler", "--subtasks", "niah", "--lengths", 400], "RULER task 'niah'"),
        (["fidelity", "--text", "none.txt"], "No text file at 'none.txt'"),
    ],
)
def test_refusals_write_no_rows(evaluate, arguments, message):
    assert message in evaluate(*arguments).error
    assert not evaluate.rows.exists()


def test_an_interrupt_writes_no_rows(evaluate, monkeypatch):
    from loki_attn.cli.evaluate import measuring as command

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "load_model", interrupted)
    done = evaluate("fidelity")
    assert (done.code, done.stdout) == (130, "")
    assert not evaluate.rows.exists()


@pytest.fixture
def written(monkeypatch):
    """Put a report room in place that only notes what it is asked."""
    calls = []

    def write_markdown(rows, out, figures=True):
        calls.append((list(rows), figures))
        out.write_text("# Report\n")
        return out

    fake = ModuleType("loki_attn.report")
    fake.write_markdown = write_markdown
    monkeypatch.setitem(sys.modules, "loki_attn.report", fake)
    return calls


def test_report(loki, written, write, tmp_path):
    one, two = write("a.jsonl", '{"n": 1}\n'), write("b.jsonl", '{"n": 2}\n{"cut')
    out = tmp_path / "report.md"
    assert loki("report", one, two, "--out", out).stdout == f"{out}\n"
    found = loki("report", one, "--out", out, "--no-figures", "--json").json
    assert found == {"report": str(out), "rows": 1}
    assert written == [([{"n": 1}, {"n": 2}], True), ([{"n": 1}], False)]


def test_report_of_real_rows(evaluate, loki, tmp_path):
    evaluate("perplexity", "-p", "loki:top_k=16", *PERPLEXITY)
    evaluate("fidelity", "-p", "loki:top_k=16", *FIDELITY)
    done = loki("report", evaluate.rows, "--out", tmp_path / "r.md", "--no-figures")
    assert done.code == 0, done.stderr
    assert "loki" in (tmp_path / "r.md").read_text()


def test_report_refusals(loki, written, write):
    assert "There is no results file 'none.jsonl'." in loki("report", "none.jsonl").error
    assert "There are no rows in" in loki("report", write("empty.jsonl", "\n")).error
    assert written == []
