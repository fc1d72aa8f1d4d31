"""KVzip: the definition by loops, rows that nothing has judged, and exact amounts."""

from dataclasses import replace

import pytest
import torch
from stepping import pieces

from loki_attn.errors import CacheError, PolicyError
from loki_attn.evict.kvzip import KVzip, judge
from loki_attn.kernels import ops
from loki_attn.policy import Policy, methods, preset
from loki_attn.select.loki import Loki
from loki_attn.testing import DrivenLayer, layer_shape, random_rows, tiny_basis
from loki_attn.types import AttentionCall

SHAPE = layer_shape(6, 3, 16)
TOKENS, REPEATED = 40, 14
FIRST = 3


def texts(batch=2, seed=0, shape=SHAPE):
    """A prompt, and texts that repeat it, whose attention is far from even."""
    query, key, value = random_rows(
        shape, TOKENS + 2 * REPEATED, batch=batch, q_len=TOKENS + 2 * REPEATED, seed=seed
    )
    return query * 2, key, value


def policy(**more):
    return preset("kvzip", **{"allocate": "uniform", "keep_first": FIRST, **more})


def zipped(rows, chunks=((0, TOKENS),), *, shape=SHAPE, num_layers=1, call=None, **more):
    """A layer whose prompt was read, and repeated in these chunks; nothing is evicted yet."""
    layer = DrivenLayer(policy(**more), shape, num_layers=num_layers, call=call)
    layer.prompt(*pieces(rows, 0, TOKENS))
    for number, (start, stop) in enumerate(chunks):
        repeat(layer, rows, slice(start, stop), TOKENS + number * REPEATED)
    return layer


def repeat(layer, rows, chunk, begin):
    """Read the text from `begin` on as a repetition of a chunk, and take it back."""
    query, key, value = pieces(rows, begin, begin + REPEATED)
    layer.rows.append(key, value)
    asked = layer.layer.selector.query_rows(query)
    keep_first = layer.layer.eviction.budget.keep_first
    judge(layer.rows.whole, asked, layer.call, chunk, keep_first)
    layer.rows.truncate(TOKENS)


def marks(layer):
    return layer.rows.whole.plane("read_in_repeating")


def naive(rows, chunk, begin, first=FIRST, call=None):
    """The largest weight of every row of a chunk, head by head, [batch, kv_heads, rows]."""
    start, stop = chunk
    query, key, _ = (part.double() for part in rows)
    batch, kv_heads = key.shape[:2]
    group = query.shape[1] // kv_heads
    others = [*range(min(first, start)), *range(start, stop)]
    held = [*others, *range(begin, begin + REPEATED)]
    hidden = torch.ones(REPEATED, len(held)).triu(len(others) + 1).bool()
    found = key.new_zeros(batch, kv_heads, stop - start)
    for b in range(batch):
        for head in range(query.shape[1]):
            asked = query[b, head, begin : begin + REPEATED]
            logits = asked @ key[b, head // group, held].T * SHAPE.head_dim**-0.5
            logits = logits.masked_fill(hidden, float("-inf"))
            if call is not None:
                sink = call.sink_logits[head].double().expand(REPEATED, 1)
                logits = torch.cat([logits, sink], 1)
            largest = logits.softmax(1).amax(0)[min(first, start) : len(others)]
            found[b, head // group] = found[b, head // group].maximum(largest)
    return found


CHUNKS = [[(0, TOKENS)], [(0, 25), (25, TOKENS)]]


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("first", [0, FIRST])
def test_a_score_is_the_largest_weight_over_queries_and_the_group(chunks, first):
    """Among the first rows, the chunk and the text that repeats it, not the whole cache."""
    rows = texts()
    layer = zipped(rows, chunks, keep_first=first)
    for number, (start, stop) in enumerate(chunks):
        expected = naive(rows, (start, stop), TOKENS + number * REPEATED, first)
        torch.testing.assert_close(
            marks(layer)[:, :, start:stop], expected.float(), rtol=1e-4, atol=1e-6
        )


def test_sink_logits_join_the_denominator():
    call = AttentionCall(scaling=SHAPE.head_dim**-0.5, sink_logits=torch.linspace(-1.0, 3.0, 6))
    rows = texts()
    expected = naive(rows, (0, TOKENS), TOKENS, call=call)
    torch.testing.assert_close(
        marks(zipped(rows, call=call)), expected.float(), rtol=1e-4, atol=1e-6
    )


def test_scores_are_above_0_and_at_most_1():
    layer = zipped(texts(), [(0, 20), (20, TOKENS)])
    own = layer.layer.eviction.evictor
    scores = own.scores(layer.rows.whole, layer.call, None)
    assert float(scores.min()) > 0
    assert float(scores.max()) <= 1


def test_the_best_of_each_head_stay_and_the_first_rows():
    rows = texts()
    layer = zipped(rows, capacity=11)
    layer.evict()
    order = naive(rows, (0, TOKENS), TOKENS)[..., FIRST:].argsort(-1, descending=True) + FIRST
    best = order[..., : 11 - FIRST].sort(-1).values.tolist()
    first = list(range(FIRST))
    assert layer.positions() == [[first + head for head in row] for row in best]
    places = layer.rows.whole.positions.long()[..., None].expand(-1, -1, -1, 16)
    assert torch.equal(layer.rows.whole.keys, rows[1].gather(2, places))


def together(rows_of_layers, **more):
    """What layers that share one budget keep."""
    count = len(rows_of_layers)
    layers = [
        zipped(rows, shape=replace(SHAPE, index=i), num_layers=count, **more)
        for i, rows in enumerate(rows_of_layers)
    ]
    DrivenLayer.evict_all(layers)
    return [layer.positions() for layer in layers]


def test_one_threshold_for_all_layers_and_heads():
    drawn = [texts(seed=seed) for seed in (1, 2)]
    kept = together(drawn, keep_share=0.3, keep_first=0, allocate="global_rows")
    scores = [naive(rows, (0, TOKENS), TOKENS, 0).tolist() for rows in drawn]
    for b in range(2):
        ranked = sorted(
            (-scores[layer][b][h][p], layer, h, p)
            for layer in range(2)
            for h in range(3)
            for p in range(TOKENS)
        )
        best = {place[1:] for place in ranked[: 2 * 3 * 12]}
        ours = {(n, h, p) for n in range(2) for h in range(3) for p in kept[n][b][h]}
        assert ours == best


@pytest.mark.parametrize("allocate", ["uniform", "global_rows", "adaptive"])
def test_a_share_of_one_keeps_all(allocate):
    layer = zipped(texts(), keep_share=1.0, allocate=allocate)
    assert layer.evict() == 0
    assert layer.positions() == [[list(range(TOKENS))] * 3] * 2


@pytest.mark.parametrize("allocate", ["uniform", "global_rows", "adaptive"])
def test_a_smaller_share_is_within_a_larger_one(allocate):
    kept = []
    for share in (0.3, 0.5):
        layer = zipped(texts(), keep_share=share, allocate=allocate)
        layer.evict()
        kept.append(layer.positions())
        assert sum(map(len, kept[-1][0])) == 3 * share * TOKENS
    for few, many in zip(kept[0], kept[1], strict=True):
        for head, wider in zip(few, many, strict=True):
            assert set(head) < set(wider)


@pytest.mark.parametrize("allocate", ["uniform", "global_rows"])
def test_rows_that_tie_are_not_all_dropped(allocate):
    """Every weight is the same: the amount is exact all the same, and lower rows stay."""
    rows = [torch.zeros_like(part) for part in texts()]
    layer = zipped(rows, keep_share=0.3, allocate=allocate)
    assert float(marks(layer).max()) == float(marks(layer).min())
    layer.evict()
    assert layer.positions() == [[list(range(12))] * 3] * 2


def test_memory_falls_with_ragged_heads():
    rows = texts(batch=1)
    rows[0][:, :2] *= 4  # a head whose queries are sure
    layer = zipped(rows, keep_share=0.3, allocate="global_rows")
    before = layer.rows.nbytes()
    layer.evict()
    lengths = [len(head) for head in layer.positions()[0]]
    assert len(set(lengths)) > 1
    assert sum(lengths) == 3 * 12
    assert layer.rows.nbytes() < 0.6 * before


@pytest.mark.parametrize("allocate", sorted(methods("allocate").keys() - {"head_groups", "table"}))
def test_without_a_second_pass_nothing_goes(allocate):
    rows = texts()
    layer = DrivenLayer(policy(keep_share=0.3, allocate=allocate), SHAPE)
    layer.prompt(*pieces(rows, 0, TOKENS))
    for step in range(TOKENS, TOKENS + 3):
        layer.attend(*pieces(rows, step, step + 1))
    layer.evict()
    assert layer.positions() == [[list(range(TOKENS + 3))] * 3] * 2


@pytest.mark.parametrize("allocate", ["uniform", "global_rows"])
def test_later_turns_drop_nothing_more(allocate):
    """Questions come and go; what was kept of the context stays, and so do they."""
    rows = texts()
    layer = zipped(rows, keep_share=0.3, allocate=allocate)
    layer.evict()
    kept = layer.positions()
    layer.prompt(*pieces(rows, TOKENS, TOKENS + 9))
    layer.attend(*pieces(rows, TOKENS + 9, TOKENS + 10))
    layer.evict()
    added = list(range(TOKENS, TOKENS + 10))
    assert layer.positions() == [[head + added for head in row] for row in kept]


def test_a_batch_row_alone_is_the_row_in_the_batch():
    rows = texts(batch=3)
    whole = zipped(rows, CHUNKS[1], keep_share=0.3, allocate="global_rows")
    whole.evict()
    for b in range(3):
        alone = zipped([r[b : b + 1] for r in rows], CHUNKS[1], allocate="global_rows")
        alone.evict()
        assert alone.positions() == [whole.positions()[b]]


def test_kept_sets_follow_their_heads():
    query, key, value = texts()
    order = [2, 0, 1]
    plain = zipped((query, key, value), capacity=12)
    grouped = query.view(2, 3, 2, *query.shape[2:])[:, order].flatten(1, 2)
    turned = zipped((grouped, key[:, order], value[:, order]), capacity=12)
    plain.evict()
    turned.evict()
    assert turned.positions() == [[row[head] for head in order] for row in plain.positions()]


def test_a_group_is_judged_as_repeated_kv_heads_are():
    single = layer_shape(3, 3, 16)
    query, key, value = texts(shape=single)
    alone = zipped((query, key, value), shape=single)
    group = zipped((query.repeat_interleave(2, 1), key, value))
    torch.testing.assert_close(marks(alone), marks(group))


def test_a_common_turn_of_queries_and_keys_changes_nothing():
    rows = texts()
    plain = zipped(rows)
    turned = DrivenLayer(
        Policy(
            select=Loki(layout="rotated", rank=4),
            evict=KVzip(),
            keep=policy().keep,
        ),
        SHAPE,
        basis=tiny_basis(SHAPE),
    )
    turned.prompt(*pieces(rows, 0, TOKENS))
    repeat(turned, rows, slice(0, TOKENS), TOKENS)
    torch.testing.assert_close(marks(turned), marks(plain), rtol=1e-4, atol=1e-6)


def test_two_requests_in_a_row_are_two_fresh_ones():
    first, second = texts(seed=1), texts(seed=2)
    used = zipped(first, keep_share=0.3)
    used.rows.reset()
    used.turn.valid = used.turn.call = None
    used.prompt(*pieces(second, 0, TOKENS))
    assert bool(torch.isinf(marks(used)).all())
    repeat(used, second, slice(0, TOKENS), TOKENS)
    assert torch.equal(marks(used), marks(zipped(second, keep_share=0.3)))


def test_no_matrix_of_weights_and_no_copy_of_all_keys(monkeypatch):
    """What is read are the first rows, the chunk and the repeated text."""
    sizes, plain = [], ops().column_sums

    def seen(query, keys, *args, **kwargs):
        sizes.append((query.shape[2], keys.shape[2], kwargs["how"]))
        return plain(query, keys, *args, **kwargs)

    monkeypatch.setattr(ops(), "column_sums", seen)
    zipped(texts(), CHUNKS[1])
    assert sizes == [(REPEATED, 25 + REPEATED, "max"), (REPEATED, 18 + REPEATED, "max")]


@pytest.mark.parametrize("chunk", [(0, TOKENS + 1), (5, 5), (-1, 4)])
def test_chunks_that_are_not_of_the_prompt_are_refused(chunk):
    with pytest.raises(CacheError, match="of a prompt were to be judged, but it has 40"):
        zipped(texts(), [chunk])


@pytest.mark.parametrize(
    ("settings", "message"), [({"chunk": 0}, "at least one token"), ({"quote": -1}, "got -1")]
)
def test_settings_that_repeat_nothing_are_refused(settings, message):
    with pytest.raises(PolicyError, match=message):
        KVzip(**settings)


def test_the_preset_is_the_papers():
    found = preset("kvzip")
    assert found.keep.keep_share == 0.3
    assert (found.evict.chunk, found.allocate.method) == (2048, "global_rows")
    assert Policy.from_json(found.to_json()) == found
