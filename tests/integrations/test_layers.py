"""LokiLayer keeps to the contract of a transformers cache layer, planes included."""

import copy

import pytest
import torch
from sparse_policies import METHODS
from transformers.cache_utils import Cache, DynamicLayer

from loki_attn.attention import LayerPolicy
from loki_attn.basis import LayerBasis
from loki_attn.budget import Budget
from loki_attn.errors import CacheError
from loki_attn.integrations.transformers.layers import LokiLayer
from loki_attn.types import KeepSet, LayerShape

SHAPE = LayerShape(index=0, num_heads=4, num_kv_heads=2, head_dim=16, value_dim=12)


def rows(tokens, batch=3, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return (
        torch.randn(batch, 2, tokens, 16, generator=draw),
        torch.randn(batch, 2, tokens, 12, generator=draw),
    )


def loki_layer(method="loki_planes"):
    draw = torch.Generator().manual_seed(7)
    turn = torch.linalg.qr(torch.randn(2, 16, 16, generator=draw)).Q
    basis = LayerBasis(
        key_map=turn, query_map=turn, spectrum=torch.ones(2, 16, dtype=torch.float64)
    )
    policy = LayerPolicy(
        shape=SHAPE,
        selector=METHODS[method].bind(SHAPE, basis),
        budget=Budget(),
        group_reduce="softmax_sum",
    )
    return LokiLayer(policy, "owner")


def fill(layer, *chunks):
    for keys, values in chunks:
        layer.armed = True
        layer.update(keys, values)
    return layer


@pytest.fixture
def pair():
    """Ours and the stock layer, with the same rows."""
    return fill(loki_layer(), rows(5)), fill(DynamicLayer(), rows(5))


OPERATIONS = {
    "append": lambda layer: fill(layer, rows(2, seed=1), rows(1, seed=2)),
    "reorder": lambda layer: layer.reorder_cache(torch.tensor([2, 0, 0])),
    "repeat": lambda layer: layer.batch_repeat_interleave(2),
    "pick": lambda layer: layer.batch_select_indices(torch.tensor([2, 1])),
    "pick by mask": lambda layer: layer.batch_select_indices(torch.tensor([True, False, True])),
    "crop": lambda layer: layer.crop(-2),
    "offload": lambda layer: layer.offload(),
    "offload and prefetch": lambda layer: (layer.offload(), layer.prefetch()),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_operations_do_what_the_stock_layer_does(pair, operation):
    ours, stock = pair
    for layer in pair:
        OPERATIONS[operation](layer)
    assert torch.equal(ours.keys, stock.keys)
    assert torch.equal(ours.values, stock.values)
    assert ours.get_seq_length() == stock.get_seq_length()
    assert ours.get_mask_sizes(3) == stock.get_mask_sizes(3)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_planes_follow_their_rows(operation):
    """The lead plane is always the one that the rows would get anew."""
    layer = fill(loki_layer(), rows(5))
    OPERATIONS[operation](layer)
    anew = fill(loki_layer(), (layer.keys.clone(), layer.values.clone()))
    for plane in ("lead", "lead_scale"):
        assert torch.equal(layer.rows.whole.plane(plane), anew.rows.whole.plane(plane))


@pytest.mark.parametrize("operation", sorted(set(OPERATIONS) - {"append"}))
def test_an_empty_layer_takes_any_operation(operation):
    layer = loki_layer()
    OPERATIONS[operation](layer)
    assert layer.get_seq_length() == 0
    assert layer.get_mask_sizes(4) == (4, 0)


def test_crop_in_both_conventions():
    layer = fill(loki_layer(), rows(9))
    layer.crop(0)
    assert layer.get_seq_length() == 9
    layer.crop(-2)
    assert layer.get_seq_length() == 7
    layer.crop(4)  # up to transformers 5.13: how many to keep
    assert layer.get_seq_length() == 4
    layer.crop(6)
    assert layer.get_seq_length() == 4
    layer.crop(-9)
    assert layer.get_seq_length() == 0


def test_no_limit_under_either_name():
    assert loki_layer().get_max_length() == loki_layer().get_max_cache_shape() == -1


def test_evicted_rows_still_count_as_seen():
    """Positions of new tokens and masks follow the tokens seen, whatever rows are held."""
    layer = fill(loki_layer(), rows(6))
    kept = torch.tensor([0, 4, 5]).expand(3, 2, 3)
    layer.rows.keep(KeepSet(kept, torch.full((3, 2), 3)))
    assert layer.rows.longest == 3
    assert layer.get_seq_length() == 6
    assert layer.get_mask_sizes(1) == (7, 0)


def test_values_may_have_another_size():
    layer = fill(loki_layer(), rows(5))
    assert layer.keys.shape == (3, 2, 5, 16)
    assert layer.values.shape == (3, 2, 5, 12)


@pytest.mark.parametrize("method", METHODS)
def test_a_copy_shares_the_format_and_nothing_else(method):
    layer = fill(loki_layer(method), rows(5))
    twin = copy.deepcopy(layer)
    assert twin.rows.row_format is layer.rows.row_format
    assert twin.rows.whole.row_format is layer.rows.whole.row_format
    before = layer.keys.clone()
    twin.keys.zero_()
    twin.crop(-3)
    assert torch.equal(layer.keys, before)
    assert (layer.get_seq_length(), twin.get_seq_length()) == (5, 2)


def test_update_needs_arming_every_time():
    layer = fill(loki_layer(), rows(2))
    with pytest.raises(CacheError, match="belongs to a Loki attachment"):
        layer.update(*rows(1))


def test_reset_gives_the_memory_back():
    layer = fill(loki_layer(), rows(5))
    layer.reset()
    assert layer.rows.nbytes() == 0
    fill(layer, rows(2, batch=1))
    assert layer.get_seq_length() == 2


def test_it_lives_in_a_transformers_cache():
    cache = Cache(layers=[loki_layer(), loki_layer()])
    for layer in cache.layers:
        fill(layer, rows(5))
    cache.reorder_cache(torch.tensor([1, 1, 0]))
    cache.crop(-1)
    assert cache.get_seq_length() == 4
    assert cache.get_mask_sizes(2, 1) == (6, 0)
