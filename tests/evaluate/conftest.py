"""Tests of this folder share `scripted`, beside them, and the tiny models of the integrations."""

import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "integrations")]


@pytest.fixture(scope="module")
def lm():
    """A tiny attached llama without a tokenizer: 2 layers of 2 KV heads, head_dim 16, float32."""
    pytest.importorskip("transformers")
    from tiny_models import build

    from loki_attn.integrations.transformers import TransformersLM

    with TransformersLM(build("Llama"), None) as made:
        yield made
