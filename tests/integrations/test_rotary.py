"""Rotary position embeddings undone, against transformers' own rotation of every layout."""

import importlib

import pytest
import torch

pytest.importorskip("transformers")

from tiny_models import SERVED, build

import loki_attn
from loki_attn.integrations.transformers.probe import quiet
from loki_attn.integrations.transformers.rotary import find_layouts, undo_rotary

TOKENS, HEADS = 9, 2
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
# What each full-attention layer does with its keys; gpt-oss passes angles that are not repeated.
LAYOUTS = {
    "Llama": {0: "halves", 1: "halves"},
    "Phi": {0: "halves", 1: "halves"},
    "GPT-NeoX": {0: "halves", 1: "halves"},
    "Gemma3 (windows)": {1: "halves"},
    "Cohere": {0: "pairs", 1: "pairs"},
    "GLM": {0: "pairs", 1: "pairs"},
    "Helium": {0: "pairs", 1: "pairs"},
    "SmolLM3 (layers without RoPE)": {0: "halves", 1: "none"},
    "Cohere2 (windows)": {1: "none"},
    "GPT-2": {},
    "gpt-oss (sinks, windows)": {},
}

UNKNOWN = {
    "not repeated, as in gpt-oss": lambda cos: cos[..., :8],
    "other tokens": lambda cos: cos[:, :-1],
    "more angles than dimensions": lambda cos: torch.cat([cos, cos], -1),
    "several kinds of positions": lambda cos: cos[None],
    "an odd number": lambda cos: cos[..., :15],
}


def rotated(name, dtype, **settings):
    """Keys, the keys as the model's own module rotates them, and the angles it passes on."""
    model = build(name, **settings)
    source = importlib.import_module(type(model).__module__)
    draw = torch.Generator().manual_seed(4)
    size = model.config.get_text_config().hidden_size // 4 if "GLM" not in name else 16
    key = torch.randn(1, HEADS, TOKENS, size, generator=draw, dtype=torch.float64).to(dtype)
    positions = torch.arange(3, 3 + TOKENS)[None]
    cos, sin = model.base_model.rotary_emb(key, positions)
    turned, rest = key[..., : cos.shape[-1]], key[..., cos.shape[-1] :]
    after = source.apply_rotary_pos_emb(turned, turned, cos, sin)[1]
    return key, torch.cat([after, rest], -1), cos, sin


def rounding(name, dtype):
    """A few roundings of values around 2, in the type that the model rotates in."""
    at_best = torch.float32 if name == "Cohere" else torch.float64
    return 8 * max(torch.finfo(dtype).eps, torch.finfo(at_best).eps)


@pytest.mark.parametrize(
    ("name", "layout", "rotary_size"),
    [
        ("Llama", None, 16),
        ("Llama", "halves", 16),
        ("Phi", None, 8),
        ("GPT-NeoX", None, 4),
        ("Cohere", None, 16),
        ("Cohere", "pairs", 16),
        ("GLM", "pairs", 8),
        ("Helium", "pairs", 16),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_it_inverts_the_models_own_rotation(name, layout, rotary_size, dtype):
    key, after, cos, sin = rotated(name, dtype)
    assert cos.shape[-1] == rotary_size
    before = undo_rotary(after, cos, sin, layout)
    torch.testing.assert_close(before, key.to(before.dtype), atol=rounding(name, dtype), rtol=0)
    assert float((after - key)[..., :rotary_size].abs().max()) > 0.5
    assert torch.equal(before[..., rotary_size:], key[..., rotary_size:].to(before.dtype))


@pytest.mark.parametrize(("name", "layout"), [("Llama", None), ("Cohere", None), ("GLM", "pairs")])
def test_it_takes_the_scale_of_the_angles_out(name, layout):
    """YaRN multiplies cos and sin by its attention scaling."""
    key, after, cos, sin = rotated(name, torch.float64, rope_parameters=YARN)
    scale = float((cos.square() + sin.square()).mean().sqrt())
    assert scale > 1.1
    before = undo_rotary(after, cos, sin, layout)
    torch.testing.assert_close(before, key, atol=rounding(name, key.dtype), rtol=0)


def test_keys_that_were_not_rotated_stay():
    key, _, cos, sin = rotated("Llama", torch.float32)
    assert undo_rotary(key, cos, sin, "none") is key


@pytest.mark.parametrize("change", UNKNOWN)
@pytest.mark.parametrize("layout", [None, "halves", "pairs"])
def test_unknown_angles_give_none(change, layout):
    _, after, cos, sin = rotated("Llama", torch.float32)
    cos, sin = UNKNOWN[change](cos), UNKNOWN[change](sin)
    assert undo_rotary(after, cos, sin, layout) is None


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_tells_how_its_layers_rotate(name, dtype):
    if SERVED[name].missing:
        pytest.skip(SERVED[name].missing)
    model = build(name, dtype=dtype)
    with loki_attn.attach(model, "dense", verify_first=False) as attachment, quiet(model):
        assert find_layouts(model, attachment) == LAYOUTS[name]
