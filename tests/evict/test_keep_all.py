"""Keep everything: the identity of its verb."""

import torch

from loki_attn.evict.base import Place
from loki_attn.evict.keep_all import KeepAll
from loki_attn.eviction import Turn, evict
from loki_attn.policy import preset
from loki_attn.testing import DrivenLayer, layer_shape, random_rows

SHAPE = layer_shape(4, 2, 8)


def test_it_is_what_a_policy_does_unless_told_otherwise():
    policy = preset("loki")
    assert policy.evict == KeepAll()
    assert not policy.evicts
    assert "evict" not in policy.to_json()


def test_nothing_is_bound_and_nothing_goes():
    driven = DrivenLayer(preset("dense"), SHAPE)
    assert driven.layer.eviction is None
    rows = random_rows(SHAPE, 30, batch=2, q_len=30)
    driven.prompt(*rows)
    assert driven.evict() == 0
    assert torch.equal(driven.rows.whole.keys, rows[1])
    assert evict([]) == 0


def test_all_rows_are_alike():
    driven = DrivenLayer(preset("dense"), SHAPE)
    driven.prompt(*random_rows(SHAPE, 30, batch=2, q_len=30))
    evictor = KeepAll().bind(Place(shape=SHAPE, num_layers=1))
    scores = evictor.scores(driven.rows.whole, driven.call, None)
    assert scores.shape == (2, 2, 30)
    assert bool((scores == scores[0, 0, 0]).all())
    assert evictor.marks() == {}
    assert Turn(rows=driven.rows).valid is None
