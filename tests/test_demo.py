"""The demo, from a model folder to a report, on a tiny random model."""

import io
import re

import pytest
import torch
from rich.console import Console
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import loki_attn.demo
from loki_attn import texts
from loki_attn.basis import Basis
from loki_attn.demo import run
from loki_attn.demo.plan import plan_for
from loki_attn.evaluate.results import read_rows

CONTEXT_TOKENS = 2048
CHAT = "{% for m in messages %}<user>{{ m['content'] }}</user>{% endfor %}<bot>"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    plain = ByteLevelBPETokenizer()
    plain.train_from_iterator([texts.load("continuation")[:20_000]], vocab_size=512)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain._tokenizer)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=CONTEXT_TOKENS,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def cache_home(home, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    return home / "loki-attn" / "bases"


@pytest.fixture(scope="module")
def shown(model_folder, home, tmp_path_factory):
    """One run of the demo: its screen, its folder and its status."""
    out = tmp_path_factory.mktemp("out") / "demo"
    screen = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(home))
        status = run(str(model_folder), out, Console(file=screen, width=110), True)
    return screen.getvalue(), out, status


def test_it_ends_well_and_leaves_rows_report_and_figures(shown):
    screen, out, status = shown
    assert status == 0
    assert (out / "report.md").is_file()
    assert {p.name.split("-")[1] for p in (out / "report").iterdir()} == {
        "fidelity.png",
        "generation.png",
        "perplexity.png",
        "rank.png",
    }
    assert "Report with figures" in screen
    assert torch.get_num_threads() == 1


def test_loki_really_selected_in_every_part(shown):
    _, out, _ = shown
    rows = list(read_rows(out / "rows.jsonl"))
    assert [row["task"] for row in rows] == [
        *["calibration"] * 2,
        *["generation"] * 2,
        *["quiz"] * 4,
        *["fidelity"] * 3,
        *["perplexity"] * 3,
    ]
    for row in rows:
        if "selecting_calls" in row["metrics"]:
            dense = row["contender"] == "dense"
            assert (row["metrics"]["selecting_calls"] == 0) == dense
    generation = {row["contender"]: row["metrics"] for row in rows if row["task"] == "generation"}
    assert generation["dense"]["read_bytes_share"] == 1
    assert generation["loki"]["read_bytes_share"] < 0.6
    assert generation["loki"]["rows_share"] < 0.25
    tokens, layers = generation["dense"], 2
    assert generation["loki"]["selecting_calls"] == layers * rows[2]["n"]
    assert tokens["dense_bytes_per_token"] == generation["loki"]["dense_bytes_per_token"]


def test_figures_of_report_and_screen_are_those_of_the_rows(shown):
    screen, out, _ = shown
    page = (out / "report.md").read_text()
    for row in read_rows(out / "rows.jsonl"):
        found = row["metrics"]
        match row["task"]:
            case "perplexity":
                wanted = [f"{found['perplexity']:.3f}", f"{found['kl_to_dense']:.4f}"]
            case "generation":
                wanted = [f"{found['tokens_per_s']:.2f}"]
            case "calibration":
                wanted = [f"{found['rank_at_90']:.1f}"]
            case _:
                continue
        assert all(text in page and text in screen for text in wanted)
    assert page.count("](report/") == 4


def test_screen_shows_each_part_in_order(shown):
    screen, _, _ = shown
    parts = re.findall(r"^(\d)\. ", screen, flags=re.MULTILINE)
    assert parts == ["1", "2", "3", "4", "5", "6"]
    assert "╭" in screen
    assert "streaming-llm" in screen


def test_second_run_takes_the_basis_and_another_text_does_not(
    model_folder, cache_home, shown, tmp_path, monkeypatch
):
    kept = Basis.load(cache_home / "tiny-llama-fast-mixed.safetensors")
    assert kept.kind == "mixed"
    assert not list(cache_home.glob("*partial*"))
    screen = io.StringIO()
    monkeypatch.setattr(loki_attn.demo.continuation, "continue_text", interrupt)
    again = run(str(model_folder), tmp_path, Console(file=screen, width=110), True)
    assert again == 130
    assert "Found a basis of this model" in screen.getvalue()
    monkeypatch.setattr(loki_attn.demo.calibration.texts, "digest", lambda text: "0" * 64)
    run(str(model_folder), tmp_path, Console(file=screen, width=110), True)
    assert "Reading 512 tokens" in screen.getvalue()


def interrupt(*_):
    raise KeyboardInterrupt


def test_interrupt_keeps_what_is_finished(model_folder, cache_home, shown, tmp_path, monkeypatch):
    monkeypatch.setattr(loki_attn.demo.measurement, "measure", interrupt)
    screen = io.StringIO()
    assert run(str(model_folder), tmp_path, Console(file=screen, width=110), True) == 130
    assert "Stopped." in screen.getvalue()
    tasks = {row["task"] for row in read_rows(tmp_path / "rows.jsonl")}
    assert tasks == {"calibration", "generation", "quiz"}
    assert not (tmp_path / "report.md").exists()


def test_terminal_streams_both_columns(model_folder, cache_home, shown, tmp_path, monkeypatch):
    monkeypatch.setattr(loki_attn.demo.questions, "ask_short", interrupt)
    screen = io.StringIO()
    console = Console(file=screen, width=110, force_terminal=True)
    assert run(str(model_folder), tmp_path, console, True) == 130
    counts = re.findall(r"(\d)/6 tokens", screen.getvalue())
    assert counts[:2] == ["1", "0"]
    assert counts[-2:] == ["6", "6"]


@pytest.mark.parametrize("context", [1024, 2048, 8192, 131_072])
@pytest.mark.parametrize("fast", [False, True])
def test_plan_fits_the_context_and_always_selects(context, fast):
    plan = plan_for(context, fast=fast, embedded=False)
    assert plan.prompt + plan.new <= context
    assert plan.prefix + plan.forced <= context
    assert max(plan.window, plan.fidelity) <= context
    assert plan.policy.budget.top_k <= plan.prompt // 4
    assert plan.policy.budget.top_k < plan.fidelity // 2
    if not fast:
        assert (plan.quiz is not None) == (context >= 8192)


def test_plan_of_the_embedded_model_has_at_least_6000_tokens_and_no_long_quiz():
    plan = plan_for(8192, fast=False, embedded=True)
    assert plan.prompt >= 6000
    assert plan.quiz is None
