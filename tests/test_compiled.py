"""The ops of storage of fixed size: what the straight line says, and honest to a compiler."""

import pytest
import torch

from loki_attn import Budget, compiled
from loki_attn.attention import LayerPolicy, decode
from loki_attn.basis import LayerBasis
from loki_attn.cache import LayerCache
from loki_attn.compiled import StaticRows, append, static_rows, step, why_not_static
from loki_attn.kernels import ops
from loki_attn.select.exact_topk import ExactTopK
from loki_attn.select.loki import Loki
from loki_attn.select.quest import Quest
from loki_attn.select.streaming_llm import StreamingLLM
from loki_attn.types import AttentionCall, LayerShape

SHAPE = LayerShape(index=0, num_heads=4, num_kv_heads=2, head_dim=16, value_dim=24)
CAPACITY = 37
HELD = 29
COUNT = torch.tensor([HELD])
CALL = AttentionCall(scaling=0.25)
FORMS = {
    **{kind: Loki(rank=6, plane_dtype=kind) for kind in ("int8", "int4", "bf16", "fp32")},
    "rotated": Loki(rank=6, layout="rotated"),
    "keys": ExactTopK(),
    "recency": StreamingLLM(),
}


@pytest.fixture
def plain_torch(monkeypatch):
    """The backend whose sums have the same order wherever they are taken."""
    monkeypatch.setenv("LOKI_ATTN_BACKEND", "reference")
    ops.cache_clear()
    yield
    ops.cache_clear()


def bound(select, budget=None, how="softmax_sum"):
    torch.manual_seed(1)
    turn = torch.linalg.qr(torch.randn(2, 16, 16, dtype=torch.float64)).Q.float()
    basis = LayerBasis(key_map=turn, query_map=turn, spectrum=torch.ones(2, 16).double())
    return LayerPolicy(
        shape=SHAPE,
        selector=select.bind(SHAPE, basis),
        budget=budget or Budget(top_k=7, sinks=1, recents=2),
        group_reduce=how,
    )


def filled(layer, held=HELD, batch=2):
    """Static rows and a cache of the same keys and values, and the query of the next step."""
    torch.manual_seed(0)
    key, value = torch.randn(batch, 2, held, 16), torch.randn(batch, 2, held, 24)
    storage = torch.zeros(batch, 2, CAPACITY, 16), torch.zeros(batch, 2, CAPACITY, 24)
    rows, cache = static_rows(layer.selector, *storage, filled=False), LayerCache(layer.selector)
    for start in range(0, held, 13):
        part = slice(start, start + 13)
        append(rows, layer.selector, key[:, :, part], value[:, :, part], torch.tensor([start]))
        cache.append(key[:, :, part], value[:, :, part])
    return rows, cache, torch.randn(batch, 4, 1, 16)


def written(held=HELD):
    return (torch.arange(CAPACITY) < held)[None, None, None]


@pytest.mark.parametrize("form", FORMS)
def test_a_step_is_that_of_the_straight_line(form):
    layer = bound(FORMS[form])
    rows, cache, query = filled(layer)
    expected, _ = decode(query, cache, layer, CALL)
    got = step(query, rows, layer, CALL, written(), COUNT)
    torch.testing.assert_close(got, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_rows_are_those_of_a_cache(form, plain_torch):
    layer = bound(FORMS[form])
    rows, cache, _ = filled(layer)
    assert torch.equal(rows.keys[:, :, :HELD], cache.keys)
    assert torch.equal(rows.values[:, :, :HELD], cache.values)
    lead = layer.selector.lead(cache)
    assert (rows.plane is None) == (form in ("rotated", "keys", "recency"))
    if rows.plane is not None:
        tiles = compiled.Tiles(rows.plane, rows.by, rows.rank, HELD)
        assert torch.equal(tiles.rows(), lead.plane.rows())
        assert not rows.plane[:, :, -1:, :, CAPACITY % 16 :].any()
    if rows.scales is not None:
        assert torch.equal(rows.scales[:, :, :HELD], lead.scales)


def test_taking_over_writes_what_appending_would_have(monkeypatch):
    monkeypatch.setattr(compiled, "_BLOCK_ROWS", 10)  # blocks that no tile boundary meets
    for form in ("int8", "rotated"):
        layer = bound(FORMS[form])
        appended, _, query = filled(layer)
        torch.manual_seed(0)
        keys, values = torch.zeros(2, 2, CAPACITY, 16), torch.zeros(2, 2, CAPACITY, 24)
        keys[:, :, :HELD] = torch.randn(2, 2, HELD, 16)
        values[:, :, :HELD] = torch.randn(2, 2, HELD, 24)
        taken = static_rows(layer.selector, keys, values, filled=True)
        expected = step(query, appended, layer, CALL, written(), COUNT)
        torch.testing.assert_close(step(query, taken, layer, CALL, written(), COUNT), expected)


@pytest.mark.parametrize("how", ["softmax_sum", "softmax_max", "max", "sum", "none"])
def test_groups_agree_as_on_the_straight_line(how):
    layer = bound(FORMS["int8"], Budget(fraction=0.3, sinks=1, recents=1), how)
    rows, cache, query = filled(layer)
    visible = torch.ones(2, 1, 1, HELD, dtype=torch.bool)
    visible[1, ..., :9] = False
    expected, _ = decode(query, cache, layer, CALL, visible)
    slots = torch.cat([visible, visible.new_zeros(2, 1, 1, CAPACITY - HELD)], -1)
    torch.testing.assert_close(step(query, rows, layer, CALL, slots, COUNT), expected)


@pytest.mark.parametrize("form", ["int8", "rotated"])
def test_a_compiler_may_rely_on_the_ops(form):
    """Schemas, shapes without data, what is written to: checked by torch itself."""
    layer = bound(FORMS[form])
    rows, _, query = filled(layer)
    maps, sizes = (
        (rows.query_map, written(), torch.tensor([7]), COUNT),
        (7, 1, 2, "softmax_sum", 0.25),
    )
    storage = rows.keys, rows.values, rows.plane, rows.scales
    torch.library.opcheck(
        torch.ops.loki_attn.step.default,
        (query, query, *storage, *maps, None, rows.by, rows.rank, *sizes, None),
    )
    key, value = torch.randn(2, 2, 3, 16), torch.randn(2, 2, 3, 24)
    torch.library.opcheck(
        torch.ops.loki_attn.append.default, (key, value, *storage, rows.key_map, COUNT, rows.by)
    )


def test_reasons_are_said():
    assert why_not_static(bound(FORMS["int8"])) is None
    reasons = {
        "a mass budget": bound(FORMS["int8"], Budget(mass=0.8)),
        "rank rows by a lead": bound(Quest()),
    }
    for reason, layer in reasons.items():
        assert reason in why_not_static(layer)


def test_a_copy_shares_its_maps_only():
    rows, _, _ = filled(bound(FORMS["int8"]))
    copied = rows.changed(torch.clone)
    assert isinstance(copied, StaticRows)
    assert copied.nbytes == rows.nbytes
    assert copied.key_map is rows.key_map
    assert copied.plane.data_ptr() != rows.plane.data_ptr()
