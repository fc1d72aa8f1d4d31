"""Profiles: files that come back to the bit, merges, and every refusal."""

import re

import pytest
import torch

from loki_attn.artefact import write_artefact
from loki_attn.errors import ProfileError
from loki_attn.profile import _FILE, Profile

MODEL = {"id": "tiny", "hash": "abc", "rope": None}


def made(method="hata", name="hash", layers=(0, 1), model=MODEL, fill=1.0):
    tensors = {i: {name: torch.full((2, 3), fill + i)} for i in layers}
    return Profile(layers=tensors, provenance={"model": model, "methods": {method: {"tokens": 64}}})


def test_a_file_comes_back_to_the_bit(tmp_path):
    """Even where layers share their tensors."""
    kinds = {
        "weight": torch.randn(2, 4, 8),
        "channels": torch.tensor([[3, 1], [0, 2]]),
        "gate": torch.tensor([True, False]),
        "half": torch.randn(2, 3).half(),
    }
    one = Profile(layers={3: kinds, 1: dict(kinds)}, provenance={"model": MODEL, "methods": {}})
    one.save(tmp_path / "new" / "p.safetensors")
    other = Profile.load(tmp_path / "new" / "p.safetensors")
    assert list(other.layers) == [1, 3]
    assert other.provenance == one.provenance
    for index, layer in one.layers.items():
        assert set(other.layer(index)) == set(layer)
        for name, tensor in layer.items():
            assert other.layer(index)[name].dtype == tensor.dtype
            assert torch.equal(other.layer(index)[name], tensor)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["p.safetensors"]


def test_a_table_has_all_layers():
    assert made().table("hash").shape == (2, 2, 3)
    assert made().table("hash")[:, 0, 0].tolist() == [1.0, 2.0]


def test_heads_permute():
    layers = {0: {"hash": torch.arange(6).view(3, 2), "gate": torch.tensor([1.0, 2.0, 3.0])}}
    turned = Profile(layers=layers, provenance={"model": MODEL}).permute_heads([2, 0, 1])
    assert turned.layer(0)["hash"].tolist() == [[4, 5], [0, 1], [2, 3]]
    assert turned.layer(0)["gate"].tolist() == [3.0, 1.0, 2.0]
    assert turned.provenance == {"model": MODEL}


def test_merging_keeps_what_both_hold():
    both = made().merged(made("duo", "gate"))
    assert both.methods == ("duo", "hata")
    assert set(both.names) == {"hash", "gate"}
    assert both.provenance["model"] == MODEL


def test_merging_again_replaces_a_methods_own():
    again = made().merged(made("duo", "gate")).merged(made(fill=7.0))
    assert set(again.names) == {"hash", "gate"}
    assert float(again.layer(0)["hash"][0, 0]) == 7.0
    assert again.methods == ("duo", "hata")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (made(layers=(0,)), "One profile has layers [0, 1], the other [0]; only profiles of one"),
        (
            made(model={"id": "big", "hash": "xyz"}),
            "One profile is of model 'tiny' (hash abc), the other of 'big' (hash xyz); only",
        ),
    ],
)
def test_profiles_of_other_models_do_not_merge(other, message):
    with pytest.raises(ProfileError, match=re.escape(message)):
        made().merged(other)


def test_it_serves_its_own_model_only():
    made().check_model({"id": "elsewhere", "hash": "abc"})
    made().check_model({"id": "unknown"})
    with pytest.raises(ProfileError, match=r"made for model 'tiny' \(hash abc\) but is used with"):
        made().check_model({"id": "big", "hash": "xyz"})


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda p: p.layer(9), "The profile has no layer 9; it has layers [0, 1]. Run `loki-attn "),
        (lambda p: p.table("gate"), "The profile holds ['hash'], not 'gate'."),
    ],
)
def test_what_is_not_there(ask, message):
    with pytest.raises(ProfileError, match=re.escape(message)):
        ask(made())


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({}, "The profile has no layers. Run `loki-attn profile`"),
        (
            {0: {"a": torch.ones(2)}, 1: {"b": torch.ones(2)}},
            "Layer 1 of the profile holds ['b'], others hold ['a'].",
        ),
        ({0: {"a": torch.tensor([1.0, float("nan")])}}, "a of layer 0 is not finite."),
    ],
)
def test_profiles_that_cannot_be(layers, message):
    with pytest.raises(ProfileError, match=re.escape(message)):
        Profile(layers=layers)


def test_files_that_are_none(tmp_path):
    path = tmp_path / "p.safetensors"
    with pytest.raises(ProfileError, match="There is no profile file"):
        Profile.load(path)
    made().save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ProfileError, match="corrupt or cut short"):
        Profile.load(path)
    write_artefact(path, _FILE, {"odd": torch.ones(1)}, {"provenance": "{}"})
    with pytest.raises(ProfileError, match="holds 'odd', no profile"):
        Profile.load(path)
