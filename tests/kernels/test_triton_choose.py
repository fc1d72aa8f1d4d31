"""Choosing rows in Triton: exactly what the reference chooses, whatever the scores and the cuts."""

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import example, given
from hypothesis import strategies as st
from triton_scenes import DEVICE, FEW, IEEE, here, kernels, normal, small_blocks, there

from loki_attn.kernels import reference
from loki_attn.kernels.triton import tuning
from loki_attn.kernels.triton.jit_rows import BINS, FORCED, bins_of, sort_keys
from loki_attn.types import Selection

pytestmark = IEEE

INF, NAN = float("inf"), float("nan")
LARGEST = torch.finfo(torch.float32).max
FEW_VALUES = torch.tensor([-0.0, 0.0, 1.0, 1e-45, -1e-40, -1.0])
ODD = torch.tensor([NAN, INF, -INF, LARGEST, -LARGEST, 0.0])
SORTS = ["plain", "tied", "alike", "few", "odd", "rising", "falling", "tiny", "huge"]
# Rows before, at and behind the end of a block and of a split.
EDGES = [1, 31, 32, 33, 65]


def scores_of(sort, shape, seed=0):
    """Scores of every sort: plain, tied, all alike, few values, no numbers, in order."""
    scores = normal(*shape, seed=seed)
    if sort == "tied":
        return torch.round(scores)
    if sort == "alike":
        return torch.full(shape, -0.5)
    if sort in {"few", "odd"}:
        values = FEW_VALUES if sort == "few" else ODD
        return values[(scores.abs() * 1e4).long() % len(values)]
    if sort in {"rising", "falling"}:
        return scores.sort(dim=-1, descending=sort == "falling").values
    return scores * {"plain": 1.0, "tiny": 1e-41, "huge": 1e38}[sort]


def check_choice(scores, counts, visible, forced):
    """Bit by bit the choice of the reference."""
    wanted = reference.choose(scores, counts, visible, forced)
    found = here(kernels.choose(*there((scores, counts, visible, forced))))
    assert found.indices.dtype == found.counts.dtype == torch.int64
    assert torch.equal(found.counts, wanted.counts)
    assert torch.equal(found.indices, wanted.indices)
    return found


def marks(shape, share, seed):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


@pytest.mark.parametrize(
    ("sort", "seq"), [*((sort, 131) for sort in SORTS), *(("tied", seq) for seq in EDGES)]
)
def test_any_scores_and_the_edges_of_blocks(sort, seq):
    """Some rows hidden, some forced, hidden and forced ones among them; other counts for each."""
    scores = scores_of(sort, (2, 2, 1, seq), seed=seq)
    visible, forced = marks((2, 1, 1, seq), 0.8, 1), marks((1, 2, 1, seq), 0.1, 2)
    amount = torch.tensor([[1.0, 0.3], [0.0, 0.7]])[..., None] * seq
    counts = torch.minimum(amount.long(), visible.expand(2, 2, 1, seq).sum(-1))
    with small_blocks():
        check_choice(scores, counts, visible, forced)


@FEW
@given(
    seed=st.integers(0, 2**31),
    sort=st.sampled_from(SORTS),
    seq=st.one_of(st.integers(1, 150), st.just(1030)),
    shares=st.tuples(*[st.sampled_from([0.0, 0.05, 0.7, 1.0])] * 3),
    block=st.sampled_from([32, 64]),
)
@example(seed=0, sort="alike", seq=131, shares=(1.0, 0.0, 1.0), block=32)  # all of many ties
@example(seed=1, sort="alike", seq=131, shares=(1.0, 0.0, 0.7), block=32)
@example(seed=2, sort="odd", seq=97, shares=(1.0, 1.0, 0.05), block=32)  # fewer than are forced
def test_any_marks_and_counts(seed, sort, seq, shares, block):
    seen, first, wanted = shares
    scores = scores_of(sort, (2, 1, 1, seq), seed)
    visible, forced = marks((2, 1, 1, seq), seen, seed), marks((1, 1, 1, seq), first, seed + 1)
    counts = torch.full((2, 1, 1), int(wanted * seq))
    counts = torch.minimum(counts, visible.sum(-1))
    with small_blocks(block):
        check_choice(scores, counts, visible, forced)


@pytest.mark.parametrize("wanted", [1, 1024, 4097, 4500])
@pytest.mark.parametrize("sort", ["plain", "alike"])
def test_blocks_as_they_are_cut(sort, wanted):
    """Beyond a block of rows and one of the list; of equal scores the list holds every row."""
    seq = tuning.REFINE.block + 404
    every = torch.ones(1, 1, 1, seq, dtype=torch.bool)
    scores, counts = scores_of(sort, (1, 1, 1, seq)), torch.tensor([[[wanted]]])
    found = check_choice(scores, counts, every, ~every)
    if sort == "alike":
        assert torch.equal(found.indices[0, 0], torch.arange(wanted))


def test_marks_of_one_for_all_and_scores_in_other_memory():
    """What is expanded is read as it lies, and no byte beside it."""
    around = torch.full((2, 5, 1, 40), INF)
    scores = around[:, 1:4, :, 3:36].copy_(scores_of("tied", (2, 3, 1, 33)))
    every = torch.ones(1, 1, 1, 1, dtype=torch.bool).expand(1, 1, 1, 33)
    check_choice(scores, torch.tensor(9).expand(2, 3, 1), every, ~every)


def test_a_choice_of_nothing_is_padded():
    every = torch.ones(1, 2, 1, 5, dtype=torch.bool)
    counts = torch.tensor([[[0], [2]]])
    found = check_choice(torch.arange(10.0).view(1, 2, 1, 5), counts, every, ~every)
    assert found.indices.tolist() == [[[-1, -1], [3, 4]]]
    assert isinstance(found, Selection)


@triton.jit
def _bin_each(out, keys, scores, KIND: tl.constexpr, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    key = sort_keys(tl.load(scores + at))
    key = tl.where(at == COUNT - 1, FORCED, key)
    tl.store(keys + at, key)
    tl.store(out + at, bins_of(key, KIND))


@pytest.mark.parametrize("kind", ["weights", "logits", "exponent"])
def test_keys_and_bins_rise_with_scores(kind):
    """Over all of float32, a forced row above it; and bins divide what the kind expects."""
    size = torch.logspace(-45, 38.5, 600, dtype=torch.float64).clamp(max=LARGEST).float()
    odd = torch.tensor([-INF, -LARGEST, NAN, INF, LARGEST, -0.0, 0.0])
    near = torch.linspace(-64, 64, 2048 - 2 * 600 - len(odd) - 1)
    scores = torch.cat([size, -size, near, odd, torch.zeros(1)])
    out, keys = (torch.empty(2048, dtype=torch.int32, device=DEVICE) for _ in range(2))
    _bin_each[(1,)](out, keys, there(scores), kind, 2048)
    bins, keys = out.cpu(), keys.cpu()
    scores = torch.nan_to_num(scores, nan=-LARGEST)
    scores[-1] = INF  # forced
    scores[-2] = 0.0
    order = scores.double().clamp(min=-LARGEST).argsort(stable=True)
    rising, sorted_keys = bins[order], keys[order]
    assert bool((sorted_keys.diff() >= 0).all())
    same = scores.clamp(min=-LARGEST, max=LARGEST)[order[:-1]].diff() == 0
    assert torch.equal(sorted_keys[:-1].diff() == 0, same)
    assert bool((rising.diff() >= 0).all())
    assert int(rising[0]) >= 0
    assert int(rising[-1]) == BINS.value - 1 if kind != "exponent" else int(rising[-1]) <= 511
    spread = bins[1200 : 1200 + len(near)] if kind == "logits" else bins[:600]
    assert len(spread.unique()) > (500 if kind == "logits" else 60)
