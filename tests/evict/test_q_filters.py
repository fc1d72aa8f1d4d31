"""Q-Filters: keys along the direction of the queries stay."""

import pytest
import torch

from loki_attn.calibrating import calibrator
from loki_attn.errors import InputError, PolicyError
from loki_attn.policy import preset
from loki_attn.profile import Profile
from loki_attn.testing import DrivenLayer, layer_shape, random_rows, tiny_basis

SHAPE = layer_shape(6, 2, 16)


def lopsided(tokens, seed=0, batch=1):
    """Queries of each KV head that lie to one side of 0 along one direction."""
    query, key, value = random_rows(SHAPE, tokens, batch=batch, q_len=tokens, seed=seed)
    draw = torch.Generator().manual_seed(1)
    toward = torch.nn.functional.normalize(torch.randn(2, 16, generator=draw), dim=-1)
    return query + 8 * toward.repeat_interleave(3, 0)[None, :, None], key, value, toward


def profile_of(*windows):
    learner = calibrator("q_filters")
    for query, key in windows:
        learner.observe(0, query, key)
    return Profile(layers=learner.finish())


def filters_of(*windows):
    return profile_of(*windows).layers[0]["query_filter"]


def test_filters_are_the_leading_direction_on_the_side_of_the_mean_query():
    query, key, _, toward = lopsided(200)
    filters = filters_of((query, key))
    assert (filters * toward).sum(-1).min() > 0.99
    for head in range(2):
        rows = query[0, 3 * head : 3 * head + 3].flatten(0, 1).double()
        leading = torch.linalg.svd(rows).Vh[0]
        leading = leading * torch.sign(leading @ rows.mean(0))
        torch.testing.assert_close(filters[head].double(), leading, rtol=1e-4, atol=1e-5)


def test_the_sign_is_fixed_so_queries_on_the_other_side_turn_the_filter():
    query, key, _, _ = lopsided(50)
    torch.testing.assert_close(filters_of((-query, key)), -filters_of((query, key)))


def test_windows_one_by_one_give_the_filters_of_all_together():
    query, key, _, _ = lopsided(60, batch=2)
    parts = [(query[:, :, part], key[:, :, part]) for part in (slice(0, 25), slice(25, 60))]
    torch.testing.assert_close(filters_of(*parts), filters_of((query, key)))
    with pytest.raises(InputError, match="none were observed"):
        calibrator("q_filters").finish()


def test_rows_whose_keys_lie_along_the_filter_stay_in_order():
    query, key, value, _ = lopsided(40, batch=2)
    profile = profile_of((query, key))
    driven = DrivenLayer(preset("q-filters", capacity=9), SHAPE, profile=profile)
    driven.prompt(query, key, value)
    along = (key * profile.layers[0]["query_filter"][None, :, None]).sum(-1)
    assert driven.positions() == along.topk(9).indices.sort().values.tolist()


def test_what_stays_is_attended_to_more_than_what_the_other_sign_would_keep():
    query, key, value, _ = lopsided(200)
    profile = profile_of((query, key))
    driven = DrivenLayer(preset("q-filters", capacity=50), SHAPE, profile=profile)
    driven.prompt(query, key, value)
    coming = lopsided(1, seed=9)[0]
    logits = (coming.view(1, 2, 3, 16) @ key.mT).mean(2)
    kept = torch.zeros(1, 2, 200).scatter_(2, torch.tensor(driven.positions()), 1.0).bool()
    assert logits[kept].mean() > logits[~kept].mean()


def test_filters_follow_their_heads_into_a_shard():
    query, key, value, _ = lopsided(40)
    driven = DrivenLayer(preset("q-filters", capacity=40), SHAPE, profile=profile_of((query, key)))
    driven.prompt(query, key, value)
    evictor, cache = driven.layer.eviction.evictor, driven.rows.whole
    whole = evictor.scores(cache, driven.call, None)
    heads = torch.tensor([1])
    part = cache.narrowed(None, heads, cache.row_format)
    mine = evictor.narrowed(heads).scores(part, driven.call, None)
    torch.testing.assert_close(mine, whole[:, 1:])


def test_a_layer_without_fitting_filters_is_refused():
    with pytest.raises(PolicyError, match="loki-attn profile --method q_filters"):
        DrivenLayer(preset("q-filters", capacity=9), SHAPE)
    query, key, _, _ = lopsided(10)
    with pytest.raises(PolicyError, match=r"3 KV heads of 16, but .* are \(2, 16\)"):
        DrivenLayer(
            preset("q-filters", capacity=9), layer_shape(6, 3, 16), profile=profile_of((query, key))
        )


def test_keys_that_are_stored_in_a_basis_are_refused():
    query, key, _, _ = lopsided(10)
    policy = preset("loki-paper", evict="q_filters", capacity=9)
    with pytest.raises(PolicyError, match="q_filters rotates stored keys or looks"):
        DrivenLayer(policy, SHAPE, basis=tiny_basis(SHAPE), profile=profile_of((query, key)))
