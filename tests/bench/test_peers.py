"""Dense peers on a device: what they compute is dense attention, and who is missing is named."""

import sys
from types import ModuleType

import pytest
import torch

from loki_attn.bench.gate import Gate
from loki_attn.bench.layers import make_layers
from loki_attn.bench.peers import device_peers
from loki_attn.bench.shapes import Shape
from loki_attn.errors import InputError
from loki_attn.testing import plain_attention
from loki_attn.types import AttentionCall

LIBRARIES = ("flash_attn", "flash_attn_interface", "flashinfer")


@pytest.fixture
def without_libraries(monkeypatch):
    """No library, whatever is installed."""
    for name in LIBRARIES:
        monkeypatch.setitem(sys.modules, name, None)


def install(monkeypatch, name, **members):
    module = ModuleType(name)
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, name, module)


def peers_of(plan, layers):
    found = device_peers(plan, layers)
    return {own.name: own for own in found.contenders}, found.left_out


@pytest.mark.usefixtures("without_libraries")
def test_torch_competes_in_both_forms_with_and_without_its_flash_kernel(small_plan):
    plan = small_plan(dtype=torch.float32)
    layers = make_layers(plan, 1)
    found, left_out = peers_of(plan, layers)
    assert list(found) == [
        "sdpa-hf", "sdpa-flash-hf", "sdpa-group-rows", "sdpa-flash-group-rows", "eager-group-rows",
    ]  # fmt: skip
    assert set(left_out) == {"sdpa-repeat-kv", "flash-attn", "flash-attn-3", "flashinfer"}
    gate = Gate(plan, layers[0])
    for own in found.values():
        assert gate.judge(own).reason == ""
        assert own.touched_bytes == (plan.context * plan.row_bytes(),)


@pytest.mark.usefixtures("without_libraries")
def test_without_groups_there_is_one_form(small_plan):
    plan = small_plan(shape=Shape(name="one", num_heads=2, num_kv_heads=2, head_dim=32))
    found, _ = peers_of(plan, [])
    assert list(found) == ["sdpa-hf", "sdpa-flash-hf", "eager-group-rows"]


def test_the_flash_forms_ask_for_the_flash_kernel(small_plan, monkeypatch):
    plan = small_plan()
    found, _ = peers_of(plan, make_layers(plan, 1))
    asked = []
    own = torch.nn.functional.scaled_dot_product_attention

    def noting(*args, **kwargs):
        asked.append(
            (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled())
        )
        return own(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noting)
    for name in ("sdpa-hf", "sdpa-flash-hf", "sdpa-flash-group-rows"):
        found[name].run(0)
    assert asked == [(True, True), (True, False), (True, False)]


def test_a_library_that_breaks_on_import_is_left_out_with_its_reason(small_plan, monkeypatch):
    for name in LIBRARIES:
        monkeypatch.setitem(sys.modules, name, None)

    def broken(name):
        if name == "flashinfer":
            raise OSError("libcudart.so.99 is missing")
        raise ModuleNotFoundError(name, name=name)

    monkeypatch.setattr("loki_attn.bench.peers.import_module", broken)
    _, left_out = peers_of(small_plan(), [])
    assert left_out["flashinfer"] == "flashinfer cannot be loaded: libcudart.so.99 is missing"
    assert left_out["flash-attn"] == "flash_attn is not installed"


@pytest.mark.parametrize("module", ["flash_attn", "flash_attn_interface"])
@pytest.mark.parametrize("shape", [(6, 2), (4, 4)])
def test_flash_attn_reads_the_same_buffers(small_plan, monkeypatch, module, shape):
    plan = small_plan(
        shape=Shape(name="s", num_heads=shape[0], num_kv_heads=shape[1], head_dim=32), context=128
    )
    layers, seen = make_layers(plan, 1), []

    def with_kvcache(q, k_cache, v_cache, *, softmax_scale, causal):
        assert not causal
        seen.append((k_cache.data_ptr(), tuple(k_cache.shape), tuple(q.shape)))
        wide = (rows.transpose(1, 2).double() for rows in (q, k_cache, v_cache))
        out = plain_attention(*wide, None, AttentionCall(scaling=softmax_scale))
        return out.transpose(1, 2).to(q.dtype)

    install(monkeypatch, module, flash_attn_with_kvcache=with_kvcache)
    found, _ = peers_of(plan, layers)
    own = found["flash-attn" if module == "flash_attn" else "flash-attn-3"]
    assert own.kind == "library"
    assert Gate(plan, layers[0]).judge(own).reason == ""
    heads = shape
    assert seen == [(layers[0].keys.data_ptr(), (2, 128, heads[1], 32), (2, 1, heads[0], 32))]


def test_flashinfer_reads_the_same_rows_as_pages_by_one_plan(small_plan, monkeypatch):
    plan, plans, read = small_plan(context=128), [], []
    layers = make_layers(plan, 2)

    class Wrapper:
        def __init__(self, workspace, layout, *, use_tensor_cores):
            assert (workspace.dtype, layout, use_tensor_cores) == (torch.uint8, "HND", True)

        def plan(self, indptr, indices, last, heads, kv_heads, dim, page, **more):
            assert (heads, kv_heads, dim, page) == (3, 1, 32, 16)
            assert more["q_data_type"] == more["kv_data_type"] == torch.bfloat16
            plans.append((indptr.tolist(), indices.tolist(), last.tolist()))
            self.indptr, self.indices = indptr, indices
            self.call = AttentionCall(scaling=more["sm_scale"])

        def run(self, query, cache):
            read.append([rows.data_ptr() for rows in cache])
            assert all(tuple(rows.shape[1:]) == (1, 16, 32) for rows in cache)
            out = []
            for own, begin, end in zip(query, self.indptr, self.indptr[1:], strict=False):
                pages = self.indices[begin:end].long()
                rows = [held[pages].reshape(1, 1, -1, 32).double() for held in cache]
                out.append(plain_attention(own[None, :, None].double(), *rows, None, self.call))
            return torch.cat(out)[:, :, 0].to(query.dtype)

    install(monkeypatch, "flashinfer", BatchDecodeWithPagedKVCacheWrapper=Wrapper)
    monkeypatch.setattr("loki_attn.bench.peers._WORKSPACE_BYTES", 64)
    found, _ = peers_of(plan, layers)
    own = found["flashinfer"]
    for index, layer in enumerate(layers):
        assert Gate(plan, layer).judge(own, own.run(index)).reason == ""
    assert plans == [([0, 8, 16, 24, 32], list(range(32)), [16] * 4)]
    assert read == [[layer.keys.data_ptr(), layer.values.data_ptr()] for layer in layers]


def test_flashinfer_is_left_out_where_its_pages_are_not_full(small_plan, monkeypatch):
    install(monkeypatch, "flashinfer")
    plan = small_plan(context=150)
    found, _ = peers_of(plan, make_layers(plan, 1))
    with pytest.raises(InputError, match="pages of 16 rows, and the last is not full"):
        found["flashinfer"].run(0)
