"""The contenders: what they compute is equal, what they touch is as stated."""

import pytest
import torch

from loki_attn.bench.contenders import HF, PARTS, torch_forms
from loki_attn.bench.shapes import Shape
from loki_attn.testing import plain_attention


def test_all_dense_forms_are_dense_attention(small_plan, everybody):
    plan = small_plan(dtype=torch.float32)
    layers, found = everybody(plan)
    for index, layer in enumerate(layers):
        wide = (layer.query.double(), layer.keys.double(), layer.values.double())
        truth = plain_attention(*wide, None, plan.call)
        dense = [contender for contender in found.values() if contender.k is None]
        assert len(dense) == 5
        for contender in dense:
            torch.testing.assert_close(contender.run(index).double(), truth, atol=1e-5, rtol=1e-5)


def test_the_parts_give_what_the_step_gives(small_plan, everybody):
    plan = small_plan(dtype=torch.float32)
    _, found = everybody(plan)
    for plane in plan.planes:
        whole, parts = found[f"loki {plane} k=40"], found[f"loki {plane} k=40{PARTS}"]
        for index in (0, 1):
            (out, selection), (again, same) = whole.run(index), parts.run(index)
            assert torch.equal(selection.indices, same.indices)
            torch.testing.assert_close(out, again)
        assert sum(whole.touched_bytes) == parts.touched_bytes[0] + parts.touched_bytes[2]


@pytest.mark.parametrize("plane", ["int8", "int4", "bf16", "fp32"])
def test_bytes_touched_are_those_of_the_library(small_plan, everybody, plane):
    """A rank that fills whole words of every format, so that no padding is counted."""
    plan = small_plan(batch=1)
    layers, found = everybody(plan, k=40)
    cache = layers[0].caches[plane]
    per_row = layers[0].bound[plane].selector.score_bytes(cache)
    kv_heads, dim = plan.shape.num_kv_heads, plan.shape.head_dim
    maps = kv_heads * dim * plan.rank * 4
    rows = 40 * kv_heads * cache.row_bytes("key", "value")
    expected = kv_heads * plan.context * per_row + rows + maps
    assert sum(found[f"loki {plane} k=40"].touched_bytes) == expected
    dense = plan.context * kv_heads * cache.row_bytes("key", "value")
    assert found[HF].touched_bytes == (dense,)
    assert found["exact-topk k=40"].touched_bytes == (dense // 2 + rows,)


def test_without_groups_the_grouped_forms_are_left_out(small_plan):
    plan = small_plan(shape=Shape(name="one", num_heads=2, num_kv_heads=2, head_dim=32))
    assert [form.name for form in torch_forms(plan, [])] == [HF, "eager-group-rows"]
