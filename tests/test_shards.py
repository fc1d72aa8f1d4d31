"""LayerRows: layers whose heads hold different numbers of rows; memory really shrinks."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loki_attn import attention
from loki_attn.cache import LayerCache
from loki_attn.errors import CacheError
from loki_attn.eviction import keep_set
from loki_attn.policy import preset
from loki_attn.row_format import Mark
from loki_attn.shards import LayerRows
from loki_attn.testing import (
    DrivenLayer,
    layer_shape,
    plain_attention,
    random_rows,
    tiny_basis,
)
from loki_attn.types import AttentionCall

SHAPE = layer_shape(6, 3, 8, 6)
CALL = AttentionCall(scaling=8**-0.5)
MARKS = {"place": Mark(torch.int64)}
LOKI = preset("loki", rank=4, top_k=8)


class Model:
    """What a layer's rows must be: per batch row and head, positions and rows as plain lists."""

    def __init__(self, batch=2, heads=3):
        self.places = [[[] for _ in range(heads)] for _ in range(batch)]
        self.keys = [[[] for _ in range(heads)] for _ in range(batch)]
        self.seen = 0

    def append(self, key):
        for b, heads in enumerate(self.places):
            for h, places in enumerate(heads):
                places += range(self.seen, self.seen + key.shape[2])
                self.keys[b][h] += list(key[b, h])
        self.seen += key.shape[2]

    def keep(self, mask):
        for b, heads in enumerate(self.places):
            for h, places in enumerate(heads):
                left = [i for i in range(len(places)) if mask[b, h, i]]
                heads[h] = [places[i] for i in left]
                self.keys[b][h] = [self.keys[b][h][i] for i in left]

    def truncate(self, seen):
        for b, heads in enumerate(self.places):
            for h, places in enumerate(heads):
                count = sum(place < seen for place in places)
                heads[h], self.keys[b][h] = places[:count], self.keys[b][h][:count]
        self.seen = seen

    def take(self, rows):
        self.places = [[list(head) for head in self.places[row]] for row in rows]
        self.keys = [[list(head) for head in self.keys[row]] for row in rows]

    @property
    def lengths(self):
        return torch.tensor([[len(head) for head in heads] for heads in self.places])


def layer_rows(policy=None):
    """Rows with a plane per key, in a basis of their head, and a mark."""
    selector = attention.bind(policy or LOKI, SHAPE, 1, tiny_basis(SHAPE)).selector
    return LayerRows(LayerCache(selector, marks=MARKS), selector.narrowed)


def fill(rows, model, tokens, seed=0):
    batch = len(model.places)
    _, key, value = random_rows(SHAPE, tokens, batch=batch, seed=seed + model.seen)
    rows.append(key, value)
    model.append(key)
    for shard in rows:
        marks, places = shard.cache.plane("place"), shard.cache.positions
        marks[:, :, -tokens:] = places[:, :, -tokens:].long()


def masked(model, chance, seed):
    """A random mask that leaves every head a row."""
    lengths = model.lengths
    draw = torch.Generator().manual_seed(seed)
    mask = torch.rand(*lengths.shape, int(lengths.max()), generator=draw) < chance
    mask[..., 0] = True
    return mask & (torch.arange(mask.shape[-1]) < lengths[..., None])


def ragged(batch=2, tokens=40):
    """Rows whose heads hold 5, 9 and 9 of 40 tokens, in every batch row."""
    rows, model = layer_rows(), Model(batch)
    fill(rows, model, tokens)
    mask = torch.zeros(batch, 3, tokens, dtype=torch.bool)
    mask[:, 0, -5:] = mask[:, 1, :9] = mask[:, 2, 3:12] = True
    rows.keep(keep_set(mask))
    model.keep(mask)
    return rows, model


def assert_rows(rows, model):
    """Every shard holds the rows of the model, planes and marks beside them."""
    covered = torch.zeros(len(model.places), 3, dtype=torch.int64)
    basis = tiny_basis(SHAPE).layer(0)
    for shard in rows:
        batch = range(len(model.places)) if shard.batch is None else shard.batch.tolist()
        heads = range(3) if shard.heads is None else shard.heads.tolist()
        cache = shard.cache
        assert cache.seen == rows.seen == model.seen
        for i, b in enumerate(batch):
            for j, h in enumerate(heads):
                covered[b, h] += 1
                assert cache.positions[i, j].tolist() == model.places[b][h]
                assert cache.plane("place")[i, j].tolist() == model.places[b][h]
                assert torch.equal(cache.keys[i, j], torch.stack(model.keys[b][h]))
                lead = (cache.keys[i, j] @ basis.key_map[h, :, :4]) / cache.plane("lead_scale")[
                    i, j
                ].float()[:, None]
                assert bool((lead - cache.plane("lead")[i, j]).abs().max() < 0.51)
    assert bool((covered == 1).all())
    assert rows.longest == int(model.lengths.max())
    assert (rows.batch, rows.num_kv_heads) == (len(model.places), 3)
    assert rows.evicted == bool((model.lengths < model.seen).any())
    assert (rows.whole is None) == (len(rows.shards) > 1)


@given(data=st.data())
def test_any_order_of_operations_holds_the_rows_of_each_head(data):
    rows, model = layer_rows(), Model()
    fill(rows, model, data.draw(st.integers(1, 40)))
    for step in range(data.draw(st.integers(1, 6))):
        operations = ["append", "ragged", "even", "truncate", "take", "repeat"]
        match data.draw(st.sampled_from(operations)):
            case "append":
                fill(rows, model, data.draw(st.integers(1, 20)))
            case "ragged":
                mask = masked(model, data.draw(st.sampled_from([0.2, 0.8, 1.0])), step)
                rows.keep(keep_set(mask))
                model.keep(mask)
            case "even":
                kept = int(model.lengths.min())
                mask = torch.arange(int(model.lengths.max())) < kept
                mask = mask.expand(*model.lengths.shape, -1)
                rows.keep(keep_set(mask))
                model.keep(mask)
            case "truncate":
                first = max(head[0] for heads in model.places for head in heads)
                seen = data.draw(st.integers(first + 1, model.seen))
                rows.truncate(seen)
                model.truncate(seen)
            case "take":
                taken = data.draw(
                    st.lists(st.integers(0, len(model.places) - 1), min_size=1, max_size=4)
                )
                rows.select_batch(torch.tensor(taken))
                model.take(taken)
            case "repeat":
                if len(model.places) < 5:
                    rows.repeat_batch(2)
                    model.take([b for b in range(len(model.places)) for _ in range(2)])
        assert_rows(rows, model)


def test_heads_of_equal_length_share_a_cache():
    rows, model = ragged()
    assert [shard.heads.tolist() for shard in rows] == [[0], [1, 2]]
    assert [shard.batch for shard in rows] == [None, None]
    assert [shard.cache.length for shard in rows] == [5, 9]
    assert_rows(rows, model)


def test_batch_rows_that_differ_are_apart():
    rows, model = layer_rows(), Model()
    fill(rows, model, 20)
    mask = torch.ones(2, 3, 20, dtype=torch.bool)
    mask[1, :, 7:] = False
    rows.keep(keep_set(mask))
    model.keep(mask)
    assert [shard.batch.tolist() for shard in rows] == [[0], [1]]
    assert_rows(rows, model)
    rows.select_batch(torch.tensor([1]))
    model.take([1])
    assert rows.whole is not None
    assert_rows(rows, model)
    rows.select_batch(torch.tensor([0, 0, 0]))
    model.take([0, 0, 0])
    assert_rows(rows, model)


def test_a_head_that_keeps_everything_is_not_copied():
    rows, _ = ragged()
    place = rows.shards[1].cache.keys.data_ptr()
    mask = torch.ones(2, 3, 9, dtype=torch.bool)
    mask[:, 0, 2:] = False
    rows.keep(keep_set(mask))
    assert [shard.cache.length for shard in rows] == [2, 9]
    assert rows.shards[1].cache.keys.data_ptr() == place


def test_bytes_are_those_of_the_rows_held():
    """Whole tiles of 16 rows are the unit in which storage is given back."""
    rows, model = layer_rows(), Model()
    fill(rows, model, 640)
    each = rows.whole.row_bytes()
    assert rows.nbytes() == 640 * 6 * each
    mask = torch.zeros(2, 3, 640, dtype=torch.bool)
    mask[:, 0, :32] = mask[:, 1, :64] = mask[:, 2, :160] = True
    rows.keep(keep_set(mask))
    assert rows.nbytes() == 2 * (32 + 64 + 160) * each
    held = sum(
        storage.data.untyped_storage().nbytes()
        for shard in rows
        for storage in shard.cache._storage.values()
    )
    assert rows.nbytes() == held
    rows.reset()
    assert rows.nbytes() == 0


def test_a_reset_makes_the_layer_whole_again():
    rows, _ = ragged()
    rows.reset()
    assert rows.whole is not None
    assert (rows.seen, rows.evicted) == (0, False)
    model = Model(1)
    fill(rows, model, 6)
    assert_rows(rows, model)
    rows.truncate(0)
    assert rows.seen == 0


@pytest.mark.parametrize("seen", [38, 36])
def test_a_truncation_takes_tokens_back_wherever_they_were_evicted(seen):
    rows, model = layer_rows(), Model()
    fill(rows, model, 40)
    mask = torch.zeros(2, 3, 40, dtype=torch.bool)
    mask[:, 0, 30:] = mask[:, 1, :10] = mask[:, 2, ::4] = True
    rows.keep(keep_set(mask))
    model.keep(mask)
    rows.truncate(seen)
    model.truncate(seen)
    assert_rows(rows, model)
    fill(rows, model, 3)
    assert_rows(rows, model)
    assert all(head[-3:] == [seen, seen + 1, seen + 2] for row in model.places for head in row)


def test_what_was_remembered_of_truncated_tokens_is_forgotten_in_every_shard():
    """Where their rows were evicted already, too."""
    rows, _ = ragged()
    mask = torch.zeros(2, 3, 9, dtype=torch.bool)
    mask[:, :, :3] = True
    rows.keep(keep_set(mask))
    for shard in rows:
        shard.cache.memory["queries"] = torch.zeros(shard.cache.positions.shape[:2])
    lengths = [shard.cache.length for shard in rows]
    with pytest.raises(CacheError, match="evicted from a head"):
        rows.truncate(30)
    assert all("queries" in shard.cache.memory for shard in rows)
    rows.truncate(39)
    assert [shard.cache.length for shard in rows] == lengths
    assert all(shard.cache.memory == {} for shard in rows)


def test_refused():
    rows, model = ragged()
    before = [shard.cache.positions.clone() for shard in rows]
    with pytest.raises(CacheError, match="Cannot truncate 40 tokens to 41"):
        rows.truncate(41)
    with pytest.raises(CacheError, match="first 20 were evicted from a head; start a new cache"):
        rows.truncate(20)  # head 0 holds the last 5
    none = keep_set(torch.zeros(2, 3, 9, dtype=torch.bool))
    with pytest.raises(CacheError, match="must leave every KV head a row"):
        rows.keep(none)
    assert all(torch.equal(a, s.cache.positions) for a, s in zip(before, rows.shards, strict=True))
    assert_rows(rows, model)


def test_parts_are_put_together_with_a_fill_behind_the_short_ones():
    rows, model = ragged()
    whole = rows.together([shard.cache.positions for shard in rows], -1)
    assert whole.shape == (2, 3, 9)
    for b, heads in enumerate(model.places):
        for h, places in enumerate(heads):
            assert whole[b, h].tolist() == places + [-1] * (9 - len(places))
    flags = rows.together([shard.cache.positions >= 0 for shard in rows], False)
    assert flags.dtype == torch.bool
    assert flags.sum(-1).tolist() == [[5, 9, 9]] * 2
    flat = rows.together([shard.cache.positions[..., 0] for shard in rows], 0)
    assert flat.tolist() == [[35, 0, 3]] * 2
    wide = rows.together([shard.cache.keys for shard in rows], 0.0)
    assert wide.shape == (2, 3, 9, 8)


def test_queries_go_to_their_shard_and_come_back():
    rows, _ = ragged()
    query = torch.arange(12.0).reshape(2, 6, 1, 1)
    parts = [shard.of_queries(query, 3) for shard in rows]
    assert [part.flatten().tolist() for part in parts] == [
        [0, 1, 6, 7],
        [2, 3, 4, 5, 8, 9, 10, 11],
    ]
    back = torch.zeros_like(query)
    for shard, part in zip(rows, parts, strict=True):
        shard.into_queries(part, back, 3)
    assert torch.equal(back, query)


def test_what_is_common_to_batch_or_heads_is_not_split():
    shard = ragged()[0].shards[0]
    assert shard.of_rows(torch.zeros(1, 1, 4)).shape == (1, 1, 4)
    assert shard.of_rows(torch.zeros(2, 1, 4)).shape == (2, 1, 4)
    assert shard.of_rows(torch.zeros(2, 3, 4)).shape == (2, 1, 4)


@pytest.mark.parametrize("sinks", [None, torch.linspace(-1, 2, 6)], ids=["plain", "sinks"])
@pytest.mark.parametrize("q_len", [1, 4])
def test_attention_over_shards_is_attention_of_every_head_to_its_rows(q_len, sinks):
    """Against the textbook over all tokens, with the evicted ones masked."""
    call = AttentionCall(scaling=8**-0.5, sink_logits=sinks)
    driven = DrivenLayer(preset("dense"), SHAPE, call=call)
    query, key, value = random_rows(SHAPE, 40 + q_len, batch=2, q_len=40 + q_len)
    driven.prompt(query[:, :, :40], key[:, :, :40], value[:, :, :40])
    mask = torch.rand(2, 3, 40, generator=torch.Generator().manual_seed(3)) < 0.4
    driven.rows.keep(keep_set(mask))
    new = (rows[:, :, 40:] for rows in (query, key, value))
    valid = torch.ones(2, 40 + q_len, dtype=torch.bool)
    valid[1, :9] = False
    causal = torch.ones(q_len, 40 + q_len).tril(40).bool()
    visible = causal & valid[:, None, None]
    out = driven.attend(*new, visible)
    held = torch.cat([mask, torch.ones(2, 3, q_len, dtype=torch.bool)], 2)
    held = held.repeat_interleave(2, 1)[:, :, None] & visible
    truth = plain_attention(query[:, :, 40:].double(), key.double(), value.double(), held, call)
    torch.testing.assert_close(out, truth.float())
    assert driven.rows.whole is None
