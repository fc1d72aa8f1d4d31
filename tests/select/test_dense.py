"""Dense: the identity."""

import pytest
import torch

from loki_attn import attention
from loki_attn.cache import LayerCache
from loki_attn.errors import PolicyError
from loki_attn.policy import Policy, preset
from loki_attn.select.dense import Dense
from loki_attn.testing import layer_shape, random_rows
from loki_attn.types import AttentionCall

SHAPE = layer_shape(4, 2, 16)


def test_every_row_is_read_and_nothing_is_read_to_choose():
    query, key, value = random_rows(SHAPE, 21)
    layer = attention.bind(preset("dense"), SHAPE, 1, None)
    cache = LayerCache(layer.selector)
    cache.append(key, value)
    _, selection = attention.decode(query, cache, layer, AttentionCall(scaling=0.25))
    assert torch.equal(selection.indices, torch.arange(21).expand(1, 2, -1))
    assert layer.selector.score_bytes(cache) == 0
    assert set(cache._storage) == {"key", "value", "position"}


@pytest.mark.parametrize("amount", [{"top_k": 5}, {"fraction": 0.5}, {"mass": 0.5}])
def test_an_amount_does_not_fit(amount):
    with pytest.raises(PolicyError, match="reads everything; drop the budget's amount"):
        preset("dense", **amount)


def test_layers_may_still_be_named_dense():
    policy = Policy(select=Dense(), budget=preset("dense", dense_layers=(0,)).budget)
    assert attention.bind(policy, SHAPE, 1, None).budget.reads_everything
