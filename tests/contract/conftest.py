"""Every method, in every variant of its settings and on every backend; every way to agree."""

from collections import Counter
from dataclasses import dataclass, fields
from functools import cache as remembered
from typing import Literal, get_args, get_origin

import pytest
import torch

from loki_attn import attention
from loki_attn.budget import Budget
from loki_attn.cache import LayerCache
from loki_attn.kernels import backends, native, ops
from loki_attn.policy import Policy, methods, preset, presets
from loki_attn.profile import Profile
from loki_attn.select.base import Estimate, Selector
from loki_attn.testing import (
    assert_within_budget,
    layer_shape,
    plain_attention,
    plain_reference,
    random_rows,
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

    @property
    def unit(self):
        """Rows that are judged together."""
        return self.select.unit

    @property
    def corrects(self):
        """Whether the output is more than attention to the rows that were read."""
        shape = layer_shape(2, 2, 16)
        return type(self.layer(shape).selector).finish is not Selector.finish

    @property
    def ranks(self):
        """Whether the query decides; recency does otherwise."""
        return not self.reads_everything and self.select.method != "streaming_llm"

    def budget(self, **amount):
        """The budget, or the only one that the dense method takes."""
        return Budget() if self.reads_everything else Budget(**amount)

    def layer(self, shape, basis=None, **amount):
        policy = Policy(
            select=self.select, budget=self.budget(**amount), group_reduce=self.group_reduce
        )
        profile = profile_of(self.select, shape) if self.select.needs_profile else None
        return attention.bind(policy, shape, 1, basis or tiny_basis(shape), profile)

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
        if self.corrects and int(selection.counts.min()) < key.shape[2]:
            self.check_corrected(out, layer, query, cache, selection, mask, call, visible)
        else:
            self.check(out, layer, query, key, value, mask, call, basis)
        return out, selection

    def check_corrected(self, out, layer, query, cache, selection, mask, call, visible):
        """Attention to the marked rows, corrected by the method's own rule: that has its tests."""
        rows = [rows.double() for rows in (query, cache.keys, cache.values)]
        attended = plain_attention(*rows, mask, call).to(out.dtype)
        logits = layer.selector.score(query, cache, call)
        if visible is None:
            visible = torch.ones(1, 1, 1, cache.length, dtype=torch.bool)
        read = Estimate(query=query, cache=cache, call=call, logits=logits, visible=visible)
        truth = layer.selector.finish(attended, selection, read)
        torch.testing.assert_close(out.float(), truth.float())

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


# What keeps an approximation approximate, and pages pages, on shapes as small as the tests'; and
# what needs no training.
SMALL = {
    "rank": 0.25,
    "page": 4,
    "chunk": 4,
    "block": 16,
    "cluster": 2,
    "representatives": 2,
    "outliers": 2,
    "local": 1,
    "channels": 0.5,
    "weights": "random",
}
THREE_RULES = ("softmax_sum", "max", "none")


def variants(method):
    """A method's default setting, and each of its other choices alone."""
    small = {
        field.name: SMALL[field.name]
        for field in fields(method)
        if field.name in SMALL
        and (get_origin(field.type) is not Literal or SMALL[field.name] in get_args(field.type))
    }
    yield method(**small)
    for field in fields(method):
        if field.type is bool:
            yield method(**small, **{field.name: not field.default})
        if get_origin(field.type) is Literal:
            for choice in get_args(field.type):
                if choice != small.get(field.name, field.default):
                    yield method(**{**small, field.name: choice})


def rules(select, *, default):
    """Ways to agree: all for the method that ranks exactly and the one that leads the house."""
    if select.method == "exact_topk" or (select.method == "loki" and default):
        return get_args(GroupReduce)
    if select.method == "loki":
        return THREE_RULES
    return (own_rule(select.method),)


@remembered
def own_rule(method):
    """How a group agrees in the first preset of a method."""
    own = [policy for policy in map(preset, presets()) if policy.select.method == method]
    return own[0].group_reduce if own else "softmax_sum"


@remembered
def profile_of(select, shape):
    """What calibrating a method on random rows makes."""
    calibrator = type(select).calibrator()
    query, key, _ = random_rows(shape, 64, q_len=64, seed=11)
    calibrator.observe(shape.index, query, key)
    return Profile(layers=calibrator.finish())


def label(case):
    settings = [str(getattr(case.select, f.name)) for f in fields(case.select)]
    return "-".join([case.select.method, *settings, case.group_reduce])


CASES = [
    Case(select, how)
    for method in methods().values()
    for order, select in enumerate(variants(method))
    for how in rules(select, default=order == 0)
]
# How a group may agree within one kernel.
FUSED_RULES = {
    "native": {"softmax_sum", "max", "none"},
    "triton": set(get_args(GroupReduce)),
}


# What is run through Triton's interpreter, which takes a fifth of a second for a decode step: every
# kernel and every way that it can be asked. The first of them is run through all laws, the others
# through those that neither draw examples nor decode again and again.
INTERPRETED = [
    "loki-0.25-planes-int8-softmax_sum",
    "exact_topk-softmax_sum",
    "loki-0.25-planes-bf16-none",
    "loki-0.25-planes-int4-max",
    "loki-0.25-rotated-int8-softmax_sum",
    "streaming_llm-softmax_sum",
]


# Evictions that judge rows by sums of the attention of many queries, which is a kernel, too.
JUDGED = ["h2o-0.5-False-uniform", "snapkv-4-3-avg-mean-uniform"]


def pytest_collection_modifyitems(config, items):
    """Leave out what the interpreter would only repeat."""
    left_out = [item for item in items if repeats(item)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in set(left_out)]
    for item in items:
        if by_triton(item):
            # Rows that are masked later may hold infinities, which a device does not mind.
            item.add_marker(pytest.mark.filterwarnings("ignore::RuntimeWarning"))


def by_triton(item):
    """Whether Triton's interpreter runs this."""
    spec = getattr(item, "callspec", None)
    return spec is not None and spec.params.get("backend") == "triton"


def repeats(item):
    """Whether the interpreter need not run this."""
    if not by_triton(item):
        return False
    spec = item.callspec
    if item.path.parent.name == "evict":
        judged = any(f"[{case}-triton" in item.name for case in JUDGED)
        return not judged or item.path.stem not in ("test_amounts", "test_batch_and_heads")
    if item.path.stem == "test_allocations":
        return True
    drawn = {label(value) for value in spec.params.values() if isinstance(value, Case)}
    long = item.path.stem == "test_modes" or "twenty_repeats" in item.name
    varied = spec.indices.get("amount", 0) > 0
    if drawn <= {INTERPRETED[0]}:
        return item.path.stem == "test_modes" and varied
    examples = getattr(item.function, "is_hypothesis_test", False)
    return long or varied or examples or not drawn <= set(INTERPRETED)


@pytest.fixture(autouse=True, params=["reference", "native", "triton"])
def backend(request, monkeypatch):
    """Run the law by one backend, as users get it, and prove at each decode step who did it."""
    found = backends.probe(request.param)
    if isinstance(found, backends.Rejected):
        pytest.skip(f"{request.param} does not run: {found.reason}")
    if request.param == "triton":
        request.getfixturevalue("interpreted")
    monkeypatch.delenv(backends.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(backends, "_PREFERENCE", {"cpu": (request.param,)})
    served = Counter()
    if request.param != "reference":
        for op in ("step", "choose", "attend"):
            fast = getattr(found.module, op)
            monkeypatch.setattr(found.module, op, counted(served, op, fast))
    monkeypatch.setattr(attention, "decode", proven(served, request.param, attention.decode))
    ops.cache_clear()
    yield request.param
    ops.cache_clear()


def counted(served, op, run):
    """Count the calls that the backend itself has answered."""

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
        elif name == "triton" and layer.budget.mass is not None:
            assert {"choose", "attend"} <= ran
        else:
            fused = (
                layer.selector.lead(cache) is not None and layer.group_reduce in FUSED_RULES[name]
            )
            assert ran == {"step"} if fused else {"choose", "attend"} <= ran
            assert name != "native" or native.last_isa() == native.isa()
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


@pytest.fixture(scope="session", params=[c for c in CASES if c.ranks], ids=label)
def ranking_case(request):
    """The cases that rank rows by the query."""
    return request.param


@pytest.fixture(
    scope="session", params=[c for c in CASES if c.ranks and c.select.estimates_mass], ids=label
)
def scoring_case(request):
    """The cases whose scores are logits, and so estimate mass."""
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
