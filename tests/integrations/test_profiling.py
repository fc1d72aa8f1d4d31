"""Profiling: a method sees what attention sees, and what it learns serves this model only."""

import pytest
import torch

pytest.importorskip("transformers")

from tiny_models import build, prompts

import loki_attn
from loki_attn import Budget, Policy
from loki_attn.errors import InputError, PolicyError, ProfileError, UnknownNameError
from loki_attn.integrations.transformers.calibration import collect_stats
from loki_attn.integrations.transformers.profiling import collect_profile
from loki_attn.profile import Profile
from loki_attn.select.hata import Hata

IDS = prompts(1, 200, seed=6)[0]
SMALL = {"bits": 32, "steps": 5}


def profiled(model, ids=IDS, **more):
    return collect_profile(model, "hata", ids, window_tokens=64, **{**SMALL, **more})


def test_a_method_sees_the_keys_that_attention_sees():
    """The mean key is that of calibration, which is held to hooks on the stock model."""
    model = build(dtype=torch.float64)
    made = profiled(model)
    stats, _ = collect_stats(model, IDS, tokens=192, window=64)
    assert list(made.layers) == list(stats.layers) == [0, 1]
    for layer in stats.layers:
        moments = stats.moments(layer, "key")
        mean = moments.total / moments.weight[:, None]
        torch.testing.assert_close(
            made.layer(layer)["hash_mean"].double(), mean, rtol=1e-4, atol=1e-5
        )
        assert made.layer(layer)["hash"].shape == (2, 16, 32)


def test_provenance_says_all_that_the_result_depends_on():
    model, news = build(), []
    made = profiled(model, corpus={"name": "night"}, progress=lambda *n: news.append(n))
    assert news == [(64, 192), (128, 192), (192, 192)]
    about = made.provenance["methods"]["hata"]
    assert about["settings"]["bits"] == 32
    assert about["settings"]["similarity"] == 0.2
    assert (about["corpus"], about["tokens"], about["window"]) == ({"name": "night"}, 192, 64)
    assert set(about["versions"]) == {"torch", "transformers"}
    assert made.provenance["model"]["id"] == "LlamaForCausalLM"


def test_it_repeats_and_leaves_the_model_as_it_was():
    model = build()
    before = model(input_ids=IDS[None, :20]).logits
    one, other = profiled(model), profiled(model)
    assert torch.equal(one.table("hash"), other.table("hash"))
    assert torch.equal(model(input_ids=IDS[None, :20]).logits, before)


def test_only_full_attention_layers_are_profiled():
    assert list(profiled(build("Gemma3 (windows)")).layers) == [1]


def test_a_model_attends_by_its_own_profile_and_no_other(tmp_path):
    model = build()
    policy = Policy(select=Hata(bits=32), budget=Budget(top_k=8), group_reduce="sum")
    with pytest.raises(PolicyError, match="HATA needs trained hash weights for layer 0"):
        loki_attn.attach(model, policy)
    path = str(tmp_path / "p.safetensors")
    profiled(model).save(path)
    with loki_attn.attach(model, policy, profile=path) as attachment:
        model.generate(IDS[None, :30], max_new_tokens=4, do_sample=False)
        assert attachment.traffic.sparse_calls > 0
    with pytest.raises(ProfileError, match=r"was made for model 'LlamaForCausalLM'.*is used with"):
        loki_attn.attach(build(seed=1), policy, profile=Profile.load(path))


@pytest.mark.parametrize(
    ("ids", "asked", "error", "message"),
    [
        (IDS[:63], {}, InputError, "at least one window of 64 tokens, the text has 63"),
        (IDS, {"window_tokens": 257}, InputError, "Windows of 257 tokens exceed|at least one"),
        (
            prompts(1, 300)[0],
            {"window_tokens": 257},
            InputError,
            "exceed the model's context of 256",
        ),
        (IDS, {"rank": 3}, UnknownNameError, "Unknown setting of hata 'rank'"),
    ],
)
def test_refusals(ids, asked, error, message):
    with pytest.raises(error, match=message):
        collect_profile(build(), "hata", ids, **{"window_tokens": 64, **asked})
