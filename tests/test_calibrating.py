"""Calibrating: methods that learn are found by name, and settings are refused by name."""

import pytest
import torch

from loki_attn.calibrating import calibrated_methods, calibrator
from loki_attn.errors import UnknownNameError
from loki_attn.policy import methods
from loki_attn.profile import Profile
from loki_attn.testing import layer_shape, random_rows

SHAPE = layer_shape(4, 2, 16)


def test_every_method_that_can_learn_is_found():
    found = calibrated_methods()
    assert "hata" in found
    assert "loki" not in found
    every = {name for room in ("select", "evict", "allocate") for name in methods(room)}
    assert set(found) <= every


@pytest.mark.parametrize("method", sorted(calibrated_methods()))
def test_what_a_method_learns_is_a_profile_that_can_be_kept(method, tmp_path):
    learner = calibrator(method)
    query, key, _ = random_rows(SHAPE, 96, q_len=96, decay=1.0)
    for layer in (1, 0):
        learner.observe(layer, query, key)
    made = Profile(layers=learner.finish(), provenance={"settings": dict(learner.settings)})
    assert list(made.layers) == [0, 1]
    for tensor in made.layer(0).values():
        assert tensor.shape[0] == SHAPE.num_kv_heads
        assert tensor.device.type == "cpu"
        assert not tensor.requires_grad
    made.save(tmp_path / "p.safetensors")
    again = Profile.load(tmp_path / "p.safetensors")
    assert again.provenance == made.provenance
    for name in made.names:
        assert torch.equal(again.table(name), made.table(name))


def test_methods_and_settings_that_are_not_known():
    with pytest.raises(UnknownNameError, match=r"Unknown method with a profile 'hatta'. Did you m"):
        calibrator("hatta")
    with pytest.raises(UnknownNameError, match=r"'loki'.* Valid: .*hata"):
        calibrator("loki")
    with pytest.raises(UnknownNameError, match=r"Unknown setting of hata 'bit'. Did you mean 'bit"):
        calibrator("hata", bit=64)
    with pytest.raises(UnknownNameError, match="Unknown setting of hata 'method'"):
        calibrator("hata", method="other")
