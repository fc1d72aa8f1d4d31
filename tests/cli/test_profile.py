"""profile: files, merging into one, and every refusal before the work."""

import pytest
import torch

from loki_attn.cli import terminal
from loki_attn.profile import Profile

QUICK = ("--set", "bits=32", "--set", "steps=3")


@pytest.fixture
def profile(loki, model):
    """Let HATA learn from a few short windows of the tiny model."""

    def run(*arguments, of=model, quick=QUICK):
        small = ["--tokens", 300, "--window", 128]
        return loki("profile", "--model", of, "--method", "hata", *small, *quick, *arguments)

    return run


def test_writes_a_profile_into_the_cache(profile, cache):
    done = profile()
    path = cache / "profiles" / "tiny-hata.safetensors"
    assert done.code == 0
    assert done.stdout.strip() == str(path)
    assert "profile of 2 layers for hata; hata learnt from 256 tokens" in done.stderr
    made = Profile.load(path)
    assert made.table("hash").shape == (2, 2, 8, 32)
    assert made.provenance["model"]["id"] == "tiny"
    about = made.provenance["methods"]["hata"]
    assert about["corpus"]["name"] == "loki-attn:calibration"
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_json(profile, tmp_path):
    out = tmp_path / "new" / "p.safetensors"
    found = profile("--json", "--out", out, "--set", "centre=false").json
    assert found.pop("seconds") > 0
    settings = found.pop("settings")
    assert (settings["bits"], settings["steps"], settings["centre"]) == (32, 3, False)
    assert found == {
        "profile": str(out),
        "method": "hata",
        "methods": ["hata"],
        "layers": 2,
        "tensors": {"hash": [2, 8, 32], "hash_mean": [2, 8]},
        "tokens": 256,
    }


def test_into_adds_to_a_file_and_replaces_a_methods_own(profile, tmp_path):
    path = tmp_path / "all.safetensors"
    assert profile("--into", path).code == 0
    first = Profile.load(path)
    about = {"model": first.provenance["model"], "methods": {"other": {"tokens": 1}}}
    gates = Profile(layers={i: {"gate": torch.ones(2)} for i in (0, 1)}, provenance=about)
    gates.merged(first).save(path)
    assert profile("--into", path, "--set", "seed=1").code == 0
    both = Profile.load(path)
    assert both.methods == ("hata", "other")
    assert torch.equal(both.table("gate"), gates.table("gate"))
    assert not torch.equal(both.table("hash"), first.table("hash"))
    assert both.provenance["methods"]["hata"]["settings"]["seed"] == 1


def test_a_file_of_another_model_is_left_alone(profile, other_model, tmp_path):
    path = tmp_path / "all.safetensors"
    profile("--into", path)
    before = path.read_bytes()
    assert "was made for model 'tiny'" in profile("--into", path, of=other_model).error
    assert path.read_bytes() == before


def test_an_interrupt_leaves_nothing(profile, cache, monkeypatch):
    from contextlib import contextmanager

    @contextmanager
    def progress(*_):
        def advance(done, news=""):
            raise KeyboardInterrupt

        yield advance

    monkeypatch.setattr(terminal, "progress", progress)
    assert profile().code == 130
    assert list((cache / "profiles").iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "hatta"], "Unknown method with a profile 'hatta'. Did you mean 'hata'?"),
        (["--set", "bit=64"], "Unknown setting of hata 'bit'. Did you mean 'bits'?"),
        (["--set", "bits"], "Cannot read --set 'bits'; write it like --set bits=64."),
        (["--set", "bits=33"], "bits must be a multiple of 32 above 0, got 33."),
        (["--set", "steps=few"], "steps is a whole number of steps above 0, got 'few'."),
        (["--out", "x", "--into", "y"], "--into names the file already; drop --out"),
        (["--out", "."], "'.' is a folder; give the path of a file."),
        (["--text", "none.txt"], "No text file at 'none.txt'"),
        (["--model", "smollm2"], "Did you mean 'smollm2-135m'?"),
        (["--dtype", "float3"], "Unknown dtype 'float3'. Did you mean 'float32'?"),
        (["--window", 2048, "--tokens", 4096], "exceed the model's context of 1024"),
        (["--window", 1000, "--tokens", 999], "at least one window of 1000 tokens"),
    ],
)
def test_refusals(profile, arguments, message):
    assert message in profile(*arguments).error


def test_a_damaged_file_is_not_added_to(profile, write):
    damaged = write("p.safetensors", "half")
    assert "corrupt or cut short" in profile("--into", damaged).error
    assert damaged.read_text() == "half"


GATES = (
    "--set", "steps=2", "--set", "context_tokens=[300, 330]", "--set", "passkeys=2",
    "--set", "passkey_words=2", "--set", "sinks=4", "--set", "recents=16",
)  # fmt: skip


def test_gates_are_learnt_by_gradient(loki, model, cache):
    done = loki("profile", "--model", model, "--method", "duo_attention", *GATES)
    assert done.code == 0, done.error
    made = Profile.load(cache / "profiles" / "tiny-duo_attention.safetensors")
    gates = made.table("gates")
    assert gates.shape == (2, 2)
    assert bool(((gates >= 0) & (gates <= 1)).all())
    assert "duo_attention learnt from" in done.stderr


def test_a_setting_of_gates_is_refused_before_the_work(loki, model):
    given = ["profile", "--model", model, "--method", "duo_attention", "--set", "step=2"]
    assert "Unknown setting of duo_attention 'step'. Did you mean 'steps'?" in loki(*given).error
