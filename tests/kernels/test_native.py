"""The native kernels against float64 and the reference, on every instruction set."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from native_scenes import each_isa, forced, planes, scenes
from native_truth import (
    EPS,
    TINY,
    Estimate,
    agreed,
    check_attention,
    check_selection,
    counts_by_mass,
    lead_logits,
    marked,
)

from loki_attn.budget import Budget
from loki_attn.kernels import native, reference
from loki_attn.tiles import pack
from loki_attn.types import AttentionCall, Lead, Selection

pytestmark = pytest.mark.usefixtures("native_library")

hows = st.sampled_from(["softmax_sum", "max", "none"])


@given(scene=scenes())
def test_dense(tally, scene):
    for isa in each_isa():
        args = (scene.query, scene.keys, scene.values, scene.visible, scene.call)
        out = native.dense(*args, causal=True)
        check_attention(out, scene, scene.visible)
        tally[f"dense on {isa}"] += 1


@given(scene=scenes())
def test_dense_column_sums(tally, scene):
    """The shares of the rows: float32 of weights that float64 gives, per row and per group."""
    call = AttentionCall(
        scaling=1.0, softcap=scene.call.softcap, sink_logits=scene.call.sink_logits
    )
    logits = lead_logits(scene.query, None, scene.clean_keys.double(), None, scene.call)
    kv_heads = scene.keys.shape[1]
    expected = agreed(logits, kv_heads, "softmax_sum", scene.seen, call)
    if scene.group == 1:
        expected = agreed(
            Estimate(*(t.repeat_interleave(2, 1) for t in (logits.value, logits.margin))),
            kv_heads,
            "softmax_sum",
            scene.seen,
            AttentionCall(scaling=1.0, sink_logits=doubled(call.sink_logits)),
        )
        expected = Estimate(expected.value / 2, expected.margin)
    for isa in each_isa():
        args = (scene.query, scene.keys, scene.values, scene.visible, scene.call)
        out, sums = native.dense_column_sums(*args)
        check_attention(out, scene, scene.visible)
        assert sums.dtype == torch.float32
        assert bool(((sums - expected.value).abs() <= expected.margin + 8 * TINY).all())
        assert bool((sums.masked_fill(scene.seen[:, 0], 0.0) == 0).all())
        tally[f"dense_column_sums on {isa}"] += 1


def doubled(logits):
    return None if logits is None else logits.repeat_interleave(2)


@given(scene=scenes(), data=st.data())
def test_attend(tally, scene, data):
    """To any rows: shared by a group or not, ragged, none at all; other rows hold poison."""
    batch, kv_heads, seq, _ = scene.keys.shape
    choosers = data.draw(st.sampled_from([kv_heads, kv_heads * scene.group]))
    seed = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    most = data.draw(st.integers(1, seq))
    counts = torch.randint(0, most + 1, (batch, choosers), generator=seed)
    chance = torch.rand(batch, choosers, seq, generator=seed).masked_fill(~scene.seen[:, 0], 2.0)
    counts = torch.minimum(counts, scene.seen.sum(-1)[:, 0])
    order = chance.argsort(-1)[..., :most]
    unused = torch.arange(most) >= counts[..., None]
    indices = order.masked_fill(unused, seq).sort(-1).values
    selection = Selection(indices.masked_fill(indices == seq, -1), counts)
    mask = marked(selection.indices, seq, scene.query.shape[1])
    wide = [t.double() for t in (scene.query, scene.clean_keys, scene.clean_values)]
    logits = reference.attend_masked(*wide, mask, scene.call).log_sum_exp
    for isa in each_isa():
        result = native.attend(scene.query, scene.keys, scene.values, selection, scene.call)
        check_attention(result.output, scene, mask)
        assert result.log_sum_exp.dtype == torch.float32
        # Large logits are as wrong as their own rounding.
        torch.testing.assert_close(result.log_sum_exp.double(), logits, rtol=1e-5, atol=2e-5)
        tally[f"attend on {isa}"] += 1


@given(data=st.data())
def test_score_of_tiles(tally, data):
    """Codes score what the reference says, bit by bit; numbers as exactly as float32 sums are.

    Sums of codes are exact, and the three products after them come in the same order; a soft-cap
    may differ by a few units of its last place.
    """
    batch, kv_heads, group = (data.draw(st.integers(1, most)) for most in (3, 3, 9))
    seq = data.draw(st.one_of(st.integers(1, 80), st.sampled_from([512, 513, 1030])))
    plane = data.draw(planes(batch, kv_heads, seq))
    query = draw_query(data, batch, kv_heads * group, plane.plane.rank)
    call = AttentionCall(scaling=0.3, softcap=data.draw(st.sampled_from([None, None, 2.0])))
    wanted = reference.score(query, plane.plane, plane.scales, call)
    truth = lead_logits(query, None, plane.numbers, plane.plane.kind, call)
    for isa in each_isa():
        scores = native.score(query, plane.plane, plane.scales, call)
        if plane.scales is not None:
            near = 8 * EPS * (call.softcap or 0.0)
            torch.testing.assert_close(scores, wanted, rtol=0, atol=near, equal_nan=True)
        else:
            error = (scores[:, :, 0] - truth.value).abs()
            assert bool((error <= truth.margin + 8 * TINY).all())
        tally[f"score of {plane.plane.kind} on {isa}"] += 1


def draw_query(data, batch, heads, rank):
    """Queries of usual and unusual size, in any dtype; codes meet infinities, too."""
    seed = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    size = data.draw(st.sampled_from([1.0, 1.0, 1e-3, 1e4, 1e-40, 0.0]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    return (torch.randn(batch, heads, 1, rank, generator=seed) * size).clamp(-6e4, 6e4).to(dtype)


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("junk", [float("nan"), float("inf"), -float("inf")])
def test_a_query_that_is_no_number_scores_nothing(kind, junk):
    query = torch.ones(1, 2, 1, 5)
    query[0, 1, 0, 3] = junk
    plane = pack(torch.ones(1, 1, 20, 5), kind)
    scales = torch.ones(1, 1, 20, dtype=torch.float16)
    for _ in each_isa():
        scores = native.score(query, plane, scales, AttentionCall(scaling=1.0))
        assert bool(torch.isfinite(scores[:, 0]).all())
        assert bool(torch.isnan(scores[:, 1]).all())


@given(scene=scenes(), data=st.data())
def test_score_of_plain_rows(tally, scene, data):
    """The prefix of key rows, wherever they lie; hidden rows may score anything."""
    rank = data.draw(st.integers(1, scene.keys.shape[3]))
    plane, query = scene.keys[..., :rank], scene.query[..., :rank]
    truth = lead_logits(query, None, scene.clean_keys[..., :rank].double(), None, scene.call)
    for isa in each_isa():
        scores = native.score(query, plane, None, scene.call)[:, :, 0]
        error = (scores - truth.value).abs().masked_fill(~scene.seen[:, 0], 0.0)
        assert bool((error <= truth.margin + 8 * TINY).all())
        tally[f"score of rows on {isa}"] += 1


@st.composite
def budgets(draw, seq, *, ranked):
    """A budget of any kind for `seq` rows."""
    sinks, recents = draw(st.integers(0, 3)), draw(st.integers(0, 4))
    kept = {"sinks": sinks, "recents": recents, "min_k": draw(st.integers(1, 4))}
    kept["dense_below"] = draw(st.sampled_from([0, 0, 0, 20]))
    least = max(sinks + recents, kept["min_k"])
    kind = draw(st.sampled_from(["top_k", "fraction", "mass"] if ranked else ["top_k", "fraction"]))
    if kind == "top_k":
        return Budget(top_k=draw(st.integers(least, least + seq)), **kept)
    if kind == "fraction":
        return Budget(fraction=draw(st.sampled_from([0.01, 0.125, 0.5, 1.0])), **kept)
    cap = draw(st.one_of(st.none(), st.integers(least, least + 40)))
    return Budget(mass=draw(st.sampled_from([0.1, 0.5, 0.9, 0.99, 1.0])), cap=cap, **kept)


@given(scene=scenes(), data=st.data(), how=hows)
def test_step(tally, scene, data, how):
    """Score, choose, attend in one: what is read is right, and what comes out fits what is read."""
    batch, kv_heads, seq, _ = scene.keys.shape
    lead, numbers, kind = draw_lead(data, scene)
    # The query that ranks need not be the one that reads: rotated rows have their own.
    query = torch.roll(scene.query, 1, 3) if data.draw(st.booleans()) else scene.query
    ranked = lead.plane is not None
    budget = data.draw(budgets(seq, ranked=ranked))
    shown = scene.seen
    must = reference.protect(shown, budget.sinks, budget.recents)
    if ranked:
        logits = lead_logits(query, lead.query_map, numbers, kind, scene.call)
        scores = agreed(logits, kv_heads, how, shown, scene.call)
    else:
        value = torch.arange(seq, dtype=torch.float64).expand(batch, kv_heads, -1)
        scores = Estimate(value, torch.zeros_like(value))
    if budget.mass is None:
        least = most = budget.counts(shown.sum(-1)[:, 0])
    else:
        args = (scores, how, scene.group, budget, shown, must, scene.call)
        least, most = counts_by_mass(*args)
    for isa in each_isa():
        out, selection = native.step(
            query, scene.query, scene.keys, scene.values, lead,
            budget.reading(seq, scene.visible), how, scene.call, scene.visible,
        )  # fmt: skip
        assert selection.counts.shape == scores.value.shape[:2]
        assert bool(((least <= selection.counts) & (selection.counts <= most)).all())
        exact = scene.numbers == "equal" and kind is not None
        check_selection(selection, scores, shown, must, ties_are_exact=exact)
        check_attention(out, scene, marked(selection.indices, seq, scene.query.shape[1]))
        tally[f"step by {kind or ('rows' if ranked else 'recency')} on {isa}"] += 1


def draw_lead(data, scene):
    """What ranks the rows, the same as float64 [batch, kv_heads, seq, rank], and its kind."""
    batch, kv_heads, seq, dim = scene.keys.shape
    choice = data.draw(st.sampled_from(["tiles"] * 4 + ["rows", "mapped rows", "recency"]))
    if choice == "recency":
        return Lead(None), None, None
    seed = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    if choice == "tiles":
        equal = scene.numbers == "equal"
        drawn = data.draw(planes(batch, kv_heads, seq, scene.visible, equal=equal))
        query_map = torch.randn(kv_heads, dim, drawn.plane.rank, generator=seed) / dim**0.5
        return Lead(drawn.plane, drawn.scales, query_map), drawn.numbers, drawn.plane.kind
    rank = data.draw(st.integers(1, dim))
    query_map = None
    if choice == "mapped rows":
        query_map = torch.randn(kv_heads, dim, rank, generator=seed) / dim**0.5
    lead = Lead(scene.keys[..., :rank], None, query_map)
    return lead, scene.clean_keys[..., :rank].double(), None


def test_the_forced_instruction_set_is_the_one_that_runs():
    """Each on its own, and results of all of them differ by rounding alone, if at all."""
    query, keys = torch.randn(1, 4, 1, 64), torch.randn(1, 2, 600, 64)
    outs = []
    for isa in native.isas():
        with forced(isa):
            outs.append(
                native.dense(query, keys, keys, None, AttentionCall(scaling=0.1), causal=True)
            )
            assert native.isa() == native.last_isa() == isa
    assert "portable" in native.isas()
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0])
