"""The identity of the verb: nothing goes, whatever the budget's other fields say."""

import pytest
import torch

from loki_attn import attention
from loki_attn.cache import LayerCache
from loki_attn.errors import PolicyError
from loki_attn.evict.base import Place
from loki_attn.evict.keep_all import KeepAll
from loki_attn.policy import Policy, preset
from loki_attn.testing import layer_shape, random_rows
from loki_attn.types import AttentionCall

SHAPE = layer_shape(4, 2, 16)


def test_it_is_what_a_policy_does_by_itself():
    assert Policy(select=preset("dense").select).evict == KeepAll()
    assert not preset("loki").evicts
    assert '"evict"' not in preset("loki").to_json()


def test_a_layer_has_no_eviction_to_run():
    assert attention.bind(preset("exact-topk"), SHAPE, 2, None).eviction is None


def test_all_rows_are_alike():
    evictor = KeepAll().bind(Place(shape=SHAPE, num_layers=2))
    cache = LayerCache()
    cache.append(*random_rows(SHAPE, 9, batch=3)[1:])
    scores = evictor.scores(cache, AttentionCall(scaling=1.0), None)
    assert scores.shape == (3, 2, 9)
    assert torch.equal(scores, torch.zeros(3, 2, 9))


def test_an_amount_without_a_method_is_refused():
    with pytest.raises(PolicyError, match="nothing is evicted; name a method"):
        preset("loki", capacity=100)
