"""Laws 1 and 8: with the full budget every method is dense attention, at every shape."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loki_attn import attention
from loki_attn.testing import layer_shape, random_rows

SHAPES = [
    layer_shape(4, 4, 64),
    layer_shape(6, 2, 80),
    layer_shape(3, 1, 96),
    layer_shape(8, 2, 128),
    layer_shape(2, 1, 256),
    layer_shape(4, 2, 64, 48),
    layer_shape(2, 2, 16),
]
FULL = [{"top_k": 10_000}, {"fraction": 1.0}, {"top_k": 200, "sinks": 4, "recents": 64}]
MASS = {"mass": 1.0}


@settings(max_examples=12)
@given(
    shape=st.sampled_from(SHAPES),
    seq=st.integers(1, 130),
    amount=st.sampled_from(FULL),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_decode(case, shape, seq, amount, dtype, seed):
    query, key, value = random_rows(shape, seq, batch=8, dtype=dtype, seed=seed)
    layer = case.layer(shape, **amount)
    out, selection = case.decode(layer, query, key, value)
    case.check_budget(out, layer, query, key, value, None)
    assert out.dtype == dtype
    assert bool((selection.counts == seq).all())


@settings(max_examples=8)
@given(
    shape=st.sampled_from(SHAPES),
    q_len=st.integers(1, 70),
    past=st.integers(0, 40),
    amount=st.sampled_from(FULL),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_every_query(case, laws, shape, q_len, past, amount, dtype):
    seq = past + q_len
    query, key, value = random_rows(shape, seq, batch=4, q_len=q_len, dtype=dtype, seed=seq)
    layer = case.layer(shape, **amount)
    out = case.every_query(layer, query, key, value)
    case.check_budget(out, layer, query, key, value, laws.causal(q_len, seq))


@pytest.mark.parametrize("seq", [1, 5, 100])
def test_whole_mass(scoring_case, seq):
    shape = SHAPES[1]
    query, key, value = random_rows(shape, seq, batch=8, seed=seq)
    layer = scoring_case.layer(shape, **MASS)
    out, _ = scoring_case.decode(layer, query, key, value)
    scoring_case.check_budget(out, layer, query, key, value, None)


@pytest.mark.parametrize("q_len", [1, 7])
@pytest.mark.parametrize("extras", [{}, {"softcap": 3.0}, {"sinks": True}])
def test_dense_path(case, laws, q_len, extras):
    """`attention.dense` undoes whatever space the rows are stored in."""
    shape, seq = SHAPES[1], 33
    query, key, value = random_rows(shape, seq, batch=8, q_len=q_len, seed=3)
    sinks = torch.linspace(-1, 2, 6) if "sinks" in extras else None
    call = laws.call(shape, softcap=extras.get("softcap"), sink_logits=sinks)
    layer = case.layer(shape, top_k=4)
    out = attention.dense(query, case.filled(layer, key, value), layer, call, None)
    case.check_budget(out, layer, query, key, value, laws.causal(q_len, seq), call)


@pytest.mark.parametrize("extras", ["softcap", "sinks", "both"])
def test_softcap_and_sink_logits(case, laws, extras):
    shape = SHAPES[3]
    query, key, value = random_rows(shape, 50, batch=2, seed=4)
    call = laws.call(
        shape,
        softcap=2.0 if extras != "sinks" else None,
        sink_logits=torch.linspace(-1, 3, 8) if extras != "softcap" else None,
    )
    for amount in ({"fraction": 1.0}, {"top_k": 9, "sinks": 1}):
        layer = case.layer(shape, **amount)
        _, selection = case.decode(layer, query, key, value, call=call)
        assert bool(
            (selection.counts == (50 if case.reads_everything else amount.get("top_k", 50))).all()
        )
