"""tune: the policy's file, the rows, the table, and refusals that leave nothing behind."""

import json

import pytest

from loki_attn.policy import Policy

SMALL = (
    *("--context", 128, "--windows", 2, "--heldout-windows", 1, "--window-tokens", 32),
    *("--cost", "bytes", "--rounds", 1),
)
# A tiny random model hardly looks at its context: everything is near dense attention.
WIDE = ("--max-kl", 1.0)


@pytest.fixture
def tune(loki, model, bases, tmp_path):
    out, rows = tmp_path / "policy.json", tmp_path / "rows.jsonl"

    def run(*arguments):
        files = ("--basis", bases["mixed"], "--out", out, "--rows", rows)
        return loki("tune", "-m", model, *files, *SMALL, *arguments)

    run.out, run.rows = out, rows
    return run


def test_writes_a_policy_that_the_other_commands_read(tune, loki, model, bases):
    done = tune(*WIDE)
    assert done.code == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(tune.out)
    for word in (
        "KL to dense <= 1",
        "speed over dense",
        "chosen",
        "policies predicted",
        "held-out text",
    ):
        assert word in done.stdout
    assert "within" in done.stderr
    policy = Policy.from_json(tune.out.read_text())
    (first, *_) = map(json.loads, tune.rows.read_text().splitlines())
    assert first["contender"] == policy.name
    assert first["policy"] == json.loads(policy.to_json())
    assert (first["task"], first["settings"]["corpus"]) == ("tune", "loki-attn:continuation")
    said = loki(
        *("generate", "-m", model, "-p", tune.out, "--basis", bases["mixed"]),
        *("--prompt", "It was a dark and stormy night. " * 30, "--max-new-tokens", 3, "--json"),
    )
    assert said.json["selecting_share"] == 1.0


def test_json_is_the_file_and_the_rows_and_a_journal_keeps_the_work(tune, tmp_path):
    journal = tmp_path / "journal.jsonl"
    result = tune("--max-ppl-delta", 500, "--journal", journal, "--json").json
    assert result["policy"] == str(tune.out)
    assert result["rows"] == [json.loads(line) for line in tune.rows.read_text().splitlines()]
    assert result["rows"][0]["settings"]["bound_on"] == "perplexity above dense"
    assert result["rows"][0]["metrics"]["perplexity_delta_high"] <= 500
    assert len(journal.read_text().splitlines()) > result["rows"][0]["settings"]["windows"]


def test_where_nothing_is_within_the_bound_there_is_no_file(tune):
    error = tune("--max-kl", 1e-12, "--json").error
    assert "No policy was found within KL to dense <= 1e-12 at 128 tokens" in error
    assert "The nearest is loki rank=" in error
    assert not tune.out.exists()
    assert not tune.rows.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Give the bound either as --max-kl NATS or as --max-ppl-delta DELTA."),
        ([*WIDE, "--max-ppl-delta", 1], "Give the bound either as --max-kl NATS or"),
        (["--max-kl", 0], "A bound on KL to dense must be a number above 0, got 0.0"),
        (["--max-ppl-delta", -1], "A bound on perplexity above dense must be a number above 0"),
        ([*WIDE, "--cost", "tiem"], "Unknown cost 'tiem'. Did you mean 'time'?"),
        ([*WIDE, "--context", 4096], "4096 tokens exceeds the model's context of 1024"),
        ([*WIDE, "--context", 0], "got window_tokens=32, context=0"),
        ([*WIDE, "--windows", 9999], "Give more text, a shorter context or fewer windows."),
        ([*WIDE, "--text", "none.txt"], "No text file at 'none.txt'"),
        ([*WIDE, "--out", "policy.yaml"], "A policy's file ends in .json"),
    ],
)
def test_refusals_leave_nothing_behind(tune, arguments, message):
    assert message in tune(*arguments).error
    assert not tune.out.exists()
    assert not tune.rows.exists()


def test_the_models_context_is_the_longest_default(loki, model, bases, write):
    """1024 tokens here, so that the text is too short for five stretches of them."""
    text = write("short.txt", "It was a dark and stormy night. " * 20)
    files = ("--basis", bases["mixed"], "--text", text)
    assert "of 1024 tokens each" in loki("tune", "-m", model, *files, *WIDE).error
