"""The oracles of `column_sums` and `hamming` against the textbook, and their errors."""

import pytest
import torch
from column_scenes import bound, columns, gathered, weights
from hypothesis import given, settings
from hypothesis import strategies as st

from loki_attn.errors import InputError, UnknownNameError
from loki_attn.kernels import ops, reference
from loki_attn.testing import assert_within_budget, layer_shape, plain_weights, random_rows
from loki_attn.types import AttentionCall

CALL = AttentionCall(scaling=0.25)
SHAPE = layer_shape(4, 2, 16)


def rows(seq=20, q_len=5, **more):
    return random_rows(SHAPE, seq, batch=2, q_len=q_len, **more)[:2]


@settings(max_examples=60)
@given(scene=columns())
def test_what_every_row_receives(scene):
    """Of any dtype, mask, window, bias and soft-max; hidden rows and queries hold poison."""
    result = scene.by(reference.column_sums)
    truth = gathered(scene, weights(scene))
    assert result.dtype == torch.float32
    assert result.shape == truth.shape
    assert bool(((result - truth).abs() <= bound(scene)).all()), scene
    unseen = ~scene.seen[:, :, scene.query.shape[2] - scene.counted :].any(2)
    assert bool((result.masked_fill(~unseen, 0.0) == 0).all())


@given(scene=columns(dtypes=[torch.float64]))
def test_float64_stays_float64_inside(scene):
    truth = gathered(scene, weights(scene))
    torch.testing.assert_close(
        scene.by(reference.column_sums), truth.float(), rtol=1e-6, atol=1e-30
    )


def test_they_are_sums_of_the_plain_weights():
    """Without bias and window, the shared oracle of attention says the same."""
    query, keys = rows(seq=40, q_len=9, dtype=torch.float64)
    call = AttentionCall(scaling=0.25, softcap=3.0, sink_logits=torch.tensor([0.5, -1.0, 2.0, 0.0]))
    seen = reference.causal_mask(9, 40, torch.device("cpu"))
    expected = plain_weights(query, keys, seen, call)
    for how, wanted in (("sum", expected.sum(2)), ("max", expected.amax(2))):
        out = reference.column_sums(query, keys, None, call, how=how)
        torch.testing.assert_close(out, wanted.float())
        out = reference.column_sums(query, keys, None, call, how=how, window=4)
        last = expected[:, :, -4:]
        torch.testing.assert_close(out, (last.sum(2) if how == "sum" else last.amax(2)).float())


@pytest.mark.parametrize("how", ["sum", "max"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("block", [1, 7, 64])
def test_blocks_of_queries_change_nothing_but_rounding(monkeypatch, how, masked, block):
    query, keys = rows(seq=300, q_len=70)
    visible = torch.rand(2, 2, 70, 300) < 0.3 if masked else None
    whole = reference.column_sums(query, keys, visible, CALL, how=how)
    monkeypatch.setattr(reference, "_QUERY_BLOCK", block)
    parts = reference.column_sums(query, keys, visible, CALL, how=how)
    torch.testing.assert_close(parts, whole)
    wide = [rows.double() for rows in (query, keys)]
    truth = reference.column_sums(*wide, visible, CALL, how=how).double()
    assert_within_budget(parts, whole, truth)


def test_each_query_gives_one_in_all():
    """Columns sum to the number of queries; a sink takes its share away."""
    query, keys = rows(seq=30, q_len=8)
    total = reference.column_sums(query, keys, None, CALL).sum(-1)
    torch.testing.assert_close(total, torch.full_like(total, 8.0))
    sinks = AttentionCall(scaling=0.25, sink_logits=torch.zeros(4))
    assert bool((reference.column_sums(query, keys, None, sinks).sum(-1) < 8.0).all())


def test_a_bias_adds_to_the_logits():
    """A row with the bias ln 2 weighs what two equal rows weigh; minus infinity hides a row."""
    query, keys = rows(seq=6, q_len=1)
    keys[:, :, 5] = keys[:, :, 4]
    twice = reference.column_sums(query, keys, None, CALL)
    bias = torch.zeros(2, 2, 5)
    bias[:, :, 4] = torch.log(torch.tensor(2.0))
    once = reference.column_sums(query, keys[:, :, :5], None, CALL, bias=bias)
    torch.testing.assert_close(once[..., 4], twice[..., 4] + twice[..., 5])
    bias[:, :, 2] = float("-inf")
    hidden = reference.column_sums(query, keys[:, :, :5], None, CALL, bias=bias)
    assert bool((hidden[..., 2] == 0).all())


QUERY, KEYS = rows()
WRONG = {
    "no window": (
        {"window": 0},
        "window must be at least 1, or None for all queries; got 0.",
    ),
    "a mask of other queries": (
        {"visible": torch.ones(1, 1, 4, 20, dtype=torch.bool)},
        "visible must have the shape [2 or 1, 2 or 1, 5, 20], got [1, 1, 4, 20].",
    ),
    "a mask per query head": (
        {"visible": torch.ones(1, 4, 5, 20, dtype=torch.bool)},
        "visible must have the shape [2 or 1, 2 or 1, 5, 20], got [1, 4, 5, 20].",
    ),
    "a bias of one head": (
        {"bias": torch.zeros(2, 1, 20)},
        "bias must have the shape [2, 2, 20], got [2, 1, 20].",
    ),
    "a bias of one dimension": (
        {"bias": torch.zeros(20)},
        "bias must have the shape [2, 2, 20], got [20].",
    ),
    "more queries than rows": (
        {"keys": KEYS[:, :, :3]},
        "5 causal queries came with 3 rows; pass fewer, or a mask.",
    ),
}


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_is_an_error(case, backend):
    """Whatever runs by default: what the kernels refuse, the reference explains."""
    changed, text = WRONG[case]
    args = {"query": QUERY, "keys": KEYS, "visible": None, "call": CALL, **changed}
    with pytest.raises(InputError) as caught:
        ops(backend).column_sums(**args)
    assert str(caught.value) == text


@pytest.mark.parametrize("backend", [None, "reference"])
def test_an_unknown_reduction_names_the_known_ones(backend):
    with pytest.raises(UnknownNameError, match=r"over queries 'mean'.*Valid: max, sum"):
        ops(backend).column_sums(QUERY, KEYS, None, CALL, how="mean")


def bits_apart(query, codes):
    """By Python's integers."""
    group = query.shape[1] // codes.shape[1]
    out = torch.zeros(*query.shape[:3], codes.shape[2])
    for b, h, i, t in torch.cartesian_prod(*map(torch.arange, out.shape)).tolist():
        pairs = zip(query[b, h, i].tolist(), codes[b, h // group, t].tolist(), strict=True)
        out[b, h, i, t] = sum(((x ^ y) & 0xFFFFFFFF).bit_count() for x, y in pairs)
    return out


def words(*shape, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, shape, generator=draw).to(torch.int32)


@given(
    sizes=st.tuples(*(st.integers(1, n) for n in (2, 2, 3, 4, 9, 5))), seed=st.integers(0, 2**31)
)
def test_hamming_counts_the_bits_that_differ(sizes, seed):
    batch, kv_heads, group, q_len, seq, count = sizes
    query = words(batch, kv_heads * group, q_len, count, seed=seed)
    codes = words(batch, kv_heads, seq, count, seed=seed + 1)
    result = reference.hamming(query, codes)
    assert result.dtype == torch.float32
    assert torch.equal(result, bits_apart(query, codes))


@pytest.mark.parametrize("most", [1, 1000])
def test_hamming_by_blocks_of_queries_is_the_same(monkeypatch, most):
    query, codes = words(2, 4, 9, 3), words(2, 2, 30, 3, seed=1)
    whole = reference.hamming(query, codes)
    monkeypatch.setattr(reference, "_HAMMING_BLOCK_BYTES", most)
    assert torch.equal(reference.hamming(query, codes), whole)


def test_hamming_of_the_ends_of_the_range():
    """All bits, no bits, and the sign bit alone: nothing overflows."""
    numbers = [0, -1, -(2**31), 2**31 - 1, 1]
    codes = torch.tensor(numbers, dtype=torch.int32)[None, None, :, None]
    assert torch.equal(reference.hamming(codes, codes), bits_apart(codes, codes))


@pytest.mark.parametrize("backend", [None, "reference"])
def test_codes_that_do_not_fit_are_an_error(backend):
    query, codes = words(2, 4, 1, 3), words(2, 2, 7, 3)
    with pytest.raises(InputError) as caught:
        ops(backend).hamming(query, codes[..., :2])
    assert str(caught.value) == "codes must have the shape [2, 2, 7, 3], got [2, 2, 7, 2]."
    with pytest.raises(InputError) as caught:
        ops(backend).hamming(query, codes.long())
    assert str(caught.value) == "Codes are int32, got torch.int32 and torch.int64."
