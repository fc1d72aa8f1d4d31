"""Every method, in every variant of its settings, every way to agree in a group, every backend."""

from collections import Counter
from dataclasses import dataclass, fields
from typing import Literal, get_args, get_origin

import pytest
import torch

from loki_attn import attention
from loki_attn.budget import Budget
from loki_attn.cache import LayerCache
from loki_attn.kernels import backends, native, ops
from loki_attn.kernels.native import place
from loki_attn.policy import Policy, methods
from loki_attn.testing import (
    assert_within_budget,
    plain_attention,
    plain_reference,
    tiny_basis,
)
from loki_attn.types import AttentionCall, GroupReduce


@dataclass(frozen=True)
class Case:
    """One method in one variant: what a law is run through."""

    select: object
    group_reduce: str

    @property
    def reads_everything(self):
        return self.select.method == "dense"

    def budget(self, **amount):
        """The budget, or the only one that the dense method takes."""
        return Budget() if self.reads_everything else Budget(**amount)

    def layer(self, shape, basis=None, **amount):
        policy = Policy(
            select=self.select, budget=self.budget(**amount), group_reduce=self.group_reduce
        )
        return attention.bind(policy, shape, 1, basis or tiny_basis(shape))

    def filled(self, layer, key, value):
        cache = LayerCache(layer.selector)
        cache.append(key, value)
        return cache

    def decode(self, layer, query, key, value, visible=None, call=None, basis=None):
        """One decode step over freshly filled rows; it must attend to what it says it read."""
        call = call or call_of(layer.shape)
        cache = self.filled(layer, key, value)
        out, selection = attention.decode(query, cache, layer, call, visible)
        mask = mask_of(selection, query.shape[1], key.shape[2])
        self.check(out, layer, query, key, value, mask, call, basis)
        return out, selection

    def check(self, out, layer, query, key, value, mask, call=None, basis=None):
        """Attention to the marked rows, and nothing else."""
        if out.dtype.itemsize < 4:
            self.check_budget(out, layer, query, key, value, mask, call, basis)
            return
        # One small float32 sample is too few for a budget: the reference may be right by luck.
        call = call or call_of(layer.shape)
        truth = plain_attention(query.double(), key.double(), value.double(), mask, call)
        torch.testing.assert_close(out.float(), truth.float())

    def check_budget(self, out, layer, query, key, value, mask, call=None, basis=None):
        """The same, held to the error budget; give it many rows."""
        call = call or call_of(layer.shape)
        truth = plain_attention(query.double(), key.double(), value.double(), mask, call)
        if layer.selector.rows(key) is not key:
            # Rows are stored in the basis: the plain reference pays for that rounding, too.
            maps = (basis or tiny_basis(layer.shape)).layer(layer.shape.index)
            query, key = mapped(query, maps.query_map), mapped(key, maps.key_map)
        plain = plain_reference(query, key, value, mask, call, truth)
        assert_within_budget(out, plain, truth)

    def every_query(self, layer, query, key, value, visible=None, call=None):
        cache = self.filled(layer, key, value)
        return attention.every_query(query, cache, layer, call or call_of(layer.shape), visible)


def call_of(shape, **more):
    return AttentionCall(scaling=shape.head_dim**-0.5, **more)


def mask_of(selection, heads, seq):
    """The rows of a selection as bool [batch, heads, 1, seq]."""
    indices = selection.indices
    marks = torch.zeros(*indices.shape[:2], seq + 1, dtype=torch.bool)
    marks.scatter_(2, indices.masked_fill(indices < 0, seq), True)
    return marks[..., :seq].repeat_interleave(heads // indices.shape[1], 1)[:, :, None]


def mapped(rows, maps):
    """Rows in the basis of their KV head, computed in float64 and rounded once."""
    group = rows.shape[1] // maps.shape[0]
    return (rows.double() @ maps.double().repeat_interleave(group, 0)).to(rows.dtype)


def causal_of(q_len, seq):
    return torch.ones(q_len, seq).tril(seq - q_len).bool()[None, None]


# What keeps an approximation approximate on heads as small as the tests'.
SMALL = {"rank": 0.25}


def variants(method):
    """A method's default setting, and each of its other choices alone."""
    small = {field.name: SMALL[field.name] for field in fields(method) if field.name in SMALL}
    yield method(**small)
    for field in fields(method):
        if get_origin(field.type) is Literal:
            for choice in get_args(field.type):
                if choice != field.default:
                    yield method(**small, **{field.name: choice})


def label(case):
    settings = [str(getattr(case.select, f.name)) for f in fields(case.select)]
    return "-".join([case.select.method, *settings, case.group_reduce])


CASES = [
    Case(select, how)
    for method in methods().values()
    for select in variants(method)
    for how in get_args(GroupReduce)
]


@pytest.fixture(autouse=True, params=["reference", "native"])
def backend(request, monkeypatch):
    """Run the law by one backend, as users get it, and prove at each decode step who did it."""
    if request.param == "native" and place.find_library() is None:
        pytest.skip(f"there are no native kernels: {place.why_missing()}")
    monkeypatch.delenv(backends.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(backends, "_PREFERENCE", (request.param, "reference"))
    served = Counter()
    for op in ("step", "choose", "attend"):
        monkeypatch.setattr(native, op, counted(served, op, getattr(native, op)))
    monkeypatch.setattr(attention, "decode", proven(served, request.param, attention.decode))
    ops.cache_clear()
    yield request.param
    ops.cache_clear()


def counted(served, op, run):
    """Count the calls that the native library itself has answered."""

    def run_and_count(*args, **kwargs):
        result = run(*args, **kwargs)
        served[op] += result is not None
        return result

    return run_and_count


def proven(served, name, decode):
    """A decode step that must be done by the backend `name`: in one call, or op by op."""

    def decode_and_prove(query, cache, layer, call, visible=None):
        before = Counter(served)
        result = decode(query, cache, layer, call, visible)
        ran = set(served - before)
        if name == "reference":
            assert not ran
        elif query.dtype == torch.float64:
            assert ran <= {"choose"}  # by recency: float32, whatever the rows are
        else:
            assert ran == {"step"} if layer.selector.lead(cache) else {"choose", "attend"} <= ran
            assert native.last_isa() == native.isa()
        return result

    return decode_and_prove


# Session-wide, so that hypothesis may draw many examples for one case.
@pytest.fixture(scope="session", params=CASES, ids=label)
def case(request):
    return request.param


@pytest.fixture(scope="session", params=[c for c in CASES if not c.reads_everything], ids=label)
def sparse_case(request):
    """The cases that take an amount."""
    return request.param


@pytest.fixture(
    scope="session",
    params=[c for c in CASES if not c.reads_everything and c.select.method != "streaming_llm"],
    ids=label,
)
def scoring_case(request):
    """The cases that rank rows by the query, and so can estimate mass."""
    return request.param


@pytest.fixture
def kernels(backend):
    return ops()


@pytest.fixture(scope="session")
def laws():
    """What laws share: the call of a shape, a selection as a mask, the causal mask."""

    class Laws:
        call = staticmethod(call_of)
        mask = staticmethod(mask_of)
        causal = staticmethod(causal_of)

    return Laws
