"""KVCrush: important rows, and representatives of the others by the bits of their heads."""

from typing import get_args

import pytest
import torch

from loki_attn.errors import PolicyError, UnknownNameError
from loki_attn.evict.base import Place
from loki_attn.evict.kvcrush import Anchor, KVCrush
from loki_attn.policy import preset
from loki_attn.testing import DrivenLayer, layer_shape, random_rows

SHAPE = layer_shape(8, 4, 16)
TOKENS, WINDOW = 80, 8
ANCHORS = get_args(Anchor)


def driven_over(query, key, value, valid=None, shape=SHAPE, **fields):
    driven = DrivenLayer(preset("kvcrush", **{"window": WINDOW, "capacity": 40, **fields}), shape)
    driven.prompt(query, key, value, valid)
    return driven


def rows_of(seed=0, batch=1):
    return random_rows(SHAPE, TOKENS, batch=batch, q_len=TOKENS, seed=seed)


def evictor(**fields):
    return KVCrush(window=WINDOW, **fields).bind(Place(shape=SHAPE, num_layers=1))


def scene(seed=0, heads=4, length=60):
    """Scores of heads that partly agree, and the last rows protected."""
    draw = torch.Generator().manual_seed(seed)
    scores = torch.rand(1, 1, length, generator=draw) + torch.rand(1, heads, length, generator=draw)
    protected = torch.zeros(1, heads, length, dtype=torch.bool)
    protected[..., -6:] = True
    return scores, protected, torch.ones_like(protected)


def plain(scores, protected, count, share, anchor, seed=0):
    """One layer, in lists: (important rows, representatives)."""
    heads, length = scores.shape[1:]
    forced = protected[0, 0].nonzero()[:, 0].tolist()
    free = [t for t in range(length) if t not in forced]
    room = count - len(forced)
    chosen = int(room * share)
    mean = scores[0].mean(0)
    important = sorted(free, key=lambda t: -float(mean[t]))[: room - chosen]
    bits = []
    for h in range(heads):
        best = sorted(free, key=lambda t, h=h: -float(scores[0, h, t]))[:room]
        bits.append([t in best or t in forced for t in range(length)])
    others = [t for t in free if t not in important]
    if anchor == "mean":
        start = [2 * sum(bits[h][t] for t in others) >= len(others) for h in range(heads)]
    elif anchor == "random":
        draw = torch.Generator().manual_seed(seed)
        start = (torch.rand(heads, generator=draw) < 0.5).tolist()
    else:
        start = [{"zeros": False, "ones": True, "alternate": h % 2 == 1}[anchor] for h in range(4)]
    distance = {t: sum(bits[h][t] != start[h] for h in range(heads)) for t in others}
    order = sorted(others, key=lambda t: (distance[t], t))
    # One from the end of each of `chosen` runs that are as equal as can be.
    ends = [-(-(i + 1) * len(order) // chosen) - 1 for i in range(chosen)]
    return sorted(forced + important), sorted(order[i] for i in ends)


@pytest.mark.parametrize("anchor", ANCHORS)
@pytest.mark.parametrize("share", [0.0, 0.25, 0.6, 1.0])
def test_a_layer_keeps_important_rows_and_even_steps_through_the_order_of_distances(anchor, share):
    scores, protected, valid = scene()
    counts = torch.full((1, 4), 26)
    mask = evictor(anchor=anchor, representatives=share).keep(scores, counts, protected, valid)
    important, others = plain(scores, protected, 26, share, anchor)
    assert not set(important) & set(others)
    for head in range(4):
        assert mask[0, head].nonzero()[:, 0].tolist() == sorted(important + others)


@pytest.mark.parametrize("anchor", ANCHORS)
def test_any_amount_is_met_exactly(anchor):
    """Also where there is nothing, or everything, to choose: no step divides by zero."""
    scores, protected, valid = scene()
    for count in range(6, 61):
        counts = torch.full((1, 4), count)
        mask = evictor(anchor=anchor).keep(scores, counts, protected, valid)
        assert torch.equal(mask.sum(-1), counts)
        assert bool((mask | ~protected).all())


def test_without_representatives_it_is_the_layer_wide_base_score():
    query, key, value = rows_of(batch=2)
    kept = driven_over(query, key, value, representatives=0.0).positions()
    base = DrivenLayer(preset("snapkv", window=WINDOW, capacity=TOKENS), SHAPE)
    base.prompt(query, key, value)
    scores = base.layer.eviction.evictor.scores(base.rows.whole, base.call, None).mean(1)
    for row in range(2):
        best = sorted(scores[row, :-WINDOW].topk(40 - WINDOW).indices.tolist())
        assert kept[row] == [best + list(range(TOKENS - WINDOW, TOKENS))] * 4


def test_representatives_do_not_change_what_is_important():
    query, key, value = rows_of()
    with_some = set(driven_over(query, key, value).positions()[0][0])
    # A quarter of the 32 rows beside the window stands for others.
    fewer = driven_over(query, key, value, representatives=0.0, capacity=32)
    assert set(fewer.positions()[0][0]) < with_some
    assert len(with_some) == 40


@pytest.mark.parametrize("anchor", ["mean", "zeros", "ones"])
def test_the_order_of_heads_does_not_matter(anchor):
    scores, protected, valid = scene()
    counts = torch.full((1, 4), 26)
    rows = evictor(anchor=anchor).keep(scores, counts, protected, valid)
    flipped = evictor(anchor=anchor).keep(scores.flip(1), counts, protected, valid)
    assert torch.equal(rows, flipped)


def test_equal_distances_go_by_position():
    """All heads alike: bits are all 0 beyond the best rows, so the steps are even in the text."""
    scores = torch.arange(60, 0, -1.0).expand(1, 4, -1)
    nothing = torch.zeros(1, 4, 60, dtype=torch.bool)
    counts = torch.full((1, 4), 16)
    mask = evictor(anchor="zeros").keep(scores, counts, nothing, ~nothing)
    # 12 rows are important. Of the others the heads would keep 12 to 15: they are far, the rest is
    # near, in order of position: 16 to 59, 12 to 15. Every twelfth of these 48 stays.
    assert mask[0, 0].nonzero()[:, 0].tolist() == [*range(12), 15, 27, 39, 51]


def test_a_random_anchor_repeats_and_follows_its_seed():
    scores, protected, valid = scene()
    counts = torch.full((1, 4), 26)

    def rows(seed):
        return evictor(anchor="random", seed=seed).keep(scores, counts, protected, valid)

    assert torch.equal(rows(3), rows(3))
    assert any(not torch.equal(rows(0), rows(seed)) for seed in range(1, 9))


def test_an_anchor_follows_its_heads_into_a_shard():
    whole = evictor(anchor="alternate")
    part = whole.narrowed(torch.tensor([1, 3]))
    ones = KVCrush(window=WINDOW, anchor="ones").bind(
        Place(shape=layer_shape(4, 2, 16), num_layers=1)
    )
    scores, protected, valid = scene(heads=2)
    counts = torch.full((1, 2), 26)
    assert torch.equal(
        part.keep(scores, counts, protected, valid), ones.keep(scores, counts, protected, valid)
    )
    assert evictor(anchor="mean").narrowed(torch.tensor([0])) is not whole


@pytest.mark.parametrize("anchor", ANCHORS)
def test_a_padded_row_keeps_what_it_keeps_alone(anchor):
    query, key, value = rows_of(batch=2)
    valid = torch.ones(2, TOKENS, dtype=torch.bool)
    valid[1, :13] = False
    padded = [rows.clone() for rows in (query, key, value)]
    for rows in padded:
        rows[1, :, :13] = float("nan")
    batch = driven_over(*padded, valid, anchor=anchor).positions()
    alone = driven_over(*[rows[1:, :, 13:] for rows in (query, key, value)], anchor=anchor)
    assert batch[1] == [[p + 13 for p in head] for head in alone.positions()[0]]
    first = driven_over(*[rows[:1] for rows in (query, key, value)], anchor=anchor)
    assert batch[0] == first.positions()[0]


def test_padding_fills_up_a_row_that_is_too_short():
    scores, protected, valid = scene()
    valid = valid.clone()
    valid[..., :40] = False
    mask = evictor().keep(scores, torch.full((1, 4), 26), protected, valid)
    assert mask[0, 0].nonzero()[:, 0].tolist() == list(range(34, 60))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"window": 0}, "at least one query"),
        ({"kernel": 4}, "odd number of rows, got 4"),
        ({"representatives": 1.5}, "share of the budget in .*, got 1.5"),
    ],
)
def test_fields_that_mean_nothing_are_refused(fields, message):
    with pytest.raises(PolicyError, match=message):
        preset("kvcrush", **fields)


def test_unknown_anchors_are_refused():
    with pytest.raises(UnknownNameError, match=r"Unknown anchor 'one'. Did you mean 'ones'"):
        preset("kvcrush", anchor="one")
