"""Fakes: a language model of characters that follows a script, and a task that counts."""

from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

from loki_attn import Budget, Policy
from loki_attn.evaluate.protocol import Contender
from loki_attn.evaluate.summary import summarise
from loki_attn.evaluate.task import Item, Record
from loki_attn.policy import preset
from loki_attn.select.exact_topk import ExactTopK

END = 0
"""Token that ends a text; it is no character of any script."""

ROW_BYTES = 10
LAYERS = 3


def contender(name="exact", **budget):
    """A policy that selects, under a name that is the policy's too."""
    chosen = Budget(**(budget or {"top_k": 8}))
    return Contender(name=name, policy=Policy(select=ExactTopK(), budget=chosen, name=name))


def dense(name="dense"):
    return Contender(name=name, policy=preset("dense", name=name))


@dataclass(frozen=True)
class Read:
    """One call of `extend`: by which policy, in which mode, on top of what, which text."""

    policy: str
    mode: str
    before: str
    text: str


@dataclass
class Cache:
    text: str
    forked: bool = False
    grown: bool = False


@dataclass
class ScriptedLM:
    """Says what its script says, one character per token.

    Attributes:
        says: From the name of a policy and the text so far to the next character, or `END`.
        prefills: Texts that were read densely.
        starts: Policy and text of every cache when it was first read on.
        reads: All that was read on top of a cache.
    """

    says: Any
    context_tokens: int = 1000
    num_layers: int = LAYERS
    identity: dict = field(default_factory=lambda: {"id": "scripted"})
    dtype: str = "float32"
    end_tokens: frozenset = frozenset({END})
    reads: list = field(default_factory=list)
    prefills: list = field(default_factory=list)
    starts: list = field(default_factory=list)

    def __post_init__(self):
        self.policy, self.mode = "dense", "decode"
        self.traffic = _nothing()

    def encode(self, text):
        return [ord(character) for character in text]

    def decode(self, ids):
        return "".join(map(chr, ids))

    @contextmanager
    def using(self, policy, basis=None, mode="decode", profile=None):
        self.policy, self.mode = policy, mode
        self.traffic = _nothing()
        try:
            yield
        finally:
            self.policy, self.mode = "dense", "decode"

    def switch(self, mode):
        assert self.policy != "dense", "outside of `using`"
        self.mode = mode

    def prefill(self, ids, *, record=False):
        assert self.policy == "dense"
        assert ids.dtype == torch.int64
        self.prefills.append(self.decode(ids[0].tolist()))
        return Cache(self.prefills[-1])

    def fork(self, cache):
        return Cache(cache.text, forked=True)

    def extend(self, cache, ids):
        assert cache.forked, "a shared cache must not grow"
        assert ids.dtype == torch.int64
        if not cache.grown:
            self.starts.append((self.policy.name, cache.text))
        cache.grown = True
        text = self.decode(ids[0].tolist())
        self.reads.append(Read(self.policy.name, self.mode, cache.text, text))
        cache.text += text
        self._count(len(text), len(cache.text))
        logits = torch.zeros(len(text), 256)
        told = self.says(self.policy.name, cache.text)
        logits[-1, told if told == END else ord(told)] = 1.0
        yield from logits.split(3)

    def _count(self, read, held):
        acts = not self.policy.budget.reads_everything and held > self.policy.budget.top_k
        if read == 1:
            self.traffic.sparse_calls += LAYERS * acts
            self.traffic.dense_bytes += ROW_BYTES * held
            self.traffic.kept_bytes += ROW_BYTES * held
            self.traffic.read_bytes += ROW_BYTES * (self.policy.budget.top_k if acts else held)
        elif self.mode == "every_query":
            self.traffic.every_query_calls += LAYERS * acts


def recites(answers, after="?"):
    """A script: each policy recites its answer from the last question mark on, then ends."""

    def says(name, text):
        said = text.rpartition(after)[2]
        answer = answers[name]
        assert answer.startswith(said), (name, said)
        return answer[len(said)] if len(said) < len(answer) else END

    return says


def _nothing():
    names = ("sparse_calls", "every_query_calls", "read_bytes", "dense_bytes", "kept_bytes")
    return SimpleNamespace(**dict.fromkeys((*names, "evicted_rows"), 0))


@dataclass(kw_only=True)
class CountingTask:
    """Makes up values from the names of item and contender, and logs every measurement.

    Attributes:
        names: Of the items.
        labels: By item.
        dies_at: Number of the measurement that raises instead, counted from 0; None never does.
        idle: Contenders that never select, and those that do so only in longer steps.
    """

    names: tuple = ("a", "b", "c")
    labels: dict = field(default_factory=dict)
    row_labels: tuple = ()
    needs_dense: bool = False
    decodes: bool = True
    dies_at: int | None = None
    idle: tuple = ()
    only_long: tuple = ()
    name: str = "counting"
    protocol: str = "made up"
    settings: dict = field(default_factory=lambda: {"seed": 3})
    log: list = field(default_factory=list)
    seen_dense: dict = field(default_factory=dict)

    def items(self, lm):
        return [Item(name=n, content={"is": n}, labels=self.labels.get(n, {})) for n in self.names]

    def measure(self, lm, item, contenders, dense):
        for one in contenders:
            if len(self.log) == self.dies_at:
                raise KeyboardInterrupt
            self.log.append((item.name, one.name))
            self.seen_dense[item.name, one.name] = dense
            yield one, self.record(item, one)

    def record(self, item, one):
        draw = torch.Generator().manual_seed(sum(map(ord, item.name + one.name)))
        values = torch.rand(2, generator=draw, dtype=torch.float64).tolist()
        acts = one.name not in self.idle and not one.policy.budget.reads_everything
        return Record(
            values={"score": values},
            decode_calls=int(acts and one.name not in self.only_long),
            every_query_calls=int(acts),
            read_bytes=3,
            dense_bytes=7,
            notes={"who": [one.name]},
        )

    def metrics(self, items, records, dense):
        notes = [record.notes["who"] for record in records]
        return {**summarise(records, dense), "of": [item.name for item in items], "who": notes}
