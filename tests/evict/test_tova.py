"""TOVA: the last query decides, for the whole layer."""

import torch
from stepping import best_of, pieces, scaling_of, shares, walk

from loki_attn.policy import Policy, preset
from loki_attn.testing import DrivenLayer, layer_shape, random_rows

SHAPE = layer_shape(6, 2, 16)


def naive(rows, prompt, capacity):
    """Positions held by batch row after each forward, by a loop over steps and heads."""
    query, key, _ = rows
    batch, tokens, group = key.shape[0], key.shape[2], query.shape[1] // key.shape[1]
    history = []
    held = [list(range(prompt - 1)) for _ in range(batch)]
    for t in range(prompt - 1, tokens):
        for b in range(batch):
            held[b] = [*held[b], t]
            if len(held[b]) > capacity:
                weights = [
                    shares(query[b, h : h + 1, t], key[b, h // group, held[b]], scaling_of(SHAPE))
                    for h in range(query.shape[1])
                ]
                mean = torch.cat(weights).mean(0).tolist()
                held[b] = best_of(dict(zip(held[b], mean, strict=True)), held[b], capacity)
        history.append([[kept] * key.shape[1] for kept in held])
    return history


def test_it_is_the_loop_over_steps():
    rows = random_rows(SHAPE, 70, batch=2, q_len=70)
    assert walk(preset("tova", capacity=20), SHAPE, rows, 40)[1] == naive(rows, 40, 20)


def test_one_set_serves_all_heads_of_a_layer():
    rows = random_rows(SHAPE, 60, batch=3, q_len=60)
    layer, held, _ = walk(preset("tova", capacity=16), SHAPE, rows, 30)
    assert all(heads[0] == heads[1] for step in held for heads in step)
    assert layer.rows.whole.length == 16


def test_it_is_snapkv_of_one_query_up_to_the_window_that_snapkv_protects():
    rows = random_rows(SHAPE, 50, q_len=50)
    _, held, _ = walk(preset("tova", capacity=12), SHAPE, rows, 50)
    layer, _, _ = walk(preset("snapkv", capacity=50, window=1, kernel=1), SHAPE, rows, 50)
    scores = layer.layer.eviction.evictor.scores(layer.rows.whole, layer.call, None)[0].mean(0)
    assert held[-1][0][0] == sorted(scores.topk(12).indices.tolist())


def test_not_even_the_newest_row_is_protected():
    query, key, value = random_rows(SHAPE, 40, q_len=40)
    key[:, :, -1] = -query[:, ::3, -1] * 10  # the last row is what its own query likes least
    query = query[:, ::3].repeat_interleave(3, 1)
    _, held, _ = walk(preset("tova", capacity=12), SHAPE, (query, key, value), 40)
    assert 39 not in held[-1][0][0]


def test_burst_waits_and_lets_one_query_decide():
    rows = random_rows(SHAPE, 60, q_len=60)
    _, held, _ = walk(preset("tova", capacity=20, burst=5), SHAPE, rows, 30)
    sizes = [len(step[0][0]) for step in held]
    assert sizes[:8] == [20, 21, 22, 23, 24, 25, 20, 21]


def test_weights_that_come_for_free_judge_alike():
    rows = random_rows(SHAPE, 41, q_len=41)
    layer, _, _ = walk(preset("tova", capacity=100), SHAPE, rows, 40)
    own, cache = layer.layer.eviction.evictor, layer.rows.whole
    free = own.scores(cache, layer.call, None)
    assert cache.chosen
    cache.chosen.clear()
    torch.testing.assert_close(free, own.scores(cache, layer.call, None))


def test_weights_of_a_step_do_not_judge_the_rows_of_the_next_forward():
    rows = random_rows(SHAPE, 50, q_len=50)
    policy = preset("tova", capacity=45)
    layer = DrivenLayer(policy, SHAPE)
    for start, stop in ((0, 40), (40, 41), (41, 50)):
        layer.attend(*pieces(rows, start, stop))
    whole = walk(policy, SHAPE, rows, 50)[1][-1]
    assert layer.positions() == whole


def test_a_step_of_padding_is_nobodys_last_query():
    # Row 1 has ended; row 0 goes on, and brings the cache over its capacity.
    rows = random_rows(SHAPE, 34, batch=2, q_len=34)
    valid = torch.ones(2, 34, dtype=torch.bool)
    valid[1, 30:] = False
    policy = preset("tova", capacity=25, burst=8)
    layer, held, _ = walk(policy, SHAPE, rows, 30, valid=valid)
    own = layer.layer.eviction.evictor.scores(layer.rows.whole, layer.call, valid_of(layer, valid))
    query, key, _ = rows
    kept = [p for p in held[-1][1][0] if p < 30]
    weights = [
        shares(query[1, h : h + 1, 29], key[1, h // 3, kept], scaling_of(SHAPE)) for h in range(6)
    ]
    torch.testing.assert_close(own[1, 0, : len(kept)].double(), torch.cat(weights).mean(0))


def valid_of(layer, valid):
    """Which rows held are no padding, bool [batch, kv_heads, rows]."""
    places = layer.rows.whole.positions.long()
    return valid[:, None].expand(-1, 2, -1).gather(2, places)


def test_policies_with_it_survive_json():
    policy = preset("tova", capacity=99, burst=3)
    assert Policy.from_json(policy.to_json()) == policy
