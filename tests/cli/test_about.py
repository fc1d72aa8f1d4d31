"""methods, doctor and demo."""

import sys
from types import ModuleType

import pytest

from loki_attn.cli.methods import introduction
from loki_attn.kernels import backends
from loki_attn.policy import ROOMS, methods, presets


def test_methods(loki):
    done = loki("methods")
    assert done.stderr == ""
    every = [name for verb in ROOMS for name in methods(verb)]
    for name in (*every, *presets(), "2406.02542", "2309.17453"):
        assert name in done.stdout


def test_methods_json(loki):
    found = loki("methods", "--json").json
    by_name = {(method["verb"], method["method"]): method for method in found["methods"]}
    assert by_name.keys() == {(verb, name) for verb in ROOMS for name in methods(verb)}
    loki_method = by_name["select", "loki"]
    assert loki_method["needs"] == "a basis"
    assert by_name["evict", "snapkv"]["needs"] == "attention of the last queries"
    assert by_name["evict", "uncomp"]["needs"] == "attention of the last queries"
    assert loki_method["arxiv"] == "2406.02542"
    assert "T * (rank + 2)" in loki_method["bytes_read"]
    told = ("what", "bytes_read", "state", "paper")
    assert all(method[field] for method in found["methods"] for field in told)
    assert {preset["policy"] for preset in found["presets"]} == set(presets())


def test_introduction():
    text = "Name: title.\n\nPaper: A: B\narXiv: 1\nBytes read: x\n    and y.\n\nOther prose.\n"
    assert introduction(text) == {
        "Name": "title.",
        "Paper": "A: B",
        "arXiv": "1",
        "Bytes read": "x and y.",
    }


def test_doctor(loki, calibrate, cache):
    calibrate()
    done = loki("doctor")
    assert done.code == 0
    for word in ("torch", "reference", "transformers", "tiny-mixed.safetensors", "threads"):
        assert word in done.stdout


def test_doctor_json(loki, calibrate, cache):
    calibrate()
    (cache / "bases" / "bad-pca.safetensors").write_bytes(b"junk")
    (cache / "bases" / "x.safetensors.partial").write_bytes(b"junk")
    model = cache / "models" / "mine"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    found = loki("doctor", "--json").json
    assert set(found) == {
        "versions",
        "cpu",
        "threads",
        "gpu",
        "backends",
        "native",
        "optional",
        "cache",
    }
    assert found["versions"].keys() == {"python", "loki-attn", "torch", "numpy", "safetensors"}
    assert found["threads"]["torch"] == 1
    assert {b["name"] for b in found["backends"]["probed"]} == set(backends.names())
    assert found["cache"]["folder"] == str(cache)
    assert found["cache"]["models"] == [{"name": "mine", "bytes": 0}]
    assert "smollm2-135m" in found["cache"]["installable"]
    bad, good = found["cache"]["bases"]
    assert bad["problem"]
    assert good == {"file": "tiny-mixed.safetensors", "kind": "mixed", "problem": None}
    assert found["cache"]["unfinished"] == ["x.safetensors.partial"]


def test_doctor_says_what_is_rejected(loki, monkeypatch):
    monkeypatch.setattr(backends, "names", lambda: ("native", "reference"))
    monkeypatch.setenv("LOKI_ATTN_BACKEND", "native")
    monkeypatch.setattr(backends, "probe", lambda name: backends.Rejected(name, "no compiler"))
    done = loki("doctor")
    assert done.code == 0
    assert "no compiler" in done.stdout
    assert "rejected" in done.stdout
    found = loki("doctor", "--json").json["backends"]
    assert found["chosen"] is None
    assert "'native' was asked for but no compiler" in found["problem"]


def test_doctor_shows_the_native_kernels(loki, monkeypatch):
    native = {
        "isa": "avx2",
        "isas": ["avx2", "portable"],
        "threads": 2,
        "pool": "lent by torch",
        "library": "/x/libloki_attn.so",
    }
    module = ModuleType("loki_attn.kernels.native")
    module.describe = lambda: native
    monkeypatch.setattr(backends, "names", lambda: ("native",))
    monkeypatch.setattr(backends, "probe", lambda name: backends.Accepted(name, module))
    assert loki("doctor", "--json").json["native"] == native
    shown = loki("doctor").stdout
    for words in ("instruction set", "avx2, portable", "lent by torch", "libloki_attn.so"):
        assert words in shown


def test_doctor_is_silent_on_native_kernels_that_cannot_run(loki, monkeypatch):
    monkeypatch.setattr(backends, "names", lambda: ("native", "reference"))
    monkeypatch.setattr(backends, "probe", lambda name: backends.Rejected(name, "no compiler"))
    assert loki("doctor", "--json").json["native"] is None
    assert "instruction set" not in loki("doctor").stdout


@pytest.fixture
def demo(monkeypatch):
    """Put a demo in place that only notes what it is asked, and fails."""
    calls = []

    def run(model, out, console, fast):
        console.print("hello")
        calls.append((model, str(out), fast))
        return 3

    fake = ModuleType("loki_attn.demo")
    fake.run = run
    monkeypatch.setitem(sys.modules, "loki_attn.demo", fake)
    return calls


def test_demo(loki, demo):
    done = loki("demo")
    assert (done.code, done.stdout) == (3, "hello\n")
    done = loki("demo", "--model", "m", "--out", "o", "--fast", "--json")
    assert done.json == {"out": "o", "model": "m", "exit_code": 3}
    assert done.stderr == "hello\n"
    assert demo == [("smollm2-135m", "demo", False), ("m", "o", True)]
