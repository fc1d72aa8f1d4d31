"""The app itself: help, errors on one line, Ctrl-C, and what it needs."""

import inspect
import json
import subprocess
import sys
import time

import pytest

from loki_attn import models
from loki_attn.cli import calibrate, options, terminal
from loki_attn.cli.evaluate import on_questions, on_text
from loki_attn.errors import LokiAttnError

COMMANDS = (
    ["calibrate"],
    ["profile"],
    ["inspect"],
    ["generate"],
    ["eval"],
    ["eval", "perplexity"],
    ["eval", "fidelity"],
    ["eval", "agreement"],
    ["eval", "needle"],
    ["eval", "ruler"],
    ["eval", "multi-question"],
    ["eval", "longbench"],
    ["eval", "sweep"],
    ["tune"],
    ["report"],
    ["methods"],
    ["doctor"],
    ["demo"],
)
WITHOUT = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Block())
sys.argv = ["loki-attn", *{arguments!r}]
from loki_attn.cli import main
main()
"""


def run_without(blocked, *arguments):
    code = WITHOUT.format(blocked=blocked, arguments=list(arguments))
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_help_with_an_example(loki, command):
    done = loki(*command, "--help")
    assert done.code == 0
    assert f"Example: loki-attn {' '.join(command)}" in " ".join(done.stdout.split())
    assert command == ["eval"] or "--json" in done.stdout


def test_version(loki):
    assert loki("--version").stdout == "loki-attn 0.1.0\n"


@pytest.mark.parametrize("blocked", ["rich", "typer"])
def test_says_what_to_install(blocked):
    done = run_without(blocked, "--help")
    assert done.returncode == 1
    assert done.stderr == (
        f'error: The command line needs {blocked}; run: pip install "loki-attn[all]"\n'
    )


def test_help_is_quick_and_needs_no_torch():
    began = time.monotonic()
    done = run_without("torch", "--help")
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began < 5  # generous: measured 0.4 s


def test_methods_need_no_transformers():
    done = run_without("transformers", "methods")
    assert done.returncode == 0, done.stderr
    assert "streaming-llm" in done.stdout


def test_generate_says_that_transformers_is_missing(bases, model):
    done = run_without(
        "transformers", "generate", "--prompt", "x", "-m", model, "--basis", str(bases["pca"])
    )
    assert done.returncode == 2
    assert "pip install 'loki-attn[transformers]'" in done.stderr


def test_unknown_command_names_the_nearest(loki):
    done = loki("calibrat")
    assert done.code == 2
    assert "calibrate" in done.stderr


def test_debug_shows_where_an_error_arose(loki):
    with pytest.raises(LokiAttnError, match="no basis file"):
        loki("--debug", "inspect", "none.safetensors")


def test_errors_of_the_disk_are_one_line(loki, bases, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device", "rows.jsonl")

    monkeypatch.setattr(terminal, "table", full)
    assert loki("methods").error == "error: No space left on device: 'rows.jsonl'."


def test_markup_in_a_message_is_shown_as_it_is(loki):
    assert "'[red]x'" in loki("inspect", "[red]x").error


def test_interrupt_is_one_line(loki, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(terminal, "emit", interrupted)
    done = loki("methods", "--json")
    assert (done.code, done.stdout) == (130, "")
    assert done.stderr.strip() == "interrupted; nothing was left half written"


def test_json_has_no_nan(capsys):
    terminal.emit({"x": float("nan"), "y": [float("inf"), 1.5], "z": (1, "é")})
    shown = capsys.readouterr().out
    assert json.loads(shown) == {"x": None, "y": [None, 1.5], "z": [1, "é"]}
    assert "é" in shown


def test_defaults_are_those_of_the_library():
    from loki_attn.evaluate import agreement, fidelity, perplexity, suites
    from loki_attn.integrations.transformers import collect_stats

    assert options.DEFAULT_MODEL == models.DEFAULT_MODEL
    pairs = (
        (calibrate.command, collect_stats),
        (on_text.perplexity, perplexity.Perplexity),
        (on_text.fidelity, fidelity.Fidelity),
        (on_text.agreement, agreement.Agreement),
        (on_questions.needle, suites.needle_task),
        (on_questions.ruler, suites.ruler_task),
        (on_questions.multi_question, suites.multi_question_task),
        (on_questions.longbench, suites.longbench_task),
    )
    # Not options of a task; and typed texts stand for lists.
    other = {"model", "policy", "basis", "text", "dtype", "out", "as_json", "path"}
    other |= {"kinds", "lengths", "depths", "subtasks"}
    for command, function in pairs:
        ours, theirs = (inspect.signature(f).parameters for f in (command, function))
        # A terminal is watched: perplexity's windows are fewer and shorter there.
        own = {"windows", "window_tokens"} if command is on_text.perplexity else set()
        shared = (set(ours) & set(theirs)) - other - own
        assert shared, command
        for name in shared:
            assert ours[name].default == theirs[name].default, (command, name)


def test_rate_and_remaining_time(capsys):
    with terminal.progress("working", 100, "things", start=20) as advance:
        advance(60, "half [way]")
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "working" in shown.err
    assert "60%" in shown.err
    assert "things/s, 0:00:01 left" in shown.err
    assert "half [way]" in shown.err
