"""Double Sparsity: channels found by calibration, and a plane that holds just these."""

from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loki_attn import attention
from loki_attn.budget import Budget
from loki_attn.cache import LayerCache
from loki_attn.calibrating import calibrated_methods, calibrator
from loki_attn.errors import InputError, PolicyError, UnknownNameError
from loki_attn.kernels import ops
from loki_attn.pieces.lead_plane import LEAD, LEAD_SCALE
from loki_attn.policy import Policy, preset
from loki_attn.profile import Profile
from loki_attn.select.double_sparsity import CHANNELS, ChannelCalibrator, DoubleSparsity
from loki_attn.select.exact_topk import ExactTopK
from loki_attn.testing import layer_shape, random_rows
from loki_attn.types import AttentionCall, GroupReduce

SHAPE = layer_shape(6, 2, 32)
CALL = AttentionCall(scaling=32**-0.5)
RULES = get_args(GroupReduce)
ORDERS = torch.stack([torch.arange(32).roll(5), torch.arange(32).flip(0)])


def profile_of(channels):
    return Profile(layers={0: {CHANNELS: channels}})


def bound(select, channels=ORDERS, how="softmax_sum", shape=SHAPE, **amount):
    policy = Policy(select=select, budget=Budget(**(amount or {"top_k": 9})), group_reduce=how)
    profile = None if channels is None else profile_of(channels)
    return attention.bind(policy, shape, 1, None, profile)


def filled(layer, key, value):
    cache = LayerCache(layer.selector)
    cache.append(key, value)
    return cache


def indices(layer, query, key, value):
    return attention.decode(query, filled(layer, key, value), layer, CALL)[1].indices


def calibrated(*windows, layer=0):
    made = ChannelCalibrator()
    for query, key in windows:
        made.observe(layer, query, key)
    return made


# the plane --------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", RULES)
def test_all_channels_choose_the_exact_top_k(how):
    exact = bound(ExactTopK(), None, how)
    layer = bound(DoubleSparsity(rank=32, plane_dtype="fp32"), how=how)
    for seed in range(5):
        rows = random_rows(SHAPE, 60, batch=2, seed=seed)
        assert torch.equal(indices(layer, *rows), indices(exact, *rows))


@pytest.mark.parametrize("rank", [1, 7, 32])
@pytest.mark.parametrize(("plane", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_labels_are_the_chosen_columns_of_the_keys(rank, plane, dtype, poison):
    """Bit for bit, each KV head its own, best first; also where rows come one by one."""
    _, key, value = random_rows(SHAPE, 21, batch=2, dtype=dtype)
    layer = bound(DoubleSparsity(rank=rank, plane_dtype=plane))
    stepwise = LayerCache(layer.selector)
    for step in range(21):
        stepwise.append(key[:, :, step : step + 1], value[:, :, step : step + 1])
    for cache in (filled(layer, key, value), stepwise):
        for head in range(2):
            expected = key[:, head][..., ORDERS[head, :rank]]
            assert torch.equal(cache.plane(LEAD)[:, head], expected)
        assert torch.equal(cache.keys, key)


@pytest.mark.parametrize("plane", ["int8", "int4"])
def test_codes_are_within_half_a_step_of_the_columns(plane):
    _, key, value = random_rows(SHAPE, 40, batch=2)
    cache = filled(bound(DoubleSparsity(rank=8, plane_dtype=plane)), key, value)
    scales = cache.plane(LEAD_SCALE).float()[..., None]
    expected = torch.stack([key[:, h][..., ORDERS[h, :8]] for h in range(2)], 1)
    error = (cache.plane(LEAD).float() * scales - expected).abs()
    assert bool((error <= scales * 0.501).all())


def test_scores_are_logits_of_those_channels():
    query, key, value = random_rows(SHAPE, 40, batch=2)
    layer = bound(DoubleSparsity(rank=5, plane_dtype="fp32"))
    got = layer.selector.score(query, filled(layer, key, value), CALL)
    for head in range(6):
        own = ORDERS[head // 3, :5]
        expected = query[:, head][..., own] @ key[:, head // 3][..., own].mT * CALL.scaling
        torch.testing.assert_close(got[:, head], expected)


@given(seed=st.integers(0, 999))
def test_permuting_channels_of_queries_and_keys_changes_nothing(seed):
    """With channels calibrated on what was permuted; a Loki without a rotation is not rotated."""
    order = torch.randperm(32, generator=torch.Generator().manual_seed(seed))
    windows = [random_rows(SHAPE, 50, q_len=50, batch=2, seed=seed)[:2]]
    turned = [(query[..., order], key[..., order]) for query, key in windows]
    mine, other = (calibrated(*w).finish()[0][CHANNELS] for w in (windows, turned))
    assert torch.equal(order[other], mine)
    query, key, value = random_rows(SHAPE, 60, seed=seed + 1)
    select = DoubleSparsity(rank=6, plane_dtype="fp32")
    first = indices(bound(select, mine), query, key, value)
    assert torch.equal(
        first, indices(bound(select, other), query[..., order], key[..., order], value)
    )


def test_a_lower_rank_takes_the_best_channels_of_the_same_profile():
    for rank in (1, 3):
        layer = bound(DoubleSparsity(rank=rank, plane_dtype="fp32"))
        lead = layer.selector.lead(filled(layer, *random_rows(SHAPE, 3)[1:]))
        assert torch.equal(lead.query_map.argmax(1), ORDERS[:, :rank])


def test_some_heads_take_their_own_channels():
    query, key, value = random_rows(SHAPE, 60)
    layer = bound(DoubleSparsity(rank=4))
    part = layer.of(torch.tensor([1]))
    cache = LayerCache(part.selector)
    cache.append(key[:, 1:], value[:, 1:])
    mine = attention.decode(query[:, 3:], cache, part, CALL)[1].indices
    assert torch.equal(mine, indices(layer, query, key, value)[:, 1:])


def test_a_kernel_may_serve_it_and_chooses_alike():
    """What a fused step or append is told is one lead plane, with maps of 0 and 1."""
    query, key, value = random_rows(SHAPE, 200, batch=2)
    layer = bound(DoubleSparsity(rank=6), top_k=20)
    cache = filled(layer, key, value)
    told = layer.selector.lead_format(key.device)
    assert layer.selector.stores_only(told)
    assert (told.plane, told.scales) == (LEAD, LEAD_SCALE)
    assert set(told.key_map.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(told.key_map, layer.selector.lead(cache).query_map)
    visible = torch.ones(1, 1, 1, 200, dtype=torch.bool)
    scores, counts, forced = attention.select(query, cache, layer, CALL, visible)
    plain = ops("reference").choose(scores, counts, visible, forced)
    assert torch.equal(attention.decode(query, cache, layer, CALL)[1].indices, plain.indices)


# calibration ------------------------------------------------------------------------------------


def test_the_mean_is_over_tokens_with_themselves_summed_over_the_group():
    query, key, _ = random_rows(SHAPE, 9, batch=2, q_len=9)
    found = calibrated((query, key)).means(0)
    assert found.shape == (2, 32)
    expected = torch.zeros(2, 32, dtype=torch.float64)
    for b in range(2):
        for t in range(9):
            for h in range(6):
                expected[h // 3] += (query[b, h, t] * key[b, h // 3, t]).abs().double() / 18
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_a_channel_of_other_tokens_products_does_not_count():
    """Large queries and large keys that never meet in one token."""
    query, key = torch.ones(1, 1, 4, 3), torch.ones(1, 1, 4, 3)
    query[0, 0, :2, 2], key[0, 0, :2, 2] = 100.0, 0.0
    query[0, 0, 2:, 2], key[0, 0, 2:, 2] = 0.0, 100.0
    assert calibrated((query, key)).means(0)[0].tolist() == [1.0, 1.0, 0.0]
    assert calibrated((query, key)).finish()[0][CHANNELS].tolist() == [[0, 1, 2]]


def test_signs_do_not_cancel():
    query, key = torch.ones(1, 2, 4, 2), torch.ones(1, 1, 4, 2)
    query[:, :, ::2, 1], query[:, 1, :, 1] = -3.0, 3.0
    assert calibrated((query, key)).finish()[0][CHANNELS].tolist() == [[1, 0]]


def test_calibration_is_additive_over_windows_and_batches():
    query, key, _ = random_rows(SHAPE, 40, batch=4, q_len=40)
    whole = calibrated((query, key))
    windows = [(query[:, :, part], key[:, :, part]) for part in (slice(15), slice(15, 40))]
    rows = [(query[row : row + 1], key[row : row + 1]) for row in range(4)]
    for split in (windows, rows, rows[::-1]):
        torch.testing.assert_close(calibrated(*split).means(0), whole.means(0))
        assert torch.equal(calibrated(*split).finish()[0][CHANNELS], whole.finish()[0][CHANNELS])


def test_channels_are_those_of_the_kv_head_not_of_copies():
    """Head 0 is large in channels 3 and 4, head 1 in 20: a layer's order would mix them."""
    query, key, _ = random_rows(SHAPE, 30, q_len=30)
    key[:, 0, :, 3] *= 90
    key[:, 0, :, 4] *= 30
    key[:, 1, :, 20] *= 50
    found = calibrated((query, key)).finish()[0][CHANNELS]
    assert found.dtype == torch.int64
    assert found[0, :2].tolist() == [3, 4]
    assert int(found[1, 0]) == 20
    assert torch.equal(found.sort(-1).values, torch.arange(32).expand(2, -1))


def test_layers_are_apart_and_half_precision_does_not_saturate():
    made = ChannelCalibrator()
    for _ in range(3):
        made.observe(5, *(torch.full((1, 2, 400, 4), 200.0, dtype=torch.float16) for _ in "qk"))
    made.observe(2, torch.ones(1, 2, 4, 4), torch.ones(1, 2, 4, 4))
    assert list(made.finish()) == [2, 5]
    assert bool((made.means(5) == 40000.0).all())
    assert bool((made.means(2) == 1.0).all())
    assert made.finish()[2][CHANNELS].tolist() == [[0, 1, 2, 3]] * 2


def test_calibrated_channels_find_more_than_random_ones():
    """Keys and queries that live in few channels, others in each head."""
    shape, top_k = layer_shape(4, 2, 32), 25
    spread = torch.full((2, 32), 0.2)
    spread[0, 7:11], spread[1, 20:24] = 3.0, 3.0

    def draw(q_len, seed):
        query, key, value = random_rows(shape, 200, batch=4, q_len=q_len, seed=seed)
        return query * spread.repeat_interleave(2, 0)[:, None], key * spread[:, None], value

    channels = calibrated(draw(200, 1)[:2]).finish()[0][CHANNELS]
    rows = draw(1, 2)
    exact = indices(bound(ExactTopK(), None, shape=shape, top_k=top_k), *rows)
    found = {}
    for source in ("profile", "random"):
        layer = bound(DoubleSparsity(rank=4, channels=source), channels, shape=shape, top_k=top_k)
        got = indices(layer, *rows)
        found[source] = float((got[..., None] == exact[..., None, :]).any(-1).float().mean())
    assert found["profile"] > 0.9
    assert found["random"] < 0.6


def test_a_saved_profile_binds_alike(tmp_path):
    made = calibrated(random_rows(SHAPE, 40, q_len=40)[:2])
    Profile(layers=made.finish()).save(tmp_path / "profile.safetensors")
    loaded = Profile.load(tmp_path / "profile.safetensors").layer(0)[CHANNELS]
    rows = random_rows(SHAPE, 60, seed=1)
    select = DoubleSparsity(rank=6)
    mine = indices(bound(select, made.finish()[0][CHANNELS]), *rows)
    assert torch.equal(mine, indices(bound(select, loaded), *rows))


def test_it_is_among_the_methods_that_learn_from_text():
    assert "double_sparsity" in calibrated_methods()
    made = calibrator("double_sparsity")
    assert isinstance(made, ChannelCalibrator)
    assert made.settings == {}
    with pytest.raises(UnknownNameError, match="setting of double_sparsity 'bits'"):
        calibrator("double_sparsity", bits=8)


def test_nothing_observed_is_refused():
    with pytest.raises(InputError, match="No token was observed; calibrate with text"):
        ChannelCalibrator().finish()
    with pytest.raises(InputError, match="No token of layer 3 was observed"):
        ChannelCalibrator().means(3)


@pytest.mark.parametrize("sizes", [(1, 6, 8, 32), (2, 6, 9, 32), (1, 6, 9, 16), (1, 5, 9, 32)])
def test_queries_and_keys_of_other_tokens_are_refused(sizes):
    with pytest.raises(InputError, match=r"queries and keys of the same tokens.*got"):
        ChannelCalibrator().observe(0, torch.zeros(sizes), torch.zeros(1, 2, 9, 32))


# random channels, bytes, refusals ---------------------------------------------------------------


def test_random_channels_need_no_profile_and_are_the_same_for_all_heads():
    select = DoubleSparsity(rank=6, channels="random")
    rows = random_rows(SHAPE, 3)[1:]

    def channels(layer_index):
        shape = layer_shape(6, 2, 32)
        shape = type(shape)(**{**vars(shape), "index": layer_index})
        selector = select.bind(shape)
        cache = LayerCache(selector)
        cache.append(*rows)
        return selector.lead(cache).query_map.argmax(1)

    first = channels(0)
    assert torch.equal(first, channels(0))
    assert not torch.equal(first, channels(1))
    assert torch.equal(first[0], first[1])
    assert len(set(first[0].tolist())) == 6


@pytest.mark.parametrize(
    ("select", "bytes_per_row"),
    [
        (DoubleSparsity(rank=8), 8 + 2),
        (DoubleSparsity(rank=8, plane_dtype="int4"), 4 + 2),
        (DoubleSparsity(rank=0.0625), 4 + 2),  # whole lines of 4 bytes
        (DoubleSparsity(rank=8, plane_dtype="bf16"), 16),
        (DoubleSparsity(rank=8, plane_dtype="fp32"), 32),
    ],
    ids=str,
)
def test_bytes_are_as_the_docstring_says(select, bytes_per_row):
    layer = bound(select)
    cache = filled(layer, *random_rows(SHAPE, 9, dtype=torch.bfloat16)[1:])
    assert layer.selector.score_bytes(cache) == bytes_per_row
    assert cache.row_bytes() - cache.row_bytes("key", "value", "position") == bytes_per_row


def test_the_preset_and_its_fields():
    policy = preset("double-sparsity", rank=8, plane_dtype="int4", channels="random", top_k=512)
    assert policy.select == DoubleSparsity(rank=8, plane_dtype="int4", channels="random")
    assert policy.budget == Budget(top_k=512)
    assert preset("double-sparsity").budget == Budget(fraction=1 / 16)
    assert preset("double-sparsity").select.rank == 1 / 16
    assert Policy.from_json(policy.to_json()) == policy
    assert DoubleSparsity.needs_profile


@pytest.mark.parametrize("channels", [None, "other"])
def test_a_profile_is_needed(channels):
    found = None if channels is None else {"hash": ORDERS}
    with pytest.raises(
        PolicyError, match=r"channels of layer 0; make a profile .* 'random'|random"
    ):
        DoubleSparsity().bind(SHAPE, None, found)


@pytest.mark.parametrize("channels", [ORDERS[:1], ORDERS[:, :1], ORDERS[0]])
def test_channels_of_another_shape_are_refused(channels):
    with pytest.raises(PolicyError, match=r"\[kv_heads=2, at least 2\], the profile has \["):
        DoubleSparsity().bind(SHAPE, None, {CHANNELS: channels})


@pytest.mark.parametrize("wrong", [0, -1, 32])
def test_channels_that_repeat_or_are_not_there_are_refused(wrong):
    channels = torch.tensor([[0, 1], [0, 1]])
    channels[1, 1] = wrong
    with pytest.raises(PolicyError, match=r"must differ and lie in 0\.\.31"):
        DoubleSparsity().bind(SHAPE, None, {CHANNELS: channels})


def test_unknown_choices_list_the_valid_ones():
    with pytest.raises(UnknownNameError, match="Valid: profile, random"):
        DoubleSparsity(channels="first")
    with pytest.raises(UnknownNameError, match="Valid: bf16, fp32, int4, int8"):
        DoubleSparsity(plane_dtype="int2")
    with pytest.raises(PolicyError, match="rank=33 is above head_dim=32; lower it"):
        DoubleSparsity(rank=33).bind(SHAPE)
