"""Full budget is stock `generate`, token by token, on every architecture that is served."""

import re

import pytest
import torch
from full_budget import PATHS, compare
from tiny_models import REFUSED, SERVED, build, greedy, prompts, random_basis

import loki_attn
from loki_attn import Budget, Policy
from loki_attn.errors import UnsupportedModelError
from loki_attn.select.loki import Loki

# transformers 5.5 warns about itself: BioGPT and GPT-BigCode.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`input_embeds` is deprecated and will:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),
]

# The largest difference measured is 2e-5, at a standard deviation of 2.
LARGEST_DIFFERENCE = 5e-5

REASONS = {
    "Falcon": "FalconForCausalLM has no attention interface",
    "Bloom": "BloomForCausalLM has no attention interface",
    "GPT-J": "GPTJForCausalLM has no attention interface",
    "DeepSeek-V2": "Layer 0 of DeepseekV2ForCausalLM changes the keys or values after the cache",
    "DeepSeek-V3": "Layer 0 of DeepseekV3ForCausalLM changes the keys or values after the cache",
    "DeepSeek-V3.2": "passes 'indices' to its attention: it selects tokens natively",
    "GLM-MoE-DSA": "passes 'indices' to its attention: it selects tokens natively",
    "DiffLlama": "Layer 0 of DiffLlamaForCausalLM changes the keys or values after the cache",
    "Mamba": "MambaForCausalLM never called the attention function",
    "T5": "T5ForConditionalGeneration is an encoder-decoder; only decoders are served",
    "Llama base model": "LlamaModel is not a causal language model",
    "Llama classifier": "LlamaForSequenceClassification is not a causal language model",
}


def require(architecture):
    if architecture.missing:
        pytest.skip(architecture.missing)


@pytest.mark.parametrize("name", SERVED)
def test_full_budget_is_stock(name):
    require(SERVED[name])
    got = compare(name)

    assert got.same_tokens == dict.fromkeys(PATHS, True)
    assert max(got.differences.values()) <= LARGEST_DIFFERENCE, got.differences
    assert 1.5 <= got.logit_std <= 2.5
    for path in PATHS:
        used, unused = got.selected[path], got.dense[path]
        if path == "dense path":
            used, unused = unused, used
        assert (used > 0) == (got.full_layers > 0)
        assert unused == 0


def test_enough_architectures_are_served():
    assert sum(not architecture.missing for architecture in SERVED.values()) >= 24


@pytest.mark.parametrize("name", ["Llama", "GPT-NeoX", "Gemma2 (soft-cap, windows)"])
@pytest.mark.parametrize("plane_dtype", ["int8", "bf16", "fp32"])
def test_any_plane_and_any_invertible_basis_are_exact_at_full_budget(name, plane_dtype):
    model = build(name)
    basis = random_basis(model, orthogonal=False)
    stock, stock_logits = greedy(model, prompts(2))
    policy = Policy(select=Loki(rank=5, plane_dtype=plane_dtype), budget=Budget(fraction=1.0))
    with loki_attn.attach(model, policy, basis=basis) as attachment:
        attachment.always_select = True
        tokens, logits = greedy(model, prompts(2))
    assert torch.equal(tokens, stock)
    assert (logits - stock_logits).abs().max() <= LARGEST_DIFFERENCE


@pytest.mark.parametrize(
    ("name", "full"),
    [
        ("Gemma2 (soft-cap, windows)", [1]),
        ("Gemma3 (windows)", [1]),
        ("gpt-oss (sinks, windows)", [1]),
        ("Llama", [0, 1]),
        ("Qwen3-Next (linear layers)", [1]),
    ],
)
def test_only_full_attention_layers_become_sparse(name, full):
    require(SERVED[name])
    with loki_attn.attach(build(name), "exact-topk", top_k=4, sinks=1) as attachment:
        assert list(attachment.shapes) == full


def test_a_model_of_windows_only_is_served_with_a_warning():
    model = build("Mistral (window 8)")
    stock = greedy(model, prompts())[0]
    with pytest.warns(UserWarning, match="nothing becomes sparse") as caught:
        attachment = loki_attn.attach(model, "exact-topk", top_k=2, sinks=1)
    assert caught[0].filename == __file__
    with attachment:
        assert attachment.shapes == {}
        assert torch.equal(greedy(model, prompts())[0], stock)


@pytest.mark.parametrize("name", ["Gemma2 (soft-cap, windows)", "gpt-oss (sinks, windows)"])
def test_soft_caps_and_sinks_matter_here(name):
    """Otherwise these two architectures would prove nothing."""
    model = build(name)
    stock = greedy(model, prompts(), 1)[1]
    if "sinks" in name:
        for layer in model.model.layers:
            layer.self_attn.sinks.data.fill_(-1e4)
    else:
        for layer in model.model.layers:
            layer.self_attn.attn_logit_softcapping = None
    assert (greedy(model, prompts(), 1)[1] - stock).abs().max() > 0.1


@pytest.mark.parametrize("name", REFUSED)
def test_refusal_names_the_reason_and_leaves_the_model_alone(name):
    require(REFUSED[name])
    model = build(REFUSED[name])
    before = model.config._attn_implementation
    with pytest.raises(UnsupportedModelError, match=re.escape(REASONS[name])):
        loki_attn.attach(model, "exact-topk")
    assert model.config._attn_implementation == before
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_plain_modules_are_refused():
    with pytest.raises(UnsupportedModelError, match="needs a transformers model, got Linear"):
        loki_attn.attach(torch.nn.Linear(2, 2))
