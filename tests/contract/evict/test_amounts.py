"""What stays: exactly the amount, first and last rows in it, for good, and memory falls."""

import itertools
import math

import pytest
import torch

from loki_attn.testing import layer_shape, random_rows

SHAPE = layer_shape(4, 2, 16)
SEQ = 44
FIRST, LAST = 2, 5


def lengths(driven):
    return torch.tensor([[len(head) for head in row] for row in driven.positions()])


def run(case, steps=0, seed=3, seq=SEQ, shape=SHAPE, **keep):
    """A prompt and some steps; the driven layer, and its positions after every forward."""
    driven = case.driven(shape, **keep)
    query, key, value = random_rows(shape, seq + steps, batch=2, q_len=seq + steps, seed=seed)
    driven.prompt(query[:, :, :seq], key[:, :, :seq], value[:, :, :seq])
    held = [driven.positions()]
    for step in range(seq, seq + steps):
        driven.attend(*(rows[:, :, step : step + 1] for rows in (query, key, value)))
        held.append(driven.positions())
    return driven, held, (query, key, value)


@pytest.mark.parametrize("capacity", [12, 13, 20, 43])
def test_exactly_the_capacity_stays_on_average_over_heads(amount_case, capacity):
    driven, _, _ = run(amount_case, capacity=capacity)
    held = lengths(driven)
    assert held.sum(-1).tolist() == [2 * capacity] * 2
    if not amount_case.allocate.ragged:
        assert bool((held == capacity).all())


def test_a_share_is_of_the_tokens_seen_rounded_up(amount_case):
    driven, _, _ = run(amount_case, keep_share=0.3)
    assert lengths(driven).sum(-1).tolist() == [2 * math.ceil(0.3 * SEQ)] * 2


def test_the_window_stays_where_no_more_is_asked_for(evict_case):
    _, held, _ = run(evict_case, capacity=14)
    window = evict_case.evict.window
    for row in held[0]:
        assert all(set(head) >= set(range(SEQ - window, SEQ)) for head in row)


def test_first_and_last_rows_stay_and_count(evict_case):
    driven, held, _ = run(evict_case, steps=6, capacity=14, keep_first=FIRST, keep_last=LAST)
    last = max(LAST, evict_case.evict.window)
    for forward, now in enumerate(held):
        seen = SEQ + forward
        for row in now:
            for head in row:
                assert head[:FIRST] == list(range(FIRST))
                assert head[-last:] == list(range(seen - last, seen))
                assert len(set(head)) == len(head)
    if not evict_case.sets_its_own_amount:
        assert len(held[0][0][0]) + len(held[0][0][1]) == 28
    assert driven.rows.seen == SEQ + 6


def test_rows_are_those_that_were_appended_in_order(evict_case):
    """Bit for bit; of what a method moves, the values."""
    driven, _, (_, key, value) = run(evict_case, steps=5, capacity=13)
    for shard in driven.rows:
        cache = shard.cache
        places = cache.positions.long()
        assert bool((places.diff(dim=-1) > 0).all())
        assert 0 <= int(places.min()) <= int(places.max()) < SEQ + 5
        for name, rows in (("key", key), ("value", value)):
            if name == "key" and evict_case.moves:
                continue
            own = shard.of_rows(rows)
            index = places[..., None].expand(-1, -1, -1, own.shape[3])
            assert torch.equal(cache.plane(name), own.gather(2, index)), name


def test_what_went_never_returns(evict_case):
    _, held, _ = run(evict_case, steps=8, capacity=13)
    for forward, (before, now) in enumerate(itertools.pairwise(held)):
        new = {SEQ + forward}
        for old_row, row in zip(before, now, strict=True):
            for old, head in zip(old_row, row, strict=True):
                assert set(head) <= set(old) | new


def test_five_runs_agree(evict_case):
    first, places, _ = run(evict_case, steps=4, capacity=13)
    keys = [shard.cache.keys for shard in first.rows]
    for _ in range(4):
        other, same, _ = run(evict_case, steps=4, capacity=13)
        assert same == places
        assert all(
            torch.equal(a, s.cache.keys) for a, s in zip(keys, other.rows.shards, strict=True)
        )


def test_each_step_keeps_the_amount_and_a_burst_lets_it_grow_that_far(amount_case):
    """High and low water, at every step, whatever the method's own time."""
    _, held, _ = run(amount_case, steps=12, capacity=14, burst=4, when="step")
    sums = [sum(len(head) for head in now[0]) for now in held]
    assert max(sums) <= 2 * (14 + 4)
    assert sums[0] == min(sums) == 28
    drops = [b for a, b in itertools.pairwise(sums) if b < a]
    assert drops == [28] * len(drops) != []
    _, held, _ = run(amount_case, steps=5, capacity=14, when="step")
    assert [sum(len(head) for head in now[0]) for now in held] == [28] * 6


def test_memory_really_falls(amount_case):
    """Storage of whole tiles of the rows that stay; nothing else is held on to."""
    shape, seq, capacity = layer_shape(4, 2, 32), 640, 64
    driven, _, _ = run(amount_case, seq=seq, shape=shape, capacity=capacity)
    held = {
        storage.data.untyped_storage().data_ptr(): storage.data.untyped_storage().nbytes()
        for shard in driven.rows
        for storage in shard.cache._storage.values()
    }
    beside = sum(t.nbytes for s in driven.rows for t in s.cache.memory.values())
    assert driven.rows.nbytes() == sum(held.values()) + beside
    counts = lengths(driven)
    each = driven.rows.shards[0].cache.row_bytes()
    tiles = ((counts + 15) // 16 * 16).sum()
    assert sum(held.values()) == int(tiles) * each
    assert beside <= seq * 4 * each / 4
    assert sum(held.values()) <= (capacity / seq + 32 / seq) * seq * 4 * each
    for shard in driven.rows:
        for name, kept in shard.cache.memory.items():
            whole = kept.untyped_storage().nbytes()
            assert whole <= max(kept.nbytes, 1), f"{name} is a view of something larger"
