"""PyramidKV: layers in an arithmetic progression whose sum is the budget."""

import pytest
import torch
from ballots import ballot
from hypothesis import given
from hypothesis import strategies as st

from loki_attn.allocate.pyramid import Pyramid
from loki_attn.errors import PolicyError
from loki_attn.policy import Policy, preset


def layers(capacity, protected, tokens, num_layers, beta=20.0):
    shared = Pyramid(beta=beta).layer_capacities(
        torch.tensor([capacity]), protected, torch.tensor([tokens]), num_layers
    )
    return shared[:, 0].tolist()


SIZES = {
    "protected": st.integers(0, 40),
    "more": st.integers(0, 300),
    "tokens": st.integers(1, 2000),
    "num_layers": st.integers(1, 40),
    "beta": st.floats(1.0, 50.0),
}


@given(**SIZES)
def test_layers_add_up_to_the_budget(protected, more, tokens, num_layers, beta):
    capacity = max(1, protected + more)
    got = layers(capacity, protected, tokens, num_layers, beta)
    assert sum(got) == num_layers * capacity


@given(**SIZES)
def test_no_layer_gets_more_than_there_is_or_less_than_is_protected(
    protected, more, tokens, num_layers, beta
):
    capacity = max(1, protected + more)
    got = layers(capacity, protected, tokens, num_layers, beta)
    assert max(got) <= max(tokens, capacity)
    assert min(got) >= protected


@given(**SIZES)
def test_layers_never_rise(protected, more, tokens, num_layers, beta):
    got = layers(max(1, protected + more), protected, tokens, num_layers, beta)
    assert got == sorted(got, reverse=True)


def test_steps_are_those_of_the_paper():
    # m = 120, ends 234 and 6 rows beside the window of 8.
    got = layers(128, 8, 5000, 32)
    assert (got[0], got[-1]) == (242, 14)
    exact = [8 + 234 - layer * (234 - 6) / 31 for layer in range(32)]
    assert all(abs(a - b) < 1 for a, b in zip(got, exact, strict=True))


def test_rounding_down_would_exceed_the_budget_and_this_does_not():
    # Steps rounded down keep 4016 rows beside the windows where 3840 are allowed.
    step = (234 - 6) // 31
    assert sum(234 - layer * step for layer in range(32)) == 4016
    assert sum(layers(128, 8, 5000, 32)) - 32 * 8 == 3840


def test_beta_of_one_is_uniform():
    assert layers(100, 8, 5000, 7, beta=1.0) == [100] * 7


def test_short_prompts_flatten_the_pyramid():
    assert layers(100, 8, 120, 3) == [120, 100, 80]
    assert layers(100, 8, 100, 3) == [100, 100, 100]
    assert layers(100, 8, 30, 3) == [100, 100, 100]


def test_batch_rows_do_not_know_each_other():
    together = Pyramid().layer_capacities(torch.tensor([100, 40]), 8, torch.tensor([120, 900]), 3)
    assert together.T.tolist() == [layers(100, 8, 120, 3), layers(40, 8, 900, 3)]


def test_heads_of_a_layer_keep_the_same():
    one = ballot(torch.rand(2, 3, 30), 9)
    assert Pyramid().counts([one])[0].tolist() == [[9, 9, 9], [9, 9, 9]]


def test_a_pyramid_on_its_head_is_refused():
    with pytest.raises(PolicyError, match=r"beta is at least 1.*got 0\.5"):
        Pyramid(beta=0.5)


def test_the_preset_is_snapkv_with_layers():
    policy = preset("pyramidkv", capacity=128)
    assert (policy.evict.method, policy.evict.window, policy.allocate.beta) == ("snapkv", 8, 20.0)
    assert Policy.from_json(policy.to_json()) == policy
