"""The oracle itself, against independent formulas, over dtypes, odd shapes and odd numbers."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loki_attn.errors import InputError
from loki_attn.kernels import reference
from loki_attn.testing import (
    assert_within_budget,
    layer_shape,
    plain_attention,
    plain_reference,
    plain_weights,
    random_rows,
)
from loki_attn.tiles import pack
from loki_attn.types import AppendRequest, AttentionCall, Lead, Reading, Selection

INF = float("inf")
SHAPE = layer_shape(4, 2, 16)
SIZES = [(4, 4, 64), (6, 2, 80), (3, 1, 96), (8, 2, 128), (2, 1, 256)]
TINY = torch.finfo(torch.float32).smallest_normal / 8


def call_of(shape=SHAPE, **more):
    return AttentionCall(scaling=shape.head_dim**-0.5, **more)


def everything(scores):
    return torch.ones(1, 1, 1, scores.shape[-1], dtype=torch.bool)


def mark(scores, count, visible=None, forced=None):
    """`choose_mask` for one row of scores, as a list of indices."""
    scores = torch.tensor(scores, dtype=torch.float32)[None, None, None]
    visible = everything(scores) if visible is None else torch.tensor(visible)[None, None, None]
    forced = ~everything(scores) if forced is None else torch.tensor(forced)[None, None, None]
    mask = reference.choose_mask(scores, torch.tensor([[[count]]]), visible, forced)
    return mask[0, 0, 0].nonzero()[:, 0].tolist()


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seq", [1, 2, 63, 130])
def test_attend_and_log_sum_exp(sizes, dtype, seq):
    shape = layer_shape(*sizes)
    query, key, value = random_rows(shape, seq, batch=8, dtype=dtype, seed=seq)
    call = call_of(shape)
    wide = [t.double() for t in (query, key, value)]
    truth = plain_attention(*wide, None, call)
    rows = torch.arange(seq).expand(8, sizes[1], -1)
    selection = Selection(rows, torch.full((8, sizes[1]), seq))
    result = reference.attend(query, key, value, selection, call)
    plain = plain_reference(query, key, value, None, call, truth)
    assert_within_budget(result.output, plain, truth)
    logits = plain_logits(*wide[:2], call)
    expected = logits.logsumexp(-1).float()
    torch.testing.assert_close(result.log_sum_exp, expected)


def plain_logits(query, key, call):
    return query @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).mT * call.scaling


@pytest.mark.parametrize("q_len", [1, 5])
def test_softcap_and_sink_logits_by_their_formula(q_len):
    """Written out with exponentials: no soft-max, no matmul of ours."""
    query, key, value = random_rows(SHAPE, 11, batch=2, q_len=q_len)
    sinks = torch.tensor([-1.0, 0.0, 1.0, 40.0])
    call = call_of(softcap=0.7, sink_logits=sinks)
    result = reference.attend_masked(query, key, value, None, call)
    for batch in range(2):
        for head in range(4):
            for row in range(q_len):
                q, k = query[batch, head, row].double(), key[batch, head // 2].double()
                logits = 0.7 * torch.tanh((k * q).sum(-1) * 0.25 / 0.7)
                total = logits.exp().sum() + sinks[head].double().exp()
                out = (logits.exp()[:, None] * value[batch, head // 2]).sum(0) / total
                torch.testing.assert_close(result.output[batch, head, row], out.float())
                got = result.log_sum_exp[batch, head, row]
                torch.testing.assert_close(got, total.log().float())


def test_a_huge_sink_takes_all_the_weight():
    query, key, value = random_rows(SHAPE, 5)
    call = call_of(sink_logits=torch.full((4,), 1e4))
    result = reference.attend_masked(query, key, value, None, call)
    assert bool((result.output == 0).all())
    assert bool((result.log_sum_exp == 1e4).all())


def test_dense_equals_attend_masked_whatever_the_call():
    for q_len in (1, 6, 9):
        query, key, value = random_rows(SHAPE, 9, batch=2, q_len=q_len)
        for visible in (
            None,
            torch.rand(2, 1, q_len, 9).lt(0.5).index_fill_(3, torch.tensor(0), True),
        ):
            seen = visible
            if visible is None:
                seen = torch.ones(q_len, 9).tril(9 - q_len).bool()[None, None]
            for call in (call_of(), call_of(softcap=1.0), call_of(sink_logits=torch.ones(4))):
                mine = reference.dense(query, key, value, visible, call, causal=True)
                other = plain_attention(query, key, value, seen, call)
                torch.testing.assert_close(mine, other)


def test_dense_without_causality_sees_all():
    query, key, value = random_rows(SHAPE, 9, q_len=9)
    mine = reference.dense(query, key, value, None, call_of(), causal=False)
    torch.testing.assert_close(mine, plain_attention(query, key, value, None, call_of()))


def test_attend_takes_one_token():
    query, key, value = random_rows(SHAPE, 9, q_len=2)
    selection = Selection(torch.zeros(1, 2, 1, dtype=torch.long), torch.ones(1, 2))
    with pytest.raises(InputError, match="one query token, got 2; attend_masked takes more"):
        reference.attend(query, key, value, selection, call_of())


@pytest.mark.parametrize("junk", [1e9, INF, -INF, float("nan")])
def test_padded_slots_of_a_selection_are_never_read(junk):
    """Slot -1 must not mean row 0, nor the last row."""
    query, key, value = random_rows(SHAPE, 9)
    clean = torch.tensor([[[3, 5, 6], [2, 4, 7]]])
    padded = torch.cat([clean, torch.full((1, 2, 2), -1)], -1)
    counts = torch.full((1, 2), 3)
    expected = reference.attend(query, key, value, Selection(clean, counts), call_of())
    for rows in (key, value):
        rows[:, :, [0, 8]] = junk
    got = reference.attend(query, key, value, Selection(padded, counts), call_of())
    torch.testing.assert_close(got.output, expected.output)
    torch.testing.assert_close(got.log_sum_exp, expected.log_sum_exp)


def test_a_row_that_is_read_does_spoil_its_reader_only():
    query, key, value = random_rows(SHAPE, 6, q_len=2)
    value[:, 1, 3] = float("nan")
    mask = torch.ones(1, 1, 2, 6, dtype=torch.bool)
    mask[:, :, 0, 3] = False
    out = reference.attend_masked(query, key, value, mask, call_of()).output
    spoilt = torch.isnan(out).all(-1)[0]
    assert spoilt.tolist() == [[False, False], [False, False], [False, True], [False, True]]


def test_nothing_to_read_gives_zeros():
    query, key, value = random_rows(SHAPE, 6, q_len=2)
    mask = torch.zeros(1, 1, 2, 6, dtype=torch.bool)
    mask[:, :, 1] = True
    result = reference.attend_masked(query, key, value, mask, call_of())
    assert bool((result.output[:, :, 0] == 0).all())
    assert bool((result.log_sum_exp[:, :, 0] == -INF).all())
    assert bool(torch.isfinite(result.log_sum_exp[:, :, 1]).all())


def test_weights_are_the_soft_max():
    query, key, _ = random_rows(SHAPE, 9, q_len=3)
    visible = torch.rand(1, 1, 3, 9).lt(0.5)
    visible[..., 0] = True
    for call in (call_of(), call_of(sink_logits=torch.arange(4.0))):
        logits = reference.score(query, key, None, call)
        before = logits.clone()
        got = reference.estimated_weights(logits, visible, call)
        torch.testing.assert_close(got, plain_weights(query, key, visible, call))
        torch.testing.assert_close(
            reference.estimated_weights(logits, None, call), plain_weights(query, key, None, call)
        )
        assert torch.equal(logits, before)


@pytest.mark.parametrize("softcap", [None, 0.5])
def test_scores_of_codes_are_scores_of_what_they_stand_for(softcap):
    query, _, _ = random_rows(SHAPE, 1, q_len=2, batch=2)
    codes = torch.randint(-127, 128, (2, 2, 9, 16), dtype=torch.int8)
    scales = torch.rand(2, 2, 9).half()
    call = call_of(softcap=softcap)
    got = reference.score(query, codes, scales, call)
    decoded = codes.double() * scales.double()[..., None]
    logits = plain_logits(query.double(), decoded, call)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    torch.testing.assert_close(got, logits.float())


def rounded_score(query, codes, scales, scaling):
    """The rule for codes, with numpy's float32 and Python's integers, one logit at a time."""
    batch, heads, q_len, _ = query.shape
    group = heads // codes.shape[1]
    out = torch.empty(batch, heads, q_len, codes.shape[2])
    for b, h, i in itertools.product(range(batch), range(heads), range(q_len)):
        row = query[b, h, i].numpy()
        step = np.float32(np.abs(row).max()) / np.float32(127)
        if step < np.finfo(np.float32).smallest_normal:
            step = np.float32(1)
        mine = [round(float(x)) for x in row / step]  # Python, too, rounds halves to even
        factor = np.float32(step * np.float32(scaling))
        for t, theirs in enumerate(codes[b, h // group].tolist()):
            dot = sum(x * y for x, y in zip(mine, theirs, strict=True))
            scale = np.float32(scales[b, h // group, t].item())
            out[b, h, i, t] = float(np.float32(dot) * factor * scale)
    return out


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("size", [1.0, 1e-30, 1e30, 1e-44, 0.0])
def test_codes_meet_a_query_of_codes(kind, size):
    """To the last bit; a query of zeros, or too small for a scale, scores 0."""
    most = 127 if kind == "int8" else 7
    query = random_rows(SHAPE, 1, q_len=2, batch=2)[0] * size
    codes = torch.randint(-most, most + 1, (2, 2, 21, 16), dtype=torch.int8)
    scales = torch.rand(2, 2, 21).half()
    got = reference.score(query, pack(codes, kind), scales, call_of())
    assert torch.equal(got, rounded_score(query, codes, scales, 0.25))
    if size < 1e-40:
        assert not bool(got.any())


def test_halves_of_a_query_code_go_to_the_even_one():
    query = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5]).view(1, 1, 1, 8)
    codes = torch.eye(8, dtype=torch.int8)[None, None]
    got = reference.score(query, pack(codes, "int8"), torch.ones(1, 1, 8).half(), call_of())
    assert (got * 4).flatten().tolist() == [127.0, 0.0, 2.0, 2.0, 0.0, -2.0, -2.0, 126.0]


def test_float64_queries_stay_float64():
    query = random_rows(SHAPE, 1, batch=2, dtype=torch.float64)[0]
    codes = torch.randint(-127, 128, (2, 2, 9, 16), dtype=torch.int8)
    scales = torch.rand(2, 2, 9).half()
    got = reference.score(query, pack(codes, "int8"), scales, call_of())
    assert got.dtype == torch.float64
    step = query.abs().amax(-1, keepdim=True) / 127
    decoded = codes.double() * scales.double()[..., None]
    torch.testing.assert_close(got, plain_logits((query / step).round() * step, decoded, call_of()))


@pytest.mark.parametrize(("kind", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_float_tiles_meet_a_query_of_their_precision(kind, dtype):
    query, key, _ = random_rows(SHAPE, 21, q_len=2, batch=2)
    got = reference.score(query, pack(key, kind), None, call_of(softcap=2.0))
    rounded = [rows.to(dtype).double() for rows in (query, key)]
    expected = 2.0 * torch.tanh(plain_logits(*rounded, call_of()) / 2.0)
    torch.testing.assert_close(got, expected.float())


def test_plain_rows_meet_the_query_as_it_is():
    query, key, _ = random_rows(SHAPE, 21, dtype=torch.bfloat16)
    got = reference.score(query.float() + 1e-3, key, None, call_of())
    expected = plain_logits(query.double() + 1e-3, key.double(), call_of())
    torch.testing.assert_close(got, expected.float())


@pytest.mark.parametrize("rank", [1, 13, 16])
@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8", "int4"])
def test_columns_that_no_row_fills_change_nothing(kind, rank):
    query = random_rows(layer_shape(4, 2, rank), 1, batch=2)[0]
    codes = torch.randint(-7, 8, (2, 2, 21, rank), dtype=torch.int8)
    tiles, scales = pack(codes, kind), torch.rand(2, 2, 21).half()
    clean = reference.score(query, tiles, scales, call_of())
    for junk in (127, -1 if kind != "int4" else 255, *([float("nan")] if kind[0] != "i" else [])):
        tiles.data[:, :, 1, :, 5:] = junk
        assert torch.equal(reference.score(query, tiles, scales, call_of()), clean)


def test_there_is_no_fused_form():
    """The plain path of the cache, and the straight line, are the reference."""
    query, key, value = random_rows(SHAPE, 5)
    places = torch.zeros(1, 2, 5, dtype=torch.int32)
    request = AppendRequest(
        key=key, value=value, keys=key, values=value, positions=places, start=0, first_position=0
    )
    assert reference.append(request) is False
    lead, reading = Lead(key), Reading(counts=2)
    done = reference.step(query, query, key, value, lead, reading, "softmax_sum", call_of(), None)
    assert done is None


# choose -------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(data=st.data())
def test_choose_mask_by_brute_force(data):
    """Sort by (forced first, score down, index up), take the first `count` visible rows."""
    number = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.5, INF, -INF, float("nan"), TINY, -TINY])
    size = data.draw(st.integers(1, 12))
    scores = data.draw(st.lists(number, min_size=size, max_size=size))
    flags = st.lists(st.booleans(), min_size=size, max_size=size)
    visible = data.draw(flags)
    forced = [f and v for f, v in zip(data.draw(flags), visible, strict=True)]
    count = data.draw(st.integers(0, sum(visible)))
    lowest = torch.finfo(torch.float32).min

    def worth(row):
        value = scores[row]
        value = lowest if value != value else min(max(value, lowest), -lowest)
        return (not forced[row], -value, row)

    expected = sorted(sorted((r for r in range(size) if visible[r]), key=worth)[:count])
    if count < sum(forced):
        # More is forced than is asked for: which forced rows is the tie rule's choice.
        expected = [r for r in range(size) if forced[r]][:count]
    assert mark(scores, count, visible, forced) == expected


def test_not_a_number_ranks_last_among_the_visible():
    nan = float("nan")
    assert mark([nan, -1.0, nan, -5.0], 2) == [1, 3]
    assert mark([nan, -1.0, nan, -5.0], 3) == [0, 1, 3]
    assert mark([nan, INF, 5.0], 2) == [1, 2]
    assert mark([nan, 7.0, 5.0], 1, visible=[True, False, False]) == [0]


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 5)])
def test_counts_may_differ_between_queries(shape):
    scores = torch.randn(*shape, 40, generator=torch.Generator().manual_seed(1))
    counts = torch.randint(0, 41, shape, generator=torch.Generator().manual_seed(2))
    none = torch.zeros(1, 1, 1, 40, dtype=torch.bool)
    mask = reference.choose_mask(scores, counts, ~none, none)
    assert torch.equal(mask.sum(-1), counts)
    worst_in = scores.masked_fill(~mask, INF).amin(-1)
    best_out = scores.masked_fill(mask, -INF).amax(-1)
    assert bool((worst_in > best_out).all())


@pytest.mark.parametrize("order", ["ascending", "descending", "equal", "minus infinity"])
def test_ordered_rows(order):
    size = 70
    scores = {
        "ascending": list(range(size)),
        "descending": list(range(size, 0, -1)),
        "equal": [3.25] * size,
        "minus infinity": [-INF] * size,
    }[order]
    first, last = list(range(9)), list(range(size - 9, size))
    assert mark(scores, 9) == (last if order == "ascending" else first)


def test_more_than_8192_rows():
    scores = torch.randn(1, 1, 1, 20_001, generator=torch.Generator().manual_seed(3))
    counts = torch.tensor([[[9_001]]])
    none = torch.zeros_like(scores, dtype=torch.bool)
    selection = reference.choose(scores, counts, ~none, none)
    expected = scores[0, 0, 0].topk(9_001).indices.sort().values
    assert torch.equal(selection.indices[0, 0], expected)


def test_short_rows_are_padded():
    scores = torch.tensor([[[[3.0, 1.0, 2.0]], [[1.0, 2.0, 3.0]]]])
    none = torch.zeros(1, 1, 1, 3, dtype=torch.bool)
    selection = reference.choose(scores, torch.tensor([[[2], [1]]]), ~none, none)
    assert selection.indices.tolist() == [[[0, 2], [2, -1]]]
    assert selection.counts.tolist() == [[2, 1]]


def test_protect():
    visible = torch.tensor([[False, True, True, False, True, True, False]])
    got = reference.protect(visible, 1, 1)
    assert got.tolist() == [[False, True, False, False, False, True, False]]
    assert torch.equal(reference.protect(visible, 9, 0), visible)
    assert torch.equal(reference.protect(visible, 0, 9), visible)
    assert not bool(reference.protect(visible, 0, 0).any())


@pytest.mark.parametrize(
    ("weights", "forced", "mass", "expected"),
    [
        ([0.1, 0.2, 0.3, 0.4], [], 0.4, 1),
        ([0.1, 0.2, 0.3, 0.4], [], 0.41, 2),
        ([0.1, 0.2, 0.3, 0.4], [0], 0.4, 2),
        ([0.1, 0.2, 0.3, 0.4], [0, 1], 0.3, 2),
        ([0.1, 0.2, 0.3, 0.4], [], 1.0, 4),
        ([0.2, 0.4, 0.6, 0.8], [], 0.4, 1),
        ([1.0, 0.0, 0.0, 0.0], [], 1.0, 1),
        ([0.0, 0.0, 0.0, 0.0], [], 0.5, 4),
        ([0.25] * 4, [], 0.5, 2),
    ],
)
def test_mass_counts(weights, forced, mass, expected):
    marks = torch.zeros(4, dtype=torch.bool)
    marks[forced] = True
    assert int(reference.mass_counts(torch.tensor(weights), marks, mass)) == expected


def test_causal_mask():
    mask = reference.causal_mask(2, 4, torch.device("cpu"))
    assert mask.tolist() == [[[[True, True, True, False], [True] * 4]]]
