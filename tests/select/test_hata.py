"""HATA: codes are signs, scores are agreement times norm, trained codes rank better."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loki_attn import attention
from loki_attn.budget import Budget
from loki_attn.cache import LayerCache
from loki_attn.errors import InputError, PolicyError
from loki_attn.kernels import ops
from loki_attn.policy import Policy, preset
from loki_attn.select.hata import CODE, NORM, Hata, pack_signs
from loki_attn.testing import layer_shape, random_rows
from loki_attn.types import AttentionCall

SHAPE = layer_shape(6, 2, 32)
CALL = AttentionCall(scaling=32**-0.5)
RANDOM = Hata(weights="random")


def profile(bits=64, centred=True, seed=3):
    """Weights that differ between KV heads, and a mean that is not small."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(2, 32, bits, generator=draw)
    return {"hash": weight, "hash_mean": torch.randn(2, 32, generator=draw) * (3.0 * centred)}


def filled(selector, key, value=None):
    cache = LayerCache(selector)
    cache.append(key, key if value is None else value)
    return cache


def bits_of(codes):
    """Every bit of int32 codes, unpacked by numpy, lowest byte and lowest bit first."""
    octets = codes.contiguous().numpy().view(np.uint8)
    return np.unpackbits(octets, axis=-1, bitorder="little").astype(bool)


@given(rows=st.integers(0, 5), words=st.integers(1, 5), seed=st.integers(0, 99))
def test_packed_signs_are_the_signs_bit_for_bit(rows, words, seed):
    numbers = torch.randn(3, rows, words * 32, generator=torch.Generator().manual_seed(seed))
    numbers[numbers.abs() < 0.1] = 0.0
    codes = pack_signs(numbers)
    assert (codes.dtype, codes.shape) == (torch.int32, (3, rows, words))
    assert np.array_equal(bits_of(codes), (numbers > 0).numpy())


def test_codes_are_the_signs_of_keys_times_weights():
    known = profile()
    _, key, _ = random_rows(SHAPE, 40, batch=2)
    selector = Hata(bits=64).bind(SHAPE, profile=known)
    planes = selector.planes(key)
    assert set(planes) == {CODE, NORM}
    for head in range(2):
        centred = key[:, head].double() - known["hash_mean"][head].double()
        wanted = (centred @ known["hash"][head].double() > 0).numpy()
        assert np.array_equal(bits_of(planes[CODE][:, head]), wanted)
        norms = centred.norm(dim=-1).half()
        assert torch.equal(planes[NORM][:, head], norms)


@pytest.mark.parametrize("batch", [1, 2])
def test_the_score_is_linear_in_the_agreement_of_bits(batch):
    """(1 - 2 * distance / bits) * norm, per query head, by its own KV head's weights."""
    known = profile()
    query, key, _ = random_rows(SHAPE, 40, batch=batch, q_len=3)
    selector = Hata(bits=64).bind(SHAPE, profile=known)
    cache = filled(selector, key)
    found = selector.score(query, cache, CALL)
    assert found.dtype == torch.float32
    assert found.shape == (batch, 6, 3, 40)
    codes, norms = bits_of(cache.plane(CODE)), cache.plane(NORM).numpy()
    for head in range(6):
        weight = known["hash"][head // 3].double()
        asked = (query[:, head].double() @ weight > 0).numpy()
        agreeing = (asked[:, :, None] == codes[:, head // 3][:, None]).sum(-1)
        wanted = (2 * agreeing / 64 - 1) * norms[:, head // 3][:, None]
        np.testing.assert_allclose(found[:, head].numpy(), wanted, rtol=1e-6, atol=1e-6)


def test_a_group_sums_its_heads():
    """G - 2 * (sum of distances) / bits, times the norm: the published form."""
    query, key, value = random_rows(SHAPE, 40)
    layer = attention.bind(Policy(select=RANDOM, group_reduce="sum"), SHAPE, 1, None)
    cache = filled(layer.selector, key, value)
    visible = torch.ones(1, 1, 1, 40, dtype=torch.bool)
    scores, _, _ = attention.select(query, cache, layer, CALL, visible)
    per_head = layer.selector.score(query, cache, CALL)
    norms = cache.plane(NORM).float()[:, :, None]
    distances = (1 - per_head.unflatten(1, (2, 3)) / norms[:, :, None]) * 128 / 2
    wanted = (3 - 2 * distances.sum(2) / 128) * norms
    torch.testing.assert_close(scores, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", ["sum", "none", "max"])
def test_without_groups_the_sum_is_the_head_alone(how):
    shape = layer_shape(2, 2, 32)
    query, key, value = random_rows(shape, 40)
    chosen = []
    for rule in ("none", how):
        policy = Policy(select=RANDOM, budget=Budget(top_k=7), group_reduce=rule)
        layer = attention.bind(policy, shape, 1, None)
        cache = filled(layer.selector, key, value)
        chosen.append(attention.decode(query, cache, layer, CALL)[1].indices)
    assert torch.equal(*chosen)


def test_equal_vectors_agree_wholly_and_opposite_ones_not_at_all():
    _, key, _ = random_rows(SHAPE, 8)
    selector = RANDOM.bind(SHAPE)
    pair = torch.cat([key, -key], 2)
    cache = filled(selector, pair)
    query = key.repeat_interleave(3, 1)
    codes = pack_signs(query.double() @ selector._weight.repeat_interleave(3, 0))
    distances = ops().hamming(codes, cache.plane(CODE))
    rows = torch.arange(8)
    assert torch.equal(distances[:, :, rows, rows], torch.zeros(1, 6, 8))
    assert torch.equal(distances[:, :, rows, rows + 8], torch.full((1, 6, 8), 128.0))
    norms = key.norm(dim=-1).half().float().repeat_interleave(3, 1)
    scores = selector.score(query, cache, CALL)
    assert torch.equal(scores[:, :, rows, rows], norms)
    assert torch.equal(scores[:, :, rows, rows + 8], -norms)


def test_with_many_random_bits_the_order_approaches_that_of_angles():
    shape = layer_shape(2, 2, 16)
    query, key, _ = random_rows(shape, 300)
    cosines = torch.nn.functional.cosine_similarity(query, key, dim=-1)[0]
    found = []
    for bits in (32, 256, 8192):
        selector = Hata(bits=bits, weights="random").bind(shape)
        cache = filled(selector, key)
        agreement = selector.score(query, cache, CALL)[0, :, 0] / cache.plane(NORM)[0].float()
        ranks = [scores.argsort(-1).argsort(-1).float() for scores in (agreement, cosines)]
        found.append(
            float(
                torch.stack(
                    [torch.corrcoef(torch.stack(r))[0, 1] for r in zip(*ranks, strict=True)]
                ).min()
            )
        )
    assert found == sorted(found)
    assert found[-1] > 0.995


def test_a_full_budget_is_dense():
    query, key, value = random_rows(SHAPE, 50)
    layer = attention.bind(Policy(select=RANDOM, budget=Budget(top_k=50)), SHAPE, 1, None)
    cache = filled(layer.selector, key, value)
    out, _ = attention.decode(query, cache, layer, CALL)
    torch.testing.assert_close(out, attention.dense(query, cache, layer, CALL, None))


def trained_and_random(kind, bits=64):
    """Recall of the exact top 32 of 512 on rows of a decaying spectrum that were not trained on."""
    query, key, value = random_rows(SHAPE, 512, batch=2, q_len=512, decay=1.5)
    if kind == "shifted":
        key = key + 4 * torch.randn(2, 1, 32, generator=torch.Generator().manual_seed(1))
    learner = Hata.calibrator(bits=bits)
    learner.observe(0, query[:1], key[:1])
    known = learner.finish()[0]
    found = {}
    for name, select in (
        ("trained", Hata(bits=bits)),
        ("random", Hata(bits=bits, weights="random")),
    ):
        policy = Policy(select=select, budget=Budget(top_k=32), group_reduce="sum")
        selector = policy.select.bind(SHAPE, profile=known)
        rows = filled(selector, key[1:], value[1:])
        asked = query[1:, :, 256::8]
        exact = asked.double() @ key[1:].double().repeat_interleave(3, 1).mT
        best = exact.topk(32).indices
        mine = selector.score(asked, rows, CALL).topk(32).indices
        hits = (best[..., None] == mine[..., None, :]).any(-1)
        found[name] = float(hits.double().mean())
    return found


@pytest.mark.parametrize("kind", ["centred", "shifted"])
def test_trained_codes_find_more_of_the_best_rows_than_random_ones(kind):
    found = trained_and_random(kind)
    assert found["trained"] > found["random"] + (0.02 if kind == "centred" else 0.3), found


def test_a_common_part_of_all_keys_changes_nothing_that_is_centred():
    """It shifts all logits of a query alike; uncentred codes would be blind to all else."""
    known = profile()
    query, key, _ = (rows.double() for rows in random_rows(SHAPE, 60))
    common = 50 * torch.randn(2, 1, 32, dtype=torch.float64)
    moved = {**known, "hash_mean": known["hash_mean"].double() + common[:, 0]}
    scores = []
    for rows, have in ((key, known), (key + common, moved)):
        selector = Hata(bits=64).bind(SHAPE, profile=have)
        scores.append(selector.score(query, filled(selector, rows), CALL))
    torch.testing.assert_close(*scores, rtol=1e-3, atol=1e-3)


def test_codes_do_not_depend_on_how_many_rows_come_at_once():
    _, key, value = random_rows(SHAPE, 131, batch=2)
    selector = Hata(bits=64).bind(SHAPE, profile=profile())
    whole = filled(selector, key, value)
    parts = LayerCache(selector)
    for start, end in ((0, 1), (1, 2), (2, 60), (60, 61), (61, 131)):
        parts.append(key[:, :, start:end], value[:, :, start:end])
    for name in (CODE, NORM):
        assert torch.equal(parts.plane(name), whole.plane(name))


def test_planes_belong_to_kv_heads_and_take_18_bytes():
    """Copies per query head would cost a group times as much."""
    _, key, _ = random_rows(SHAPE, 20, dtype=torch.bfloat16)
    selector = RANDOM.bind(SHAPE)
    cache = filled(selector, key)
    assert cache.plane(CODE).shape == (1, 2, 20, 4)
    assert cache.plane(NORM).dtype == torch.float16
    assert selector.score_bytes(cache) == 18
    assert (
        Hata(bits=64, weights="random")
        .bind(SHAPE)
        .score_bytes(filled(Hata(bits=64, weights="random").bind(SHAPE), key))
        == 10
    )


def test_norms_beyond_float16_and_padding_that_is_no_number_do_no_harm():
    query, key, value = random_rows(SHAPE, 30)
    key[:, :, 5] *= 1e6
    selector = RANDOM.bind(SHAPE)
    whole = selector.score(query, filled(selector, key), CALL)
    assert bool(torch.isfinite(whole).all())
    for junk in (float("nan"), float("inf"), 1e9):
        spoilt = key.clone()
        spoilt[:, :, :3] = junk
        scores = selector.score(query, filled(selector, spoilt), CALL)
        assert torch.equal(scores[..., 3:], whole[..., 3:])
        layer = attention.bind(Policy(select=RANDOM, budget=Budget(top_k=6)), SHAPE, 1, None)
        visible = (torch.arange(30) >= 3)[None, None, None]
        cache = filled(layer.selector, spoilt, value)
        out, selection = attention.decode(query, cache, layer, CALL, visible)
        assert int(selection.indices.min()) >= 3
        assert bool(torch.isfinite(out).all())


def test_some_heads_of_a_selector_are_those_heads():
    known = profile()
    query, key, _ = random_rows(SHAPE, 40)
    selector = Hata(bits=64).bind(SHAPE, profile=known)
    whole = selector.score(query, filled(selector, key), CALL)
    second = selector.narrowed(torch.tensor([1]))
    part = second.score(query[:, 3:], filled(second, key[:, 1:]), CALL)
    assert torch.equal(part, whole[:, 3:])


def test_random_weights_repeat_and_follow_their_seed():
    one, same, other = (Hata(weights="random", seed=s).bind(SHAPE) for s in (1, 1, 2))
    assert torch.equal(one._weight, same._weight)
    assert not torch.equal(one._weight, other._weight)


def test_presets_read_what_they_say():
    trained, control = preset("hata"), preset("hata-random")
    assert trained.select == Hata()
    assert trained.select.needs_profile
    assert not control.select.needs_profile
    assert control.select == RANDOM
    assert trained.budget == control.budget
    assert trained.group_reduce == control.group_reduce == "sum"
    assert (trained.budget.top_k, trained.budget.sinks, trained.budget.recents) == (512, 4, 64)
    assert preset("hata", bits=64, top_k=128).select == Hata(bits=64)


def test_it_estimates_no_mass():
    with pytest.raises(PolicyError, match="hata estimates no mass; give top_k or fraction"):
        Policy(select=RANDOM, budget=Budget(mass=0.9))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 100}, "bits must be a multiple of 32 above 0, got 100."),
        ({"bits": 0}, "got 0."),
        ({"bits": 64.0}, "got 64.0."),
        ({"seed": -1}, "seed must be a whole number from 0, got -1."),
        ({"weights": "traned"}, "Unknown weights 'traned'. Did you mean 'trained'?"),
    ],
)
def test_settings_that_no_layer_could_serve(settings, message):
    with pytest.raises(InputError, match=re.escape(message)):
        Hata(**settings)


@pytest.mark.parametrize(
    ("known", "select", "message"),
    [
        (None, Hata(), "needs trained hash weights for layer 0; make a profile with `loki-attn pr"),
        ({"gate": torch.ones(2)}, Hata(), "or take weights='random', which needs none"),
        (profile(), Hata(), "codes have 64 bits, the policy asks for 128; say bits=64, or make"),
        (
            {"hash": torch.ones(3, 32, 128), "hash_mean": torch.ones(3, 32)},
            Hata(),
            "needs hash weights [kv_heads, head_dim, bits] = [2, 32, 128], the profile has [3, 32",
        ),
    ],
)
def test_profiles_that_do_not_fit(known, select, message):
    with pytest.raises(PolicyError, match=re.escape(message)):
        select.bind(SHAPE, profile=known)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 33}, "bits must be a multiple of 32 above 0, got 33."),
        ({"steps": 0}, "steps is a whole number of steps above 0, got 0."),
        ({"centre": "yes"}, "centre is true or false, got 'yes'."),
        ({"balance": -1}, "balance is a finite weight, at least 0, got -1."),
        ({"similarity": "much"}, "similarity is a finite weight, at least 0, got 'much'."),
        ({"decorrelation": float("nan")}, "decorrelation is a finite weight, at least 0, got nan."),
        ({"seed": 0.5}, "seed is a whole number, got 0.5."),
    ],
)
def test_settings_that_cannot_be_trained_with(settings, message):
    with pytest.raises(InputError, match=re.escape(message)):
        Hata.calibrator(**settings)
