"""The space: what is in it, and who is at least as exact as whom."""

from itertools import product

import numpy as np
import pytest

from loki_attn.policy import Policy
from loki_attn.tune.space import (
    PLANES,
    Candidate,
    amounts_for,
    candidates,
    covering,
    dense_sets,
    ranks_for,
)


@pytest.mark.parametrize(
    ("head_dim", "ranks"),
    [
        (64, (8, 16, 32, 48)),
        (128, (8, 16, 32, 48, 64)),
        (16, (8,)),
        (8, (4,)),
        (2, (1,)),
        (1, (1,)),
    ],
)
def test_ranks(head_dim, ranks):
    assert ranks_for(head_dim) == ranks


def test_amounts():
    assert amounts_for(2048) == (64, 96, 128, 192, 256, 384, 512, 768, 1024)
    assert amounts_for(256) == (16, 24, 32, 48, 64, 96, 128)
    assert amounts_for(64) == (8, 12, 16, 24, 32)


@pytest.mark.parametrize(
    ("layers", "worst", "sets"),
    [
        (range(30), (7, 2, 0, 9, 3), [(), (0,), (0, 1), (7,), (2, 7), (0, 2, 7, 9)]),
        (range(2), (1, 0), [(), (0,), (1,)]),
        ((5,), (5,), [()]),
        ((1, 3, 5, 7), (1, 3, 5, 7), [(), (1,)]),
    ],
)
def test_dense_sets_leave_layers_that_select(layers, worst, sets):
    assert dense_sets(tuple(layers), worst) == tuple(sets)


@pytest.mark.parametrize("context", [64, 100, 256, 2048, 4096])
def test_every_policy_selects_wherever_it_is_judged(context):
    for top_k, plane in product(amounts_for(context), PLANES):
        policy = Candidate(rank=4, plane_dtype=plane, top_k=top_k).policy(context)
        assert policy.budget.top_k == top_k
        # Windows are judged in the second half of the context.
        assert not policy.budget.is_dense(context // 2 + 1)
        assert Policy.from_json(policy.to_json()) == policy


def test_a_name_says_everything():
    one = Candidate(rank=16, plane_dtype="int4", top_k=96, dense_layers=(0, 3))
    assert one.name == one.policy(512).name == "loki rank=16 int4 top_k=96 dense=0,3"
    assert one.policy(512).budget.dense_layers == (0, 3)


def test_covering_is_the_order_of_all_four_properties():
    found = candidates((8, 16), (64, 96), ((), (0,), (1,), (0, 1)))
    order = covering(found)
    assert len({one.name for one in found}) == len(found) == 2 * 3 * 4 * 2
    for (i, a), (j, b) in product(enumerate(found), repeat=2):
        expected = (
            a.rank >= b.rank
            and a.top_k >= b.top_k
            and PLANES.index(a.plane_dtype) >= PLANES.index(b.plane_dtype)
            and set(a.dense_layers) >= set(b.dense_layers)
        )
        assert order[i, j] == expected, (a, b)
    assert order.dtype == np.bool_
