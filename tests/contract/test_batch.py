"""Law 4: a row alone and the same row in a batch, padded left or right, give the same answer."""

import pytest
import torch

from loki_attn import attention
from loki_attn.testing import layer_shape, random_rows
from loki_attn.types import AttentionCall

SHAPE = layer_shape(4, 2, 32)
CALL = AttentionCall(scaling=32**-0.5)
PADS = [13, 38, 0]
SEQ = 50
AMOUNTS = [
    {"fraction": 0.3, "sinks": 2, "recents": 3},
    {"top_k": 16, "min_k": 3},
    {"fraction": 0.3, "dense_below": 40},
]
JUNK = [1e9, float("inf"), float("-inf"), float("nan")]


def sizes(unit):
    """The length of the batch and of each row: whole units, which padding must not cut."""
    pads = [-(-pad // unit) * unit for pad in PADS]
    seq = max(-(-SEQ // unit) * unit, max(pads) + unit)
    return seq, [seq - pad for pad in pads]


def span(length, seq, side):
    return slice(seq - length, seq) if side == "left" else slice(0, length)


def padded(unit, side, junk):
    """A batch of rows of several lengths; what is padded holds junk."""
    seq, lengths = sizes(unit)
    query, key, value = random_rows(SHAPE, seq, batch=3, seed=5)
    visible = torch.zeros(3, 1, 1, seq, dtype=torch.bool)
    for row, length in enumerate(lengths):
        visible[row, ..., span(length, seq, side)] = True
    hidden = ~visible[:, :, 0, :, None]
    return query, key.masked_fill(hidden, junk), value.masked_fill(hidden, junk), visible


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("amount", AMOUNTS, ids=str)
def test_decode(case, side, amount):
    seq, lengths = sizes(case.unit)
    for junk in (0.5, *JUNK):
        query, key, value, visible = padded(case.unit, side, junk)
        layer = case.layer(SHAPE, **amount)
        cache = case.filled(layer, key, value)
        out, selection = attention.decode(query, cache, layer, CALL, visible)
        for row, length in enumerate(lengths):
            own = span(length, seq, side)
            rows = [t[row : row + 1] for t in (query, key[:, :, own], value[:, :, own])]
            alone, chosen = case.decode(layer, *rows)
            counts = selection.counts[row : row + 1]
            picked = selection.indices[row : row + 1, :, : chosen.indices.shape[2]]
            assert torch.equal(counts, chosen.counts)
            assert torch.equal(picked.clamp(min=own.start) - own.start, chosen.indices.clamp(min=0))
            torch.testing.assert_close(out[row : row + 1], alone)


@pytest.mark.parametrize("side", ["left", "right"])
def test_every_query(case, side, laws):
    """Padding queries are served, too; with left padding they see nothing and get zeros."""
    shape, amount = SHAPE, {"fraction": 0.3, "sinks": 1, "recents": 1}
    seq, lengths = sizes(case.unit)
    query, key, value = random_rows(shape, seq, batch=3, q_len=seq, seed=6)
    visible = laws.causal(seq, seq).expand(3, -1, -1, -1).clone()
    for row, length in enumerate(lengths):
        hidden = torch.ones(seq, dtype=torch.bool)
        hidden[span(length, seq, side)] = False
        visible[row, ..., hidden] = False
    layer = case.layer(shape, **amount)
    for junk in JUNK:
        seen = visible.any(2)[:, 0]
        spoilt = (~seen)[:, None, :, None]
        rows = [t.masked_fill(spoilt, junk) for t in (key, value)]
        out = case.every_query(layer, query, *rows, visible)
        assert bool(torch.isfinite(out).all())
        blind = ~visible.any(-1)
        assert bool((out.masked_fill(~blind[..., None], 0.0) == 0).all())
        dense = attention.dense(query, case.filled(layer, *rows), layer, CALL, visible)
        assert bool(torch.isfinite(dense).all())
        assert bool((dense.masked_fill(~blind[..., None], 0.0) == 0).all())
        for row, length in enumerate(lengths):
            own = span(length, seq, side)
            alone = case.every_query(
                layer, *(t[row : row + 1, :, own] for t in (query, key, value))
            )
            torch.testing.assert_close(out[row : row + 1, :, own], alone)


@pytest.mark.parametrize("junk", JUNK[1:])
def test_a_later_row_cannot_spoil_an_earlier_query(case, junk):
    """Causal: the last row is invisible to all queries but the last."""
    query, key, value = random_rows(SHAPE, 20, q_len=20)
    layer = case.layer(SHAPE, top_k=6)
    clean = case.every_query(layer, query, key, value)
    plain = attention.dense(query, case.filled(layer, key, value), layer, CALL, None)
    for spoilt in (key, value):
        spoilt[:, :, -1] = junk
    out = case.every_query(layer, query, key, value)
    torch.testing.assert_close(out[:, :, :-1], clean[:, :, :-1])
    dense = attention.dense(query, case.filled(layer, key, value), layer, CALL, None)
    torch.testing.assert_close(dense[:, :, :-1], plain[:, :, :-1])


def test_a_query_that_sees_nothing_gets_zeros(case):
    query, key, value = random_rows(SHAPE, 9, batch=2)
    visible = torch.ones(2, 1, 1, 9, dtype=torch.bool)
    visible[1] = False
    layer = case.layer(SHAPE, fraction=0.5)
    cache = case.filled(layer, key, value)
    out, selection = attention.decode(query, cache, layer, CALL, visible)
    dense = attention.dense(query, cache, layer, CALL, visible)
    assert bool((out[1] == 0).all())
    assert bool((dense[1] == 0).all())
    assert bool((out[0] != 0).any())
    assert bool((dense[0] != 0).any())
    assert bool((selection.indices[1] == -1).all())
