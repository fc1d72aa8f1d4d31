"""SnapKV: the definition by loops, and what released code gets wrong."""

import pytest
import torch
from stepping import pieces, visible_of

from loki_attn.errors import BudgetError, PolicyError
from loki_attn.evict.snapkv import SnapKV
from loki_attn.policy import Policy, preset
from loki_attn.testing import DrivenLayer, layer_shape, random_rows

SHAPE = layer_shape(6, 2, 16)
TOKENS, CAPACITY, WINDOW = 60, 20, 6


def prompt(tokens=TOKENS, *, batch=2, seed=0, dtype=torch.float32):
    """Rows whose attention is far from even."""
    query, key, value = random_rows(
        SHAPE, tokens, batch=batch, q_len=tokens, seed=seed, dtype=dtype
    )
    return query * 3, key, value


def driven(rows, *, valid=None, chunks=(), **more):
    policy = preset("snapkv", **{"capacity": CAPACITY, "window": WINDOW, **more})
    layer = DrivenLayer(policy, SHAPE)
    layer.prompt(*rows, valid, chunks=chunks)
    return layer


def naive(rows, *, window=WINDOW, kernel=7, pooling="max", reduce="mean", capacity=CAPACITY):
    """What every KV head keeps, by loops over heads and rows."""
    query, key, _ = (part.double() for part in rows)
    length, found = key.shape[2], []
    for b in range(key.shape[0]):
        found.append([])
        for h in range(key.shape[1]):
            asked = query[b, 3 * h : 3 * h + 3, -window:]
            logits = asked @ key[b, h].T * SHAPE.head_dim**-0.5
            hidden = torch.ones(window, length).triu(length - window + 1).bool()
            received = logits.masked_fill(hidden, float("-inf")).softmax(-1).sum(1)
            prefix = getattr(received, reduce if reduce != "max" else "amax")(0)[:-window]
            reach, how = kernel // 2, torch.max if pooling == "max" else torch.mean
            judged = [
                float(how(prefix[max(0, i - reach) : i + reach + 1]))
                for i in range(length - window)
            ]
            order = sorted(range(length - window), key=lambda i: (-judged[i], i))
            best = sorted(order[: capacity - window])
            found[-1].append([*best, *range(length - window, length)])
    return found


@pytest.mark.parametrize("pooling", ["avg", "max"])
@pytest.mark.parametrize("kernel", [1, 5, 7])
def test_what_stays_is_what_the_definition_says(kernel, pooling):
    rows = prompt()
    layer = driven(rows, kernel=kernel, pooling=pooling)
    assert layer.positions() == naive(rows, kernel=kernel, pooling=pooling)


@pytest.mark.parametrize("reduce", ["mean", "sum", "max"])
def test_a_group_agrees_as_it_is_told(reduce):
    rows = prompt()
    layer = driven(rows, kernel=5, pooling="avg", reduce=reduce)
    assert layer.positions() == naive(rows, kernel=5, pooling="avg", reduce=reduce)


def test_prompts_within_the_capacity_are_untouched():
    rows = prompt(CAPACITY)
    layer = driven(rows)
    assert layer.positions() == [[list(range(CAPACITY))] * 2] * 2
    assert torch.equal(layer.rows.whole.keys, rows[1])


def test_prompts_shorter_than_the_window_are_untouched():
    assert driven(prompt(WINDOW - 2)).positions() == [[list(range(WINDOW - 2))] * 2] * 2


def test_the_capacity_counts_the_window_which_stays_bit_by_bit_and_last():
    rows = prompt()
    cache = driven(rows).rows.whole
    assert cache.length == CAPACITY
    assert torch.equal(cache.keys[:, :, -WINDOW:], rows[1][:, :, -WINDOW:])
    assert torch.equal(cache.values[:, :, -WINDOW:], rows[2][:, :, -WINDOW:])


def test_rows_stay_in_order_and_belong_to_their_positions():
    _, key, _ = rows = prompt()
    cache = driven(rows).rows.whole
    places = cache.positions.long()
    assert bool((places[..., 1:] > places[..., :-1]).all())
    own = key.gather(2, places[..., None].expand(*places.shape, 16))
    assert torch.equal(cache.keys, own)


def test_kv_heads_are_stored_once_under_grouped_queries():
    assert driven(prompt()).rows.whole.keys.shape == (2, 2, CAPACITY, 16)


def test_all_queries_and_no_pooling_rank_as_h2o_does_after_a_prompt():
    rows = prompt()
    everything = preset(
        "snapkv", capacity=TOKENS, window=TOKENS, kernel=1, reduce="sum", when="prompt"
    )
    snapkv = DrivenLayer(everything, SHAPE)
    h2o = DrivenLayer(preset("h2o", capacity=TOKENS), SHAPE)
    scores = []
    for layer in (snapkv, h2o):
        layer.prompt(*rows)
        own = layer.layer.eviction.evictor
        scores.append(own.scores(layer.rows.whole, layer.call, None))
    torch.testing.assert_close(*scores)


def test_the_window_lends_nothing_to_its_neighbours():
    # Every query of the window looks at the window's first row, and a little at row 10.
    key = torch.zeros(1, 2, 40, 16)
    key[:, :, 36, 0], key[:, :, 10, 0] = 20.0, 15.0
    query = torch.zeros(1, 6, 40, 16)
    query[..., 0] = 4.0
    layer = driven((query, key, torch.zeros_like(key)), window=4, kernel=5, capacity=9)
    assert layer.positions()[0][0] == [8, 9, 10, 11, 12, 36, 37, 38, 39]


def test_a_common_turn_of_queries_and_keys_changes_nothing():
    query, key, value = prompt(dtype=torch.float64)
    draw = torch.Generator().manual_seed(3)
    turn = torch.linalg.qr(torch.randn(16, 16, generator=draw, dtype=torch.float64)).Q
    plain, turned = driven((query, key, value)), driven((query @ turn, key @ turn, value))
    assert turned.positions() == plain.positions()


@pytest.mark.parametrize("chunks", [(30,), (1, 7, 58), (55, 57)])
def test_a_prompt_in_chunks_keeps_the_same_if_the_last_one_is_waited_for(chunks):
    rows = prompt(TOKENS + 1)
    found = []
    for cut in ((), chunks):
        policy = preset("snapkv", capacity=CAPACITY, window=WINDOW, when="prompt")
        layer = DrivenLayer(policy, SHAPE)
        layer.prompt(*pieces(rows, 0, TOKENS), chunks=cut)
        assert layer.rows.longest == TOKENS
        layer.attend(*pieces(rows, TOKENS, TOKENS + 1))
        found.append(layer.positions())
    assert found[0] == found[1]
    assert all(len(head) == CAPACITY for row in found[0] for head in row)


def test_chunks_that_evict_one_by_one_stay_within_the_budget():
    layer = driven(prompt(), chunks=(25, 40, 52))
    assert [len(head) for row in layer.positions() for head in row] == [CAPACITY] * 4
    assert all(head[-WINDOW:] == list(range(54, 60)) for row in layer.positions() for head in row)


@pytest.mark.parametrize("pooling", ["avg", "max"])
def test_padding_before_a_prompt_changes_nothing(pooling):
    query, key, value = prompt()
    valid = torch.ones(2, TOKENS, dtype=torch.bool)
    valid[1, :15] = False
    key[1, :, :15], value[1, :, :15] = float("nan"), 1e9
    together = driven((query, key, value), valid=valid, pooling=pooling).positions()
    alone = driven([part[1:, :, 15:] for part in (query, key, value)], pooling=pooling)
    assert [[p - 15 for p in head] for head in together[1]] == alone.positions()[0]
    other = driven([part[:1] for part in (query, key, value)], pooling=pooling)
    assert together[0] == other.positions()[0]


def test_batch_rows_do_not_know_each_other():
    rows = prompt(batch=3)
    together = driven(rows).positions()
    assert together == [driven([part[b : b + 1] for part in rows]).positions()[0] for b in range(3)]


def test_the_order_of_kv_heads_does_not_matter():
    query, key, value = prompt()
    turned = query.view(2, 2, 3, TOKENS, 16).flip(1).flatten(1, 2), key.flip(1), value.flip(1)
    plain = driven((query, key, value)).positions()
    assert driven(turned).positions() == [row[::-1] for row in plain]


def test_a_cache_that_was_reset_remembers_nothing():
    layer = driven(prompt(seed=1))
    layer.rows.reset()
    layer.prompt(*prompt(seed=2))
    assert layer.positions() == driven(prompt(seed=2)).positions()


def test_a_second_prompt_is_judged_by_its_own_queries():
    first, second = prompt(), prompt(30, seed=5)
    layer = driven(first)
    kept = layer.positions()
    layer.prompt(*second)
    for row, before in zip(layer.positions(), kept, strict=True):
        for head, old in zip(row, before, strict=True):
            assert len(head) == CAPACITY
            assert set(head) <= {*old, *range(TOKENS, TOKENS + 30)}
            assert head[-WINDOW:] == list(range(TOKENS + 24, TOKENS + 30))


def test_decoding_appends_and_drops_nothing_by_default():
    rows = prompt(TOKENS + 3)
    layer = driven(pieces(rows, 0, TOKENS))
    for token in range(TOKENS, TOKENS + 3):
        layer.attend(*pieces(rows, token, token + 1), visible_of(None, token, token + 1))
    assert [len(head) for row in layer.positions() for head in row] == [CAPACITY + 3] * 4


def test_memory_falls_with_the_rows():
    layer = driven(prompt(640), capacity=32)
    rows = 2 * 2 * 32 * (16 + 16) * 4
    assert layer.rows.nbytes() < 1.5 * rows


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"window": 0}, "at least one query, got 0"),
        ({"kernel": 4}, "odd number of rows, got kernel=4"),
        ({"kernel": -1}, "odd number of rows, got kernel=-1"),
    ],
)
def test_windows_and_kernels_that_judge_nothing_are_refused(fields, message):
    with pytest.raises(PolicyError, match=message):
        SnapKV(**fields)


def test_a_capacity_below_the_window_is_refused():
    with pytest.raises(BudgetError, match="capacity=8 is less than the rows that always stay"):
        preset("snapkv", capacity=8)


def test_the_preset_is_the_longbench_configuration():
    policy = preset("snapkv")
    assert policy.evict == SnapKV(window=32, kernel=7, pooling="max")
    assert policy.keep.capacity == 2048
    assert Policy.from_json(policy.to_json()) == policy
