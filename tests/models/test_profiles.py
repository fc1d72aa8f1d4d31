"""Profiles of models: found by the model's name and the policy's methods."""

import pytest
import torch

from loki_attn.errors import ProfileError
from loki_attn.models.profiles import find_profile, profile_path
from loki_attn.policy import preset
from loki_attn.profile import Profile


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "loki-attn" / "profiles"


def made(method):
    provenance = {"model": {"id": "tiny", "hash": "a"}, "methods": {method: {}}}
    return Profile(layers={0: {method: torch.ones(2)}}, provenance=provenance)


def test_it_lies_in_the_cache_beside_the_bases(cache):
    assert profile_path("org/tiny", "hata") == cache / "org--tiny-hata.safetensors"
    assert profile_path("/models/tiny", "hata").parent == cache


def test_a_policy_finds_what_its_methods_learnt():
    assert find_profile(preset("hata"), "tiny") is None
    made("hata").save(profile_path("tiny", "hata"))
    found = find_profile(preset("hata"), "tiny")
    assert found is not None
    assert found.methods == ("hata",)
    assert find_profile(preset("loki"), "tiny") is None
    assert find_profile(preset("hata"), "other") is None
    assert find_profile(preset("hata"), "") is None


def test_a_named_file_comes_first(tmp_path):
    made("hata").save(profile_path("tiny", "hata"))
    made("mine").save(tmp_path / "mine.safetensors")
    found = find_profile(preset("hata"), "tiny", tmp_path / "mine.safetensors")
    assert found is not None
    assert found.methods == ("mine",)
    with pytest.raises(ProfileError, match="There is no profile file"):
        find_profile(preset("hata"), "tiny", tmp_path / "none.safetensors")
