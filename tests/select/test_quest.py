"""Quest: bounds that hold, pages that follow their rows, and the page that is always read."""

import itertools
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loki_attn import attention
from loki_attn.budget import Budget
from loki_attn.cache import KEY, LayerCache
from loki_attn.errors import PolicyError
from loki_attn.kernels import ops
from loki_attn.policy import Policy, preset
from loki_attn.select.exact_topk import ExactTopK
from loki_attn.select.quest import BOUNDS, Quest
from loki_attn.testing import layer_shape, plain_attention, random_rows
from loki_attn.types import AttentionCall, GroupReduce

SHAPE = layer_shape(6, 2, 32)
CALL = AttentionCall(scaling=32**-0.5)
JUNK = [1e9, float("inf"), float("-inf"), float("nan")]
RULES = get_args(GroupReduce)


def bound(page=8, how="max", shape=SHAPE, select=None, **amount):
    policy = Policy(select=select or Quest(page=page), budget=Budget(**amount), group_reduce=how)
    return attention.bind(policy, shape, 1, None)


def filled(layer, key, value):
    cache = LayerCache(layer.selector)
    cache.append(key, value)
    return cache


def decode(layer, query, key, value, visible=None):
    return attention.decode(query, filled(layer, key, value), layer, CALL, visible)


def scores(layer, query, cache):
    return layer.selector.score(query, cache, CALL)


# the bound --------------------------------------------------------------------------------------


@given(
    page=st.integers(1, 20),
    seq=st.integers(1, 70),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    q_len=st.integers(1, 3),
)
def test_no_row_of_a_page_scores_above_its_bound(page, seq, dtype, q_len):
    """In float64 of the same rounded numbers, but for the rounding of one sum."""
    query, key, value = random_rows(SHAPE, seq, batch=2, q_len=q_len, dtype=dtype, seed=seq)
    layer = bound(page)
    got = scores(layer, query, filled(layer, key, value))
    assert got.shape == (2, 6, q_len, seq)
    true = query.double() @ key.double().repeat_interleave(3, 1).mT * CALL.scaling
    assert bool((got >= true - 1e-5).all())


@given(page=st.integers(1, 20), seq=st.integers(1, 70))
def test_the_bound_is_the_sum_of_the_larger_products(page, seq):
    """By the formula, one page and one head at a time."""
    query, key, value = random_rows(SHAPE, seq, batch=2, seed=page)
    layer = bound(page)
    got = scores(layer, query, filled(layer, key, value))
    for start in range(0, seq, page):
        rows = key[:, :, start : start + page].double()
        for head in range(6):
            asked = query[:, head, 0].double()
            ends = [asked * edge[:, head // 3] for edge in (rows.amax(2), rows.amin(2))]
            expected = torch.maximum(*ends).sum(-1, keepdim=True) * CALL.scaling
            mine = got[:, head, 0, start : start + page]
            torch.testing.assert_close(mine, expected.float().expand_as(mine))


def test_the_bound_of_equal_rows_is_their_logit():
    query, key, value = random_rows(SHAPE, 32)
    key = key[:, :, ::8].repeat_interleave(8, 2)
    layer = bound(8)
    true = query @ key.repeat_interleave(3, 1).mT * CALL.scaling
    torch.testing.assert_close(scores(layer, query, filled(layer, key, value)), true)


@pytest.mark.parametrize("how", RULES)
def test_pages_of_one_row_are_exact_top_k(how):
    """The page that is always read is then the last row, which exact top-k gets as its recent.

    Soft-max weights among the other rows compare query heads in another way than weights among
    all: they agree where no group has to.
    """
    shape = layer_shape(3, 3, 32) if how.startswith("softmax") else SHAPE
    exact = bound(select=ExactTopK(), how=how, shape=shape, top_k=9, recents=1)
    layer = bound(1, how, shape, top_k=9)
    for seed in range(5):
        rows = random_rows(shape, 60, batch=2, seed=seed)
        assert torch.equal(decode(layer, *rows)[1].indices, decode(exact, *rows)[1].indices)


def test_a_budget_of_whole_pages_reads_the_best_pages():
    """The published choice, page by page: the last one, and those with the highest bounds."""
    layer = bound(8, "none", top_k=3 * 8)
    for seed in range(5):
        query, key, value = random_rows(SHAPE, 64, batch=2, seed=seed)
        _, selection = decode(layer, query, key, value)
        pages = key.repeat_interleave(3, 1).unflatten(2, (8, 8))
        ends = [query * pages.amax(3), query * pages.amin(3)]
        best = torch.maximum(*ends).sum(-1)[..., :-1].topk(2).indices
        for b, h in itertools.product(range(2), range(6)):
            chosen = {int(p) for p in best[b, h]} | {7}
            assert set((selection.indices[b, h] // 8).tolist()) == chosen


def test_bounds_of_another_basis_are_others():
    """Least and greatest coordinates are not invariant under rotation, as logits are."""
    query, key, value = random_rows(SHAPE, 40)
    turn = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(0))).Q
    layer = bound(8)
    mine = scores(layer, query, filled(layer, key, value))
    other = scores(layer, query @ turn, filled(layer, key @ turn, value))
    assert float((mine - other).abs().max()) > 0.1


# pages and rows ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seq", [1, 7, 8, 9, 130])
def test_bounds_are_the_extremes_exactly(dtype, seq, poison):
    _, key, value = random_rows(SHAPE, seq, batch=2, dtype=dtype)
    bounds = filled(bound(8), key, value).summary(BOUNDS)
    assert bounds.dtype == dtype
    assert bounds.shape[2] == -(-seq // 8)
    for page in range(bounds.shape[2]):
        rows = key[:, :, page * 8 : page * 8 + 8]
        assert torch.equal(bounds[:, :, page], torch.cat([rows.amax(2), rows.amin(2)], -1))


def test_an_append_widens_the_last_page_and_no_other():
    _, key, value = random_rows(SHAPE, 40)
    cache = LayerCache(bound(8).selector)
    before = None
    for step in range(40):
        now = slice(step, step + 1)
        cache.append(key[:, :, now], value[:, :, now])
        bounds = cache.summary(BOUNDS).clone()
        if before is not None:
            old = before.shape[2]
            last = (step - 1) // 8
            assert torch.equal(bounds[:, :, :last], before[:, :, :last])
            if old == bounds.shape[2]:
                assert bool((bounds[:, :, last, :32] >= before[:, :, last, :32]).all())
                assert bool((bounds[:, :, last, 32:] <= before[:, :, last, 32:]).all())
        before = bounds


@given(seed=st.integers(0, 99), kept=st.integers(1, 50), cut=st.integers(1, 60))
def test_after_an_eviction_the_survivors_are_paged_anew(seed, kept, cut):
    """Each head keeps rows of its own; bounds are those of a cache that only ever held these."""
    _, key, value = random_rows(SHAPE, 60, batch=2, seed=seed)
    cache = filled(bound(8), key, value)
    cache.summary(BOUNDS)
    draw = torch.Generator().manual_seed(seed)
    index = torch.rand(2, 2, 60, generator=draw).argsort(-1)[..., :kept].sort(-1).values
    cache.keep(index)
    fresh = filled(bound(8), cache.keys.clone(), cache.values.clone())
    assert torch.equal(cache.summary(BOUNDS), fresh.summary(BOUNDS))
    cache.truncate(min(cut, kept))
    fresh = filled(bound(8), cache.keys.clone(), cache.values.clone())
    assert torch.equal(cache.summary(BOUNDS), fresh.summary(BOUNDS))


def test_a_reordered_batch_takes_its_bounds_along():
    query, key, value = random_rows(SHAPE, 40, batch=3)
    layer, rows = bound(8), torch.tensor([2, 0, 0])
    cache = filled(layer, key, value)
    mine = scores(layer, query, cache)[rows]
    cache.select_batch(rows)
    assert torch.equal(scores(layer, query[rows], cache), mine)


# the page that is always read -------------------------------------------------------------------


def spoil_last_page(seq):
    """Rows in which the last page is the worst of all for every head."""
    query, key, value = random_rows(SHAPE, seq, batch=2)
    query = query.abs()
    key[:, :, seq - seq % 8 :] = -5.0
    return query, key, value


@pytest.mark.parametrize("how", RULES)
def test_the_last_page_is_read_however_bad(how):
    query, key, value = spoil_last_page(61)
    _, selection = decode(bound(8, how, top_k=16), query, key, value)
    assert selection.indices.shape[1] == (6 if how == "none" else 2)
    for rows in selection.indices.flatten(0, 1).tolist():
        assert set(range(56, 61)) < set(rows)


@pytest.mark.parametrize("how", RULES)
def test_it_is_the_page_of_the_last_visible_row(how):
    """Behind right padding of whole pages, whatever the padding holds."""
    query, key, value = spoil_last_page(45)
    alone, chosen = decode(bound(8, how, top_k=16), query, key, value)
    for junk in JUNK:
        pad = torch.full((2, 2, 19, 32), junk)
        rows = [torch.cat([t, pad], 2) for t in (key, value)]
        visible = (torch.arange(64) < 45).expand(2, 1, 1, -1)
        # The page of row 44 has padding, too; its bound does not matter, as it is read anyway.
        out, selection = decode(bound(8, how, top_k=16), query, *rows, visible)
        assert torch.equal(selection.indices, chosen.indices)
        torch.testing.assert_close(out, alone)


def test_protected_rows_come_before_it_and_a_cut_page_gives_its_first_rows():
    query, key, value = random_rows(SHAPE, 64)
    layer = bound(16, top_k=7, sinks=2, recents=2)
    _, selection = decode(layer, query, key, value)
    expected = torch.tensor([0, 1, 48, 49, 50, 62, 63])
    assert torch.equal(selection.indices, expected.expand_as(selection.indices))


def test_heads_that_kept_other_rows_have_pages_of_their_own():
    """A mask per KV head: each head's own last page is the one that is read."""
    query, key, value = random_rows(SHAPE, 40)
    visible = torch.ones(1, 2, 1, 40, dtype=torch.bool)
    visible[:, 1, :, 21:] = False
    _, selection = decode(bound(8, top_k=8), query, key, value, visible)
    first, second = selection.indices[0].tolist()
    assert first == list(range(32, 40))
    # Its last page has 5 visible rows; the rest of the budget is one page's first rows.
    assert second[3:] == list(range(16, 21))
    assert second[:3] in ([0, 1, 2], [8, 9, 10])


# causality, padding, groups ---------------------------------------------------------------------


@pytest.mark.parametrize("how", RULES)
def test_steps_and_one_forward_agree(how):
    """A page's bound knows rows behind the queries in it: it must have no say in their choice."""
    query, key, value = random_rows(SHAPE, 90, batch=2, q_len=90)
    layer = bound(8, how, top_k=20, recents=1)
    whole = attention.every_query(query, filled(layer, key, value), layer, CALL)
    cache = LayerCache(layer.selector)
    for step in range(90):
        now = slice(step, step + 1)
        cache.append(key[:, :, now], value[:, :, now])
        out, _ = attention.decode(query[:, :, now], cache, layer, CALL)
        torch.testing.assert_close(whole[:, :, now], out)


@pytest.mark.parametrize("how", RULES)
@pytest.mark.parametrize("junk", [50.0, *JUNK])
def test_later_rows_cannot_change_an_earlier_query(how, junk):
    query, key, value = random_rows(SHAPE, 44, q_len=44)
    layer = bound(8, how, top_k=12)
    clean = attention.every_query(query, filled(layer, key, value), layer, CALL)
    spoilt = [rows.clone() for rows in (key, value)]
    for rows in spoilt:
        rows[:, :, 27:] = junk
    out = attention.every_query(query, filled(layer, *spoilt), layer, CALL)
    torch.testing.assert_close(out[:, :, :27], clean[:, :, :27])


@pytest.mark.parametrize("how", RULES)
@pytest.mark.parametrize("junk", JUNK)
def test_padding_by_whole_pages_changes_nothing(how, junk):
    query, key, value = random_rows(SHAPE, 61, batch=2)
    layer = bound(8, how, top_k=20)
    alone, chosen = decode(layer, query, key, value)
    pad = torch.full((2, 2, 16, 32), junk)
    rows = [torch.cat([pad, t], 2) for t in (key, value)]
    visible = (torch.arange(77) >= 16).expand(2, 1, 1, -1)
    out, selection = decode(layer, query, *rows, visible)
    assert torch.equal(selection.indices - 16, chosen.indices)
    torch.testing.assert_close(out, alone)


@pytest.mark.parametrize("junk", JUNK[1:])
def test_keys_that_are_not_finite_stay_out_of_the_bounds(junk):
    """Padding inside a page: its other rows alone bound it."""
    _, key, value = random_rows(SHAPE, 32)
    layer = bound(8)
    spoilt = key.clone()
    spoilt[:, :, 8:11] = junk
    spoilt[:, :, 16:24] = junk
    bounds = filled(layer, spoilt, value).summary(BOUNDS)
    own = key[:, :, 11:16]
    assert torch.equal(bounds[:, :, 1], torch.cat([own.amax(2), own.amin(2)], -1))
    assert not bool(bounds[:, :, 2].any())
    clean = filled(layer, key, value).summary(BOUNDS)
    assert torch.equal(bounds[:, :, [0, 3]], clean[:, :, [0, 3]])


def test_heads_are_not_averaged_before_the_bound():
    """Opposite query heads of a group average to nothing; each must find its own page."""
    shape = layer_shape(2, 1, 8)
    query = torch.zeros(1, 2, 1, 8)
    query[0, 0, 0, 0], query[0, 1, 0, 0] = 1.0, -1.0
    key = torch.zeros(1, 1, 48, 8)
    key[0, 0, 9, 0], key[0, 0, 34, 0] = 9.0, -8.0
    for how in ("max", "softmax_sum", "softmax_max", "sum"):
        layer = bound(8, how, shape, top_k=24)
        _, selection = decode(layer, query, key, torch.zeros(1, 1, 48, 8))
        assert set((selection.indices // 8).flatten().tolist()) == {1, 4, 5}
    alone = bound(8, "none", shape, top_k=16)
    _, selection = decode(alone, query, key, torch.zeros(1, 1, 48, 8))
    assert [set((rows // 8).tolist()) for rows in selection.indices[0]] == [{1, 5}, {4, 5}]


def test_a_group_without_agreement_is_repeated_kv_heads():
    query, key, value = random_rows(SHAPE, 60, batch=2)
    many = layer_shape(6, 6, 32)
    mine = decode(bound(8, "none", top_k=20), query, key, value)
    copies = [rows.repeat_interleave(3, 1) for rows in (key, value)]
    other = decode(bound(8, "none", many, top_k=20), query, *copies)
    assert torch.equal(mine[1].indices, other[1].indices)
    torch.testing.assert_close(mine[0], other[0])


def test_a_batch_row_is_served_as_if_alone():
    query, key, value = random_rows(SHAPE, 60, batch=3)
    layer = bound(8, top_k=20)
    _, together = decode(layer, query, key, value)
    for row in range(3):
        one = slice(row, row + 1)
        _, alone = decode(layer, query[one], key[one], value[one])
        assert torch.equal(together.indices[one], alone.indices)


def test_a_budget_of_all_pages_is_dense():
    query, key, value = random_rows(SHAPE, 61, batch=2)
    for amount in ({"top_k": 64}, {"fraction": 1.0}):
        out, selection = decode(bound(8, **amount), query, key, value)
        assert bool((selection.counts == 61).all())
        torch.testing.assert_close(out, plain_attention(query, key, value, None, CALL))


# bytes, presets, refusals -----------------------------------------------------------------------


@pytest.mark.parametrize("page", [1, 8, 16, 32])
def test_bytes_are_as_the_docstring_says(page):
    query, key, value = random_rows(SHAPE, 128, dtype=torch.bfloat16)
    layer = bound(page)
    cache = filled(layer, key, value)
    without = cache.nbytes()
    assert layer.selector.score_bytes(cache) == 2 * 32 * 2 / page
    scores(layer, query, cache)
    assert cache.nbytes() - without == 2 * (128 // page) * 2 * 32 * 2
    assert cache.row_bytes() == cache.row_bytes(KEY, "value", "position")


def test_a_selector_remembers_no_request():
    layer = bound(8, top_k=16)
    before = dict(vars(layer.selector))
    decode(layer, *random_rows(SHAPE, 60, seed=1))
    rows = random_rows(SHAPE, 45, seed=2)
    after = decode(layer, *rows)[0]
    assert vars(layer.selector) == before
    assert torch.equal(after, decode(bound(8, top_k=16), *rows)[0])


def test_the_native_kernel_scores_alike():
    query, key, value = random_rows(SHAPE, 300, batch=2)
    layer = bound(16)
    cache = filled(layer, key, value)
    plain = ops("reference").score(
        torch.cat([query.clamp(min=0), query.clamp(max=0)], -1), cache.summary(BOUNDS), None, CALL
    )
    got = scores(layer, query, cache)[..., ::16]
    torch.testing.assert_close(got, plain)


def test_the_preset_and_its_fields():
    policy = preset("quest", page=32, top_k=1024)
    assert policy.select == Quest(page=32)
    assert policy.budget == Budget(top_k=1024, min_k=48)
    assert preset("quest").group_reduce == "max"
    assert Policy.from_json(policy.to_json()) == policy
    assert policy.select.unit == 32


@pytest.mark.parametrize("page", [0, -1, True, 2.0, "16"])
def test_a_page_is_a_whole_number_of_tokens(page):
    with pytest.raises(PolicyError, match=r"whole number of tokens >= 1, got .*; 16 is usual"):
        Quest(page=page)


def test_bounds_are_no_mass():
    with pytest.raises(PolicyError, match="quest estimates no mass"):
        preset("quest", mass=0.9)
