"""StreamingLLM: sinks and recents, at true positions or at their slots."""

import itertools

import pytest
import torch
from stepping import pieces, visible_of, walk

from loki_attn import attention
from loki_attn.errors import BudgetError, PolicyError
from loki_attn.evict.streaming import Streaming
from loki_attn.policy import Policy, preset
from loki_attn.rope import Rope
from loki_attn.testing import DrivenLayer, layer_shape, plain_attention, random_rows, tiny_basis

SHAPE = layer_shape(6, 2, 16)
ROPE = Rope(frequencies=10000.0 ** -(torch.arange(8) / 8))
PAIRS = Rope(frequencies=100.0 ** -(torch.arange(6) / 6), layout="pairs")  # rotary_dim 12 of 16


def roped(rows, rope=ROPE, first=0):
    """Query, key and value as a model hands them over, the first token at this position."""
    query, key, value = rows
    places = torch.arange(first, first + key.shape[2])
    return rope.turn(query, places), rope.turn(key, places), value


def slotted(raw, kept, rope):
    """Attention of the last token to the kept ones, numbered anew, in float64."""
    query, key, value = (part.double() for part in raw)
    places = torch.arange(len(kept))
    asked = rope.turn(query[:, :, kept[-1:]], places[-1:])
    mask = torch.ones(1, 1, 1, len(kept), dtype=torch.bool)
    layer = DrivenLayer(preset("dense"), SHAPE)
    return plain_attention(
        asked, rope.turn(key[:, :, kept], places), value[:, :, kept], mask, layer.call
    )


def slot(**more):
    return preset("streaming-slot", **more)


@pytest.mark.parametrize("name", ["streaming-keep", "streaming-slot"])
@pytest.mark.parametrize("sinks", [0, 1, 4])
def test_the_first_and_the_last_rows_stay(name, sinks):
    rows = random_rows(SHAPE, 60, batch=2, q_len=60)
    policy = preset(name, capacity=16, **{"evict.sinks": sinks})
    _, held, _ = walk(policy, SHAPE, rows, 10, rope=ROPE)
    for step, batch in enumerate(held):
        tokens = 10 + step
        first = max(sinks, tokens - 16 + sinks)
        whole = [*range(min(sinks, tokens)), *range(first, tokens)]
        assert batch == [[whole] * 2] * 2


@pytest.mark.parametrize("name", ["streaming-keep", "streaming-slot"])
def test_within_the_capacity_it_is_dense(name):
    rows = roped(random_rows(SHAPE, 40, q_len=40))
    _, _, outs = walk(preset(name, capacity=40), SHAPE, rows, 25, rope=ROPE)
    assert torch.equal(outs, walk(preset("dense"), SHAPE, rows, 25)[2])


@pytest.mark.parametrize("rope", [ROPE, PAIRS], ids=["halves", "pairs"])
@pytest.mark.parametrize("burst", [0, 5])
def test_slots_are_positions_in_the_cache(rope, burst):
    raw = random_rows(SHAPE, 55, batch=2, q_len=55)
    policy = slot(capacity=16, burst=burst)
    _, held, outs = walk(policy, SHAPE, roped(raw, rope), 30, rope=rope)
    for step in range(1, 25):
        kept = [*held[step - 1][0][0], 29 + step]
        truth = slotted(raw, kept, rope)
        torch.testing.assert_close(
            outs[:, :, 29 + step].double(), truth[:, :, 0], rtol=1e-4, atol=1e-5
        )


def test_the_output_depends_on_the_raw_kept_rows_alone():
    # Whatever was dropped between sinks and recents, and however much of it.
    query, key, value = random_rows(SHAPE, 24, q_len=24)
    outs = []
    for dropped in (7, 100, 3000):
        other = random_rows(SHAPE, dropped, q_len=dropped, seed=dropped)
        text = [
            torch.cat([mine[:, :, :4], new, mine[:, :, 4:]], 2)
            for mine, new in zip((query, key, value), other, strict=True)
        ]
        driven = DrivenLayer(slot(capacity=16), SHAPE, rope=ROPE)
        whole, tokens = roped(text), dropped + 24
        driven.attend(*pieces(whole, 0, tokens - 8))
        steps = [driven.attend(*pieces(whole, t, t + 1)) for t in range(tokens - 8, tokens)]
        outs.append(torch.cat(steps, 2))
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0], rtol=1e-4, atol=1e-4)


def test_true_positions_are_kept_as_they_are():
    rows = roped(random_rows(SHAPE, 50, q_len=50))
    layer, held, _ = walk(preset("streaming-keep", capacity=12), SHAPE, rows, 20)
    assert torch.equal(layer.rows.whole.keys, rows[1][:, :, held[-1][0][0]])


def test_slots_leave_positions_true_and_recents_untouched():
    rows = roped(random_rows(SHAPE, 50, q_len=50))
    layer, held, _ = walk(slot(capacity=12), SHAPE, rows, 20, rope=ROPE)
    cache = layer.rows.whole
    assert cache.positions[0, 0].tolist() == held[-1][0][0]
    assert torch.equal(cache.keys[:, :, 4:], rows[1][:, :, 42:])


def test_rounding_of_the_turns_does_not_add_up():
    # Turned 200 times: once from the keys as they came is one rounding to bfloat16.
    raw = random_rows(SHAPE, 220, q_len=220, dtype=torch.bfloat16)
    rows = roped(raw)
    layer, _, _ = walk(slot(capacity=12), SHAPE, rows, 20, rope=ROPE)
    truth = ROPE.turn(rows[1][:, :, :4].double(), torch.full((4,), 208))
    off = (layer.rows.whole.keys[:, :, :4].double() - truth).abs()
    assert bool((off <= truth.abs() * 2**-8 + 1e-6).all())


def test_turns_add_up_in_one_go_as_in_many():
    rows = roped(random_rows(SHAPE, 80, batch=2, q_len=80))
    many = walk(slot(capacity=12), SHAPE, rows, 5, rope=ROPE)[0].rows.whole
    once = walk(slot(capacity=12), SHAPE, rows, 80, rope=ROPE)[0].rows.whole
    torch.testing.assert_close(many.keys, once.keys, rtol=1e-4, atol=1e-5)


def test_padding_is_no_sink_and_no_distance():
    # The short row's tokens lie further right; what it attends to must be as without padding.
    raw = random_rows(SHAPE, 60, batch=2, q_len=60)
    valid = torch.ones(2, 60, dtype=torch.bool)
    valid[1, :21] = False
    query, key, value = roped(raw)
    short = roped([part[1:, :, 21:] for part in raw])
    for part, new in zip((query, key, value), short, strict=True):
        part[1:, :, 21:] = new
    key[1, :, :21] = float("nan")
    value[1, :, :21] = float("nan")
    driven = DrivenLayer(slot(capacity=16), SHAPE, rope=ROPE)
    alone = DrivenLayer(slot(capacity=16), SHAPE, rope=ROPE)
    bounds = [0, 30, *range(31, 61)]
    for start, stop in itertools.pairwise(bounds):
        out = driven.attend(
            *pieces((query, key, value), start, stop), visible_of(valid, start, stop)
        )
        own = (max(0, start - 21), stop - 21)
        truth = alone.attend(*pieces(short, *own))
        got = out[1:, :, -truth.shape[2] :]
        torch.testing.assert_close(got, truth, rtol=1e-4, atol=1e-5)
    assert driven.positions()[1] == [[*range(21, 25), *range(48, 60)]] * 2
    assert driven.positions()[0] == [[*range(4), *range(48, 60)]] * 2


def test_what_is_truncated_and_said_again_is_the_same():
    # Memory is dropped when rows are truncated; sinks must not forget how far they moved.
    rows = roped(random_rows(SHAPE, 60, q_len=60))
    driven, _, outs = walk(slot(capacity=16), SHAPE, rows, 40, rope=ROPE)
    sinks = driven.rows.whole.keys[:, :, :4].clone()
    driven.rows.truncate(57)
    again = [driven.attend(*pieces(rows, t, t + 1)) for t in range(57, 60)]
    assert torch.equal(driven.rows.whole.keys[:, :, :4], sinks)
    # Rows that were dropped for the forgotten ones are gone: the first step reads 13 rows, not 16.
    assert driven.rows.whole.length == 16
    kept = [*range(4), *range(48, 60)]
    truth = slotted(
        [ROPE.turn(part, -torch.arange(60)) for part in rows[:2]] + [rows[2]], kept, ROPE
    )
    torch.testing.assert_close(again[-1].double(), truth, rtol=1e-4, atol=1e-5)
    assert outs.shape[2] == 60


def test_sinks_turn_on_after_a_truncation():
    raw = random_rows(SHAPE, 70, q_len=70)
    rows = roped(raw)
    driven, _, _ = walk(slot(capacity=16), SHAPE, pieces(rows, 0, 60), 40, rope=ROPE)
    driven.rows.truncate(57)
    for t in range(57, 70):
        out = driven.attend(*pieces(rows, t, t + 1))
    kept = [*range(4), *range(57, 70)]
    torch.testing.assert_close(out.double(), slotted(raw, kept, ROPE), rtol=1e-4, atol=1e-5)


def test_requests_share_no_sinks():
    rows, others = (roped(random_rows(SHAPE, 50, q_len=50, seed=seed)) for seed in (0, 1))
    policy = slot(capacity=12)
    first, second = (DrivenLayer(policy, SHAPE, rope=ROPE) for _ in range(2))
    second.layer = first.layer
    for start, stop in [(0, 30), *((t, t + 1) for t in range(30, 50))]:
        one = first.attend(*pieces(rows, start, stop))
        two = second.attend(*pieces(others, start, stop))
    for out, text in ((one, rows), (two, others)):
        assert torch.equal(out, walk(policy, SHAPE, text, 30, rope=ROPE)[2][:, :, -1:])


def test_beams_take_their_sinks_along():
    rows = roped(random_rows(SHAPE, 50, batch=3, q_len=50))
    driven, _, _ = walk(slot(capacity=12), SHAPE, pieces(rows, 0, 40), 30, rope=ROPE)
    order = torch.tensor([2, 0, 0])
    driven.rows.select_batch(order)
    picked = [part[order] for part in rows]
    straight = DrivenLayer(slot(capacity=12), SHAPE, rope=ROPE)
    straight.attend(*pieces(picked, 0, 30))
    for t in range(30, 40):
        straight.attend(*pieces(picked, t, t + 1))
    for t in range(40, 50):
        out = driven.attend(*pieces(picked, t, t + 1))
        torch.testing.assert_close(out, straight.attend(*pieces(picked, t, t + 1)))


def test_the_budget_may_name_more_sinks():
    rows = roped(random_rows(SHAPE, 50, q_len=50))
    layer, held, _ = walk(slot(capacity=12, keep_first=6), SHAPE, rows, 30, rope=ROPE)
    assert held[-1][0][0] == [*range(6), *range(44, 50)]
    truth = ROPE.turn(rows[1][:, :, :6], torch.full((6,), 38))
    torch.testing.assert_close(layer.rows.whole.keys[:, :, :6], truth, rtol=1e-4, atol=1e-5)


def test_sinks_alone_are_no_cache():
    with pytest.raises(BudgetError, match="capacity=4 has no room for 4 sinks and a recent row"):
        DrivenLayer(preset("streaming-keep", capacity=4), SHAPE)
    DrivenLayer(preset("streaming-keep", capacity=5), SHAPE)


def test_slots_need_to_know_how_a_layer_rotates():
    with pytest.raises(
        PolicyError, match="how layer 0 rotates them is not known; use positions='keep'"
    ):
        DrivenLayer(slot(capacity=12), SHAPE)
    DrivenLayer(preset("streaming-keep", capacity=12), SHAPE)


def test_keys_in_a_basis_cannot_move_but_can_be_dropped():
    policy = preset("loki-paper", evict="streaming", capacity=24, **{"evict.positions": "slot"})
    with pytest.raises(PolicyError, match="rotates stored keys"):
        attention.bind(policy, SHAPE, 1, tiny_basis(SHAPE), rope=ROPE)
    rows = roped(random_rows(SHAPE, 60, q_len=60))
    policy = preset("loki-paper", evict="streaming", capacity=24)
    _, held, _ = walk(policy, SHAPE, rows, 30, basis=tiny_basis(SHAPE))
    assert held[-1][0][0] == [*range(4), *range(40, 60)]


def test_planes_would_not_follow_keys_that_move():
    policy = preset("loki", evict="streaming", capacity=600, **{"evict.positions": "slot"})
    driven = DrivenLayer(policy, SHAPE, basis=tiny_basis(SHAPE), rope=ROPE)
    with pytest.raises(PolicyError, match="the planes that the selection keeps of them"):
        driven.attend(*random_rows(SHAPE, 8, q_len=8))


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"sinks": -1}, "sinks is a number of rows, got -1"),
        ({"positions": "rank"}, "positions is 'keep' or 'slot', got 'rank'"),
    ],
)
def test_what_makes_no_sense_is_refused(fields, text):
    with pytest.raises(PolicyError, match=text):
        Streaming(**fields)


def test_policies_with_it_survive_json():
    for name in ("streaming-keep", "streaming-slot"):
        policy = preset(name, capacity=99, **{"evict.sinks": 2})
        assert Policy.from_json(policy.to_json()) == policy
