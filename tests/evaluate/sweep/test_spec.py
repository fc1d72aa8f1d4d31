"""Specs of sweeps: what they expand to, and what is refused before anything runs."""

import pytest

from loki_attn.errors import InputError
from loki_attn.evaluate.sweep import read_spec

WHOLE = """
models: [one, two]
policies:
  - dense
  - {policy: loki, rank: [8, 16], basis: pca}
tasks:
  - {task: perplexity, prefix_tokens: [512, 1024], window_tokens: 32, text: a.txt}
  - task: needle
    lengths: [512, 1024]
    seed: [0, 1]
    models: [two]
    policies: [streaming-llm]
"""


@pytest.fixture
def read(tmp_path):
    def from_text(text):
        path = tmp_path / "spec.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return read_spec(path)

    return from_text


def test_a_sweep_is_expanded(read):
    spec = read(WHOLE)
    assert spec.models == ("one", "two")
    assert spec.policies == ("dense", "loki:rank=8,basis=pca", "loki:rank=16,basis=pca")
    first, second = spec.of_model("one")
    assert (first.task, first.policies) == ("perplexity", spec.policies)
    assert [c.options["prefix_tokens"] for c in (first, second)] == [512, 1024]
    needles = spec.of_model("two")[2:]
    assert [c.options["seed"] for c in needles] == [0, 1]
    assert all(c.options["lengths"] == [512, 1024] for c in needles)
    assert all(c.policies == ("streaming-llm",) for c in needles)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("models: [", "is not YAML"),
        (b"\xff", "is not YAML"),
        ("- a", r"A sweep is a mapping with models, policies, tasks; got \['a'\]"),
        ("model: [a]", "Did you mean 'models'"),
        ("models: []\npolicies: [a]\ntasks: [{task: ruler}]", "needs a list under 'models'"),
        ("models: [a]\npolicies: [3]\ntasks: [{task: ruler}]", "A policy is a text such as"),
        ("models: [a]\npolicies: [b]\ntasks: [ruler]", "A task is a mapping with 'task: NAME'"),
        ("models: [a]\npolicies: [b]\ntasks: [{task: rulr}]", "Did you mean 'ruler'"),
        (
            "models: [a]\npolicies: [b]\ntasks: [{task: ruler, length: 3}]",
            "Did you mean 'lengths'",
        ),
        (
            "models: [a]\npolicies: [b]\ntasks: [{task: ruler, models: [c]}]",
            "model of a task 'c'",
        ),
        ("models: [3]\npolicies: [b]\ntasks: [{task: ruler}]", "'models' lists names"),
    ],
)
def test_refusals(read, text, message):
    with pytest.raises(InputError, match=message):
        read(text)


def test_a_missing_file(tmp_path):
    with pytest.raises(InputError, match=r"Cannot read .*none.yaml.*No such file"):
        read_spec(tmp_path / "none.yaml")
