"""The caches of a bench: the same rows in every format, other rows in every layer."""

import torch

from loki_attn.bench.layers import _turned, layers_wanted, make_layers


def test_every_format_holds_the_same_rows_and_layers_differ(small_plan):
    plan = small_plan()
    first, second = make_layers(plan, 2)
    for layer in (first, second):
        for cache in layer.caches.values():
            assert torch.equal(cache.keys, layer.keys)
            assert torch.equal(cache.values, layer.values)
            assert cache.length == plan.context
            assert cache.capacity > plan.context
    assert not torch.equal(first.keys, second.keys)
    assert not torch.equal(first.query, second.query)
    assert not torch.equal(first.basis.key_map, second.basis.key_map)


def test_layers_hold_the_same_numbers_from_another_row_on(small_plan):
    first, second = make_layers(small_plan(), 2)
    turns = [torch.equal(first.keys.roll(-by, 2), second.keys) for by in range(150)]
    assert sum(turns) == 1


def test_turned_chunks_cover_every_row_once():
    for length, offset in ((1, 0), (9000, 0), (9000, 1), (9000, 8999), (4096, 4000)):
        rows = [row for begin, end in _turned(length, offset) for row in range(begin, end)]
        assert rows == [*range(offset, length), *range(offset)]


def test_enough_layers_to_keep_a_visit_cold_if_they_fit(small_plan):
    plan = small_plan()
    plenty = 1 << 40
    assert layers_wanted(plan, [1000, 10], 100, plenty) == 10
    assert layers_wanted(plan, [1000], 1001, plenty) == 2
    noise = plan.context * plan.row_bytes()
    room = noise + 3 * plan.layer_bytes()
    assert layers_wanted(plan, [10], 1000, room) == 3
    assert layers_wanted(plan, [10], 1000, room - 1) == 2
    assert layers_wanted(plan, [10], 1000, noise) == 0
    assert layers_wanted(plan, [10], 1000, 0) == 0


def test_layer_bytes_are_at_least_what_a_layer_holds_of_its_context(small_plan):
    plan = small_plan(context=1024)
    (layer,) = make_layers(plan, 1)
    held = sum(cache.nbytes() for cache in layer.caches.values())
    assert held <= plan.layer_bytes() <= 2 * held
