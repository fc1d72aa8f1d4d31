"""Policy: presets, overrides, JSON, and messages that list what would have been right."""

import json

import pytest

from loki_attn.allocate.adaptive import Adaptive
from loki_attn.allocate.table import Table
from loki_attn.budget import Budget
from loki_attn.errors import BudgetError, InputError, PolicyError, UnknownNameError
from loki_attn.evict.gui_kv import GuiKV
from loki_attn.evict.snapkv import SnapKV
from loki_attn.keep_budget import KeepBudget
from loki_attn.policy import Policy, as_policy, methods, preset, presets
from loki_attn.select.dense import Dense
from loki_attn.select.exact_topk import ExactTopK
from loki_attn.select.loki import Loki


@pytest.mark.parametrize("name", presets())
def test_presets_are_valid_named_and_survive_json(name):
    policy = preset(name)
    assert policy.name == name
    assert Policy.from_json(policy.to_json()) == policy
    assert preset(name) is not policy
    assert as_policy(name) == as_policy(policy) == policy


def test_the_strong_default_and_the_published_one():
    loki, paper = preset("loki"), preset("loki-paper")
    assert loki.select == Loki(layout="planes", plane_dtype="int8")
    assert (loki.budget.sinks, loki.budget.recents) == (4, 64)
    assert loki.group_reduce == "softmax_sum"
    assert paper.select == Loki(layout="rotated", rank=0.25)
    assert paper.budget == Budget(fraction=0.25)
    assert paper.group_reduce == "none"


def test_methods_are_found_by_their_files():
    assert set(methods()) >= {"dense", "exact_topk", "loki", "streaming_llm"}
    assert all(kind.method == name for name, kind in methods().items())


def test_a_preset_stays_dense_where_dense_is_as_fast_and_no_further():
    assert preset("loki").budget.dense_below == 1536
    assert preset("loki", top_k=1024).budget.dense_below == 1536
    assert preset("loki", top_k=100).budget.dense_below == 300
    assert preset("loki", top_k=100, dense_below=7).budget.dense_below == 7
    assert preset("loki", fraction=0.25).budget.dense_below == 0
    assert preset("loki", mass=0.9, dense_below=7).budget.dense_below == 7


def test_overrides_reach_method_budget_and_policy():
    policy = preset("loki", rank=8, top_k=128, sinks=2, group_reduce="max", name="mine")
    assert policy.select == Loki(rank=8)
    assert policy.budget == Budget(top_k=128, sinks=2, recents=32, min_k=128, dense_below=384)
    assert (policy.group_reduce, policy.name) == ("max", "mine")


def test_a_new_amount_replaces_the_old_one():
    assert preset("loki", fraction=0.5).budget == Budget(
        fraction=0.5, sinks=4, recents=64, min_k=128
    )
    assert preset("loki", mass=0.9, cap=256).budget.top_k is None
    assert preset("loki-paper", top_k=16).budget == Budget(top_k=16)


@pytest.mark.parametrize("top_k", [4, 5, 64, 100, 128, 512, 4096])
def test_any_top_k_makes_a_valid_preset(top_k):
    budget = preset("loki", top_k=top_k).budget
    assert budget.top_k == top_k
    assert budget.recents == (min(64, top_k // 4) if top_k > 4 else 0)


def test_a_small_cap_or_table_shrinks_what_is_protected():
    assert preset("loki", mass=0.9, cap=40).budget.recents == 10
    table = preset("loki", top_k=400, per_layer=(400, 100)).budget
    assert (table.recents, table.min_k) == (25, 100)
    with pytest.raises(BudgetError, match="top_k=40 is less than sinks"):
        preset("loki", top_k=40, recents=64)


def test_presets_share_no_state():
    preset("loki", rank=3, top_k=8)
    assert preset("loki").select.rank is None
    assert preset("loki").budget.top_k == 512


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: preset("lokki"),
            r"Unknown policy 'lokki'\. Did you mean 'loki'\? Valid: .*dense,",
        ),
        (lambda: preset("loki", topk=5), r"Unknown policy field 'topk'\. Did you mean 'top_k'\?"),
        (lambda: preset("exact-topk", rank=5), r"Unknown policy field 'rank'"),
        (
            lambda: Policy(select=Dense(), group_reduce="min"),
            r"Unknown group_reduce 'min'.*Valid: max, none, softmax_max, softmax_sum, sum",
        ),
        (
            lambda: Policy.from_json('{"select": {"method": "exact_topq"}}'),
            r"Unknown method 'exact_topq'\. Did you mean 'exact_topk'\? Valid: .*dense, .*loki,",
        ),
        (
            lambda: Policy.from_json('{"select": {"method": ["loki"]}}'),
            "Unknown method",
        ),
        (
            lambda: Policy.from_json('{"select": {"method": "loki", "ranck": 3}}'),
            r"Unknown field of loki 'ranck'\. Did you mean 'rank'\? Valid: layout, plane_dtype,",
        ),
        (
            lambda: Policy.from_json('{"select": {"method": "loki"}, "budgets": {}}'),
            r"Unknown policy field 'budgets'\. Did you mean 'budget'\?",
        ),
        (
            lambda: Policy.from_json('{"select": {"method": "loki"}, "budget": {"sink": 1}}'),
            r"Unknown budget field 'sink'\. Did you mean 'sinks'\?",
        ),
    ],
)
def test_unknown_names_list_the_valid_ones_and_the_nearest(call, message):
    with pytest.raises(UnknownNameError, match=message):
        call()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "This policy is not JSON"),
        ("[1]", "A policy is a JSON object, got list"),
        ("{}", "needs a select part with a method"),
        ('{"select": {}}', "needs a select part with a method"),
        ('{"select": "loki"}', "The select part of a policy is an object, got 'loki'"),
        ('{"select": {"method": "dense"}, "budget": 5}', "The budget part of a policy is an obj"),
        ('{"select": {"method": "dense"}, "version": 9}', "Policy version 9 is not 1"),
        ('{"select": {"method": "loki", "rank": 2.5}}', "rank must be a whole number"),
        ('{"select": {"method": "dense"}, "budget": {"top_k": 5}}', "reads everything"),
    ],
)
def test_malformed_json(text, message):
    with pytest.raises(PolicyError, match=message):
        Policy.from_json(text)


def test_a_bad_budget_in_json():
    with pytest.raises(BudgetError, match="got nan"):
        Policy.from_json('{"select": {"method": "loki"}, "budget": {"fraction": NaN}}')


def test_policies_from_files(tmp_path):
    path = tmp_path / "mine.json"
    policy = Policy(select=ExactTopK(), budget=Budget(top_k=3), name="mine")
    path.write_text(policy.to_json(), encoding="utf-8")
    assert as_policy(str(path)) == policy
    assert json.loads(policy.to_json())["version"] == 1
    with pytest.raises(PolicyError, match="There is no policy file"):
        as_policy(str(tmp_path / "yours.json"))
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(PolicyError, match="is not UTF-8 text"):
        as_policy(str(path))
    with pytest.raises(PolicyError, match="Only a preset's name takes overrides"):
        as_policy(policy, top_k=5)


def test_every_verb_finds_its_methods_by_their_files():
    assert set(methods("evict")) >= {"keep_all", "snapkv", "h2o", "tova", "knorm"}
    assert set(methods("allocate")) >= {"uniform", "adaptive", "pyramid"}
    for room in ("evict", "allocate"):
        assert all(kind.method == name for name, kind in methods(room).items())


def test_methods_bring_their_presets_along():
    assert {"quest", "snapkv", "h2o", "pyramidkv", "ada-kv"} <= set(presets())
    assert preset("snapkv").evict.method == "snapkv"
    assert preset("snapkv").evicts
    assert not preset("loki").evicts
    assert preset("dense").is_dense
    assert not preset("snapkv").is_dense


def test_any_selection_takes_an_eviction_and_its_budget():
    policy = preset("loki", evict="snapkv", capacity=1024, keep_first=4)
    assert policy.select.method == "loki"
    assert policy.evict == SnapKV()
    assert policy.keep == KeepBudget(capacity=1024, keep_first=4)
    assert Policy.from_json(policy.to_json()) == policy
    ragged = preset("snapkv", allocate="adaptive", alpha=0.5)
    assert ragged.allocate == Adaptive(alpha=0.5)
    assert Policy.from_json(ragged.to_json()) == ragged


def test_a_part_is_named_where_two_have_the_field():
    policy = preset("snapkv", **{"evict.window": 9, "keep.burst": 3, "capacity": 50})
    assert policy.evict.window == 9
    assert policy.keep == KeepBudget(capacity=50, burst=3)
    with pytest.raises(PolicyError, match=r"'seed' is a field of .*and of.*; say select.seed or"):
        preset("hata", evict="keyformer", capacity=50, seed=3)


def test_a_share_replaces_the_capacity_and_back():
    assert preset("snapkv", keep_share=0.5).keep == KeepBudget(keep_share=0.5)
    assert preset("snapkv", **{"keep.keep_share": 0.5}).keep == KeepBudget(keep_share=0.5)
    assert preset("loki", **{"budget.fraction": 0.5}).budget.top_k is None
    with pytest.raises(BudgetError, match="got both; keep one"):
        preset("snapkv", keep_share=0.5, capacity=9)


def test_tuples_survive_json():
    policy = Policy(
        select=Dense(),
        evict=GuiKV(spans=((3, 9), (12, 40))),
        keep=KeepBudget(capacity=64, whole_layers=(0, -1)),
        allocate=Table(shares=((0.5, 1.5), (1.0, 1.0))),
        reuse_above=0.85,
    )
    again = Policy.from_json(policy.to_json())
    assert again == policy
    assert again.evict.spans == ((3, 9), (12, 40))
    assert again.keep.whole_layers == (0, -1)
    assert hash(again.evict) == hash(policy.evict)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"keep": KeepBudget(capacity=9)}, "A capacity was given, but nothing is evicted; name a"),
        ({"allocate": Adaptive()}, "allocate='adaptive' shares a budget out, but nothing is evict"),
        ({"evict": SnapKV()}, "snapkv needs an amount: give capacity or keep_share"),
        ({"reuse_above": 3.0}, r"reuse_above is a cosine \(2 never reuses\), got 3.0"),
    ],
)
def test_parts_must_fit_each_other(fields, message):
    with pytest.raises(PolicyError, match=message):
        Policy(select=Dense(), **fields)


def test_a_capacity_has_room_for_the_window():
    with pytest.raises(BudgetError, match=r"capacity=31 is less than the rows .* at least 32"):
        preset("snapkv", capacity=31)
    assert preset("snapkv", capacity=32).keep.capacity == 32


def test_no_mass_without_an_estimate_of_it():
    with pytest.raises(PolicyError, match="quest estimates no mass; give top_k or fraction"):
        preset("quest", mass=0.9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: preset("loki", evict="snapkw"), "Unknown evict method 'snapkw'.*mean 'snapkv'"),
        (lambda: preset("snapkv", allocate="unifrm"), "Unknown allocate method 'unifrm'.*'uniform"),
        (lambda: preset("snapkv", capacty=4), "Unknown policy field 'capacty'.*mean 'capacity'"),
        (lambda: preset("snapkv", **{"select.window": 4}), "Unknown policy field 'select.window'"),
        (
            lambda: Policy.from_json('{"select": {"method": "dense"}, "keep": {"capacty": 4}}'),
            "Unknown keep field 'capacty'",
        ),
    ],
)
def test_unknown_parts_of_an_eviction(call, message):
    with pytest.raises(UnknownNameError, match=message):
        call()


def test_errors_are_input_errors():
    assert issubclass(PolicyError, InputError)
