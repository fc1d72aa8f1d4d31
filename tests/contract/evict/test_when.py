"""When rows go: after they were attended to, when there are too many, however the prompt came."""

import itertools

import pytest
import torch

from loki_attn.eviction import Turn
from loki_attn.policy import preset
from loki_attn.testing import DrivenLayer, layer_shape, random_rows

SHAPE = layer_shape(4, 2, 16)
SEQ = 40
CAPACITY = 13
# One token at a time is another method where tokens of a prompt and of an answer differ.
NOT_ONE_BY_ONE = {"keyformer": "its temperature grows with every single-token step"}


def part(rows, start, end):
    return [one[:, :, start:end] for one in rows]


def prompt_in(case, edges, rows):
    """Positions after an eviction that follows the prompt in these chunks."""
    driven = case.driven(SHAPE, capacity=CAPACITY, when="prompt")
    for start, end in itertools.pairwise(edges):
        driven.attend(*part(rows, start, end))
        assert driven.rows.longest == driven.rows.seen == end
    driven.evict()
    return driven.positions()


def test_chunks_of_a_prompt_are_judged_as_one(evict_case):
    rows = random_rows(SHAPE, SEQ, batch=2, q_len=SEQ, seed=4)
    whole = prompt_in(evict_case, [0, SEQ], rows)
    for edges in ([0, 2, 21, SEQ], [0, 16, 32, SEQ], [0, SEQ - 2, SEQ]):
        assert prompt_in(evict_case, edges, rows) == whole
    assert sum(map(len, whole[0])) < 2 * SEQ


def test_one_by_one_as_well(evict_case):
    if evict_case.method in NOT_ONE_BY_ONE:
        return
    rows = random_rows(SHAPE, SEQ, batch=2, q_len=SEQ, seed=4)
    whole = prompt_in(evict_case, [0, SEQ], rows)
    assert prompt_in(evict_case, range(SEQ + 1), rows) == whole


def test_a_prompt_in_chunks_goes_at_the_first_step_behind_it(evict_case):
    rows = random_rows(SHAPE, SEQ + 2, q_len=SEQ + 2, seed=4)
    driven = evict_case.driven(SHAPE, capacity=CAPACITY, when="prompt")
    driven.prompt(*part(rows, 0, SEQ), chunks=(9, 30))
    assert not driven.rows.evicted
    driven.attend(*part(rows, SEQ, SEQ + 1))
    held = driven.positions()
    # What decides by itself may find nothing to drop.
    assert driven.rows.evicted or evict_case.sets_its_own_amount
    driven.attend(*part(rows, SEQ + 1, SEQ + 2))
    assert driven.positions() == [[[*head, SEQ + 1] for head in row] for row in held]


def test_a_forward_attends_to_what_it_drops(evict_case):
    """Bit for bit what dense attention gives."""
    rows = random_rows(SHAPE, SEQ, batch=2, q_len=SEQ)
    plain = DrivenLayer(preset("dense"), SHAPE).prompt(*rows)
    driven = evict_case.driven(SHAPE, capacity=CAPACITY, when="forward")
    assert torch.equal(driven.prompt(*rows), plain)
    assert driven.rows.evicted


@pytest.mark.parametrize("capacity", [SEQ + 6, 10_000])
def test_with_room_for_all_nothing_goes_and_nothing_changes(amount_case, capacity):
    """Steps whose weights are wanted are summed in another order."""
    rows = random_rows(SHAPE, SEQ + 6, batch=2, q_len=SEQ + 6)
    plain, driven = (
        DrivenLayer(preset("dense"), SHAPE),
        amount_case.driven(SHAPE, capacity=capacity),
    )
    for start, end in [(0, SEQ), *((i, i + 1) for i in range(SEQ, SEQ + 6))]:
        expected, out = (one.attend(*part(rows, start, end)) for one in (plain, driven))
        weighs = driven.layer.eviction.evictor.wants_weights and end > SEQ
        assert torch.allclose(out, expected, atol=1e-6) if weighs else torch.equal(out, expected)
    assert torch.equal(driven.rows.whole.keys, rows[1])
    assert driven.positions() == plain.positions()


def test_two_requests_in_a_row_are_two_fresh_ones(evict_case):
    """No state outside the rows: neither a reset nor another request in between is noticed."""
    first, second = (
        random_rows(SHAPE, SEQ + 3, batch=2, q_len=SEQ + 3, seed=seed) for seed in (1, 2)
    )
    used = evict_case.driven(SHAPE, capacity=CAPACITY)
    request(used, first)
    used.rows.reset()
    used.turn = Turn(rows=used.rows)
    fresh = evict_case.driven(SHAPE, capacity=CAPACITY)
    outs = request(used, second), request(fresh, second)
    assert torch.equal(*outs)
    assert used.positions() == fresh.positions()


def test_two_requests_at_a_time_do_not_meet(evict_case):
    first, second = (random_rows(SHAPE, SEQ, q_len=SEQ, seed=seed) for seed in (1, 2))
    mine = evict_case.driven(SHAPE, capacity=CAPACITY, when="prompt")
    other = evict_case.driven(SHAPE, capacity=CAPACITY, when="prompt")
    other.layer = mine.layer
    for start, end in ((0, 20), (20, SEQ)):
        mine.attend(*part(first, start, end))
        other.attend(*part(second, start, end))
    mine.evict()
    other.evict()
    assert mine.positions() == prompt_in(evict_case, [0, SEQ], first)
    assert other.positions() == prompt_in(evict_case, [0, SEQ], second)


def request(driven, rows):
    outs = [driven.prompt(*part(rows, 0, SEQ))]
    outs += [driven.attend(*part(rows, i, i + 1)) for i in range(SEQ, SEQ + 3)]
    return torch.cat(outs, 2)
