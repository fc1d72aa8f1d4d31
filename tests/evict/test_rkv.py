"""R-KV: importance less redundancy."""

import pytest
import torch
from stepping import scaling_of, walk
from torch.nn.functional import normalize

from loki_attn.errors import PolicyError
from loki_attn.evict import rkv
from loki_attn.evict.rkv import RKV, mean_similarity
from loki_attn.policy import Policy, preset
from loki_attn.testing import layer_shape, random_rows

SHAPE = layer_shape(6, 2, 16)


def naive_similarity(keys, threshold):
    """Keys [rows, dim] of one head: the whole matrix, and a loop over its rows."""
    unit = normalize(keys.double(), dim=-1)
    cosines = unit @ unit.T
    cosines.fill_diagonal_(0.0)
    for i in range(len(keys)):
        later = [j for j in range(i + 1, len(keys)) if cosines[i, j] > threshold]
        if later:
            cosines[i, later[-1]] = 0.0
    return cosines.sum(0) / (len(keys) - 1)


def naive_scores(query, keys, mix, window, kernel):
    """Scores of one head's rows, for its group's queries [group, tokens, dim] of the last rows."""
    length = len(keys)
    window = min(window, length)
    logits = query[:, -window:].double() @ keys.double().T * scaling_of(SHAPE)
    hidden = torch.ones(window, length).triu(length - window + 1).bool()
    weights = logits.masked_fill(hidden, float("-inf")).softmax(-1).mean(1).amax(0)
    reach = kernel // 2
    pooled = torch.stack([weights[max(0, i - reach) : i + reach + 1].max() for i in range(length)])
    return mix * pooled - (1 - mix) * naive_similarity(keys, 0.5).softmax(0)


def mixed(rows, share=0.8):
    """Rows whose keys share a direction, so that many cosines lie about the threshold."""
    query, key, value = rows
    common = key[:, :, :1]
    return query, (1 - share) * key + share * common, value


@pytest.mark.parametrize("mix", [0.07, 0.5, 1.0])
def test_scores_are_those_of_the_whole_matrix(mix):
    query, key, value = mixed(random_rows(SHAPE, 60, batch=2, q_len=60), 0.55)
    layer, _, _ = walk(preset("rkv", capacity=99, mix=mix), SHAPE, (query, key, value), 57)
    own = layer.layer.eviction.evictor
    scores = own.scores(layer.rows.whole, layer.call, None)
    for b in range(2):
        for h in range(2):
            group = query[b, 3 * h : 3 * h + 3]
            truth = naive_scores(group, key[b, h], mix, 8, 7)
            torch.testing.assert_close(scores[b, h].double(), truth, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("length", [1, 2, 9, 31, 32, 33, 100])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
def test_similarity_in_blocks_is_that_of_the_whole_matrix(monkeypatch, length, share):
    monkeypatch.setattr(rkv, "_BLOCK", 16)
    _, key, _ = mixed(random_rows(SHAPE, length, batch=2, seed=length), share)
    found = mean_similarity(key, None, 0.5)
    for b in range(2):
        for h in range(2):
            truth = naive_similarity(key[b, h], 0.5) if length > 1 else torch.zeros(1)
            torch.testing.assert_close(found[b, h].double(), truth.double(), rtol=1e-5, atol=1e-6)


def test_of_equal_keys_the_older_ones_go_first():
    # Rows 5, 20 and 33 are copies: without importance, only the newest is spared.
    _, key, _ = random_rows(SHAPE, 60, batch=2)
    key[:, :, [5, 20]] = key[:, :, [33]]
    alike = mean_similarity(key, None, 0.99)
    assert bool((alike[..., 33] < alike[..., 20]).all())
    assert bool((alike[..., 20] <= alike[..., 5] + 1e-6).all())


def test_of_a_pair_only_the_newer_is_spared():
    # The released code spares both: each is the other's only near-duplicate.
    key = torch.eye(6)[None, None].clone()
    key[..., 4, :] = key[..., 1, :]
    alike = mean_similarity(key, None, 0.5)[0, 0]
    torch.testing.assert_close(alike, torch.tensor([0, 0.2, 0, 0, 0, 0]))


def test_rows_without_a_near_duplicate_change_nothing_for_row_0():
    # An index of the largest of nothing is 0, and would clear row 0.
    key = torch.eye(8)[None, None] + 0.1
    alike = mean_similarity(key, None, 0.5)[0, 0]
    torch.testing.assert_close(alike, alike[:1].expand(8))
    assert float(alike[0]) > 0


def test_every_batch_row_has_its_own_similarities():
    _, key, _ = mixed(random_rows(SHAPE, 40, batch=3))
    together = mean_similarity(key, None, 0.5)
    for b in range(3):
        torch.testing.assert_close(mean_similarity(key[b : b + 1], None, 0.5), together[b : b + 1])


def test_similarity_ignores_padding_whatever_it_holds():
    _, key, _ = mixed(random_rows(SHAPE, 40, batch=2))
    valid = torch.ones(2, 1, 40, dtype=torch.bool)
    valid[1, :, :13] = False
    truth = mean_similarity(key[1:, :, 13:], None, 0.5)
    for rubbish in (float("nan"), float("inf"), 1e9):
        key[1, :, :13] = rubbish
        torch.testing.assert_close(mean_similarity(key, valid, 0.5)[1:, :, 13:], truth)


def test_cosines_are_invariant_under_an_orthogonal_map():
    _, key, _ = mixed(random_rows(SHAPE, 50, batch=2))
    turn = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(0))).Q
    torch.testing.assert_close(
        mean_similarity(key @ turn, None, 0.5), mean_similarity(key, None, 0.5)
    )


def test_a_zero_key_is_like_no_other():
    key = torch.ones(1, 1, 5, 4)
    key[..., 2, :] = 0
    assert float(mean_similarity(key, None, 0.5)[0, 0, 2]) == 0


def test_importance_alone_is_a_window_score_as_of_snapkv():
    rows = random_rows(SHAPE, 60, batch=2, q_len=60)
    own = preset("rkv", capacity=20, burst=0, mix=1.0)
    snapkv = preset("snapkv", capacity=20, window=8, kernel=7, pooling="max", reduce="max")
    assert walk(own, SHAPE, rows, 60)[1] == walk(snapkv, SHAPE, rows, 60)[1]


def test_rows_go_when_the_burst_is_full():
    rows = random_rows(SHAPE, 60, q_len=60)
    _, held, _ = walk(preset("rkv", capacity=20, burst=6), SHAPE, rows, 24)
    sizes = [len(step[0][0]) for step in held]
    assert sizes[:5] == [24, 25, 26, 20, 21]
    assert max(sizes[1:]) == 26


def test_the_window_stays():
    rows = random_rows(SHAPE, 80, q_len=80)
    _, held, _ = walk(preset("rkv", capacity=12, burst=0), SHAPE, rows, 30)
    for step, heads in enumerate(history[0] for history in held):
        assert all(kept[-8:] == list(range(22 + step, 30 + step)) for kept in heads)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"mix": 2.0}, r"mix is a share in \[0, 1\], got 2.0"),
        ({"window": 0}, "a window of at least one query, got 0"),
        ({"kernel": 4}, "pools over an odd number of rows, got kernel=4"),
    ],
)
def test_what_makes_no_sense_is_refused(fields, text):
    with pytest.raises(PolicyError, match=text):
        RKV(**fields)


def test_policies_with_it_survive_json():
    policy = preset("rkv", mix=0.1, capacity=99)
    assert Policy.from_json(policy.to_json()) == policy
