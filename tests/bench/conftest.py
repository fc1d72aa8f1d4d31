"""A small layer of one context, and everybody who competes in it."""

import pytest
import torch

from loki_attn.bench.contenders import dense_native, exact_topk, loki, loki_parts, torch_forms
from loki_attn.bench.layers import Plan, make_layers
from loki_attn.bench.shapes import Shape

CONTEXT = 150
PLANES = ("int8", "int4", "bf16", "fp32")


@pytest.fixture
def small_plan():
    """Make a plan of a small layer."""

    def make(**changes):
        settings = {
            "shape": Shape(name="small", num_heads=6, num_kv_heads=2, head_dim=32),
            "batch": 2,
            "context": CONTEXT,
            "dtype": torch.bfloat16,
            "rank": 8,
            "planes": PLANES,
        }
        return Plan(**(settings | changes))

    return make


@pytest.fixture
def everybody():
    """Make all contenders of a plan, and the layers that they read."""

    def make(plan, count=2, k=40, layers=None):
        layers = layers or make_layers(plan, count)
        found = [*torch_forms(plan, layers), dense_native(plan, layers)]
        found += [exact_topk(plan, layers, k)]
        found += [loki(plan, layers, plane, k) for plane in plan.planes]
        found += [loki_parts(plan, layers, plane, k) for plane in plan.planes]
        return layers, {contender.name: contender for contender in found}

    return make
