"""Choosing rows and counting mass natively: exactly what the reference chooses and counts."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from native_scenes import each_isa

from loki_attn.kernels import native, reference
from loki_attn.types import AttentionCall, Lead, Reading

pytestmark = pytest.mark.usefixtures("native_library")

INF, NAN = float("inf"), float("nan")
SIZES = st.one_of(st.integers(1, 70), st.sampled_from([511, 512, 513, 2047, 2049, 2500, 5000]))
FEW = torch.tensor([-0.0, 0.0, 1.0, 1e-45, -1e-40, -1.0])
ODD = torch.tensor([NAN, INF, -INF, 3.4028235e38, -3.4028235e38, 0.0])


def draw_scores(data, seed, shape):
    """Scores of every sort: plain, tied, all alike, few values, no numbers, in order, in views."""
    kind = data.draw(
        st.sampled_from(["plain", "tied", "alike", "few", "odd", "rising", "falling", "tiny"])
    )
    scores = torch.randn(shape, generator=seed)
    if kind == "tied":
        scores = torch.round(scores)
    elif kind == "alike":
        scores = torch.full(shape, 0.5)
    elif kind == "tiny":
        scores = scores * 1e-41
    elif kind in {"few", "odd"}:
        values = FEW if kind == "few" else ODD
        scores = values[torch.randint(0, len(values), shape, generator=seed)]
    elif kind in {"rising", "falling"}:
        scores = scores.sort(dim=-1, descending=kind == "falling").values
    if data.draw(st.booleans()):
        around = torch.full((shape[0], shape[1] + 2, 1, shape[3] + 3), INF)
        scores = around[:, 1:-1, :, 2:-1].copy_(scores)
    return scores


def draw_marks(data, seed, shape):
    """A mask that is common to all, to a batch row's choosers, or to each on its own."""
    batch, choosers, _, seq = shape
    size = data.draw(st.sampled_from([(1, 1), (batch, 1), (batch, choosers), (1, choosers)]))
    share = data.draw(st.sampled_from([0.0, 0.05, 0.7, 1.0]))
    return torch.rand(*size, 1, seq, generator=seed) < share


@given(data=st.data())
def test_choose_is_the_choice_of_the_reference(tally, data):
    """Bit by bit, whatever the scores, the masks and the counts, none included."""
    seed = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    seq = data.draw(SIZES)
    shape = (data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4)), 1, seq)
    scores = draw_scores(data, seed, shape)
    visible, forced = (draw_marks(data, seed, shape) for _ in range(2))
    share = data.draw(st.sampled_from([0.02, 0.3, 1.0]))
    counts = (torch.rand(shape[:3], generator=seed) * (share * seq + 1)).long()
    counts = torch.minimum(counts, visible.expand(shape).sum(-1))
    if data.draw(st.booleans()):  # the same for all
        counts = counts.amin((0, 1), keepdim=True)
    wanted = reference.choose(scores, counts, visible, forced)
    for isa in each_isa():
        found = native.choose(scores, counts, visible, forced)
        assert torch.equal(found.indices, wanted.indices)
        assert torch.equal(found.counts, wanted.counts)
        tally[f"choose on {isa}"] += 1


@given(data=st.data())
def test_mass_counts_are_smallest(tally, data):
    """The smallest set that reaches the mass. A share that lies within rounding of it may count
    or not: 1e-6 of the whole, as the reference sums shares that are rounded to float32."""
    seed = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    shape = (data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4)), 1, data.draw(SIZES))
    sharpness = data.draw(st.sampled_from([0.0, 1.0, 5.0, 30.0]))
    weights = torch.softmax(torch.randn(shape, generator=seed) * sharpness, -1)
    forced = draw_marks(data, seed, shape)
    mass = data.draw(st.sampled_from([1e-6, 0.1, 0.5, 0.9, 0.99, 1.0]))
    share = weights.double() / weights.double().sum(-1, keepdim=True)
    order = share.masked_fill(forced, INF).sort(dim=-1, descending=True, stable=True).indices
    reached = share.gather(-1, order).cumsum(-1)
    least, most = (
        (reached < mass + slack).sum(-1).clamp(max=shape[3] - 1) + 1 for slack in (-1e-6, 1e-6)
    )
    wanted = reference.mass_counts(weights, forced, mass)
    counts = native.mass_counts(weights, forced, mass)
    for found in (wanted, counts):
        assert bool(((least <= found) & (found <= most)).all())
    tally["mass_counts"] += 1


@given(data=st.data())
def test_mass_counts_of_round_shares_are_exact(tally, data):
    """Shares that float32 holds exactly leave nothing to rounding."""
    seed = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    parts = data.draw(st.sampled_from([1, 2, 64, 256, 4096]))
    shape = (2, 3, 1, data.draw(st.integers(1, 300)))
    places = torch.randint(0, shape[3], (*shape[:3], parts), generator=seed)
    weights = torch.zeros(shape).scatter_add_(3, places, torch.ones(places.shape))
    forced = draw_marks(data, seed, shape)
    mass = data.draw(st.sampled_from([0.125, 0.5, 0.75, 1.0]))
    wanted = reference.mass_counts(weights, forced, mass)
    assert torch.equal(native.mass_counts(weights, forced, mass), wanted)
    tally["mass_counts of round shares"] += 1


@pytest.mark.parametrize("value", [0.0, NAN])
def test_mass_counts_of_nothing(value):
    """No weight at all, and no number: what the reference says of them."""
    weights = torch.full((1, 1, 1, 5), value)
    forced = torch.zeros(1, 1, 1, 5, dtype=torch.bool)
    wanted = reference.mass_counts(weights, forced, 0.5)
    assert torch.equal(native.mass_counts(weights, forced, 0.5), wanted)


def test_a_step_whose_sink_logits_take_everything_counts_like_the_reference():
    """The estimated shares of all rows vanish in float32."""
    call = AttentionCall(scaling=0.2, sink_logits=torch.full((4,), 300.0))
    query, keys = torch.randn(1, 4, 1, 8), torch.randn(1, 2, 50, 8)
    logits = reference.score(query, keys, None, call)
    shares = reference.reduce_group(logits, 2, "softmax_sum", None, call)
    forced = reference.protect(torch.ones(1, 1, 1, 50, dtype=torch.bool), 1, 2)
    wanted = reference.mass_counts(shares, forced, 0.5)[..., 0]
    reading = Reading(counts=None, mass=0.5, sinks=1, recents=2)
    result = native.step(query, query, keys, keys, Lead(keys), reading, "softmax_sum", call, None)
    assert torch.equal(result[1].counts, wanted)
