"""generate: the text, the figures, the basis that is found, and every refusal."""

import pytest
import torch

from loki_attn import preset
from loki_attn.cli.loading import Typed, label, parse_policy

transformers = pytest.importorskip("transformers")

WORDS = "the quick brown fox jumps over the lazy dog and " * 12


@pytest.fixture
def generate(loki, model, bases):
    def run(*arguments, basis="mixed", prompt=WORDS):
        given = [] if basis is None else ["--basis", bases[basis]]
        said = [] if prompt is None else ["--prompt", prompt]
        return loki("generate", "--model", model, "--max-new-tokens", 8, *given, *said, *arguments)

    return run


def stock_text(folder, prompt):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    new = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False
    )
    return tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True)


def test_dense_says_what_stock_generate_says(generate, model):
    done = generate("--policy", "dense", basis=None)
    assert done.code == 0
    assert done.stdout == stock_text(model, WORDS) + "\n"
    assert "tokens/s" in done.stderr
    assert "100.0% of what dense attention reads" in done.stderr


def test_loki_streams_and_tells_what_it_read(generate):
    done = generate("--top-k", 16, "--rank", 4)
    assert done.code == 0
    assert len(done.stdout) > 1
    assert done.stdout.endswith("\n")
    assert "basis: " in done.stderr
    assert "MB read per token" in done.stderr


def test_json(generate, bases, model):
    found = generate("--top-k", 16, "--json", "--compare-dense").json
    dense = found.pop("dense")
    assert dense["text"] == stock_text(model, WORDS)
    assert 0 < found["read_bytes_share"] < 1
    assert found["read_bytes_per_token"] > 0
    assert found["selecting_share"] == 1
    assert found["tokens_per_s"] > 0
    assert found["first_token_s"] > 0
    assert 0 <= found["equal_tokens"] <= 8
    assert (found["new_tokens"], found["prompt_tokens"]) == (8, dense["prompt_tokens"])
    assert (found["model"], found["policy"]) == (model, "loki")
    assert found["basis"] == str(bases["mixed"])
    assert set(found) - set(dense) == {
        "model",
        "policy",
        "basis",
        "read_bytes_share",
        "read_bytes_per_token",
        "selecting_share",
        "kept_bytes_share",
        "evicted_rows",
        "equal_tokens",
    }
    assert found["evicted_rows"] == 0


def test_compare_dense_shows_both(generate):
    done = generate("--policy", "loki:top_k=16,rank=4", "--compare-dense")
    assert "--- loki:top_k=16,rank=4 ---\n" in done.stdout
    assert "--- dense ---\n" in done.stdout
    assert "of 8 tokens are the same" in done.stderr


def test_a_budget_that_covers_everything_is_said(generate):
    assert "every step read everything" in generate(prompt="the dog").stderr


def test_prompt_from_a_file_and_chat(generate, write):
    done = generate("--file", write("p.txt", "the dog"), "--chat", "--json", prompt=None)
    plain = generate("--json", prompt="the dog")
    assert done.json["prompt_tokens"] == plain.json["prompt_tokens"] + 2


def test_the_basis_that_calibrate_wrote_is_found(generate, calibrate, cache):
    missing = generate(basis=None).error
    assert "there is none of" in missing
    assert "run `loki-attn calibrate --model" in missing
    calibrate()
    found = generate("--json", basis=None).json
    assert found["basis"] == str(cache / "bases" / "tiny-mixed.safetensors")
    # The rotated layout needs an orthogonal basis, which the balanced one is not.
    assert "--kind pca` once" in generate("--policy", "loki-paper", basis=None).error
    calibrate("--kind", "pca")
    found = generate("--policy", "loki-paper", "--json", basis=None).json
    assert found["basis"] == str(cache / "bases" / "tiny-pca.safetensors")


def test_a_policy_file(generate, write):
    mine = write("mine.json", preset("streaming-llm", top_k=32).to_json())
    assert generate("--policy", mine, "--json", basis=None).json["policy"] == "mine"
    assert "Only a preset's name takes overrides" in generate("--policy", mine, "--rank", 4).error


def test_generation_stops_where_the_context_ends(generate):
    done = generate("--policy", "dense", "--json", prompt=" dog" * 510, basis=None)
    room = 1024 - done.json["prompt_tokens"]
    assert done.json["new_tokens"] == min(8, room)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "  "], "The prompt is empty"),
        (["--prompt", "x", "--file", "y"], "either as --prompt TEXT or as --file FILE"),
        ([], "either as --prompt TEXT or as --file FILE"),
        (["--file", "none.txt"], "No text file at 'none.txt'"),
        (["--prompt", "x", "--policy", "loky"], "Unknown policy 'loky'. Did you mean 'loki'?"),
        (["--prompt", "x", "--policy", "loki:topk=4"], "Did you mean 'top_k'?"),
        (["--prompt", "x", "--policy", "loki:rank"], "Cannot read 'rank' in policy 'loki:rank'"),
        (["--prompt", "x", "--policy", "none.json"], "There is no policy file 'none.json'."),
        (["--prompt", "x", "--top-k", 0], "top_k must be a whole number of tokens >= 1, got 0"),
        (["--prompt", "x", "--rank", 99], "rank=99 is above head_dim=8"),
        (["--prompt", "x", "--policy", "loki:fraction=1.5"], "must lie in (0, 1], got 1.5"),
        (["--prompt", "x", "--policy", "loki:fraction=NaN"], "must lie in (0, 1], got nan"),
        (["--prompt", "x", "--policy", "loki-paper"], "needs an orthogonal one"),
    ],
)
def test_refusals(generate, arguments, message):
    assert message in generate(*arguments, prompt=None).error


def test_a_prompt_beyond_the_context(generate):
    error = generate(prompt=" dog" * 2000).error
    assert "the model's context is 1,024; give a prompt of at most 1,023 tokens" in error
    assert "The prompt has " in error


def test_no_chat_template(loki, tmp_path, model):
    import shutil

    bare = shutil.copytree(model, tmp_path / "bare")
    (bare / "chat_template.jinja").unlink(missing_ok=True)
    done = loki("generate", "-m", bare, "-p", "dense", "--prompt", "x", "--chat")
    assert "has no chat template; drop --chat" in done.error


def test_the_basis_of_another_model(generate, other_model):
    assert "was fitted on model 'tiny'" in generate("--model", other_model).error


def test_policies_as_they_are_typed():
    typed = parse_policy("loki:top_k=256,rank=16,dense_layers=[0,1],basis=a/b.safetensors")
    policy = typed.policy
    assert (policy.budget.top_k, policy.select.rank) == (256, 16)
    assert policy.budget.dense_layers == (0, 1)
    assert str(typed.basis) == "a/b.safetensors"
    assert parse_policy("loki", rank=None) == Typed(preset("loki"))
    assert parse_policy("loki:plane-dtype=bf16").policy.select.plane_dtype == "bf16"
    assert parse_policy("loki:fraction=.125").policy.budget.fraction == 0.125
    both = parse_policy("loki:evict=snapkv,capacity=2048,evict.window=16,profile=p.safetensors")
    assert (both.policy.evict.method, both.policy.evict.window) == ("snapkv", 16)
    assert (both.policy.keep.capacity, str(both.profile)) == (2048, "p.safetensors")


def test_labels_name_no_folders():
    assert label("loki:basis=/home/me/b.safetensors,rank=4") == "loki:basis=b,rank=4"
    assert label("/home/me/mine.json") == "mine"
