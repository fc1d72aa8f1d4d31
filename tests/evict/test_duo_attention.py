"""DuoAttention: full heads keep everything, streaming heads sinks and recents; with Loki, too."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from stepping import pieces, walk

from loki_attn import attention
from loki_attn.attention import LayerPolicy
from loki_attn.basis import LayerBasis
from loki_attn.budget import Budget
from loki_attn.cache import LayerCache
from loki_attn.errors import BudgetError, PolicyError
from loki_attn.evict.base import Evictor
from loki_attn.evict.duo_attention import DuoAttention, full_by_gates
from loki_attn.policy import Policy, preset
from loki_attn.profile import Profile
from loki_attn.row_format import RowFormat
from loki_attn.serving import rows_for
from loki_attn.shards import LayerRows
from loki_attn.testing import (
    DrivenLayer,
    layer_shape,
    plain_attention,
    random_rows,
    tiny_basis,
)

SHAPE = layer_shape(6, 3, 16)
SINKS, RECENTS, PROMPT, TOKENS = 2, 6, 20, 44
BASIS = tiny_basis(SHAPE)


def duo(full=(1,), base="duo-attention", **more):
    """Small streaming heads; `full` are the full heads of the only layer."""
    own = {"burst": 0, "evict.sinks": SINKS, "evict.recents": RECENTS, "full_heads": (full,)}
    if base != "duo-attention":
        own |= {"evict": "duo_attention"}
    return preset(base, **own | more)


def loki(full=(1,), **more):
    return duo(full, "loki", rank=8, top_k=8, **{"budget.recents": 1, "budget.sinks": 1, **more})


def gates(*layers):
    return Profile(layers={i: {"gates": torch.tensor(gate)} for i, gate in enumerate(layers)})


def truth_at(rows, token, full, *, first=0):
    """The output of one token by the textbook: `first` is the first token that is no padding."""
    query, key, value = (part[:, :, first:].double() for part in rows)
    token -= first
    places = torch.arange(token + 1)
    near = (places < SINKS) | (places >= token - RECENTS)
    seen = torch.stack([torch.ones_like(near) if h in full else near for h in range(3)])
    mask = seen.repeat_interleave(2, 0)[None, :, None]
    known = (query[:, :, token : token + 1], key[:, :, : token + 1], value[:, :, : token + 1])
    return plain_attention(*known, mask, DrivenLayer(duo(), SHAPE).call)[:, :, 0]


def heads_of(rows, heads):
    """The rows of some KV heads, with their query heads."""
    query, key, value = rows
    asked = query.view(query.shape[0], 3, 2, *query.shape[2:])[:, heads].flatten(1, 2)
    return asked, key[:, heads], value[:, heads]


@pytest.mark.parametrize("full", [(), (1,), (0, 2), (0, 1, 2)])
def test_every_step_is_attention_to_what_the_kinds_of_heads_see(full):
    rows = random_rows(SHAPE, TOKENS, batch=2, q_len=TOKENS)
    _, held, outs = walk(duo(full), SHAPE, rows, PROMPT)
    for token in range(PROMPT, TOKENS):
        torch.testing.assert_close(
            outs[:, :, token].double(), truth_at(rows, token, full), rtol=1e-4, atol=1e-5
        )
    near = [*range(SINKS), *range(TOKENS - RECENTS, TOKENS)]
    every = list(range(TOKENS))
    assert held[-1] == [[every if head in full else near for head in range(3)]] * 2


def test_with_all_heads_full_it_is_dense():
    rows = random_rows(SHAPE, TOKENS, q_len=TOKENS)
    layer, _, outs = walk(duo((0, 1, 2)), SHAPE, rows, PROMPT)
    assert torch.equal(outs, walk(preset("dense"), SHAPE, rows, PROMPT)[2])
    assert not layer.rows.evicted


def test_with_no_full_head_it_is_streaming_llm_at_true_positions():
    rows = random_rows(SHAPE, TOKENS, batch=2, q_len=TOKENS)
    other = preset("streaming-keep", capacity=SINKS + RECENTS, **{"evict.sinks": SINKS})
    ours, theirs = (walk(policy, SHAPE, rows, PROMPT) for policy in (duo(()), other))
    assert ours[1] == theirs[1]
    assert torch.equal(ours[2], theirs[2])


def test_the_order_of_heads_does_not_matter():
    rows = random_rows(SHAPE, TOKENS, q_len=TOKENS)
    order = [2, 0, 1]
    straight = walk(duo((1,)), SHAPE, rows, PROMPT)[2]
    turned = walk(duo((order.index(1),)), SHAPE, heads_of(rows, order), PROMPT)[2]
    expected = heads_of((straight, *rows[1:]), order)[0]
    torch.testing.assert_close(turned, expected, rtol=1e-5, atol=1e-6)


def test_streaming_heads_do_not_depend_on_tokens_between_sinks_and_recents():
    rows = random_rows(SHAPE, TOKENS, q_len=TOKENS)
    other = [part.clone() for part in rows]
    for part in other[1:]:
        part[:, :, SINKS : TOKENS - RECENTS - 1] += 1.0
    outs = [walk(duo(), SHAPE, text, PROMPT)[2][:, :, -1] for text in (rows, other)]
    streaming, full = [0, 1, 4, 5], [2, 3]
    assert torch.equal(outs[0][:, streaming], outs[1][:, streaming])
    assert bool((outs[0][:, full] != outs[1][:, full]).any(-1).all())


def test_a_prompt_in_one_forward_is_dense_for_every_head():
    rows = random_rows(SHAPE, TOKENS, q_len=TOKENS)
    once = walk(duo(), SHAPE, rows, PROMPT)[2][:, :, :PROMPT]
    assert torch.equal(once, walk(preset("dense"), SHAPE, rows, PROMPT)[2][:, :, :PROMPT])


def test_of_a_chunk_streaming_heads_see_sinks_recents_and_the_chunk():
    rows = random_rows(SHAPE, 30, q_len=30)
    outs = walk(duo(), SHAPE, rows, 30, chunks=(12, 20))[2]
    call = DrivenLayer(duo(), SHAPE).call
    places = torch.arange(30)
    for start, stop in ((12, 20), (20, 30)):
        known = (places < SINKS) | (places >= start - RECENTS)
        near = known & (places <= places[start:stop, None])
        causal = places <= places[start:stop, None]
        mask = torch.stack([near, causal, near]).repeat_interleave(2, 0)[None]
        query, key, value = (part.double() for part in rows)
        truth = plain_attention(query[:, :, start:stop], key, value, mask, call)
        got = outs[:, :, start:stop].double()
        torch.testing.assert_close(got, truth, rtol=1e-4, atol=1e-5)


def test_chunks_differ_from_one_forward_unless_they_go_together():
    rows = random_rows(SHAPE, 40, q_len=40)
    once = walk(duo(), SHAPE, rows, 30)
    chunked = walk(duo(), SHAPE, rows, 30, chunks=(12, 20))
    full = [2, 3]
    assert not torch.allclose(chunked[2][:, :, 20:30], once[2][:, :, 20:30])
    torch.testing.assert_close(chunked[2][:, full], once[2][:, full])
    together = walk(duo(when="prompt"), SHAPE, rows, 30, chunks=(12, 20))
    torch.testing.assert_close(together[2][:, :, :30], once[2][:, :, :30])
    # The first step still reads everything; rows go behind it, and gather from then on.
    assert together[1][3] == once[1][1]
    assert len(together[1][-1][0][0]) == SINKS + RECENTS + 9


def test_rows_stay_as_they_are_at_their_true_positions():
    rows = random_rows(SHAPE, TOKENS, q_len=TOKENS)
    layer, _, _ = walk(duo(), SHAPE, rows, PROMPT)
    for shard in layer.rows:
        places = shard.cache.positions[0].long()
        for i, head in enumerate(shard.heads.tolist()):
            assert torch.equal(shard.cache.keys[0, i], rows[1][0, head, places[i]])
            assert torch.equal(shard.cache.values[0, i], rows[2][0, head, places[i]])


def test_memory_really_falls():
    rows = random_rows(SHAPE, 640, q_len=640)
    layer = DrivenLayer(duo(**{"evict.sinks": 16, "evict.recents": 48}), SHAPE)
    layer.attend(*rows)
    each = layer.rows.shards[0].cache.row_bytes()
    assert layer.rows.nbytes() == (640 + 2 * 64) * each
    assert [shard.heads.tolist() for shard in layer.rows] == [[0, 2], [1]]


@pytest.mark.parametrize("burst", [1, 5])
def test_a_burst_lets_rows_gather_before_they_go(burst):
    rows = random_rows(SHAPE, TOKENS, q_len=TOKENS)
    _, held, _ = walk(duo(burst=burst), SHAPE, rows, PROMPT)
    lengths = [len(step[0][0]) for step in held]
    assert lengths[0] == SINKS + RECENTS
    cycle = [SINKS + RECENTS + i for i in range(burst + 1)]
    assert lengths == [cycle[i % len(cycle)] for i in range(len(lengths))]
    assert all(len(step[0][1]) == PROMPT + i for i, step in enumerate(held))


def test_rows_are_not_judged_before_the_high_water(monkeypatch):
    rows = random_rows(SHAPE, 30, q_len=30)
    layer = DrivenLayer(duo(burst=4), SHAPE)
    layer.attend(*pieces(rows, 0, 20))
    judged = []
    kind = type(layer.layer.eviction.evictor)
    scores = kind.scores

    def judging(*args):
        judged.append(1)
        return scores(*args)

    monkeypatch.setattr(kind, "scores", judging)
    for token in range(20, 24):
        layer.attend(*pieces(rows, token, token + 1))
    assert not judged
    layer.attend(*pieces(rows, 24, 25))
    assert judged


@pytest.mark.parametrize("first", [5, 17], ids=["padded", "shorter than sinks and recents"])
def test_padding_is_no_sink_and_batch_rows_share_their_caches(first):
    rows = random_rows(SHAPE, TOKENS, batch=2, q_len=TOKENS)
    valid = torch.ones(2, TOKENS, dtype=torch.bool)
    valid[1, :first] = False
    for part in rows[1:]:
        part[1, :, :first] = float("nan")
    layer, _, outs = walk(duo(), SHAPE, rows, PROMPT, valid=valid)
    for token in range(PROMPT, TOKENS):
        for row, begin in ((0, 0), (1, first)):
            alone = [part[row : row + 1] for part in rows]
            truth = truth_at(alone, token, (1,), first=begin)
            got = outs[row : row + 1, :, token].double()
            torch.testing.assert_close(got, truth, rtol=1e-4, atol=1e-5)
    assert [shard.batch for shard in layer.rows] == [None, None]
    assert layer.positions()[1][0] == [first, first + 1, *range(38, 44)]


def test_requests_share_nothing():
    texts = [random_rows(SHAPE, TOKENS, q_len=TOKENS, seed=seed) for seed in (0, 1)]
    layers = [DrivenLayer(loki(), SHAPE, basis=BASIS) for _ in texts]
    layers[1].layer = layers[0].layer
    bounds = [(0, PROMPT), *((t, t + 1) for t in range(PROMPT, TOKENS))]
    for start, stop in bounds:
        how = "decode" if stop - start == 1 else "dense"
        last = [
            layer.attend(*pieces(text, start, stop), how=how)
            for layer, text in zip(layers, texts, strict=True)
        ]
    for out, text in zip(last, texts, strict=True):
        alone = walk(loki(), SHAPE, text, PROMPT, basis=BASIS, how="decode")[2]
        assert torch.equal(out, alone[:, :, -1:])


def test_beams_take_their_rows_along():
    rows = random_rows(SHAPE, TOKENS, batch=3, q_len=TOKENS)
    layer, _, _ = walk(duo(), SHAPE, pieces(rows, 0, 30), PROMPT)
    order = torch.tensor([2, 0, 0])
    layer.rows.select_batch(order)
    picked = [part[order] for part in rows]
    out = layer.attend(*pieces(picked, 30, 31))
    straight = walk(duo(), SHAPE, pieces(picked, 0, 31), PROMPT)[2]
    torch.testing.assert_close(out, straight[:, :, -1:])


def test_the_budget_may_protect_more():
    rows = random_rows(SHAPE, TOKENS, q_len=TOKENS)
    _, held, _ = walk(duo(keep_first=4, keep_last=9), SHAPE, rows, PROMPT)
    assert held[-1][0][0] == [*range(4), *range(TOKENS - 9, TOKENS)]


# Gates: which heads are full.


@given(
    layers=st.lists(
        st.lists(st.sampled_from([0.0, 0.5, 0.93, 0.97, 1.0]), min_size=1, max_size=5),
        min_size=1,
        max_size=6,
    ),
    sparsity=st.floats(0, 1),
)
def test_the_number_of_full_heads_is_exact_whatever_ties(layers, sparsity):
    table = {i: torch.tensor(layer) for i, layer in enumerate(layers)}
    full = full_by_gates(dict(reversed(table.items())), sparsity)
    flat = [(gate, i, h) for i, layer in enumerate(layers) for h, gate in enumerate(layer)]
    assert sum(int(marks.sum()) for marks in full.values()) == round((1 - sparsity) * len(flat))
    assert [marks.numel() for marks in full.values()] == [len(layer) for layer in layers]
    ranked = sorted(flat, key=lambda one: (-one[0], one[1], one[2]))
    kinds = [bool(full[i][h]) for _, i, h in ranked]
    assert kinds == sorted(kinds, reverse=True)


def test_the_share_is_of_all_layers_not_of_each():
    profile = gates([0.99, 0.98, 0.97], [0.93, 0.92, 0.94])
    for index, streams in ((0, [False] * 3), (1, [True] * 3)):
        shape = replace(SHAPE, index=index)
        bound = attention.bind(preset("duo-attention"), shape, 2, None, profile)
        assert bound.eviction.evictor.plain_heads().tolist() == streams


@pytest.mark.parametrize(
    ("sparsity", "full"), [(0.0, [0, 1, 2]), (0.34, [0, 2]), (0.67, [2]), (1.0, [])]
)
def test_the_quantile_decides_and_no_threshold(sparsity, full):
    policy = preset("duo-attention", sparsity=sparsity)
    layer = DrivenLayer(policy, SHAPE, profile=gates([0.96, 0.95, 0.99]))
    streams = layer.layer.eviction.evictor.plain_heads()
    assert (~streams).nonzero()[:, 0].tolist() == full


def test_layers_of_whole_layers_keep_everything_but_count():
    profile = gates([0.9, 0.1, 0.1], [0.8, 0.7, 0.2])
    policy = preset("duo-attention", sparsity=0.5, whole_layers=(0,))
    first = attention.bind(policy, SHAPE, 2, None, profile)
    assert first.eviction is None
    second = attention.bind(policy, replace(SHAPE, index=1), 2, None, profile)
    assert second.eviction.evictor.plain_heads().tolist() == [False, False, True]


# With Loki on the full heads.


def test_streaming_heads_carry_no_planes():
    rows = random_rows(SHAPE, 640, q_len=640)
    more = {"evict.sinks": 16, "evict.recents": 48}
    layer = DrivenLayer(loki(**more), SHAPE, basis=BASIS)
    layer.attend(*rows)
    full, streaming = layer.rows
    assert (full.heads.tolist(), streaming.heads.tolist()) == ([1], [0, 2])
    alone = LayerCache()
    alone.append(rows[1][:, :, :1], rows[2][:, :, :1])
    assert streaming.cache.row_bytes() == alone.row_bytes()
    assert full.cache.row_bytes() == alone.row_bytes() + 8 + 2
    expected = 640 * full.cache.row_bytes() + 2 * 64 * alone.row_bytes()
    assert layer.rows.nbytes() == expected


def test_with_loki_full_heads_select_and_streaming_heads_read_all_they_hold():
    """The same as Loki and StreamingLLM on the heads alone, from the first step on."""
    rows = random_rows(SHAPE, TOKENS, batch=2, q_len=TOKENS)
    policy = loki((1,), min_k=1, dense_below=0)
    _, _, outs = walk(policy, SHAPE, rows, PROMPT, basis=BASIS, how="decode")
    one, maps = layer_shape(2, 1, 16), BASIS.layer(0)
    only = LayerBasis(
        key_map=maps.key_map[1:2], query_map=maps.query_map[1:2], spectrum=maps.spectrum[1:2]
    )
    alone = replace(BASIS, layers={0: only})
    plain = preset(
        "loki",
        rank=8,
        top_k=8,
        min_k=1,
        dense_below=0,
        **{"budget.recents": 1, "budget.sinks": 1},
    )
    selected = walk(plain, one, heads_of(rows, [1]), PROMPT, basis=alone, how="decode")[2]
    torch.testing.assert_close(outs[:, [2, 3]], selected)
    two = layer_shape(4, 2, 16)
    other = preset("streaming-keep", capacity=SINKS + RECENTS, **{"evict.sinks": SINKS})
    streamed = walk(other, two, heads_of(rows, [0, 2]), PROMPT)[2]
    torch.testing.assert_close(outs[:, [0, 1, 4, 5]], streamed)
    dense = walk(duo(), SHAPE, rows, PROMPT)[2]
    assert not torch.allclose(outs[:, [2, 3], -1], dense[:, [2, 3], -1])


def test_with_loki_and_no_full_head_a_layer_has_no_index():
    layer = DrivenLayer(loki(()), SHAPE, basis=BASIS)
    layer.attend(*random_rows(SHAPE, 40, q_len=40))
    assert layer.rows.whole is not None
    assert type(layer.rows.whole.row_format).planes is RowFormat.planes
    assert layer.layer.budget.reads_everything


def test_with_loki_and_only_full_heads_it_is_loki():
    rows = random_rows(SHAPE, TOKENS, q_len=TOKENS)
    plain = preset("loki", rank=8, top_k=8, **{"budget.recents": 1, "budget.sinks": 1})
    outs = [
        walk(policy, SHAPE, rows, PROMPT, basis=BASIS, how="decode")[2]
        for policy in (loki((0, 1, 2)), plain)
    ]
    assert torch.equal(*outs)


def test_under_a_dense_selection_heads_lie_together_until_rows_go():
    layer = DrivenLayer(duo(), SHAPE)
    layer.attend(*random_rows(SHAPE, 8, q_len=8))
    assert layer.rows.whole is not None
    assert layer.layer.parts == ()


def test_rotated_keys_are_for_full_heads_only():
    policy = duo(base="loki-paper", **{"layout": "rotated"})
    rows = random_rows(SHAPE, TOKENS, q_len=TOKENS)
    layer, _, _ = walk(policy, SHAPE, rows, PROMPT, basis=BASIS, how="decode")
    full, streaming = layer.rows
    assert torch.equal(streaming.cache.keys[0, :, -1], rows[1][0, [0, 2], -1])
    assert not torch.allclose(full.cache.keys[0, 0, -1], rows[1][0, 1, -1])


# What lies apart from the start (shards, attention).


def test_rows_that_lie_apart_begin_so_again_after_a_reset():
    layer = DrivenLayer(loki(), SHAPE, basis=BASIS)
    rows = random_rows(SHAPE, 40, q_len=40)
    layer.attend(*rows)
    layer.rows.reset()
    assert (layer.rows.seen, layer.rows.nbytes()) == (0, 0)
    layer.attend(*rows)
    fresh = DrivenLayer(loki(), SHAPE, basis=BASIS)
    fresh.attend(*rows)
    assert layer.rows.nbytes() == fresh.rows.nbytes()
    assert layer.positions() == fresh.positions()


@pytest.mark.parametrize("before", ["dense", "duo", "loki"])
def test_a_cache_of_another_policy_is_cut_where_heads_lie_apart(before):
    policies = {"dense": preset("dense"), "duo": duo((0,)), "loki": loki((2,))}
    old = DrivenLayer(policies[before], SHAPE, basis=BASIS)
    old.attend(*random_rows(SHAPE, 30, batch=2, q_len=30))
    bound = attention.bind(loki((1,)), SHAPE, 1, BASIS)
    rows = old.rows.converted(
        bound.selector, lambda heads: bound.of(heads).selector, {}, bound.parts
    )
    for shard in rows:
        streams = {head != 1 for head in shard.heads.tolist()}
        assert len(streams) == 1
        has_planes = type(shard.cache.row_format).planes is not RowFormat.planes
        assert has_planes != streams.pop()
    whole = rows.together([shard.cache.positions for shard in rows], -1)
    assert torch.equal(whole, old.rows.together([s.cache.positions for s in old.rows], -1))
    assert sorted(h for shard in rows for h in shard.heads.tolist()) == [0, 1, 2]


def test_a_changed_policy_forgets_how_it_was_narrowed():
    """An attachment verifies itself at full budget, and must select afterwards."""
    bound = attention.bind(loki(), SHAPE, 1, BASIS)
    heads = torch.tensor([1])
    assert bound.of(heads).budget == bound.budget
    everything = replace(bound, budget=Budget())
    assert everything.of(heads).budget == Budget()
    assert bound.of(heads).budget == bound.budget
    assert bound.of(torch.tensor([0, 2])).budget == Budget()


# Refusals and records.


@pytest.mark.parametrize(
    ("fields", "error", "text"),
    [
        ({"sparsity": 1.5}, PolicyError, r"share of heads that stream, in \[0, 1\], got 1.5"),
        ({"sparsity": True}, PolicyError, "got True"),
        ({"sinks": -1}, BudgetError, "sinks"),
        ({"recents": 0}, BudgetError, "recents"),
        ({"full_heads": ((-1,),)}, BudgetError, "a head of full_heads"),
    ],
)
def test_what_makes_no_sense_is_refused(fields, error, text):
    with pytest.raises(error, match=text):
        DuoAttention(**fields)


@pytest.mark.parametrize(
    ("policy", "profile", "text"),
    [
        (preset("duo-attention"), None, "needs gates: learn them with optimise_gates"),
        (
            preset("duo-attention"),
            Profile(layers={0: {"weights": torch.ones(3)}}),
            "needs gates: learn them",
        ),
        (
            preset("duo-attention"),
            gates([1.0, 0.5]),
            r"needs gates \[kv_heads\] = \[3\].*has \[2\]",
        ),
        (duo(full=(3,)), None, r"KV heads \[3\] of layer 0, which has 0 to 2"),
        (
            preset("duo-attention", full_heads=((0,), ())),
            None,
            "heads of 2 layers, the model has 1; give one tuple per layer",
        ),
        (duo(capacity=64), None, "takes no capacity or keep_share; set evict.sparsity"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(policy, profile, text):
    with pytest.raises(PolicyError, match=text):
        DrivenLayer(policy, SHAPE, profile=profile)


def test_gates_are_needed_where_no_heads_are_named():
    assert DuoAttention().needs_profile
    assert not DuoAttention(full_heads=((),)).needs_profile


def test_policies_with_it_survive_json():
    for policy in (preset("duo-attention", sparsity=0.25), duo((0, 2)), loki(())):
        again = Policy.from_json(policy.to_json())
        assert again == policy
        assert again.evict.full_heads == policy.evict.full_heads
    assert preset("duo-attention", **{"evict.sinks": 4}).evict.sinks == 4


def test_other_methods_leave_no_heads_alone():
    assert Evictor.plain_heads(object()) is None
    bound = attention.bind(preset("loki", evict="knorm", capacity=600), SHAPE, 1, BASIS)
    assert isinstance(bound, LayerPolicy)
    assert bound.parts == ()
    assert isinstance(rows_for(bound), LayerRows)
