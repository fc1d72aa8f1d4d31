"""StreamingLLM's pattern: sinks and the last rows, whatever the query is."""

import pytest
import torch

from loki_attn import attention
from loki_attn.budget import Budget
from loki_attn.cache import LayerCache
from loki_attn.errors import PolicyError
from loki_attn.policy import Policy, preset
from loki_attn.select.streaming_llm import StreamingLLM
from loki_attn.testing import layer_shape, random_rows
from loki_attn.types import AttentionCall

SHAPE = layer_shape(4, 2, 16)


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        ({"top_k": 6, "sinks": 2}, [0, 1, 26, 27, 28, 29]),
        ({"top_k": 6, "sinks": 2, "recents": 1}, [0, 1, 26, 27, 28, 29]),
        ({"top_k": 3}, [27, 28, 29]),
        ({"fraction": 0.1, "sinks": 1}, [0, 28, 29]),
        ({"top_k": 99, "sinks": 4}, list(range(30))),
    ],
    ids=str,
)
@pytest.mark.parametrize("how", ["none", "max", "softmax_sum"])
def test_sinks_and_recents(budget, expected, how):
    query, key, value = random_rows(SHAPE, 30)
    policy = Policy(select=StreamingLLM(), budget=Budget(**budget), group_reduce=how)
    layer = attention.bind(policy, SHAPE, 1, None)
    cache = LayerCache(layer.selector)
    cache.append(key, value)
    _, selection = attention.decode(query, cache, layer, AttentionCall(scaling=0.25))
    assert selection.indices.tolist() == [[expected] * 2]
    assert layer.selector.score_bytes(cache) == 0


def test_it_estimates_no_mass():
    with pytest.raises(PolicyError, match="estimates no mass; give top_k or fraction"):
        preset("streaming-llm", mass=0.9)


def test_nothing_but_position_decides():
    query, key, value = random_rows(SHAPE, 30)
    layer = attention.bind(preset("streaming-llm", top_k=8), SHAPE, 1, None)
    seen = []
    for scale in (1.0, -50.0):
        cache = LayerCache(layer.selector)
        cache.append(key * scale, value)
        call = AttentionCall(scaling=0.25)
        seen.append(attention.decode(query, cache, layer, call)[1].indices)
    assert torch.equal(*seen)
