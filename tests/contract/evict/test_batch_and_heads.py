"""Batch rows and KV heads are judged alone: padding, order and group change nothing."""

import pytest
import torch

from loki_attn.testing import layer_shape, random_rows

SHAPE = layer_shape(6, 3, 16)
SEQ = 48
CAPACITY = 14
ORDER = [2, 0, 1]
# Whole units of every method, so that rows are judged in the same units.
PADS = [12, 24, 0]
WILD = [1e9, float("inf"), float("-inf"), float("nan")]


def by_group(rows, order):
    """Permute query heads as their KV heads are permuted."""
    grouped = rows.view(rows.shape[0], 3, -1, *rows.shape[2:])
    return grouped[:, order].flatten(1, 2)


def kept(driven, rows, valid=None, steps=0):
    """Positions after a prompt and some single tokens; `valid` is of all of them."""
    seq = rows[1].shape[2] - steps
    past = None if valid is None else valid[:, :seq]
    driven.prompt(*(part[:, :, :seq] for part in rows), past)
    for step in range(seq, seq + steps):
        seen = None if valid is None else valid[:, None, None, : step + 1]
        driven.attend(*(part[:, :, step : step + 1] for part in rows), seen)
    return driven.positions()


@pytest.mark.parametrize("steps", [0, 3])
def test_kept_sets_follow_their_heads(evict_case, steps):
    """The same bound layer, with its heads in another order."""
    query, key, value = random_rows(SHAPE, SEQ, batch=2, q_len=SEQ, seed=1)
    driven = evict_case.driven(SHAPE, capacity=CAPACITY)
    mine = kept(driven, (query, key, value), steps=steps)
    other = evict_case.driven(SHAPE, capacity=CAPACITY)
    order = torch.tensor(ORDER)
    own = other.layer.eviction
    object.__setattr__(own, "evictor", own.evictor.narrowed(order))
    rows = by_group(query, ORDER), key[:, ORDER], value[:, ORDER]
    assert kept(other, rows, steps=steps) == [[row[head] for head in ORDER] for row in mine]


def test_a_group_is_judged_as_repeated_kv_heads_are(evict_case):
    """Query heads of a group that ask the same: each of them alone would keep the same rows."""
    shape, single = layer_shape(6, 3, 16), layer_shape(3, 3, 16)
    query, key, value = random_rows(single, SEQ, q_len=SEQ, seed=2)
    alone = evict_case.driven(single, capacity=CAPACITY)
    mine = kept(alone, (query, key, value))
    grouped = evict_case.driven(shape, capacity=CAPACITY)
    assert kept(grouped, (query.repeat_interleave(2, 1), key, value)) == mine


def test_rows_are_held_per_kv_head(evict_case):
    """Never per query head: a group would be stored as often as it has members."""
    driven = evict_case.driven(SHAPE, capacity=CAPACITY)
    assert len(kept(driven, random_rows(SHAPE, SEQ, q_len=SEQ))[0]) == 3
    assert all(shard.cache.keys.shape[1] <= 3 for shard in driven.rows)


@pytest.mark.parametrize("junk", [[0.5], WILD], ids=["tame", "wild"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_matter(evict_case, side, junk):
    """A row of a padded batch keeps what it keeps alone; what is padded holds junk."""
    steps = 3
    query, key, value = random_rows(SHAPE, SEQ + steps, batch=3, q_len=SEQ + steps, seed=5)
    valid = torch.ones(3, SEQ + steps, dtype=torch.bool)
    for row, pad in enumerate(PADS):
        hidden = slice(0, pad) if side == "left" else slice(SEQ - pad, SEQ)
        valid[row, hidden] = False
    spoilt = ~valid[:, None, :, None]
    filler = torch.tensor(junk).repeat(SEQ + steps)[: SEQ + steps, None]
    rows = [torch.where(spoilt, filler, part) for part in (query, key, value)]
    for together in (0, steps):
        ends = SEQ + together
        batched = kept(
            evict_case.driven(SHAPE, capacity=CAPACITY),
            [part[:, :, :ends] for part in rows],
            valid[:, :ends],
            together,
        )
        for row in range(3):
            real = valid[row, :ends].nonzero()[:, 0].tolist()
            own = [part[row : row + 1, :, real] for part in (query, key, value)]
            alone = kept(evict_case.driven(SHAPE, capacity=CAPACITY), own, steps=together)[0]
            places = [[real[place] for place in head] for head in alone]
            tokens = [[place for place in head if place in set(real)] for head in batched[row]]
            assert tokens == places, (row, together)


def test_a_batch_row_alone_is_the_row_in_the_batch(evict_case):
    query, key, value = random_rows(SHAPE, SEQ + 4, batch=3, q_len=SEQ + 4, seed=7)
    whole = kept(evict_case.driven(SHAPE, capacity=CAPACITY), (query, key, value), steps=4)
    for row in range(3):
        own = [part[row : row + 1] for part in (query, key, value)]
        assert kept(evict_case.driven(SHAPE, capacity=CAPACITY), own, steps=4) == [whole[row]]


def test_a_prompt_shorter_than_the_capacity_stays_whole_in_a_padded_batch(amount_case):
    query, key, value = random_rows(SHAPE, SEQ, batch=2, q_len=SEQ, seed=8)
    valid = torch.ones(2, SEQ, dtype=torch.bool)
    valid[1, : SEQ - 8] = False
    places = kept(amount_case.driven(SHAPE, capacity=CAPACITY), (query, key, value), valid)
    for head in places[1]:
        assert set(range(SEQ - 8, SEQ)) <= set(head)
    assert sum(map(len, places[0])) == 3 * CAPACITY
