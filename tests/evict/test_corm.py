"""CORM: rows that mattered to none of the last queries go."""

import pytest
import torch
from stepping import pieces, scaling_of, shares, simulate, visible_of, walk

from loki_attn.cache import LayerCache
from loki_attn.errors import PolicyError
from loki_attn.evict.base import Attended
from loki_attn.evict.corm import CORM
from loki_attn.policy import Policy, preset
from loki_attn.testing import DrivenLayer, layer_shape, random_rows
from loki_attn.types import AttentionCall

SHAPE = layer_shape(6, 2, 16)


class Naive:
    """One head: for every query that came, the positions that mattered to it."""

    def __init__(self, queries, window):
        self.queries, self.window = queries, window
        self.important = []

    def see(self, token, held, query, keys):
        del token
        found = shares(query, keys[held], scaling_of(SHAPE))
        heads = (found >= 1 / len(held)).any(0).tolist()
        self.important.append({p for p, yes in zip(held, heads, strict=True) if yes})

    def drop(self, held, token):
        lately = set().union(*self.important[-self.queries :])
        return [p for p in held if p in lately or p > token - self.window]


def sharp(rows, factor=3.0):
    """Rows whose queries attend to few of them."""
    query, key, value = rows
    return query * factor, key, value


@pytest.mark.parametrize(
    ("queries", "window"), [(4, 4), (3, 10), (10, 3), (32, 5), (33, 5), (1, 0)]
)
def test_it_is_the_loop_over_queries(queries, window):
    rows = sharp(random_rows(SHAPE, 64, batch=2, q_len=64), 6.0)
    policy = preset("corm", queries=queries, **{"evict.window": window})

    _, held, _ = walk(policy, SHAPE, rows, 40)

    assert held == simulate(rows, 40, lambda b, h: Naive(queries, window))


def test_chunks_of_a_prompt_write_the_same_bits():
    rows = sharp(random_rows(SHAPE, 90, batch=2, q_len=90), 10.0)
    policy = preset("corm", queries=12, when="prompt", **{"evict.window": 8})
    once = walk(policy, SHAPE, rows, 80)
    split = walk(policy, SHAPE, rows, 80, chunks=(7, 40, 72, 76))
    assert split[1][4:] == once[1]
    assert len(once[1][1][0][0]) < 81


def test_heads_keep_as_many_rows_as_matter_to_them():
    rows = sharp(random_rows(SHAPE, 80, q_len=80))
    layer, held, _ = walk(preset("corm", queries=4, **{"evict.window": 4}), SHAPE, rows, 40)
    sizes = [len(head) for head in held[-1][0]]
    assert sizes[0] != sizes[1]
    assert layer.rows.nbytes() < walk(preset("dense"), SHAPE, rows, 40)[0].rows.nbytes()


def test_uniform_attention_drops_nothing():
    query, key, value = random_rows(SHAPE, 200, q_len=200)
    for alike in (torch.zeros_like(key), key[:, :, :1].expand_as(key)):
        layer, _, _ = walk(
            preset("corm", queries=2, **{"evict.window": 0}), SHAPE, (query, alike, value), 150
        )
        assert layer.rows.longest == 200


def test_every_query_finds_a_row_important_so_no_head_is_left_empty():
    # Also where a sink logit takes nearly all of the attention.
    rows = sharp(random_rows(SHAPE, 60, batch=2, q_len=60), 20.0)
    call = AttentionCall(scaling=0.25, sink_logits=torch.full((6,), 50.0))
    policy = preset("corm", queries=1, **{"evict.window": 0})
    _, held, _ = walk(policy, SHAPE, rows, 30, call=call)
    assert min(len(head) for step in held for row in step for head in row) >= 1
    # A group of three heads has three favourites at most, where attention is this sharp.
    assert min(len(head) for step in held for row in step for head in row) <= 3


def test_a_sink_logit_takes_no_share():
    rows = sharp(random_rows(SHAPE, 50, q_len=50))
    policy = preset("corm", queries=4, **{"evict.window": 4})
    plain = AttentionCall(scaling=0.25)
    sinking = AttentionCall(scaling=0.25, sink_logits=torch.full((6,), 50.0))
    held = [walk(policy, SHAPE, rows, 30, call=call)[1] for call in (plain, sinking)]
    assert held[0] == held[1]


def test_the_threshold_counts_the_rows_that_are_there():
    # After the drop a query sees two rows, and 0.45 of the attention is below a half.
    shape = layer_shape(1, 1, 4)
    cache = LayerCache(marks=CORM(queries=1, window=0).bind(None).marks())
    key = torch.zeros(1, 1, 2, 4)
    key[..., 1, 0] = torch.log(torch.tensor(0.55 / 0.45))
    cache.append(key, key, positions=torch.tensor([[0, 9]]))
    cache.see(10)
    evictor = CORM(queries=1, window=0).bind(None)
    query = torch.eye(4)[None, None, :1]
    evictor.observe(cache, Attended(query=query, call=AttentionCall(scaling=1.0)))
    assert shape.group == 1
    assert evictor.scores(cache, AttentionCall(scaling=1.0), None).tolist() == [[[0.0, 1.0]]]


def test_a_window_of_the_whole_text_is_dense():
    rows = sharp(random_rows(SHAPE, 60, q_len=60))
    layer, _, outs = walk(preset("corm", queries=2, **{"evict.window": 60}), SHAPE, rows, 30)
    assert layer.rows.longest == 60
    assert torch.equal(outs, walk(preset("dense"), SHAPE, rows, 30)[2])


def test_a_query_marks_one_bit_per_row_and_word_31_has_its_sign():
    # 32 queries fill a word of 32 bits, the highest of which is the sign.
    query, key, value = random_rows(SHAPE, 64, q_len=64)
    policy = preset("corm", queries=32, **{"evict.window": 64})
    layer, _, _ = walk(policy, SHAPE, (query, torch.zeros_like(key), value), 64)
    bits = layer.rows.whole.plane("important")
    assert bits.shape == (1, 2, 64, 1)
    assert bits.dtype == torch.int32
    assert bool((bits[:, :, :33] == -1).all())
    own = layer.layer.eviction.evictor
    counts = own.scores(layer.rows.whole, layer.call, None)[0, 0]
    assert counts.tolist() == [32.0] * 33 + [float(n) for n in range(31, 0, -1)]


@pytest.mark.parametrize(("queries", "size"), [(1, 4), (32, 4), (33, 8), (256, 32)])
def test_bits_are_packed(queries, size):
    rows = random_rows(SHAPE, 10, q_len=10)
    layer, _, _ = walk(preset("corm", queries=queries), SHAPE, rows, 10)
    assert layer.rows.whole.row_bytes("important") == size


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_asks_nothing_and_takes_no_place_in_the_ring(side):
    tokens, pad = 60, 17
    rows = sharp(random_rows(SHAPE, tokens, batch=2, q_len=tokens))
    valid = torch.ones(2, tokens, dtype=torch.bool)
    real = slice(pad, None) if side == "left" else slice(0, tokens - pad)
    valid[1] = False
    valid[1, real] = True
    policy = preset("corm", queries=6, **{"evict.window": 3})
    layer = DrivenLayer(policy, SHAPE)
    layer.attend(*rows, visible_of(valid, 0, tokens))
    alone = DrivenLayer(policy, SHAPE)
    alone.attend(*[part[1:, :, real] for part in rows])
    shift = pad if side == "left" else 0
    kept = [[p - shift for p in head if bool(valid[1, p])] for head in layer.positions()[1]]
    assert kept == alone.positions()[0]


def test_padding_between_turns_leaves_the_ring_as_it_was():
    # The row that was padded must forget its oldest queries first, not others.
    rows = sharp(random_rows(SHAPE, 60, batch=2, q_len=60))
    valid = torch.ones(2, 60, dtype=torch.bool)
    valid[1, 30:34] = False
    policy = preset("corm", queries=6, **{"evict.window": 3})
    padded, alone = DrivenLayer(policy, SHAPE), DrivenLayer(policy, SHAPE)
    real = [part[1:, :, valid[1]] for part in rows]
    for start, stop in ((0, 34), *((t, t + 1) for t in range(34, 60))):
        padded.attend(*pieces(rows, start, stop), visible_of(valid, start, stop))
        alone.attend(*pieces(real, start and start - 4, stop - 4))
        kept = [[p - 4 * (p >= 34) for p in head] for head in padded.positions()[1]]
        assert kept == alone.positions()[0]


def test_a_turn_of_padding_longer_than_the_ring_drops_nothing_by_itself():
    rows = sharp(random_rows(SHAPE, 60, batch=2, q_len=60))
    valid = torch.ones(2, 60, dtype=torch.bool)
    valid[1, 40:] = False
    layer = DrivenLayer(preset("corm", queries=4, **{"evict.window": 2}), SHAPE)
    layer.attend(*pieces(rows, 0, 40))
    before = layer.positions()[1]
    layer.attend(*pieces(rows, 40, 60), visible_of(valid, 40, 60))
    assert [[p for p in head if p < 40] for head in layer.positions()[1]] == before


def test_a_capacity_keeps_what_mattered_most():
    rows = sharp(random_rows(SHAPE, 60, q_len=60))
    free = preset("corm", queries=16, **{"evict.window": 4})
    bound = preset("corm", queries=16, capacity=10, **{"evict.window": 4})
    layer, held, _ = walk(free, SHAPE, rows, 60)
    own = layer.layer.eviction.evictor
    marks = DrivenLayer(preset("corm", queries=16, **{"evict.window": 60}), SHAPE)
    marks.attend(*rows)
    scores = own.scores(marks.rows.whole, layer.call, None)[0]
    kept = walk(bound, SHAPE, rows, 60)[1][-1][0]
    for head in range(2):
        last = list(range(56, 60))
        others = sorted(range(56), key=lambda p: (-scores[head, p], p))
        assert kept[head] == sorted(others[:6]) + last
        assert set(kept[head]) <= set(held[-1][0][head])


def test_bits_go_with_their_rows():
    rows = sharp(random_rows(SHAPE, 50, q_len=50))
    layer, _, _ = walk(preset("corm", queries=8, **{"evict.window": 4}), SHAPE, rows, 40)
    for shard in layer.rows:
        assert shard.cache.plane("important").shape[2] == shard.cache.length


def test_a_policy_holds_no_state_of_a_request():
    rows, others = (sharp(random_rows(SHAPE, 60, q_len=60, seed=s)) for s in (0, 1))
    policy = preset("corm", queries=5, **{"evict.window": 5})
    first = walk(policy, SHAPE, rows, 30)[1]
    walk(policy, SHAPE, others, 33)
    assert walk(policy, SHAPE, rows, 30)[1] == first


def test_judges_that_are_none_are_refused():
    with pytest.raises(PolicyError, match="got queries=0, window=256"):
        CORM(queries=0)
    with pytest.raises(PolicyError, match="got queries=256, window=-1"):
        CORM(window=-1)


def test_policies_with_it_survive_json():
    policy = preset("corm", queries=128)
    assert Policy.from_json(policy.to_json()) == policy
