"""Which backend runs: chosen by name, by environment, or the best; a choice never falls back."""

import importlib
import logging
from types import SimpleNamespace

import pytest
import torch

from loki_attn.errors import LokiAttnError, UnknownNameError
from loki_attn.kernels import Ops, backends, ops
from loki_attn.types import AttentionCall


@pytest.fixture
def picky(monkeypatch):
    """A backend for CPUs that scores no query of more than 4 coordinates."""

    def score(query, plane, scales, call):
        if query.shape[3] > 4:
            raise backends.Unserved(f"it counts to 4, not to {query.shape[3]}")
        return "scored by the picky one"

    load = importlib.import_module
    mine = SimpleNamespace(score=score)
    found = SimpleNamespace(
        import_module=lambda name: mine if name.endswith(".picky") else load(name)
    )
    monkeypatch.setattr(backends, "importlib", found)
    monkeypatch.setattr(backends, "names", lambda: ("picky", "reference"))
    monkeypatch.setattr(backends, "_PREFERENCE", {"cpu": ("picky",)})
    monkeypatch.setattr(backends, "_passed_over", set())
    monkeypatch.delenv(backends.ENVIRONMENT_VARIABLE, raising=False)
    ops.cache_clear()
    yield mine
    ops.cache_clear()


def scored(kernels, rank, tokens=1):
    """What scoring 3 rows of ones gives."""
    query, plane = torch.ones(1, 1, tokens, rank), torch.ones(1, 1, 3, rank)
    return kernels.score(query, plane, None, AttentionCall(scaling=1.0))


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


def test_each_device_has_a_preference_of_its_own(monkeypatch):
    """And plain torch serves the devices that nobody prefers, and what cannot run."""
    monkeypatch.delenv(backends.ENVIRONMENT_VARIABLE, raising=False)
    assert backends.resolve(None, "abacus").name == "reference"
    for device, name in (("cpu", "native"), ("cuda", "triton")):
        runs = isinstance(backends.probe(name), backends.Accepted)
        assert backends.resolve(None, device).name == (name if runs else "reference")
        monkeypatch.setattr(backends, "probe", rejecting(name, backends.probe))
        assert backends.resolve(None, device).name == "reference"
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "reference")
    assert backends.resolve(None, "cuda").name == "reference"


def rejecting(name, probe):
    """A probe to which one backend says no."""

    def answer(asked):
        return backends.Rejected(name, "it sleeps") if asked == name else probe(asked)

    return answer


def test_what_the_best_backend_does_not_serve_falls_back_and_is_traced_once(picky, caplog):
    caplog.set_level(logging.INFO, "loki_attn.kernels")
    kernels = ops()
    assert scored(kernels, 4) == "scored by the picky one"
    assert backends.fallbacks() == ()
    for _ in range(3):
        assert scored(kernels, 5).tolist() == [[[[5.0] * 3]]]
    assert scored(kernels, 6).tolist() == [[[[6.0] * 3]]]
    reasons = [f"it counts to 4, not to {rank}" for rank in (5, 6)]
    assert backends.fallbacks() == tuple(("score", "picky", reason) for reason in reasons)
    assert [record.getMessage() for record in caplog.records] == [
        f"score is served by plain torch instead of picky, because {reason}" for reason in reasons
    ]


def test_a_named_backend_refuses_what_it_does_not_serve(picky, monkeypatch):
    wanted = (
        "Backend 'picky' was asked for, and cannot run 'score' here because it counts to 4, not"
    )
    with pytest.raises(LokiAttnError, match=wanted):
        scored(ops("picky"), 5)
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "picky")
    ops.cache_clear()
    with pytest.raises(LokiAttnError, match=wanted):
        scored(ops(), 5)
    assert backends.fallbacks() == ()


def test_ops_that_a_backend_has_not_and_several_queries_are_plain_torch(picky):
    """By its nature, not for a reason that somebody could mend: nothing is traced."""
    for kernels in (ops(), ops("picky")):
        assert scored(kernels, 2, tokens=2).shape == (1, 1, 2, 3)
        visible = torch.ones(1, 1, 1, 3, dtype=torch.bool)
        assert kernels.protect(visible, 1, 0).tolist() == [[[[True, False, False]]]]
    assert backends.fallbacks() == ()
