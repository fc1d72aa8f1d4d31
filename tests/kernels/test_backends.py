"""Which backend runs: chosen by name, by environment, or the best; a choice never falls back."""

import pytest

from loki_attn.errors import LokiAttnError, UnknownNameError
from loki_attn.kernels import Ops, backends


def test_the_reference_always_runs():
    assert "reference" in backends.names()
    found = backends.probe("reference")
    assert isinstance(found, backends.Accepted)
    assert backends.resolve("reference").module is found.module


def test_an_unknown_backend_lists_the_valid_ones():
    with pytest.raises(
        UnknownNameError, match=r"Unknown backend 'referenc'. Did you mean 'reference'\? Valid: .*"
    ):
        backends.resolve("referenc")


def test_the_environment_chooses(monkeypatch):
    monkeypatch.setenv("LOKI_ATTN_BACKEND", "reference")
    assert backends.resolve().name == "reference"
    monkeypatch.setenv("LOKI_ATTN_BACKEND", "abacus")
    with pytest.raises(UnknownNameError, match="Unknown backend 'abacus'"):
        backends.resolve()
    assert backends.resolve("reference").name == "reference"


def test_a_choice_never_falls_back(monkeypatch):
    def broken(name):
        raise ImportError(f"no library behind {name}")

    monkeypatch.setattr(backends.importlib, "import_module", broken)
    with pytest.raises(LokiAttnError, match="'reference' was asked for but cannot be loaded: no"):
        backends.resolve("reference")
    monkeypatch.delenv("LOKI_ATTN_BACKEND", raising=False)
    with pytest.raises(LokiAttnError, match="No backend runs here"):
        backends.resolve()


def test_a_backend_says_why_not(monkeypatch):
    module = backends.probe("reference").module
    monkeypatch.setattr(module, "why_not", lambda: "the moon is full", raising=False)
    assert backends.probe("reference") == backends.Rejected("reference", "the moon is full")


def test_the_reference_has_every_op_and_the_others_some():
    wanted = {name for name in vars(Ops) if not name.startswith("_")}
    assert {"choose_mask", "step", "append"} < wanted
    for name in backends.names():
        found = backends.probe(name)
        if isinstance(found, backends.Accepted):
            own = {op for op in wanted if callable(getattr(found.module, op, None))}
            assert own if name != "reference" else own == wanted
