"""Law 11: what is saved is what is loaded."""

import json

import torch

from loki_attn.basis import Basis
from loki_attn.policy import Policy, as_policy
from loki_attn.testing import layer_shape, random_rows, tiny_basis

SHAPE = layer_shape(4, 2, 16)


def test_a_policy_survives_json(case, tmp_path):
    for amount in (
        {"top_k": 9, "sinks": 1, "recents": 2, "per_layer": (9, 12)},
        {"fraction": 0.1, "dense_layers": (0, -1), "dense_below": 5, "min_k": 3},
    ):
        policy = Policy(
            select=case.select,
            budget=case.budget(**amount),
            group_reduce=case.group_reduce,
            name="mine",
        )
        text = policy.to_json()
        assert Policy.from_json(text) == policy
        assert Policy.from_json(json.dumps(json.loads(text))) == policy
        path = tmp_path / "policy.json"
        path.write_text(text, encoding="utf-8")
        assert as_policy(str(path)) == policy


def test_a_saved_basis_selects_alike(sparse_case, tmp_path):
    basis = tiny_basis(SHAPE)
    basis.save(tmp_path / "basis.safetensors")
    loaded = Basis.load(tmp_path / "basis.safetensors")
    rows = random_rows(SHAPE, 40)
    out, selection = sparse_case.decode(sparse_case.layer(SHAPE, basis, top_k=7), *rows)
    again, same = sparse_case.decode(sparse_case.layer(SHAPE, loaded, top_k=7), *rows)
    assert torch.equal(out, again)
    assert torch.equal(selection.indices, same.indices)
