"""Units: whole ones are kept, to the row, whatever is padded, protected or equal."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from loki_attn.pieces.units import judge_units, keep_units


def judged(scores, valid, size, how):
    """The same, one row at a time."""
    out = torch.full_like(scores, float("-inf"))
    for b in range(scores.shape[0]):
        for h in range(scores.shape[1]):
            real = valid[b, h].nonzero()[:, 0]
            for unit in real.split(size):
                values = scores[b, h, unit].sort(descending=True).values
                if how == "best_half":
                    values = values[: (len(unit) + 1) // 2]
                out[b, h, unit] = values.mean()
    return out


def scene(seed, length, share):
    draw = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 4, (2, 2, length), generator=draw).float()
    valid = torch.rand(2, 2, length, generator=draw) < share
    valid[..., -1] = True
    protected = (torch.rand(2, 2, length, generator=draw) < 0.2) & valid
    return scores, valid, protected


@given(
    st.integers(0, 99),
    st.integers(1, 40),
    st.integers(1, 9),
    st.sampled_from(("mean", "best_half")),
)
def test_a_row_has_the_judgement_of_its_unit_of_real_rows(seed, length, size, how):
    scores, valid, _ = scene(seed, length, 0.7)
    junk = scores.masked_fill(~valid, float("nan"))
    torch.testing.assert_close(
        judge_units(junk, valid, size, how), judged(scores, valid, size, how)
    )


def test_without_padding_a_mask_of_all_rows_changes_nothing():
    scores, _, _ = scene(0, 37, 1.0)
    everything = torch.ones(2, 1, 37, dtype=torch.bool)
    assert torch.equal(judge_units(scores, None, 8), judge_units(scores, everything, 8))


@given(st.integers(0, 99), st.integers(1, 40), st.integers(1, 9), st.data())
def test_exactly_the_amount_is_kept_and_at_most_one_free_unit_is_cut(seed, length, size, data):
    scores, valid, protected = scene(seed, length, 0.7)
    scores = judge_units(scores, valid, size)
    least = max(1, int(protected.sum(-1).max()))
    amount = data.draw(st.integers(least, max(least, length)))
    counts = torch.full((2, 2), amount).clamp(max=length)

    kept = keep_units(scores, counts, protected, valid, size)

    assert torch.equal(kept.sum(-1), counts)
    assert bool((kept | ~protected).all())
    # Padding stays only where everything else does.
    padded = (kept & ~valid).any(-1)
    assert bool((kept | ~valid).all(-1)[padded].all())
    for b in range(2):
        for h in range(2):
            units = valid[b, h].nonzero()[:, 0].split(size)
            free = [u for u in units if not bool(protected[b, h, u].any())]
            cut = [u for u in free if 0 < int(kept[b, h, u].sum()) < len(u)]
            assert len(cut) <= 1


def test_the_best_units_stay_and_the_rest_of_the_amount_is_recent():
    scores = torch.tensor([1.0, 1, 1, 5, 5, 5, 2, 2, 2, 4, 4, 4, 0, 0, 0])[None, None]
    nothing = torch.zeros(1, 1, 15, dtype=torch.bool)
    tail = nothing.clone()
    tail[..., 13:] = True

    def rows(count, protected):
        mask = keep_units(scores, torch.tensor([[count]]), protected, ~nothing, 3)
        return mask[0, 0].nonzero()[:, 0].tolist()

    assert rows(6, nothing) == [3, 4, 5, 9, 10, 11]
    assert rows(8, nothing) == [3, 4, 5, 9, 10, 11, 13, 14]
    # The unit of the protected tail comes first, then the best.
    assert rows(6, tail) == [3, 4, 5, 12, 13, 14]
    assert rows(7, tail) == [3, 4, 5, 11, 12, 13, 14]
    assert rows(2, tail) == [13, 14]
    # So does the unit of a protected first row, whatever it scores.
    sink = nothing.clone()
    sink[..., 0] = True
    assert rows(4, sink) == [0, 1, 2, 14]
    assert rows(6, sink) == [0, 1, 2, 3, 4, 5]


def test_of_equal_units_the_lower_stays():
    nothing = torch.zeros(1, 1, 12, dtype=torch.bool)
    kept = keep_units(torch.zeros(1, 1, 12), torch.tensor([[8]]), nothing, ~nothing, 4)
    assert kept[0, 0].nonzero()[:, 0].tolist() == list(range(8))


def test_units_that_cannot_be_judged_rank_last():
    scores = torch.tensor([float("nan")] * 4 + [-7.0] * 4)[None, None]
    nothing = torch.zeros(1, 1, 8, dtype=torch.bool)
    kept = keep_units(scores, torch.tensor([[4]]), nothing, ~nothing, 4)
    assert kept[0, 0].nonzero()[:, 0].tolist() == [4, 5, 6, 7]
