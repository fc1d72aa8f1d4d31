"""H2O: accumulated attention, the recents besides."""

from collections import defaultdict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from stepping import best_of, pieces, scaling_of, shares, simulate, walk

from loki_attn.cache import LayerCache
from loki_attn.errors import PolicyError
from loki_attn.evict.base import Attended
from loki_attn.evict.h2o import H2O
from loki_attn.policy import Policy, preset
from loki_attn.testing import DrivenLayer, layer_shape, random_rows
from loki_attn.types import AttentionCall

SHAPE = layer_shape(6, 2, 16)


class Naive:
    """One head: a score per position, and how many queries saw it."""

    def __init__(self, capacity, recents, *, normalise=False, high_water=0):
        self.capacity, self.recents, self.normalise = capacity, recents, normalise
        self.high_water = high_water
        self.scores, self.age = defaultdict(float), defaultdict(int)

    def see(self, token, held, query, keys):
        del token
        for position, weight in zip(
            held, shares(query, keys[held], scaling_of(SHAPE)).sum(0).tolist(), strict=True
        ):
            self.scores[position] += weight
            self.age[position] += 1

    def drop(self, held, token):
        del token
        if len(held) <= self.capacity + self.high_water:
            return held
        last = held[len(held) - self.recents :]
        others = held[: len(held) - self.recents]
        scores = self.scores
        if self.normalise:
            scores = {p: scores[p] / self.age[p] for p in others}
        return best_of(scores, others, self.capacity - self.recents) + last


@pytest.mark.parametrize(
    ("capacity", "share", "recents", "normalise", "burst"),
    [
        (20, 0.5, 10, False, 0),
        (21, 0.5, 10, True, 0),
        (20, 0.0, 0, False, 0),
        (20, 0.25, 5, True, 7),
        (9, 1.0, 9, False, 0),
        (1, 0.5, 0, False, 0),
    ],
)
def test_it_is_the_loop_over_steps(capacity, share, recents, normalise, burst):
    rows = random_rows(SHAPE, 70, batch=2, q_len=70)
    policy = preset("h2o", capacity=capacity, recent_share=share, normalise=normalise, burst=burst)

    _, held, _ = walk(policy, SHAPE, rows, 40)

    def judge(b, h):
        del b, h
        return Naive(capacity, recents, normalise=normalise, high_water=burst)

    assert held == simulate(rows, 40, judge)


def test_scores_sum_to_the_number_of_queries_while_nothing_was_dropped():
    rows = random_rows(SHAPE, 50, batch=2, q_len=50)
    layer, _, _ = walk(preset("h2o", capacity=50), SHAPE, rows, 30)
    sums = layer.rows.whole.plane("received").sum(-1)
    torch.testing.assert_close(sums, torch.full_like(sums, 50.0 * SHAPE.group))


def test_without_recents_only_heavy_rows_stay():
    # A slice of the last 0 rows would be all rows: nothing could go.
    rows = random_rows(SHAPE, 60, q_len=60)
    layer, _, _ = walk(preset("h2o", capacity=8, recent_share=0.0), SHAPE, rows, 60)
    assert layer.rows.longest == 8


def test_half_of_the_budget_is_recent():
    rows = random_rows(SHAPE, 80, q_len=80)
    _, held, _ = walk(preset("h2o", capacity=16), SHAPE, rows, 40)
    for step, heads in enumerate(held[0] for held in held):
        for kept in heads:
            assert kept[-8:] == list(range(40 + step - 8, 40 + step))


def test_the_preset_keeps_a_fifth_of_the_text():
    rows = random_rows(SHAPE, 100, q_len=100)
    _, held, _ = walk(preset("h2o"), SHAPE, rows, 50)
    assert [len(held[i][0][0]) for i in (0, 25, 50)] == [10, 15, 20]


def test_early_rows_have_a_head_start_which_age_takes_away():
    # Uniform attention: row i of T gets 1/(i+1) + ... + 1/T from T - i queries.
    tokens = 64
    query, key, value = random_rows(SHAPE, tokens, q_len=tokens)
    rows, first_over_last = (query, torch.zeros_like(key), value), {}
    for normalise in (False, True):
        policy = preset("h2o", capacity=tokens, normalise=normalise)
        layer, _, _ = walk(policy, SHAPE, rows, tokens)
        own = layer.layer.eviction.evictor
        scores = own.scores(layer.rows.whole, layer.call, None)
        first_over_last[normalise] = scores[..., 0] / scores[..., -1]
    torch.testing.assert_close(first_over_last[False], tokens * first_over_last[True])


def test_age_lets_a_young_heavy_row_beat_an_old_light_one():
    # Row 0 gets a little from every query, row 30 much from few.
    query, key, value = random_rows(SHAPE, 34, q_len=34, seed=1)
    key = torch.zeros_like(key)
    key[:, :, 30], query = 4.0, torch.ones_like(query)
    kept = {}
    for normalise in (False, True):
        policy = preset("h2o", capacity=2, recent_share=0.5, normalise=normalise)
        kept[normalise] = walk(policy, SHAPE, (query, key, value), 32)[1][0][0][0]
    assert kept == {False: [0, 31], True: [30, 31]}


def test_weights_that_come_for_free_are_the_same_sums():
    rows = random_rows(SHAPE, 40, batch=2, q_len=40)
    evictor = H2O().bind(None)
    caches = [LayerCache(marks=evictor.marks()) for _ in range(2)]
    call = AttentionCall(scaling=scaling_of(SHAPE))
    query, key, value = rows
    for cache in caches:
        cache.append(key, value)
    group = query[:, :, -1].view(2, 2, 3, -1)
    weights = (group @ key.mT * call.scaling).softmax(-1).sum(2)
    evictor.observe(caches[0], Attended(query=query[:, :, -1:], call=call))
    evictor.observe(caches[1], Attended(query=query[:, :, -1:], call=call, weights=weights))
    torch.testing.assert_close(caches[0].plane("received"), caches[1].plane("received"))


def test_full_rank_logits_judge_as_exact_attention_does():
    rows = random_rows(SHAPE, 60, q_len=60)
    dense = preset("h2o", capacity=20)
    selecting = preset("exact-topk", evict="h2o", capacity=20, top_k=8, sinks=0, recents=0)
    held = [
        walk(p, SHAPE, rows, 40, how=how)[1] for p, how in ((dense, "dense"), (selecting, "decode"))
    ]
    assert held[0] == held[1]


def test_a_query_that_is_padding_judges_nothing():
    # Right padding, as in a batch of turns: its queries see real rows, and are none.
    rows = random_rows(SHAPE, 30, batch=2, q_len=30)
    valid = torch.ones(2, 30, dtype=torch.bool)
    valid[1, 20:] = False
    layer, _, _ = walk(preset("h2o", capacity=40, normalise=True), SHAPE, rows, 30, valid=valid)
    alone, _, _ = walk(
        preset("h2o", capacity=40, normalise=True),
        SHAPE,
        [part[1:] for part in pieces(rows, 0, 20)],
        20,
    )
    for name in ("received", "age"):
        got = layer.rows.whole.plane(name)[1:, :, :20]
        torch.testing.assert_close(got, alone.rows.whole.plane(name))


def test_a_step_that_is_padding_judges_nothing():
    # A batch row that has ended gets padding while the others go on.
    rows = random_rows(SHAPE, 24, batch=2, q_len=24)
    valid = torch.ones(2, 24, dtype=torch.bool)
    valid[1, 20:] = False
    layer, _, _ = walk(preset("h2o", capacity=40), SHAPE, rows, 20, valid=valid)
    before, _, _ = walk(preset("h2o", capacity=40), SHAPE, pieces(rows, 0, 20), 20)
    got = layer.rows.whole.plane("received")
    torch.testing.assert_close(got[1, :, :20], before.rows.whole.plane("received")[1])
    assert bool((got[0] > 0).all())


@given(
    prompt=st.integers(1, 24),
    steps=st.integers(0, 12),
    capacity=st.integers(1, 30),
    share=st.floats(0, 1),
    burst=st.integers(0, 4),
)
def test_it_is_the_loop_over_steps_at_any_size(prompt, steps, capacity, share, burst):
    rows = random_rows(SHAPE, prompt + steps, q_len=prompt + steps, seed=prompt)
    policy = preset("h2o", capacity=capacity, recent_share=share, burst=burst)
    _, held, _ = walk(policy, SHAPE, rows, prompt)
    recents = int(capacity * share)
    naive = simulate(rows, prompt, lambda _b, _h: Naive(capacity, recents, high_water=burst))
    assert held == naive


def test_state_lies_in_the_cache_of_a_request():
    rows, others = (random_rows(SHAPE, 50, q_len=50, seed=seed) for seed in (0, 1))
    policy = preset("h2o", capacity=12)
    shared = DrivenLayer(policy, SHAPE)
    first, second = DrivenLayer(policy, SHAPE), DrivenLayer(policy, SHAPE)
    first.layer = second.layer = shared.layer
    for start, stop in [(0, 30), *((t, t + 1) for t in range(30, 50))]:
        first.attend(*pieces(rows, start, stop))
        second.attend(*pieces(others, start, stop))
    assert first.positions() == walk(policy, SHAPE, rows, 30)[1][-1]
    assert second.positions() == walk(policy, SHAPE, others, 30)[1][-1]


def test_protected_rows_of_the_budget_leave_their_room_to_no_recents():
    rows = random_rows(SHAPE, 40, q_len=40)
    policy = preset("h2o", capacity=10, recent_share=1.0, keep_first=7)
    _, held, _ = walk(policy, SHAPE, rows, 40)
    assert held[-1][0] == [[*range(7), 37, 38, 39]] * 2


def test_a_share_is_a_share():
    with pytest.raises(
        PolicyError, match=r"recent_share is a share of the budget in \[0, 1\], got 1.5"
    ):
        H2O(recent_share=1.5)


def test_policies_with_it_survive_json():
    policy = preset("h2o", recent_share=0.25, normalise=True, burst=64)
    assert Policy.from_json(policy.to_json()) == policy
