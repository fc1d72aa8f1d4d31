"""Every eviction method, in every variant of its settings; a few with ragged allocations, too."""

from dataclasses import dataclass, fields
from functools import cache as remembered
from typing import Literal, get_args, get_origin

import pytest
import torch

from loki_attn.allocate.adaptive import Adaptive
from loki_attn.allocate.uniform import Uniform
from loki_attn.budget import Budget
from loki_attn.keep_budget import KeepBudget
from loki_attn.policy import Policy, methods
from loki_attn.profile import Profile
from loki_attn.rope import Rope
from loki_attn.select.dense import Dense
from loki_attn.testing import DrivenLayer, layer_shape, random_rows, tiny_basis

# Windows, units and ranks as small as the tests' prompts.
SMALL = {
    "window": 4,
    "suffix": 4,
    "kernel": 3,
    "unit": 4,
    "chunk": 4,
    "queries": 8,
    "lag": 4,
    "sinks": 2,
    "n_future": 8,
    "rank": 4,
    "truncate": 4,
    "sample": 16,
    "recents": 4,
    "full_heads": ((1,),),
}
# Those whose heads have scores of their own, and that nothing but the amount keeps from differing.
RAGGED = ("expected_attention", "h2o", "keydiff", "knorm", "snapkv")


@dataclass(frozen=True)
class EvictCase:
    """One eviction in one variant, with an allocation: what a law is run through."""

    evict: object
    allocate: object

    @property
    def method(self):
        return self.evict.method

    @property
    def sets_its_own_amount(self):
        return not self.evict.needs_budget

    @property
    def moves(self):
        """Whether it turns stored keys."""
        return getattr(self.evict, "positions", "keep") == "slot"

    def policy(self, select=None, budget=None, **keep):
        if self.sets_its_own_amount:
            keep.pop("capacity", None)
            keep.pop("keep_share", None)
        return Policy(
            select=select or Dense(),
            budget=budget or Budget(),
            evict=self.evict,
            keep=KeepBudget(**keep),
            allocate=self.allocate,
        )

    def driven(self, shape, *, select=None, budget=None, num_layers=1, **keep):
        """A layer with this eviction."""
        return DrivenLayer(
            self.policy(select, budget, **keep),
            shape,
            num_layers=num_layers,
            basis=tiny_basis(shape),
            profile=profile_of(self.evict, shape),
            rope=rope_of(shape),
        )


def rope_of(shape):
    return Rope(frequencies=100.0 ** -(torch.arange(0, shape.head_dim, 2) / shape.head_dim))


@remembered
def profile_of(evict, shape):
    """What calibrating a method on random rows makes; None where it needs nothing."""
    if not evict.needs_profile:
        return None
    calibrator = type(evict).calibrator()
    # Every query head of a group asks the same: a profile is then that of a layer without groups.
    single = layer_shape(shape.num_kv_heads, shape.num_kv_heads, shape.head_dim)
    query, key, _ = random_rows(single, 64, q_len=64, seed=11)
    calibrator.observe(shape.index, query.repeat_interleave(shape.group, 1), key)
    return Profile(layers=calibrator.finish())


def variants(method):
    """A method with small settings, and each of its other choices alone."""
    small = {field.name: SMALL[field.name] for field in fields(method) if field.name in SMALL}
    yield method(**small)
    for field in fields(method):
        if field.type is bool:
            yield method(**small, **{field.name: not field.default})
        if get_origin(field.type) is Literal:
            for choice in get_args(field.type):
                if choice != field.default:
                    yield method(**small, **{field.name: choice})


def label(case):
    settings = [str(getattr(case.evict, f.name)) for f in fields(case.evict)]
    return "-".join([case.method, *settings, case.allocate.method])


# What no second pass has judged stays, whatever the amount: those methods have tests of their own.
EVICT_CASES = [
    EvictCase(evict, allocate)
    for name, method in methods("evict").items()
    if name != "keep_all" and method.needs != "a second pass over the prompt"
    for order, evict in enumerate(variants(method))
    for allocate in ([Uniform(), Adaptive()] if order == 0 and name in RAGGED else [Uniform()])
]


@pytest.fixture(scope="session", params=EVICT_CASES, ids=label)
def evict_case(request):
    return request.param


@pytest.fixture(
    scope="session", params=[c for c in EVICT_CASES if not c.sets_its_own_amount], ids=label
)
def amount_case(request):
    """The cases that keep what they are told to."""
    return request.param
