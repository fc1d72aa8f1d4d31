"""Layers drawn on a device: rows once, every format beside them, no copy to fill them from."""

import pytest
import torch

from loki_attn.bench import drawn_layers
from loki_attn.bench.drawn_layers import draw_layers, drawing_bytes, drawn_layer_bytes
from loki_attn.bench.gate import Gate
from loki_attn.bench.layers import Layer
from loki_attn.cache import LayerCache


@pytest.mark.parametrize("context", [1, 63, 64, 150])
@pytest.mark.parametrize("chunk_bytes", [1, 1 << 30])
def test_a_drawn_cache_is_what_appending_its_rows_makes(
    small_plan, monkeypatch, context, chunk_bytes
):
    monkeypatch.setattr(drawn_layers, "_CHUNK_BYTES", chunk_bytes)
    plan = small_plan(context=context)
    (layer,) = draw_layers(plan, 1)
    for plane, cache in layer.caches.items():
        same = LayerCache(layer.bound[plane].selector)
        same.append(layer.keys, layer.values)
        assert cache.length == cache.seen == context
        for name in ("key", "value", "position"):
            assert torch.equal(cache.plane(name), same.plane(name)), (plane, name)
        # Another order of the same sums: a code may fall to the other side of a half.
        coded = plane in {"int8", "int4"}
        near = {"atol": 1, "rtol": 0} if coded else {"atol": 1e-5, "rtol": 1e-2}
        torch.testing.assert_close(cache.plane("lead"), same.plane("lead"), **near)
        if coded:
            torch.testing.assert_close(cache.plane("lead_scale"), same.plane("lead_scale"))


def test_formats_share_their_rows_and_layers_share_nothing(small_plan):
    layers = draw_layers(small_plan(), 2)
    for layer in layers:
        assert len({cache.keys.data_ptr() for cache in layer.caches.values()}) == 1
        assert len({cache.plane("lead").sum() for cache in layer.caches.values()}) > 1
    first, second = layers
    assert not torch.equal(first.keys, second.keys)
    assert not torch.equal(first.query, second.query)
    assert not torch.equal(first.basis.key_map, second.basis.key_map)


def test_a_seed_draws_the_same_again(small_plan):
    first, again, other = (draw_layers(small_plan(), 1, seed)[0] for seed in (1, 1, 2))
    assert torch.equal(first.keys, again.keys)
    assert not torch.equal(first.keys, other.keys)


@pytest.mark.parametrize("rank", [8, 7])
def test_bytes_are_those_that_are_held(small_plan, rank):
    plan = small_plan(context=1000, rank=rank)
    (layer,) = draw_layers(plan, 1)
    held = {}
    for cache in layer.caches.values():
        for storage in cache._storage.values():
            held[storage.data.data_ptr()] = storage.nbytes
    assert drawn_layer_bytes(plan) == sum(held.values())
    assert drawing_bytes(plan) >= 2 * plan.row_bytes()


def test_contenders_are_right_on_drawn_layers(small_plan, everybody):
    plan = small_plan()
    layers = draw_layers(plan, 1)
    _, found = everybody(plan, layers=layers)
    gate = Gate(plan, layers[0])
    assert {name: gate.judge(own).reason for name, own in found.items()} == dict.fromkeys(found, "")


def test_a_layer_of_either_kind_is_a_layer(small_plan):
    (layer,) = draw_layers(small_plan(), 1)
    assert isinstance(layer, Layer)
    assert layer.keys.dtype == layer.query.dtype == torch.bfloat16
    assert tuple(layer.query.shape) == (2, 6, 1, 32)
