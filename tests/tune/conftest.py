"""Tests of this folder share the tiny models of the integrations."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "integrations"))


@pytest.fixture(scope="module")
def tiny():
    """A tiny attached llama without a tokenizer, and a basis: 2 layers of 2 KV heads, float32."""
    pytest.importorskip("transformers")
    from tiny_models import build, random_basis

    from loki_attn.integrations.transformers import TransformersLM

    model = build("Llama")
    basis = random_basis(model)
    with TransformersLM(model, None) as made:
        yield made, basis
