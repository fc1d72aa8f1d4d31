"""ShadowKV: landmarks, outliers and local chunks."""

import pytest
import torch

from loki_attn import attention
from loki_attn.budget import Budget
from loki_attn.cache import LayerCache
from loki_attn.errors import BudgetError
from loki_attn.policy import Policy, preset
from loki_attn.select.shadowkv import COSINE, LANDMARK, ShadowKV
from loki_attn.testing import layer_shape, random_rows
from loki_attn.types import AttentionCall

SHAPE = layer_shape(6, 2, 64)
CALL = AttentionCall(scaling=64**-0.5)
SMALL = ShadowKV(chunk=4, outliers=3, local=2)


def bound(select=SMALL, shape=SHAPE, how="softmax_max", **amount):
    policy = Policy(select=select, budget=Budget(**amount), group_reduce=how)
    return attention.bind(policy, shape, 1, None)


def filled(layer, key, value):
    cache = LayerCache(layer.selector)
    cache.append(key, value)
    return cache


def read(layer, query, key, value, visible=None):
    _, selection = attention.decode(query, filled(layer, key, value), layer, CALL, visible)
    return [set(row.tolist()) - {-1} for row in selection.indices[0]]


def chunks_of(key, size=4):
    return key.unfold(1, size, size).transpose(-1, -2).double()


def expected_chunks(query, key, select, number):
    """The published choice, head by head: local, outliers, and the best of the others."""
    found = []
    for head in range(2):
        cut = chunks_of(key[0], select.chunk)[head]
        mean = cut.mean(1)
        cosine = torch.cosine_similarity(cut, mean[:, None], dim=-1).amin(1)
        whole = list(range(len(cut)))
        local = whole[len(cut) - select.local :]
        far = whole[: len(cut) - select.local]
        outliers = sorted(far, key=lambda c: float(cosine[c]))[: select.outliers]
        rest = [c for c in far if c not in outliers]
        asked = query[0, 3 * head : 3 * head + 3, 0].double()
        weights = (asked @ mean[rest].mT * 64**-0.5).softmax(-1).amax(0)
        best = [rest[int(i)] for i in weights.argsort(descending=True)[:number]]
        found.append((local, outliers, best))
    return found


def test_a_landmark_is_the_mean_key_and_knows_its_worst_member():
    _, key, value = random_rows(SHAPE, 40)
    cache = filled(bound(), key, value)
    cut = chunks_of(key[0])
    torch.testing.assert_close(cache.summary(LANDMARK)[0].double(), cut.mean(2))
    cosine = torch.cosine_similarity(cut, cut.mean(2, keepdim=True), dim=-1).amin(-1)
    torch.testing.assert_close(cache.summary(COSINE)[0].double(), cosine)


@pytest.mark.parametrize("seed", range(4))
def test_local_outlier_and_chosen_chunks_are_disjoint_and_fill_the_budget(seed):
    query, key, value = random_rows(SHAPE, 122, seed=seed)
    layer = bound(top_k=(2 + 3 + 5) * 4 + 2)
    mine = read(layer, query, key, value)
    for rows, parts in zip(mine, expected_chunks(query, key, SMALL, 5), strict=True):
        chunks = [c for part in parts for c in part]
        assert len(chunks) == len(set(chunks)) == 10
        assert rows == {4 * c + i for c in chunks for i in range(4)} | {120, 121}


def test_outliers_have_no_say_in_which_other_chunks_are_read():
    """The largest weight over heads: an outlier with most of one head's mass would silence it."""
    shape = layer_shape(2, 1, 8)
    key = torch.zeros(1, 1, 40, 8)
    key[:, :, :4, 0] = torch.tensor([40.0, 40.0, 40.0, -20.0])  # the outlier, loud to head 0
    key[:, :, 8:12, 0] = 2.0
    key[:, :, 16:20, 1] = 1.0
    key[..., 7] += 0.1
    query = torch.zeros(1, 2, 1, 8)
    query[0, 0, 0, 0] = query[0, 1, 0, 1] = 8.0
    select = ShadowKV(chunk=4, outliers=1, local=0)
    rows = read(bound(select, shape, top_k=8), query, key, torch.ones(1, 1, 40, 8))
    assert rows == [{0, 1, 2, 3, 8, 9, 10, 11}]


def test_a_constant_chunk_is_its_landmark_and_the_last_to_be_an_outlier():
    query, key, value = random_rows(SHAPE, 48)
    key[:, :, 8:12] = key[:, :, 8:9]
    cache = filled(bound(), key, value)
    torch.testing.assert_close(cache.summary(LANDMARK)[:, :, 2], key[:, :, 8])
    torch.testing.assert_close(cache.summary(COSINE)[:, :, 2], torch.ones(1, 2))
    visible = torch.ones(1, 1, 1, 48, dtype=torch.bool)
    for outliers, constant in ((9, False), (10, True)):
        layer = bound(ShadowKV(chunk=4, outliers=outliers, local=2), top_k=48)
        always = layer.selector.always(filled(layer, key, value), visible)
        assert bool(always[..., 8:12].all()) is constant
        assert int(always[0, 0].sum()) == (outliers + 2) * 4
    del query


def test_chunks_of_padding_take_no_outlier_place():
    """Padding by whole chunks, of keys unlike each other: as if the row were alone."""
    query, key, value = random_rows(SHAPE, 100, seed=3)
    visible = torch.zeros(1, 1, 1, 100, dtype=torch.bool)
    visible[..., 40:] = True
    layer = bound(top_k=34)
    padded = read(layer, query, key, value, visible)
    alone = read(layer, query, key[:, :, 40:], value[:, :, 40:])
    assert padded == [{row + 40 for row in rows} for rows in alone]


@pytest.mark.parametrize("seq", [3, 30, 300])
def test_what_is_read_does_not_depend_on_how_the_rows_came(seq):
    """A prompt is not known by its length, and generated rows have landmarks like others."""
    query, key, value = random_rows(SHAPE, seq)
    layer = bound(top_k=24)
    cache = LayerCache(layer.selector)
    for row in range(seq):
        cache.append(key[:, :, row : row + 1], value[:, :, row : row + 1])
        cache.summary(LANDMARK)
    _, selection = attention.decode(query, cache, layer, CALL)
    assert [set(r.tolist()) - {-1} for r in selection.indices[0]] == read(layer, query, key, value)
    assert cache.summary(LANDMARK).shape[2] == -(-seq // 4)


def test_an_eviction_leaves_landmarks_of_the_rows_that_stay():
    _, key, value = random_rows(SHAPE, 90)
    layer = bound()
    cache = filled(layer, key, value)
    cache.summary(LANDMARK)
    kept = torch.arange(0, 90, 3).expand(1, 2, -1)
    cache.keep(kept)
    fresh = filled(layer, key[:, :, ::3].contiguous(), value[:, :, ::3].contiguous())
    for name in (LANDMARK, COSINE):
        assert torch.equal(cache.summary(name), fresh.summary(name))


def test_keys_that_are_not_finite_spoil_no_landmark():
    _, key, value = random_rows(SHAPE, 16)
    clean = filled(bound(), key, value).summary(LANDMARK)
    key[:, :, 5] = float("nan")
    cache = filled(bound(), key, value)
    assert bool(torch.isfinite(cache.summary(LANDMARK)).all())
    assert torch.equal(cache.summary(LANDMARK)[:, :, [0, 2, 3]], clean[:, :, [0, 2, 3]])
    torch.testing.assert_close(cache.summary(LANDMARK)[:, :, 1], key[:, :, [4, 6, 7]].mean(2))


def test_the_budgets_recents_come_before_outliers_and_local_chunks():
    query, key, value = random_rows(SHAPE, 80)
    layer = bound(ShadowKV(chunk=4, outliers=10, local=2), top_k=12, recents=3)
    for rows in read(layer, query, key, value):
        assert {77, 78, 79} <= rows
        assert len(rows) == 12


def test_bytes_are_a_share_of_the_chunk():
    layer = bound(ShadowKV())
    _, key, value = random_rows(SHAPE, 64, dtype=torch.bfloat16)
    cache = filled(layer, key, value)
    before = cache.nbytes()
    assert layer.selector.score_bytes(cache) == (64 * 2 + 4) / 8
    cache.summary(LANDMARK)
    assert cache.nbytes() - before == 2 * 64 * (64 * 2 + 4) / 8


def test_the_preset_has_the_published_amounts():
    policy = preset("shadowkv")
    assert policy.select == ShadowKV(chunk=8, outliers=48, local=4)
    assert policy.budget.top_k == 2048 + 48 * 8 + 4 * 8
    assert policy.group_reduce == "softmax_max"


def test_a_chunk_has_rows():
    with pytest.raises(BudgetError, match="chunk must be a whole number of tokens >= 1, got 0"):
        ShadowKV(chunk=0)
