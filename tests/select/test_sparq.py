"""SparQ: the channels it reads, the temperature of partial logits, the mean of the values."""

import math
from dataclasses import replace
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loki_attn import attention
from loki_attn.budget import Budget
from loki_attn.cache import LayerCache
from loki_attn.errors import PolicyError
from loki_attn.kernels import ops
from loki_attn.policy import Policy, preset
from loki_attn.select.base import Estimate
from loki_attn.select.exact_topk import ExactTopK
from loki_attn.select.sparq import SparQ, largest_channels, temperature, visible_mean
from loki_attn.testing import layer_shape, plain_attention, random_rows
from loki_attn.types import AttentionCall, GroupReduce

SHAPE = layer_shape(6, 2, 32, 24)
CALL = AttentionCall(scaling=32**-0.5)
JUNK = [1e9, float("inf"), float("-inf"), float("nan")]
RULES = get_args(GroupReduce)
COPIES = [True, False]


def bound(select=None, how="sum", shape=SHAPE, **amount):
    policy = Policy(
        select=select or SparQ(rank=8), budget=Budget(**(amount or {"top_k": 20})), group_reduce=how
    )
    return attention.bind(policy, shape, 1, None)


def filled(layer, key, value):
    cache = LayerCache(layer.selector)
    cache.append(key, value)
    return cache


def decode(layer, query, key, value, visible=None, call=CALL):
    return attention.decode(query, filled(layer, key, value), layer, call, visible)


def by_the_paper(query, key, value, rank, top_k, recents, call):
    """One query token by the published steps, in float64, one batch row and KV head at a time."""
    query, key, value = query.double(), key.double(), value.double()
    (batch, heads), kv_heads = query.shape[:2], key.shape[1]
    group, out = heads // kv_heads, []
    for b in range(batch):
        for h in range(kv_heads):
            asked, rows = query[b, h * group : (h + 1) * group, 0], key[b, h]
            channels = asked.abs().sum(0).topk(rank).indices
            part = asked[:, channels]
            share = part.abs().sum(-1) / asked.abs().sum(-1)
            logits = part @ rows[:, channels].mT * call.scaling / share.sqrt()[:, None]
            if call.softcap:
                logits = call.softcap * torch.tanh(logits / call.softcap)
            ranked = logits.sum(0)
            ranked[rows.shape[0] - recents :] = float("inf")
            read = ranked.topk(top_k).indices
            sinks = [] if call.sink_logits is None else call.sink_logits.double().view(kv_heads, -1)
            for i in range(group):
                sink = torch.cat([logits[i], sinks[h][i : i + 1]]) if len(sinks) else logits[i]
                weights = sink.softmax(-1)[: rows.shape[0]]
                lost = 1 - weights[read].sum() - (1 - weights.sum())
                one = asked[i].view(1, 1, 1, -1)
                own = None if not len(sinks) else sinks[h][i : i + 1]
                exact = plain_attention(
                    one,
                    rows[read][None, None],
                    value[b, h][read][None, None],
                    None,
                    replace(call, sink_logits=own),
                )
                out.append((1 - lost) * exact[0, 0, 0] + lost * value[b, h].mean(0))
    return torch.stack(out).view(batch, heads, 1, -1)


# against the published steps --------------------------------------------------------------------


@pytest.mark.parametrize("copy", COPIES)
@pytest.mark.parametrize("sizes", [(6, 2, 32, 24), (4, 4, 20, 20), (7, 1, 48, 16)], ids=str)
@pytest.mark.parametrize("seq", [33, 64, 150])
@pytest.mark.parametrize("extras", ["plain", "softcap", "sinks"])
def test_the_output_is_that_of_the_published_steps(copy, sizes, seq, extras):
    shape = layer_shape(*sizes)
    call = AttentionCall(
        scaling=sizes[2] ** -0.5,
        softcap=2.0 if extras == "softcap" else None,
        sink_logits=torch.linspace(-1, 3, sizes[0]) if extras == "sinks" else None,
    )
    layer = bound(SparQ(rank=7, copy_channels=copy), shape=shape, top_k=12, recents=3)
    rows = random_rows(shape, seq, batch=2, seed=seq)
    out, selection = decode(layer, *rows, call=call)
    assert selection.indices.shape == (2, sizes[1], 12)
    torch.testing.assert_close(out, by_the_paper(*rows, 7, 12, 3, call).float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_errs_by_its_own_rounding(dtype):
    rows = random_rows(SHAPE, 150, batch=2, dtype=dtype)
    out, _ = decode(bound(SparQ(rank=7), top_k=12), *rows)
    assert out.dtype == dtype
    true = by_the_paper(*rows, 7, 12, 0, CALL)
    assert float((out.double() - true).abs().max()) <= torch.finfo(dtype).eps * float(
        true.abs().max()
    )


# channels and their scale -----------------------------------------------------------------------


def test_the_channels_of_a_group_by_hand():
    """|q| summed over the group: neither the signed sum nor one head's own largest."""
    query = torch.tensor([[3.0, -2.0, 0.0, 1.0], [-3.0, 2.5, 3.5, 0.0]])[None, :, None]
    assert largest_channels(query, 1, 2).tolist() == [[[[0, 1]]]]
    assert largest_channels(query, 1, 3).tolist() == [[[[0, 1, 2]]]]
    assert largest_channels(query, 2, 1).tolist() == [[[[0]], [[2]]]]
    ties = torch.ones(1, 2, 1, 4)
    assert largest_channels(ties, 1, 2).tolist() == [[[[0, 1]]]]


@given(seed=st.integers(0, 99), rank=st.integers(1, 32), q_len=st.integers(1, 4))
def test_no_channel_left_out_is_larger_than_one_read(seed, rank, q_len):
    query = random_rows(SHAPE, 1, batch=2, q_len=q_len, seed=seed)[0]
    found = largest_channels(query, 2, rank)
    size = query.abs().unflatten(1, (2, 3)).sum(2)
    read = torch.zeros_like(size, dtype=torch.bool).scatter_(3, found, True)
    assert bool((read.sum(-1) == rank).all())
    assert bool((found.diff(dim=-1) > 0).all())
    least = size.masked_fill(~read, float("inf")).amin(-1)
    assert bool((size.masked_fill(read, -1.0).amax(-1) <= least).all())


@given(seed=st.integers(0, 999))
def test_all_channels_are_scaled_by_exactly_the_root_of_head_dim(seed):
    query = random_rows(SHAPE, 1, batch=2, q_len=3, seed=seed)[0]
    none_left_out = torch.zeros_like(query, dtype=torch.bool)
    assert bool((temperature(query, none_left_out) == 1).all())


def test_the_scale_of_a_part_by_hand():
    query = torch.tensor([[3.0, -1.0, 0.5, 0.5], [0.0, 0.0, 2.0, 0.0]])[None, :, None]
    unread = torch.tensor([False, True, True, True]).expand_as(query)
    found = temperature(query, unread)[0, :, 0]
    assert found.tolist() == pytest.approx([math.sqrt(5 / 3), 1.0])


@pytest.mark.parametrize("copy", COPIES)
@pytest.mark.parametrize("how", RULES)
def test_all_channels_choose_the_exact_top_k(copy, how):
    exact = bound(ExactTopK(), how)
    layer = bound(SparQ(rank=32, copy_channels=copy), how)
    for seed in range(3):
        query, key, value = random_rows(SHAPE, 60, batch=2, seed=seed)
        cache = filled(layer, key, value)
        got = layer.selector.score(query, cache, CALL)
        torch.testing.assert_close(got, ops().score(query, key, None, CALL))
        mine = attention.decode(query, cache, layer, CALL)[1]
        assert torch.equal(mine.indices, decode(exact, query, key, value)[1].indices)


@given(seq=st.integers(1, 200), rank=st.integers(1, 32), seed=st.integers(0, 99))
def test_the_copy_by_channels_scores_like_the_keys(seq, rank, seed):
    query, key, value = random_rows(SHAPE, seq, batch=2, seed=seed)
    found = []
    for copy in COPIES:
        layer = bound(SparQ(rank=rank, copy_channels=copy))
        found.append(layer.selector.score(query, filled(layer, key, value), CALL))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("copy", COPIES)
def test_channels_that_are_not_read_do_not_matter(copy):
    query, key, value = random_rows(SHAPE, 100)
    query[..., 16:] *= 0.01
    layer = bound(SparQ(rank=16, copy_channels=copy))
    mine = layer.selector.score(query, filled(layer, key, value), CALL)
    other = key.clone()
    other[..., 16:] = 77.0
    assert torch.equal(mine, layer.selector.score(query, filled(layer, other, value), CALL))


@pytest.mark.parametrize("copy", COPIES)
def test_queries_of_zeros_are_served(copy):
    """Of a whole group, and of one head in the channels that its group reads."""
    query, key, value = random_rows(SHAPE, 40)
    query[:, :3] = 0.0
    query[:, 3, :, :16] = 0.0
    query[:, 4:, :, 16:] = 0.0
    query[:, 4:] *= 100
    layer = bound(SparQ(rank=8, copy_channels=copy))
    assert bool((layer.selector.score(query, filled(layer, key, value), CALL)[:, :4] == 0).all())
    out, _ = decode(layer, query, key, value)
    assert bool(torch.isfinite(out).all())


def test_the_copy_follows_its_rows(poison):
    """After an eviction by each head, and a cut, as if only the survivors had come."""
    query, key, value = random_rows(SHAPE, 150, batch=2)
    layer = bound()
    cache = filled(layer, key, value)
    layer.selector.score(query, cache, CALL)
    draw = torch.Generator().manual_seed(0)
    cache.keep(torch.rand(2, 2, 150, generator=draw).argsort(-1)[..., :100].sort(-1).values)
    for length in (100, 64, 63, 1):
        cache.truncate(length)
        fresh = filled(layer, cache.keys.clone(), cache.values.clone())
        mine, other = (layer.selector.score(query, one, CALL) for one in (cache, fresh))
        assert torch.equal(mine, other)
        assert mine.shape[3] == length


# the mean of the values -------------------------------------------------------------------------


@pytest.mark.parametrize("copy", COPIES)
def test_a_full_budget_is_dense_and_the_mean_has_no_part_in_it(copy):
    query, key, value = random_rows(SHAPE, 100, batch=2)
    out, _ = decode(bound(SparQ(rank=3, copy_channels=copy), top_k=100), query, key, value)
    plain = SparQ(rank=3, copy_channels=copy, mean_value=False)
    assert torch.equal(out, decode(bound(plain, top_k=100), query, key, value)[0])
    torch.testing.assert_close(out, plain_attention(query, key, value, None, CALL))


def test_nothing_read_gives_the_mean_of_the_values():
    """k = 0, which no budget allows, as the correction sees it."""
    query, key, value = random_rows(SHAPE, 100, batch=2)
    layer = bound()
    cache = filled(layer, key, value)
    visible = torch.ones(1, 1, 1, 100, dtype=torch.bool)
    logits = layer.selector.score(query, cache, CALL)
    read = Estimate(query=query, cache=cache, call=CALL, logits=logits, visible=visible)
    none = torch.zeros(2, 2, 1, 100, dtype=torch.bool)
    out = layer.selector.finish(torch.zeros(2, 6, 1, 24), none, read)
    torch.testing.assert_close(out, value.mean(2, keepdim=True).repeat_interleave(3, 1))


def test_equal_logits_give_every_row_its_share_of_the_mean():
    """Keys of zeros: alpha is k / T, so that 5 of 50 rows count 1 / 10."""
    query, key, value = random_rows(SHAPE, 50)
    out, selection = decode(bound(top_k=5), query, key * 0, value)
    assert selection.indices[0, 0].tolist() == list(range(5))
    expected = 0.1 * value[:, :, :5].mean(2) + 0.9 * value.mean(2)
    torch.testing.assert_close(out[:, :, 0], expected.repeat_interleave(3, 1))


def test_the_running_mean_is_the_full_mean_at_every_step(poison):
    _, key, value = random_rows(SHAPE, 150, batch=2)
    cache = LayerCache(bound().selector)
    for step in range(150):
        now = slice(step, step + 1)
        cache.append(key[:, :, now], value[:, :, now])
        visible = torch.ones(1, 1, 1, step + 1, dtype=torch.bool)
        expected = value[:, :, : step + 1].mean(2, keepdim=True)
        torch.testing.assert_close(visible_mean(cache, visible), expected)


@given(
    seq=st.integers(1, 200),
    prefix=st.integers(1, 200),
    seed=st.integers(0, 99),
    junk=st.sampled_from(JUNK),
    per_head=st.booleans(),
)
def test_the_mean_is_that_of_the_visible_rows(seq, prefix, seed, junk, per_head):
    """Under any mask, of any prefix, whatever invisible rows hold."""
    _, key, value = random_rows(SHAPE, seq, batch=2, seed=seed)
    draw = torch.Generator().manual_seed(seed)
    length = min(seq, prefix)
    # Runs of rows, so that whole pages are visible, hidden and mixed.
    visible = torch.rand(2, 2 if per_head else 1, 3, 8, generator=draw) < 0.7
    visible = visible.repeat_interleave(26, -1)[..., :seq].contiguous()
    visible[..., length:] = False
    unseen = ~visible.any(2)[..., None]
    layer = bound()
    cache = filled(layer, key, value.masked_fill(unseen, junk))
    visible_mean(cache, visible)
    part = visible[..., :length]
    found = visible_mean(cache.prefix(length), part)
    weights = part.double() / part.sum(-1, keepdim=True).clamp(min=1)
    expected = weights @ value[:, :, :length].double()
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-6)


def test_the_mean_is_that_of_the_survivors_of_an_eviction():
    _, key, value = random_rows(SHAPE, 150, batch=2)
    cache = filled(bound(), key, value)
    visible_mean(cache, torch.ones(1, 1, 1, 150, dtype=torch.bool))
    draw = torch.Generator().manual_seed(0)
    cache.keep(torch.rand(2, 2, 150, generator=draw).argsort(-1)[..., :130].sort(-1).values)
    found = visible_mean(cache, torch.ones(1, 1, 1, 130, dtype=torch.bool))
    torch.testing.assert_close(found, cache.values.mean(2, keepdim=True))


def test_values_beyond_float32_sums_do_not_spoil_other_pages():
    """Hidden rows whose sum overflows: their page counts 0 times, not 0 times infinity."""
    _, key, value = random_rows(SHAPE, 128)
    value[:, :, :64] = 3e38
    visible = torch.zeros(1, 1, 1, 128, dtype=torch.bool)
    visible[..., 64:] = True
    found = visible_mean(filled(bound(), key, value), visible)
    torch.testing.assert_close(found, value[:, :, 64:].mean(2, keepdim=True))


@pytest.mark.parametrize("how", RULES)
def test_a_selection_and_a_mask_are_corrected_alike(how):
    """What a step returns is what the same query gets in a forward of several."""
    query, key, value = random_rows(SHAPE, 90, batch=2, q_len=90)
    layer = bound(how=how, top_k=20, recents=2)
    whole = attention.every_query(query, filled(layer, key, value), layer, CALL)
    cache = LayerCache(layer.selector)
    for step in range(90):
        now = slice(step, step + 1)
        cache.append(key[:, :, now], value[:, :, now])
        out, _ = attention.decode(query[:, :, now], cache, layer, CALL)
        torch.testing.assert_close(whole[:, :, now], out)


# masks, batches, requests -----------------------------------------------------------------------


@pytest.mark.parametrize("copy", COPIES)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("junk", JUNK)
def test_masked_slots_never_leak(copy, side, junk):
    query, key, value = random_rows(SHAPE, 61, batch=2)
    layer = bound(SparQ(rank=8, copy_channels=copy), top_k=20, recents=2)
    alone, chosen = decode(layer, query, key, value)
    pads = [torch.full((2, 2, 29, rows.shape[3]), junk) for rows in (key, value)]
    order = slice(None, None, 1 if side == "left" else -1)
    rows = [torch.cat([pad, t][order], 2) for pad, t in zip(pads, (key, value), strict=True)]
    first = 29 if side == "left" else 0
    place = torch.arange(90)
    visible = ((place >= first) & (place < first + 61)).expand(2, 1, 1, -1)
    out, selection = decode(layer, query, *rows, visible)
    assert torch.equal(selection.indices - first, chosen.indices)
    torch.testing.assert_close(out, alone)


@pytest.mark.parametrize("junk", JUNK)
def test_later_rows_cannot_change_an_earlier_query(junk):
    query, key, value = random_rows(SHAPE, 80, q_len=80)
    layer = bound(top_k=12)
    clean = attention.every_query(query, filled(layer, key, value), layer, CALL)
    for rows in (key, value):
        rows[:, :, 70:] = junk
    out = attention.every_query(query, filled(layer, key, value), layer, CALL)
    torch.testing.assert_close(out[:, :, :70], clean[:, :, :70])


def test_a_query_that_sees_nothing_gets_zeros():
    query, key, value = random_rows(SHAPE, 70, batch=2)
    visible = torch.ones(2, 1, 1, 70, dtype=torch.bool)
    visible[1] = False
    out, selection = decode(bound(), query, key, value, visible)
    assert not bool(out[1].any())
    assert bool(out[0].any())
    assert bool((selection.counts[1] == 0).all())


def test_heads_with_masks_of_their_own_have_means_of_their_own():
    query, key, value = random_rows(SHAPE, 70)
    visible = torch.ones(1, 2, 1, 70, dtype=torch.bool)
    visible[:, 1, :, 40:] = False
    layer = bound(top_k=12)
    out, _ = decode(layer, query, key, value, visible)
    one = layer_shape(3, 1, 32, 24)
    for head, length in ((0, 70), (1, 40)):
        mine = slice(head, head + 1), slice(length)
        rows = [t[:, mine[0], mine[1]] for t in (key, value)]
        heads = query[:, 3 * head : 3 * head + 3]
        alone, _ = decode(bound(shape=one, top_k=12), heads, *rows)
        torch.testing.assert_close(out[:, 3 * head : 3 * head + 3], alone)


def test_a_selector_remembers_no_request():
    layer = bound()
    before = dict(vars(layer.selector))
    decode(layer, *random_rows(SHAPE, 90, seed=1))
    rows = random_rows(SHAPE, 45, seed=2)
    after = decode(layer, *rows)[0]
    assert vars(layer.selector) == before
    assert torch.equal(after, decode(bound(), *rows)[0])


def test_a_batch_row_is_served_as_if_alone():
    rows = random_rows(SHAPE, 100, batch=3)
    together = decode(bound(), *rows)[0]
    for row in range(3):
        alone = decode(bound(), *(t[row : row + 1] for t in rows))[0]
        torch.testing.assert_close(together[row : row + 1], alone)


# bytes, presets, refusals -----------------------------------------------------------------------


@pytest.mark.parametrize("copy", COPIES)
@pytest.mark.parametrize("mean", [True, False])
def test_bytes_are_as_the_docstring_says(copy, mean):
    query, key, value = random_rows(SHAPE, 128, dtype=torch.bfloat16)
    layer = bound(SparQ(rank=8, copy_channels=copy, mean_value=mean))
    cache = filled(layer, key, value)
    columns, sums = (8 if copy else 32) * 2, 24 / 16 if mean else 0
    assert layer.selector.score_bytes(cache) == columns + sums
    without = cache.nbytes()
    attention.decode(query, cache, layer, CALL)
    held = cache.nbytes() - without
    assert held == 2 * 128 * ((32 * 2 if copy else 0) + sums)


def test_the_preset_and_its_fields():
    policy = preset("sparq", rank=16, top_k=512, copy_channels=False)
    assert policy.select == SparQ(rank=16, copy_channels=False)
    assert policy.budget == Budget(top_k=512, recents=32)
    assert policy.group_reduce == "sum"
    assert preset("sparq").budget == Budget(top_k=128, recents=32)
    assert Policy.from_json(policy.to_json()) == policy


def test_the_estimate_is_a_mass():
    """Its scores are logits: a budget may be a share of the estimated attention."""
    rows = random_rows(SHAPE, 90)
    counts = [decode(bound(mass=mass), *rows)[1].counts for mass in (0.3, 0.9)]
    assert bool((counts[0] < counts[1]).all())


def test_a_rank_above_head_dim_is_refused():
    with pytest.raises(PolicyError, match="rank=33 is above head_dim=32; lower it"):
        bound(SparQ(rank=33))


@pytest.mark.parametrize("rank", [0, True, 1.0, "8", None])
def test_a_rank_is_a_whole_number_or_a_share(rank):
    with pytest.raises(PolicyError, match="or a share of head_dim between 0 and 1"):
        SparQ(rank=rank)


@pytest.mark.parametrize("name", ["copy_channels", "mean_value"])
def test_a_switch_is_true_or_false(name):
    with pytest.raises(PolicyError, match=f"{name} is true or false, got 1"):
        SparQ(**{name: 1})
