"""UNComp: the entropy of known spectra, and heads that keep rows by it."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from stepping import pieces

from loki_attn.calibrating import calibrator
from loki_attn.errors import InputError, PolicyError, UnknownNameError
from loki_attn.evict.uncomp import UNComp, matrix_entropy, over_heads
from loki_attn.policy import Policy, preset
from loki_attn.profile import Profile
from loki_attn.testing import DrivenLayer, layer_shape, random_rows

SHAPE = layer_shape(8, 4, 16)
TOKENS, CAPACITY = 64, 20


def isotropic(directions, dim):
    """Rows plus and minus each of the first axes: centred, of one length, a flat spectrum."""
    axes = torch.eye(dim)[:directions]
    return torch.cat([axes, -axes])[None, None]


def entropy(rows, truncate=None):
    return float(matrix_entropy(rows, None, truncate))


def gaussian(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def prompt(tokens=TOKENS, *, batch=2, seed=0):
    """Rows whose queries have fewer directions the later the head."""
    query, key, value = random_rows(SHAPE, tokens, batch=batch, q_len=tokens, seed=seed)
    for head in range(8):
        query[:, head, :, 16 - 2 * (head // 2) * 2 :] *= 0.01
    return query * 3, key, value


def driven(rows, *, valid=None, chunks=(), profile=None, **more):
    policy = preset("uncomp", **{"capacity": CAPACITY, **more})
    layer = DrivenLayer(policy, SHAPE, profile=profile)
    layer.prompt(*rows, valid, chunks=chunks)
    return layer


def lengths(layer):
    return [[len(head) for head in row] for row in layer.positions()]


def test_rows_along_one_line_have_no_entropy():
    line = gaussian(1, 1, 1, 16)
    rows = line * torch.linspace(-2, 3, 40)[:, None] + gaussian(1, 1, 1, 16, seed=1)
    assert entropy(rows) == pytest.approx(0.0, abs=1e-4)


@given(st.integers(0, 10**6), st.integers(1, 16), st.integers(2, 40))
def test_entropy_lies_between_nothing_and_the_flat_spectrum(seed, truncate, tokens):
    found = entropy(gaussian(1, 1, tokens, 16, seed=seed), truncate)
    # Below K = d / e the leading eigenvalues can exceed 1 / K only by lowering the entropy.
    assert -1e-6 <= found <= max(math.log(truncate), 1 / math.e) / math.log(16) + 1e-6


def test_isotropic_rows_reach_one_only_without_truncation():
    rows = isotropic(128, 128)
    assert entropy(rows, 32) == pytest.approx(0.25, abs=1e-4)
    assert entropy(rows, 128) == pytest.approx(1.0, abs=1e-4)
    assert entropy(rows) == pytest.approx(1.0, abs=1e-4)


def test_a_flat_spectrum_of_as_many_directions_as_count_is_the_largest():
    largest = math.log(32) / math.log(128)
    assert entropy(isotropic(32, 128), 32) == pytest.approx(largest, abs=1e-4)
    assert entropy(isotropic(48, 128), 32) < largest


def test_orthogonal_maps_and_a_common_scale_change_nothing():
    rows = gaussian(1, 1, 50, 16)
    turn = torch.linalg.qr(gaussian(16, 16, seed=2)).Q
    assert entropy(rows @ turn, 8) == pytest.approx(entropy(rows, 8), abs=1e-4)
    assert entropy(rows * 37.0, 8) == pytest.approx(entropy(rows, 8), abs=1e-6)


def test_scales_of_single_rows_change_nothing_only_where_rows_are_centred():
    scales = torch.linspace(0.5, 4.0, 32)[:, None]
    centred = isotropic(16, 16)
    # The same scale for a row and its opposite leaves the mean where it is.
    twice = torch.cat([scales[:16], scales[:16]])
    assert entropy(centred * twice) == pytest.approx(entropy(centred), abs=1e-5)
    shifted = gaussian(1, 1, 32, 16) + 3.0
    assert abs(entropy(shifted * scales) - entropy(shifted)) > 1e-3


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1e4])
@pytest.mark.parametrize("tokens", [1, 7])
def test_rows_that_are_all_alike_have_none(value, tokens):
    assert entropy(torch.full((1, 1, tokens, 16), value)) == 0.0


def test_one_dimension_has_none():
    assert entropy(gaussian(1, 1, 9, 1)) == 0.0


def test_rows_that_do_not_count_may_hold_anything():
    rows = gaussian(2, 3, 20, 16)
    padded = torch.cat([torch.full((2, 3, 5, 16), float("nan")), rows], 2)
    real = torch.cat([torch.zeros(2, 1, 5), torch.ones(2, 1, 20)], -1).bool()
    torch.testing.assert_close(matrix_entropy(padded, real, 8), matrix_entropy(rows, None, 8))


def test_a_kv_head_has_the_mean_of_its_query_heads():
    assert over_heads(torch.tensor([[1.0, 3.0, 5.0, 6.0]]), 2).tolist() == [[2.0, 5.5]]


def test_heads_of_higher_entropy_keep_more_and_the_mean_is_the_capacity():
    assert lengths(driven(prompt())) == [[27, 27, 13, 13]] * 2
    assert lengths(driven(prompt(), groups=4, ratio=3.0)) == [[30, 23, 17, 10]] * 2


def test_one_group_is_snapkv():
    rows = prompt()
    snapkv = DrivenLayer(
        preset("snapkv", capacity=CAPACITY, window=8, kernel=5, pooling="avg"), SHAPE
    )
    snapkv.prompt(*rows)
    assert driven(rows, groups=1).positions() == snapkv.positions()
    assert driven(rows, allocate="uniform").positions() == snapkv.positions()


@pytest.mark.parametrize("chunks", [(30,), (3, 60)])
def test_a_prompt_in_chunks_keeps_the_same_if_the_last_one_is_waited_for(chunks):
    rows = prompt(TOKENS + 1)
    found = []
    for cut in ((), chunks):
        layer = driven(pieces(rows, 0, TOKENS), chunks=cut, when="prompt", sample=40)
        layer.attend(*pieces(rows, TOKENS, TOKENS + 1))
        found.append(layer.positions())
    assert found[0] == found[1]


def test_heads_are_judged_once_and_the_sample_is_forgotten():
    layer = driven(prompt())
    for shard in layer.rows:
        assert shard.cache.memory["recent_queries"].shape[3] == 8
    # Queries of another kind: the order of the heads would turn round.
    query, key, value = prompt(30, seed=3)
    layer.prompt(query.flip(1), key, value)
    assert lengths(layer) == [[27, 27, 13, 13]] * 2


def test_padding_before_a_prompt_changes_nothing():
    query, key, value = prompt()
    valid = torch.ones(2, TOKENS, dtype=torch.bool)
    valid[1, :10] = False
    key[1, :, :10], value[1, :, :10] = float("nan"), 1e9
    query[1, :, :10] = 100.0
    together = driven((query, key, value), valid=valid).positions()
    alone = driven([part[1:, :, 10:] for part in (query, key, value)]).positions()
    assert [[p - 10 for p in head] for head in together[1]] == alone[0]


def test_the_order_of_kv_heads_does_not_matter():
    query, key, value = prompt()
    turned = query.view(2, 4, 2, TOKENS, 16).flip(1).flatten(1, 2), key.flip(1), value.flip(1)
    plain = driven((query, key, value)).positions()
    assert driven(turned).positions() == [row[::-1] for row in plain]


def test_a_cache_that_was_reset_remembers_nothing():
    query, key, value = prompt()
    layer = driven((query, key, value))
    layer.rows.reset()
    turned = query.flip(1), key, value
    layer.prompt(*turned)
    assert layer.positions() == driven(turned).positions()


def calibrated(**settings):
    """A profile made from queries whose entropies run the other way."""
    learner = calibrator("uncomp", **settings)
    for seed in range(3):
        query, key, _ = prompt(seed=seed)
        learner.observe(0, query.flip(1), key)
    return Profile(layers=learner.finish())


def test_a_profile_holds_the_mean_entropy_of_its_windows():
    learner = UNComp.calibrator(truncate=8)
    windows = [prompt(seed=seed)[:2] for seed in range(3)]
    for query, key in windows:
        learner.observe(0, query, key)
    truth = torch.stack([over_heads(matrix_entropy(q, None, 8), 4) for q, _ in windows])
    got = learner.finish()[0]["query_entropy"]
    torch.testing.assert_close(got, truth.mean((0, 1)))
    assert learner.settings == {"truncate": 8}


def test_groups_may_come_from_a_profile():
    layer = driven(prompt(), profile=calibrated(), groups_from="profile")
    assert lengths(layer) == [[13, 13, 27, 27]] * 2
    # Heads that hold other numbers of rows are judged by their own entries.
    layer.prompt(*prompt(20, seed=4))
    assert lengths(layer) == [[13, 13, 27, 27]] * 2


def test_a_missing_profile_is_said():
    with pytest.raises(PolicyError, match="needs a profile with 'query_entropy'"):
        driven(prompt(), groups_from="profile")


def test_a_calibrator_that_saw_nothing_says_so():
    with pytest.raises(InputError, match="No window was observed"):
        UNComp.calibrator().finish()


def test_a_calibrator_refuses_settings_it_does_not_know():
    with pytest.raises(UnknownNameError, match="setting of uncomp 'trunkate'"):
        calibrator("uncomp", trunkate=8)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"window": 0}, "window=0, sample=256"),
        ({"sample": 4}, "window=8, sample=4"),
        ({"kernel": 2}, "got kernel=2"),
        ({"truncate": 0}, "at least 1, got 0"),
        ({"groups_from": "guess"}, "'prompt' or 'profile', got 'guess'"),
    ],
)
def test_fields_that_judge_nothing_are_refused(fields, message):
    with pytest.raises(PolicyError, match=message):
        UNComp(**fields)


def test_the_preset_round_trips():
    policy = preset("uncomp", truncate=16)
    assert Policy.from_json(policy.to_json()) == policy
