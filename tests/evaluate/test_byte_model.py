"""The byte model: equal to the traffic that attached models count."""

import dataclasses

import pytest
import torch

pytest.importorskip("transformers")

from tiny_models import SERVED, build, prompts, random_basis

from loki_attn import Budget, Policy
from loki_attn.errors import InputError
from loki_attn.evaluate.byte_model import ByteModel, StepBytes, layout_of, step_bytes
from loki_attn.integrations.transformers import TransformersLM
from loki_attn.policy import preset
from loki_attn.select.exact_topk import ExactTopK
from loki_attn.select.loki import Loki

POLICIES = {
    "dense": preset("dense"),
    "exact": Policy(select=ExactTopK(), budget=Budget(top_k=6, sinks=1, recents=2)),
    "streaming": preset("streaming-llm", top_k=7, group_reduce="none"),
    "int8": Policy(select=Loki(rank=6), budget=Budget(top_k=5)),
    "int4": Policy(select=Loki(rank=5, plane_dtype="int4"), budget=Budget(top_k=9)),
    "bf16": Policy(select=Loki(rank=3, plane_dtype="bf16"), budget=Budget(fraction=0.3)),
    "fp32": Policy(select=Loki(rank=16, plane_dtype="fp32"), budget=Budget(top_k=4, min_k=3)),
    "rotated": Policy(select=Loki(rank=6, layout="rotated"), budget=Budget(top_k=6)),
    "dense first": Policy(select=Loki(rank=6), budget=Budget(top_k=6, dense_layers=(0,))),
    "dense last": Policy(select=Loki(rank=6), budget=Budget(top_k=6, dense_layers=(-1,))),
    "dense below": Policy(select=Loki(rank=6), budget=Budget(top_k=6, dense_below=24)),
    "per layer": Policy(select=Loki(rank=6), budget=Budget(top_k=6, per_layer=(4, 11))),
    "fraction floor": Policy(select=ExactTopK(), budget=Budget(fraction=0.01, sinks=2, recents=3)),
}
MODELS = {
    "float32": ("Llama", torch.float32),
    "bfloat16": ("Llama", torch.bfloat16),
    "no groups": ("Llama, MHA", torch.float32),
}


@pytest.fixture(scope="module", params=MODELS)
def served(request):
    name, dtype = MODELS[request.param]
    model = build(name, dtype=dtype)
    basis = random_basis(model)
    with TransformersLM(model, None) as made:
        yield made, basis


def counted(lm, policy, basis, length):
    """What one step counts when it holds `length` rows."""
    ids = prompts(1, length)
    cache = lm.prefill(ids[:, :-1])
    with lm.using(policy, basis):
        list(lm.extend(cache, ids[:, -1:]))
        return dataclasses.replace(lm.traffic)


@pytest.mark.parametrize("name", POLICIES)
def test_prediction_is_the_measured_traffic(served, name):
    lm, basis = served
    model = ByteModel(basis, layout_of(lm))
    for length in (4, 25, 67):
        traffic = counted(lm, POLICIES[name], basis, length)
        predicted = model.step(POLICIES[name], length)
        found = predicted.read, predicted.dense, predicted.selecting_layers
        counts = traffic.read_bytes, traffic.dense_bytes, traffic.sparse_calls
        assert found == counts, length


def test_window_layers_are_left_out():
    model = build(SERVED["Gemma3 (windows)"])
    policy = Policy(select=ExactTopK(), budget=Budget(top_k=6))
    with TransformersLM(model, None) as lm:
        layout = layout_of(lm)
        assert (list(layout.shapes), layout.num_layers) == ([1], 3)
        traffic = counted(lm, policy, None, 20)
        assert step_bytes(policy, None, layout, 20).read == traffic.read_bytes


def test_parts_add_up_by_hand(lm):
    """2 layers of 2 heads, rows of 128 bytes; layer 0 dense, 8 + 2 bytes rank a row of layer 1."""
    basis = random_basis(build("Llama"))
    found = step_bytes(POLICIES["dense first"], basis, layout_of(lm), 50)
    assert found == StepBytes(
        scored=2 * 50 * 10,
        chosen=2 * 6 * 128,
        whole=2 * 50 * 128,
        dense=2 * 2 * 50 * 128,
        selecting_layers=1,
    )


def test_one_model_serves_many_policies_alike(lm):
    basis, layout = random_basis(build("Llama")), layout_of(lm)
    model = ByteModel(basis, layout)
    for policy in (*POLICIES.values(), *POLICIES.values()):
        assert model.step(policy, 40) == step_bytes(policy, basis, layout, 40)


@pytest.mark.parametrize(
    ("policy", "context", "message"),
    [
        (Policy(select=ExactTopK(), budget=Budget(mass=0.9)), 30, "reach mass=0.9; how many"),
        (Policy(select=ExactTopK(), budget=Budget(top_k=4), group_reduce="none"), 30, "2 query"),
        (preset("dense"), 0, "got context=0 tokens"),
        (preset("snapkv", capacity=8, **{"evict.window": 4}), 40, "follows from the text"),
        (preset("exact-topk", top_k=8, reuse_above=0.9), 40, "follows from the text"),
    ],
)
def test_what_follows_from_the_scores_is_refused(lm, policy, context, message):
    with pytest.raises(InputError, match=message):
        step_bytes(policy, None, layout_of(lm), context)


def test_a_mass_budget_that_reads_everything_here_is_known(lm):
    policy = Policy(select=ExactTopK(), budget=Budget(mass=0.9, dense_below=64))
    found = step_bytes(policy, None, layout_of(lm), 64)
    assert (found.read, found.selecting_layers) == (found.dense, 0)


def test_a_model_without_full_attention_is_refused():
    class Blind:
        num_layers = 2

        def observing(self, observer):
            from contextlib import nullcontext

            return nullcontext()

        def prefill(self, ids, *, record=False):
            return None

    with pytest.raises(InputError, match="no full-attention layer that could select"):
        layout_of(Blind())
