"""A step and an append read no number of a tensor on the host: on a GPU that would be a wait."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from loki_attn import compiled
from loki_attn.attention import bind
from loki_attn.kernels import backends, ops
from loki_attn.policy import preset
from loki_attn.testing import layer_shape, random_rows, tiny_basis
from loki_attn.types import AttentionCall

SHAPE = layer_shape(4, 2, 32)
CALL = AttentionCall(scaling=SHAPE.head_dim**-0.5)
CAPACITY, WRITTEN = 80, 50
POLICIES = {
    "loki": {"top_k": 16, "rank": 8},
    "loki by a share, rotated": {"fraction": 0.25, "rank": 8, "layout": "rotated"},
    "loki by the largest weight": {"top_k": 16, "rank": 8, "group_reduce": "softmax_max"},
    "exact-topk": {"top_k": 16},
    "streaming-llm": {"top_k": 16},
}


class NobodyWaits(TorchDispatchMode):
    """Refuses every op that hands numbers of a tensor to Python, or has a size that they decide."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal")

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if any(name in str(op) for name in self.WAITING):
            pytest.fail(f"{op} waits for the device")
        return op(*args, **(kwargs or {}))


@pytest.fixture(autouse=True, params=["triton", "reference"])
def backend(request, monkeypatch):
    """The kernels, and what takes over where they do not serve; each by name."""
    if request.param == "triton":
        request.getfixturevalue("interpreted")
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, request.param)
    ops.cache_clear()
    yield
    ops.cache_clear()


def layer_of(name):
    settings = {"recents": 4, "sinks": 2, "dense_below": 20, **POLICIES[name]}
    policy = preset(name.partition(" ")[0], **settings)
    return bind(policy, SHAPE, 1, tiny_basis(SHAPE))


@pytest.mark.parametrize("name", POLICIES)
def test_a_step_over_fixed_storage_never_waits(name, monkeypatch):
    layer = layer_of(name)
    query, key, value = random_rows(SHAPE, WRITTEN, batch=2)
    storage = [torch.zeros(2, 2, CAPACITY, 32) for _ in "kv"]
    rows = compiled.static_rows(layer.selector, *storage, filled=False)
    visible = (torch.arange(CAPACITY) < WRITTEN).expand(2, 1, 1, -1).clone()
    visible[1, ..., :7] = False
    held = torch.zeros(1, dtype=torch.int64)
    # A custom op hides what it does from such a mode, so its body is called as it stands.
    for name in ("_step", "_append"):
        monkeypatch.setattr(compiled, name, getattr(compiled, name)._init_fn)
    with NobodyWaits():
        compiled.append(rows, layer.selector, key, value, held)
        out = compiled.step(query, rows, layer, CALL, visible, held + WRITTEN)
    assert bool(out.isfinite().all())


def test_the_guard_sees_who_waits():
    with pytest.raises(pytest.fail.Exception, match="waits for the device"), NobodyWaits():
        int(torch.ones(3).sum())
