"""U2 and U3: step by step, in chunks or at once, each query row reads and returns the same."""

import itertools

import pytest
import torch

from loki_attn import attention
from loki_attn.cache import LayerCache
from loki_attn.testing import layer_shape, random_rows

SHAPE = layer_shape(6, 2, 32)
SEQ = 150
AMOUNTS = [
    {"top_k": 12, "sinks": 2, "recents": 3},
    {"fraction": 0.25, "min_k": 4},
    {"fraction": 0.25, "dense_below": 70},
    {"mass": 0.7, "cap": 30},
]


def stepwise(case, layer, query, key, value, call):
    cache, outs = LayerCache(layer.selector), []
    for step in range(SEQ):
        now = slice(step, step + 1)
        cache.append(key[:, :, now], value[:, :, now])
        outs.append(attention.decode(query[:, :, now], cache, layer, call)[0])
    return torch.cat(outs, 2)


def chunked(case, layer, query, key, value, call, edges):
    cache, outs = LayerCache(layer.selector), []
    for start, end in itertools.pairwise(edges):
        now = slice(start, end)
        cache.append(key[:, :, now], value[:, :, now])
        outs.append(attention.every_query(query[:, :, now], cache, layer, call))
    return torch.cat(outs, 2)


@pytest.mark.parametrize("amount", AMOUNTS, ids=str)
def test_steps_chunks_and_one_forward_agree(case, laws, amount):
    if "mass" in amount and not case.select.estimates_mass:
        amount = AMOUNTS[1]
    query, key, value = random_rows(SHAPE, SEQ, q_len=SEQ, batch=2, seed=2)
    if case.unit > 1:
        # Bounds of pages nearly tie more often than rows do: sums of eighths have no rounding.
        query, key = ((rows * 8).round() / 8 for rows in (query, key))
    layer, call = case.layer(SHAPE, **amount), laws.call(SHAPE)
    whole = case.every_query(layer, query, key, value)
    steps = stepwise(case, layer, query, key, value, call)
    # Another choice of rows would differ by far more than the order of summation does.
    torch.testing.assert_close(steps, whole)
    for edges in ([0, 1, 70, SEQ], [0, 64, 128, SEQ]):
        torch.testing.assert_close(chunked(case, layer, query, key, value, call, edges), whole)


def test_a_causal_mask_is_the_default(case, laws):
    query, key, value = random_rows(SHAPE, 90, q_len=70)
    layer = case.layer(SHAPE, fraction=0.3)
    mine = case.every_query(layer, query, key, value)
    other = case.every_query(layer, query, key, value, laws.causal(70, 90))
    assert torch.equal(mine, other)


def test_two_requests_in_a_row_are_two_fresh_runs(case):
    """No state in specifications, selectors or presets."""
    layer = case.layer(SHAPE, top_k=8)
    first = random_rows(SHAPE, 40, seed=1)
    second = random_rows(SHAPE, 33, seed=2)
    case.decode(layer, *first)
    after, _ = case.decode(layer, *second)
    fresh, _ = case.decode(case.layer(SHAPE, top_k=8), *second)
    assert torch.equal(after, fresh)
