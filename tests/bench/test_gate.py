"""The gate: what is right passes in every dtype, each kind of wrong is noticed."""

from dataclasses import replace

import pytest
import torch

from loki_attn.bench.gate import Gate
from loki_attn.bench.shapes import Shape
from loki_attn.kernels import ops
from loki_attn.types import Selection


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_everybody_passes(small_plan, everybody, dtype):
    plan = small_plan(dtype=dtype)
    layers, found = everybody(plan)
    gate = Gate(plan, layers[0])
    verdicts = {name: gate.judge(contender) for name, contender in found.items()}
    assert {name: v.reason for name, v in verdicts.items() if not v.passed} == {}
    assert all(0 <= v.largest_error <= v.allowed for v in verdicts.values())


def test_everything_read_and_sinks_alone_read(small_plan, everybody):
    plan = small_plan()
    for k in (4, plan.context):
        layers, found = everybody(plan, k=k)
        gate = Gate(plan, layers[0])
        assert all(gate.judge(contender).passed for contender in found.values())


@pytest.mark.parametrize("seed", range(6))
def test_the_order_of_float32_sums_fails_nobody(small_plan, everybody, seed):
    """A draw on which plain torch errs by little must not condemn another order."""
    shape = Shape(name="odd", num_heads=10, num_kv_heads=2, head_dim=20)
    plan = small_plan(
        shape=shape, batch=1, context=300 + 17 * seed, dtype=torch.float32, planes=("int8",)
    )
    layers, found = everybody(plan)
    gate = Gate(plan, layers[0])
    verdicts = {name: gate.judge(contender) for name, contender in found.items()}
    assert {name: v.reason for name, v in verdicts.items() if not v.passed} == {}
    missed = [layers[0].keys, layers[0].values]
    one_row_less = torch.nn.functional.scaled_dot_product_attention(
        layers[0].query, *(rows[:, :, 1:] for rows in missed), enable_gqa=True
    )
    short = spoiled(found["sdpa-hf"], lambda out: one_row_less)
    assert not gate.judge(short).passed


def spoiled(contender, change):
    """The contender with its result changed."""
    *before, (name, last) = contender.stages
    return replace(contender, stages=(*before, (name, lambda value: change(last(value)))))


def judged(small_plan, everybody, name, change):
    plan = small_plan(batch=1)
    layers, found = everybody(plan)
    return Gate(plan, layers[0]).judge(spoiled(found[name], lambda out: change(out, plan, layers)))


@pytest.mark.parametrize("name", ["sdpa-hf", "eager-group-rows", "dense-native"])
def test_a_dense_result_of_other_rows_is_refused(small_plan, everybody, name):
    verdict = judged(small_plan, everybody, name, lambda out, *_: out + 0.05)
    assert not verdict.passed
    assert "plain torch in torch.bfloat16 explains" in verdict.reason
    assert verdict.largest_error > verdict.allowed


def test_nan_is_refused(small_plan, everybody):
    assert not judged(small_plan, everybody, "sdpa-hf", lambda out, *_: out * float("nan")).passed


def with_rows(rows):
    """Replace the rows that a step reads, and attend to those."""

    def change(result, plan, layers):
        _, selection = result
        indices = torch.stack([rows(own) for own in selection.indices[0]])[None]
        counts = torch.full(indices.shape[:2], indices.shape[2])
        chosen, layer = Selection(indices, counts), layers[0]
        out = ops().attend(layer.query, layer.keys, layer.values, chosen, plan.call).output
        return out, chosen

    return change


def first_left(own):
    """The first row behind the sinks that was not chosen."""
    return torch.tensor([min(set(range(4, 150)) - set(own.tolist()))])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (lambda own: own[:-1], "39 rows were chosen, expected 40"),
        (lambda own: torch.cat([own[:3], own[4:], first_left(own)]).sort().values, "sinks"),
        (lambda own: own.flip(0), "not unique, ascending"),
        (lambda own: torch.cat([own[:1], own[:-1]]), "not unique, ascending"),
    ],
    ids=["too few", "no sinks", "descending", "twice"],
)
@pytest.mark.parametrize("name", ["loki int8 k=40", "exact-topk k=40"])
def test_a_selection_that_no_budget_allows_is_refused(small_plan, everybody, name, rows, message):
    verdict = judged(small_plan, everybody, name, with_rows(rows))
    assert not verdict.passed
    assert message in verdict.reason
    assert verdict.to_json()["verdict"] == "failed"


@pytest.mark.parametrize(
    "name", ["loki int8 k=40", "loki int4 k=40", "loki bf16 k=40", "exact-topk k=40"]
)
def test_a_row_that_is_not_among_the_best_is_refused(small_plan, everybody, name):
    """The attention to the rows read is right; only their choice is not."""
    refused = 0
    for seed in range(5):
        torch.manual_seed(seed)

        def shuffle(own):
            left = torch.tensor(sorted(set(range(150)) - set(own.tolist())))
            taken = left[torch.randperm(len(left))[:10]]
            middle = own[4:-10]
            kept = middle[torch.randperm(len(middle))[: len(middle) - 10]]
            return torch.cat([own[:4], kept, own[-10:], taken]).sort().values

        verdict = judged(small_plan, everybody, name, with_rows(shuffle))
        refused += "was chosen before one of" in verdict.reason
    assert refused == 5


@pytest.fixture
def sampled(small_plan, everybody):
    """A gate that compares 2 of 4 pairs, who it judges, and a pair of either kind."""
    plan = small_plan()
    layers, found = everybody(plan)
    gate = Gate(plan, layers[0], most_pairs=2)
    own = {(b, h) for b, h, _ in gate._heads()}
    assert len(own) == 2
    left = sorted({(b, h) for b in (0, 1) for h in (0, 1)} - own)
    return gate, found, sorted(own)[0], left[0]


def test_of_many_pairs_some_are_compared_and_the_verdict_says_how_many(sampled):
    gate, found, own, left = sampled
    assert gate.judge(found["sdpa-hf"]).to_json()["pairs"] == [2, 4]
    for (b, h), passes in ((own, False), (left, True)):
        heads = slice(3 * h, 3 * h + 3)

        def off(out, b=b, heads=heads):
            out[b, heads] += 0.05
            return out

        assert gate.judge(spoiled(found["sdpa-hf"], off)).passed == passes


@pytest.mark.parametrize("name", ["sdpa-hf", "loki int8 k=40"])
def test_numbers_that_are_not_finite_are_refused_wherever_they_are(sampled, name):
    gate, found, _, (b, h) = sampled

    def holed(result):
        out = result if name == "sdpa-hf" else result[0]
        out[b, 3 * h, 0, 5] = float("inf")
        return result

    assert "not finite" in gate.judge(spoiled(found[name], holed)).reason


@pytest.mark.parametrize(("change", "message"), [("count", "39 rows"), ("order", "ascending")])
def test_a_selection_that_cannot_be_is_refused_wherever_it_is(sampled, change, message):
    gate, found, _, (b, h) = sampled

    def wrong(result):
        out, own = result
        indices, counts = own.indices.clone(), own.counts.clone()
        if change == "count":
            counts[b, h] -= 1
        else:
            indices[b, h] = indices[b, h].flip(0)
        return out, Selection(indices, counts)

    assert message in gate.judge(spoiled(found["loki int8 k=40"], wrong)).reason


def test_a_result_that_was_made_elsewhere_is_judged_as_it_is(small_plan, everybody):
    plan = small_plan()
    layers, found = everybody(plan)
    gate, own = Gate(plan, layers[0]), found["sdpa-hf"]
    assert gate.judge(own, own.run(0)).passed
    assert not gate.judge(own, own.run(0) + 0.05).passed
    assert "another shape" in gate.judge(own, own.run(0)[:1]).reason
