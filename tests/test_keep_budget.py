"""KeepBudget: how many rows stay, which always do, and what is refused."""

import json

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from loki_attn.errors import BudgetError, UnknownNameError
from loki_attn.keep_budget import KeepBudget


def rows(budget, *seen):
    return budget.rows(torch.tensor(seen)).tolist()


def test_rows():
    assert rows(KeepBudget(), 0, 1, 70) == [0, 1, 70]
    assert rows(KeepBudget(capacity=20), 1, 20, 70) == [20, 20, 20]
    assert rows(KeepBudget(keep_share=0.25), 1, 4, 5, 100) == [1, 1, 2, 25]
    assert rows(KeepBudget(keep_share=1.0), 1, 70) == [1, 70]


@given(seen=st.integers(1, 100_000), share=st.floats(1e-6, 1.0))
@example(100, 0.07)  # 7.000000000000001 in float64
@example(25, 0.28)
def test_a_share_is_rounded_up_but_not_for_a_rounding_error(seen, share):
    (count,) = rows(KeepBudget(keep_share=share), seen)
    assert 1 <= count <= seen
    assert count == 1 or count - 1 < seen * share - 1e-10
    assert seen * share <= count + 1e-8


def test_it_keeps_everything_only_without_an_amount():
    assert KeepBudget(keep_first=4, keep_last=9).keeps_everything
    assert not KeepBudget(capacity=5).keeps_everything
    assert not KeepBudget(keep_share=1.0).keeps_everything


def test_layers_are_spared_from_either_end():
    budget = KeepBudget(capacity=4, whole_layers=(0, -1, 2))
    assert [budget.spares(i, 5) for i in range(5)] == [True, False, True, False, True]
    assert not KeepBudget(capacity=4).spares(0, 1)
    for index in (5, -6):
        with pytest.raises(BudgetError, match=rf"\[{index}\], but the model has layers 0 to 4"):
            KeepBudget(capacity=4, whole_layers=(0, index)).spares(0, 5)


def test_room_for_what_always_stays():
    budget = KeepBudget(capacity=10, keep_first=4, keep_last=6)
    budget.require_room(6)
    with pytest.raises(BudgetError, match=r"capacity=10 is less .* last 7 .*at least 11 or lower"):
        budget.require_room(7)
    KeepBudget(keep_first=4, keep_last=9).require_room(100)
    with pytest.raises(BudgetError, match="capacity=9 is less than the rows that always stay"):
        KeepBudget(capacity=9, keep_first=4, keep_last=6)


BUDGETS = [
    KeepBudget(),
    KeepBudget(capacity=10, keep_first=4, keep_last=6, burst=128, when="step"),
    KeepBudget(keep_share=0.5, whole_layers=(0, -1), when="prompt"),
]


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_json(budget):
    record = json.loads(json.dumps(budget.to_json()))
    assert KeepBudget.from_json(record) == budget
    assert hash(KeepBudget.from_json(record)) == hash(budget)
    assert all(record[name] != getattr(KeepBudget(), name) for name in record)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"capacity": 5, "keep_share": 0.5}, "got both; keep one"),
        ({"capacity": 0}, "capacity must be a whole number of tokens >= 1, got 0"),
        ({"capacity": True}, "capacity must be a whole number of tokens >= 1, got True"),
        ({"capacity": 5.0}, "capacity must be a whole number of tokens >= 1, got 5.0"),
        ({"keep_first": -1}, "keep_first must be a whole number of tokens >= 0, got -1"),
        ({"keep_last": 1.5}, "keep_last must be a whole number of tokens >= 0, got 1.5"),
        ({"burst": None}, "burst must be a whole number of tokens >= 0, got None"),
        ({"keep_share": 0.0}, r"keep_share must lie in \(0, 1\], got 0.0; use capacity for tokens"),
        ({"keep_share": float("nan")}, r"keep_share must lie in \(0, 1\], got nan"),
        ({"keep_share": True}, r"keep_share must be a number in \(0, 1\], got True"),
        ({"whole_layers": (0.5,)}, "whole_layers takes layer indices, got 0.5"),
        ({"whole_layers": (True,)}, "whole_layers takes layer indices, got True"),
    ],
)
def test_refused(fields, message):
    with pytest.raises(BudgetError, match=message):
        KeepBudget(**fields)


def test_an_unknown_time():
    with pytest.raises(UnknownNameError, match=r"time of eviction 'promt'\. Did you mean 'prompt'"):
        KeepBudget(capacity=5, when="promt")
