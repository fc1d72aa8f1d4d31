"""Basis: its checks, its file, its controls, its ranks."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch

from loki_attn.basis import Basis, LayerBasis
from loki_attn.errors import BasisError, InputError
from loki_attn.fitting import fit
from loki_attn.key_stats import KeyStats

MODEL = {"id": "some/model", "hash": "abc", "rope": {"theta": 1e4}}
PROVENANCE = {
    "model": {"id": "some/model", "hash": "abc"},
    "rope": {"theta": 1e4},
    "corpus": {"name": "brown", "hash": "123"},
}


def make_basis(kind="balanced", layers=(0, 1, 4), heads=3, size=16, tokens=200):
    g = torch.Generator().manual_seed(0)
    stats = KeyStats()
    for layer in layers:
        key = torch.randn(1, heads, tokens, size, generator=g)
        query = torch.randn(1, 2 * heads, tokens, size, generator=g)
        stats.update(layer, key, query)
    return fit(stats, kind, provenance=PROVENANCE)


def with_spectrum(*spectra):
    eye = torch.eye(len(spectra[0])).repeat(len(spectra), 1, 1)
    spectrum = torch.tensor(spectra, dtype=torch.float64)
    layer = LayerBasis(key_map=eye, query_map=eye, spectrum=spectrum)
    return Basis(kind="pca", side="post", orthogonal=True, layers={0: layer})


def assert_bit_equal(one, other):
    assert one.layer_indices == other.layer_indices
    for index in one.layer_indices:
        for part in ("key_map", "query_map", "spectrum"):
            assert torch.equal(getattr(one.layer(index), part), getattr(other.layer(index), part))


def rewrite(path, edit):
    """Change a saved basis: edit(tensors, metadata) in place."""
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    edit(tensors, metadata)
    path.write_bytes(safetensors.torch.save(tensors, metadata=metadata))


def test_sizes_and_layers():
    basis = make_basis(layers=(4, 0))
    assert (basis.layer_indices, basis.num_kv_heads, basis.head_dim) == ((0, 4), 3, 16)
    with pytest.raises(BasisError, match=r"no layer 1; it has layers \[0, 4\]"):
        basis.layer(1)


@pytest.mark.parametrize("kind", ["pca", "balanced", "mixed", "random", "identity"])
def test_save_and_load_are_bit_equal(kind, tmp_path):
    basis = make_basis(kind)
    path = tmp_path / "basis.safetensors"
    basis.save(path)
    loaded = Basis.load(path, model=MODEL)
    assert_bit_equal(basis, loaded)
    assert (loaded.kind, loaded.side, loaded.orthogonal) == (kind, "post", basis.orthogonal)
    assert loaded.provenance == basis.provenance
    assert loaded.provenance["corpus"] == {"name": "brown", "hash": "123"}
    assert loaded.provenance["tokens"] == 200
    assert set(loaded.provenance["versions"]) == {"loki-attn", "torch", "transformers"}
    with safetensors.safe_open(path, framework="pt") as file:
        header = file.metadata()
    assert (header["format"], header["version"]) == ("loki-attn-basis", "1")
    assert (header["kind"], header["side"]) == (kind, "post")
    assert json.loads(header["provenance"])["model"]["hash"] == "abc"


def test_an_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "basis.safetensors"
    make_basis("pca").save(path)
    old = path.read_bytes()

    def interrupt(self, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        make_basis("balanced").save(path)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "basis.safetensors"
    with pytest.raises(BasisError, match=f"no basis file at '{re.escape(str(path))}'.*calibrate`"):
        Basis.load(path)
    make_basis().save(path)
    whole = path.read_bytes()
    for cut in (0, 4, 30, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(BasisError, match=r"corrupt or cut short .* Delete it\. Run"):
            Basis.load(path)
    path.write_bytes(b"not a basis" * 50)
    with pytest.raises(BasisError, match="corrupt or cut short"):
        Basis.load(path)
    path.write_bytes(safetensors.torch.save({"x": torch.zeros(1)}))
    with pytest.raises(BasisError, match="not a basis: it says no format"):
        Basis.load(path)


def drop(name):
    return lambda tensors, metadata: tensors.pop(name)


def put(name, change):
    return lambda tensors, metadata: tensors.__setitem__(name, change(tensors[name]))


def head(name, value):
    return lambda tensors, metadata: metadata.__setitem__(name, value)


@pytest.mark.parametrize(
    ("kind", "edit", "message"),
    [
        ("pca", head("format", "gguf"), "it says format 'gguf', expected 'loki-attn-basis'"),
        ("pca", head("version", "2"), "version '2', this library reads version '1'"),
        ("pca", head("kind", "best"), "Its kind is 'best', expected one of pca, balanced"),
        ("pca", head("side", "up"), "Its side is 'up', expected one of post, pre"),
        ("pca", head("orthogonal", "yes"), "Its orthogonal is 'yes'"),
        ("pca", head("provenance", "{"), "no readable 'provenance' in its header"),
        ("pca", head("provenance", "[]"), "'provenance' .* is not a mapping"),
        ("pca", drop("layers.1.spectrum"), "Layer 1 lacks spectrum"),
        ("balanced", drop("layers.4.query_map"), "Layer 4 lacks query_map"),
        ("pca", lambda t, m: t.clear(), "The basis has no layers"),
        ("pca", lambda t, m: t.update(x=torch.zeros(1)), "unknown tensor 'x'"),
        ("pca", put("layers.0.key_map", torch.Tensor.half), "key_map must be torch.float32"),
        ("pca", put("layers.1.key_map", lambda t: t[:1]), r"must be torch.float32 \[3, 16, 16\]"),
        ("pca", put("layers.0.key_map", lambda t: t[0]), r"must be \[num_kv_heads, head_dim"),
        (
            "pca",
            put("layers.0.spectrum", lambda t: t[:, 1:].clone()),
            "spectrum must be torch.float64",
        ),
        ("pca", put("layers.0.spectrum", lambda t: -1 - t), "a negative share"),
        ("pca", put("layers.4.key_map", lambda t: t * float("nan")), "key_map holds NaN"),
        ("pca", put("layers.4.key_map", lambda t: t * 1.001), "claims to be orthogonal"),
        ("balanced", put("layers.4.key_map", lambda t: t * 1.01), "is not the inverse of key_map"),
    ],
)
def test_wrong_contents_are_refused(kind, edit, message, tmp_path):
    path = tmp_path / "basis.safetensors"
    make_basis(kind).save(path)
    rewrite(path, edit)
    with pytest.raises(BasisError, match=message) as caught:
        Basis.load(path)
    assert str(path) in str(caught.value)
    assert "calibrate`" in str(caught.value)


def test_provenance_must_be_json(tmp_path):
    for bad in ({"x": object()}, {"x": float("nan")}):
        basis = replace(make_basis(), provenance=bad)
        with pytest.raises(InputError, match="provenance cannot be written as JSON"):
            basis.save(tmp_path / "basis.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_another_model_is_refused(tmp_path):
    path = tmp_path / "basis.safetensors"
    basis = make_basis()
    basis.save(path)
    sizes = {"num_kv_heads": 3, "head_dim": 16}
    basis.check_model(layers=[0, 4], **sizes, model=MODEL)
    basis.check_model(layers=[0, 4], **sizes)
    basis.check_model(layers=[0], **sizes, model={"id": "no hash known"})
    other = {"id": "other/model", "hash": "xyz"}
    told = (
        r"model 'some/model' \(hash abc\) but is used with model 'other/model' \(hash xyz\)\. Run"
    )
    with pytest.raises(BasisError, match=told):
        Basis.load(path, model=other)
    with pytest.raises(BasisError, match=told):
        basis.check_model(layers=[0], **sizes, model=other)
    with pytest.raises(
        BasisError, match=r"RoPE settings \{'theta': 10000.0\} but .* with \{'theta': 5"
    ):
        basis.check_model(layers=[0], **sizes, model={**MODEL, "rope": {"theta": 5}})
    with pytest.raises(BasisError, match="3 KV heads of head_dim 16, the model has 2 of head_dim"):
        basis.check_model(layers=[0], num_kv_heads=2, head_dim=16, model=MODEL)
    with pytest.raises(BasisError, match="the model has 3 of head_dim 64"):
        basis.check_model(layers=[0], num_kv_heads=3, head_dim=64)
    with pytest.raises(BasisError, match=r"has no layers \[2, 3\]; it has \[0, 1, 4\]"):
        basis.check_model(layers=range(5), **sizes)


def test_rank_at_is_the_smallest_rank_that_reaches_the_share():
    basis = with_spectrum([4.0, 3.0, 2.0, 1.0], [10.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0])
    for share, first in (
        *((0.01, 1), (0.39, 1), (0.4, 1), (0.41, 2), (0.69, 2), (0.7, 2), (0.71, 3), (0.9, 3)),
        *((0.91, 4), (1.0, 4)),
    ):
        assert basis.rank_at(share).tolist() == [[first, 1, 1]], share
    tenths = with_spectrum([0.4, 0.3, 0.2, 0.1])  # .4 + .3 + .2 rounds below .9
    assert tenths.rank_at(0.9).tolist() == [[3]]
    assert make_basis().rank_at(1.0).shape == (3, 3)
    for bad in (0.0, -1.0, 1.1, float("nan")):
        with pytest.raises(InputError, match=r"variance is a share in \(0, 1\]"):
            basis.rank_at(bad)


def test_heads_permute():
    basis = make_basis()
    moved = basis.permute_heads([2, 0, 1])
    for index in basis.layer_indices:
        for to, source in enumerate([2, 0, 1]):
            for part in ("key_map", "query_map", "spectrum"):
                old, new = (getattr(b.layer(index), part) for b in (basis, moved))
                assert torch.equal(new[to], old[source])
    for bad in ([0, 1], [0, 1, 1], [1, 2, 3]):
        with pytest.raises(InputError, match="each of the 3 KV heads once"):
            basis.permute_heads(bad)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("heads", [2, 3, 8])
def test_shuffle_gives_every_head_another_heads_basis(heads, seed, tmp_path):
    basis = make_basis(heads=heads)
    control = basis.shuffle_heads(seed)
    for index in basis.layer_indices:
        old, new = basis.layer(index).key_map, control.layer(index).key_map
        same = (new[:, None] == old[None]).flatten(2).all(-1)
        assert not same.diagonal().any()
        assert same.sum(0).tolist() == same.sum(1).tolist() == [1] * heads
    assert control.provenance["control"] == {"shuffled_heads_seed": seed}
    assert_bit_equal(control, basis.shuffle_heads(seed))
    control.save(tmp_path / "control.safetensors")


def test_shuffle_of_single_heads_takes_other_layers():
    basis = make_basis(heads=1)
    control = basis.shuffle_heads()
    for index in basis.layer_indices:
        assert not torch.equal(control.layer(index).key_map, basis.layer(index).key_map)
    with pytest.raises(InputError, match="no other head to take"):
        make_basis(heads=1, layers=(0,)).shuffle_heads()
