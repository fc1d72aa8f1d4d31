"""Expected Attention: what a Gaussian of queries to come is expected to attend to."""

import pytest
import torch

from loki_attn.errors import PolicyError
from loki_attn.policy import preset
from loki_attn.rope import Rope
from loki_attn.testing import DrivenLayer, layer_shape, plain_weights, random_rows, tiny_basis

SHAPE = layer_shape(6, 2, 16)
ROPE = Rope(frequencies=100.0 ** (-torch.arange(8) / 8))
TOKENS = 60


def orthogonal():
    draw = torch.Generator().manual_seed(7)
    matrix = torch.randn(16, 16, generator=draw, dtype=torch.float64)
    return torch.linalg.qr(matrix).Q.float()


def driven_over(query, key, value, valid=None, rope=ROPE, cuts=(), **fields):
    policy = preset("expected-attention", **{"capacity": 1000, "n_future": 20, **fields})
    driven = DrivenLayer(policy, SHAPE, rope=rope)
    driven.prompt(query, key, value, valid, chunks=cuts)
    return driven


def scores_of(driven):
    return driven.layer.eviction.evictor.scores(driven.rows.whole, driven.call, None)


def turned(rope, rows, shift):
    return rope.turn(rows, torch.as_tensor(shift).expand(rows.shape[-2]))


def plain(query, key, value, first_query, positions, seen, rope=ROPE, n_future=20, sinks=4):
    """The same in float64, one query head at a time, straight from the formulas.

    Queries begin at position `first_query`, rows lie at `positions`, `seen` tokens are over.
    """
    scaling, group = SHAPE.head_dim**-0.5, SHAPE.group
    scores = torch.zeros(key.shape[:3], dtype=torch.float64)
    for b in range(key.shape[0]):
        for h in range(SHAPE.num_heads):
            places = torch.arange(first_query, first_query + query.shape[2])
            raw = rope.turn(query[b, h].double(), -places)[max(0, sinks - first_query) :]
            mean, spread = raw.mean(0), torch.cov(raw.T, correction=0)
            eye = torch.eye(SHAPE.head_dim, dtype=torch.float64)
            future = [turned(rope, eye, seen + j) for j in range(n_future)]
            average = torch.stack(future).mean(0).T  # columns: images of the unit vectors
            mean, spread = average @ mean, average @ spread @ average.T
            rows = key[b, h // group].double()
            exponent = scaling * rows @ mean
            exponent += 0.5 * scaling**2 * torch.einsum("td,de,te->t", rows, spread, rows)
            scores[b, h // group] += exponent.softmax(0) / group
    return scores * value.double().norm(dim=-1)


def test_scores_are_the_expected_attention_times_the_length_of_the_value():
    query, key, value = random_rows(SHAPE, TOKENS, batch=2, q_len=TOKENS)
    expected = plain(query, key, value, 0, range(TOKENS), TOKENS)
    scores = scores_of(driven_over(query, key, value))
    torch.testing.assert_close(scores.double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("layout", ["halves", "pairs"])
def test_dimensions_beyond_the_rotary_ones_do_not_turn(layout):
    rope = Rope(frequencies=ROPE.frequencies[:3], layout=layout)
    query, key, value = random_rows(SHAPE, TOKENS, q_len=TOKENS)
    expected = plain(query, key, value, 0, range(TOKENS), TOKENS, rope)
    scores = scores_of(driven_over(query, key, value, rope=rope))
    torch.testing.assert_close(scores.double(), expected, rtol=1e-4, atol=1e-6)


def constant_queries(seed=0):
    """One query before RoPE at every position, so that their spread is 0."""
    query, key, value = random_rows(SHAPE, TOKENS, q_len=TOKENS, seed=seed)
    raw = query[:, :, :1].expand_as(query)
    return raw, ROPE.turn(raw, torch.arange(TOKENS)), key, value


def test_without_spread_the_next_position_gets_plain_attention_of_the_mean_query():
    raw, query, key, value = constant_queries()
    driven = driven_over(query, key, value, n_future=1)
    coming = ROPE.turn(raw[:, :, :1], torch.tensor([TOKENS]))
    weights = plain_weights(coming.double(), key.double(), None, driven.call)[:, :, 0]
    expected = weights.view(1, 2, 3, -1).mean(2) * value.double().norm(dim=-1)
    torch.testing.assert_close(scores_of(driven).double(), expected, rtol=1e-4, atol=1e-6)


def test_positions_to_come_are_counted_from_the_tokens_seen_not_from_the_rows_held():
    """After an eviction, and for a second prompt, the next position is behind all tokens."""
    query, key, value = random_rows(SHAPE, TOKENS, q_len=TOKENS)
    driven = driven_over(query, key, value, capacity=30)
    assert driven.rows.whole.length == 30
    held = driven.rows.whole
    expected = plain(query, held.keys, held.values, 0, None, TOKENS)
    torch.testing.assert_close(scores_of(driven).double(), expected, rtol=1e-4, atol=1e-6)
    wrong = plain(query, held.keys, held.values, 0, None, 30)
    assert not torch.allclose(scores_of(driven).double(), wrong, rtol=1e-2)


def test_queries_behind_an_eviction_are_turned_back_from_their_true_positions():
    query, key, value = random_rows(SHAPE, TOKENS, q_len=TOKENS)
    driven = driven_over(query, key, value, capacity=30)
    more = random_rows(SHAPE, 20, q_len=20, seed=4)
    driven.prompt(*more)
    held = driven.rows.whole
    expected = plain(torch.cat([query, more[0]], 2), held.keys, held.values, 0, None, TOKENS + 20)
    torch.testing.assert_close(scores_of(driven).double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("cuts", [(1,), (3, 30), tuple(range(1, TOKENS))])
def test_chunks_of_a_prompt_give_the_scores_of_the_whole(cuts):
    query, key, value = random_rows(SHAPE, TOKENS, batch=2, q_len=TOKENS)
    whole = scores_of(driven_over(query, key, value))
    parts = scores_of(driven_over(query, key, value, cuts=cuts))
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)


def test_the_first_queries_do_not_count():
    query, key, value = random_rows(SHAPE, TOKENS, q_len=TOKENS)
    other = query.clone()
    other[:, :, :4] = 50.0
    same = scores_of(driven_over(other, key, value))
    torch.testing.assert_close(same, scores_of(driven_over(query, key, value)))
    other[:, :, 4] = 50.0
    changed = scores_of(driven_over(other, key, value))
    assert not torch.allclose(changed, same, rtol=1e-2)


def test_sinks_stay_whatever_they_score():
    query, key, value = random_rows(SHAPE, TOKENS, batch=2, q_len=TOKENS)
    value[:, :, :4] = 0.0  # the lowest score there is
    kept = driven_over(query, key, value, capacity=20).positions()
    assert all(head[:4] == [0, 1, 2, 3] and len(head) == 20 for row in kept for head in row)


def test_scaling_the_values_scales_the_scores():
    query, key, value = random_rows(SHAPE, TOKENS, q_len=TOKENS)
    scores = scores_of(driven_over(query, key, value))
    torch.testing.assert_close(scores_of(driven_over(query, key, 3 * value)), 3 * scores)


def test_epsilon_adds_a_share_of_the_length_of_the_value():
    query, key, value = random_rows(SHAPE, TOKENS, q_len=TOKENS)
    more = scores_of(driven_over(query, key, value, epsilon=0.5))
    without = scores_of(driven_over(query, key, value))
    torch.testing.assert_close(more - without, 0.5 * value.norm(dim=-1))


def test_without_covariance_only_the_mean_counts():
    query, key, value = random_rows(SHAPE, TOKENS, q_len=TOKENS)
    mean_only = scores_of(driven_over(query, key, value, covariance=False))
    assert not torch.allclose(mean_only, scores_of(driven_over(query, key, value)), rtol=1e-2)
    _, same, key, value = constant_queries()
    torch.testing.assert_close(
        scores_of(driven_over(same, key, value, covariance=False)),
        scores_of(driven_over(same, key, value)),
        rtol=1e-4,
        atol=1e-6,
    )


def test_maps_that_commute_with_rope_change_nothing_and_others_do():
    query, key, value = random_rows(SHAPE, TOKENS, q_len=TOKENS)
    scores = scores_of(driven_over(query, key, value))
    # A turn by one angle per pair of dimensions is what RoPE itself does.
    own = [ROPE.turn(rows, torch.full((TOKENS,), 5)) for rows in (query, key)]
    torch.testing.assert_close(scores_of(driven_over(*own, value)), scores, rtol=1e-3, atol=1e-6)
    turn = orthogonal()
    other = scores_of(driven_over(query @ turn, key @ turn, value))
    assert not torch.allclose(other, scores, rtol=1e-2)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_keeps_what_it_keeps_alone(side):
    """Also behind a prompt padded on the right: positions count real tokens, not rows."""
    pad = 13
    query, key, value = random_rows(SHAPE, TOKENS, batch=2, q_len=TOKENS)
    valid = torch.ones(2, TOKENS, dtype=torch.bool)
    valid[1, :pad] = side == "right"
    valid[1, -pad:] = side == "left"
    own = slice(pad, None) if side == "left" else slice(0, TOKENS - pad)
    alone = driven_over(*[rows[1:, :, own] for rows in (query, key, value)], capacity=20)
    first = own.start
    for junk in (1e9, float("nan")):
        rows = [part.masked_fill(~valid[:, None, :, None], junk) for part in (query, key, value)]
        batch = driven_over(*rows, valid, capacity=20)
        kept = batch.positions()
        assert kept[1] == [[p + first for p in head] for head in alone.positions()[0]]
        mine = scores_of(batch)[1:]
        torch.testing.assert_close(mine, scores_of(alone), rtol=1e-3, atol=1e-5)


def test_two_requests_share_nothing():
    first = random_rows(SHAPE, TOKENS, q_len=TOKENS, seed=1)
    second = random_rows(SHAPE, TOKENS, q_len=TOKENS, seed=2)
    driven = driven_over(*first, capacity=20)
    driven.rows.reset()
    driven.prompt(*second)
    assert driven.positions() == driven_over(*second, capacity=20).positions()


def test_a_prompt_of_sinks_alone_is_judged_by_its_values():
    query, key, value = random_rows(SHAPE, 4, q_len=4)
    torch.testing.assert_close(
        scores_of(driven_over(query, key, value)), value.norm(dim=-1) / 4, rtol=1e-5, atol=0
    )


def test_a_layer_whose_rotary_embedding_is_not_known_is_refused():
    with pytest.raises(PolicyError, match=r"rotary embedding of layer 0.*snapkv, keydiff or knorm"):
        DrivenLayer(preset("expected-attention"), SHAPE)


def test_keys_that_are_stored_in_a_basis_are_refused():
    policy = preset("loki-paper", evict="expected_attention", capacity=20)
    with pytest.raises(PolicyError, match="expected_attention rotates stored keys"):
        DrivenLayer(policy, SHAPE, basis=tiny_basis(SHAPE), rope=ROPE)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("n_future", 0, "looks ahead"),
        ("evict.sinks", -1, "number of sinks"),
        ("epsilon", -0.1, "0 or"),
    ],
)
def test_fields_that_mean_nothing_are_refused(field, value, message):
    with pytest.raises(PolicyError, match=message):
        preset("expected-attention", **{field: value})
