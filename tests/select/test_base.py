"""The contract of a method: a lead is enough, and one of lead and score is needed."""

import pytest
import torch

from loki_attn.cache import LayerCache
from loki_attn.select.base import Selector, map_query
from loki_attn.testing import layer_shape, random_rows
from loki_attn.tiles import pack
from loki_attn.types import AttentionCall, Lead

SHAPE = layer_shape(4, 2, 16)
CALL = AttentionCall(scaling=0.25)


class Leading(Selector):
    """A method that is nothing but its lead."""

    def __init__(self, lead):
        self._lead = lead

    def lead(self, cache):
        return self._lead

    def score_bytes(self, cache):
        return 0


class Silent(Selector):
    """A method that forgot to say how it ranks."""

    def score_bytes(self, cache):
        return 0


def plain(query, rows):
    return query @ rows.repeat_interleave(2, 1).mT * CALL.scaling


@pytest.mark.parametrize("rank", [5, 16])
def test_without_a_map_the_first_coordinates_of_the_query_rank(rank):
    query, key, _ = random_rows(SHAPE, 20, batch=2, q_len=3)
    expected = plain(query[..., :rank], key[..., :rank])
    for plane in (key[..., :rank], pack(key[..., :rank], "fp32")):
        got = Leading(Lead(plane)).score(query, LayerCache(), CALL)
        torch.testing.assert_close(got, expected)


def test_a_map_brings_the_query_to_the_lead():
    query, key, _ = random_rows(SHAPE, 20, batch=2, q_len=3)
    query_map = torch.randn(2, 16, 7, generator=torch.Generator().manual_seed(1))
    mapped = map_query(query.bfloat16(), query_map)
    assert mapped.dtype == torch.float32
    expected = query.bfloat16().float() @ query_map.repeat_interleave(2, 0)
    torch.testing.assert_close(mapped, expected)
    got = Leading(Lead(key[..., :7], None, query_map)).score(query.bfloat16(), LayerCache(), CALL)
    torch.testing.assert_close(got, plain(expected, key[..., :7]))


def test_recency_scores_nothing():
    query, _, _ = random_rows(SHAPE, 3)
    assert Leading(Lead(None)).score(query, LayerCache(), CALL) is None


def test_a_method_defines_a_lead_or_a_score():
    query, _, _ = random_rows(SHAPE, 3)
    assert Silent().lead(LayerCache()) is None
    with pytest.raises(NotImplementedError, match="Silent must define lead or score"):
        Silent().score(query, LayerCache(), CALL)
