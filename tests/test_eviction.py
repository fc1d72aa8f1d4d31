"""The last stage of the line: when it is due, what it protects, how much goes, and from whom."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loki_attn.evict.base import best
from loki_attn.eviction import Turn, evict, is_due, keep_set, valid_rows
from loki_attn.policy import preset
from loki_attn.shards import Shard
from loki_attn.testing import DrivenLayer, layer_shape, random_rows

SHAPE = layer_shape(4, 2, 8)
SEQ = 30


def rows(seq=SEQ, batch=2, seed=0):
    return random_rows(SHAPE, seq, batch=batch, q_len=seq, seed=seed)


def knorm(**keep):
    return preset("knorm", **{"capacity": 10, **keep})


def driven(num_layers=1, **keep):
    return DrivenLayer(knorm(**keep), SHAPE, num_layers=num_layers)


def counts(layer):
    return [[len(head) for head in row] for row in layer.positions()]


# when -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("when", "prompt", "chunk_after", "step_after_prompt", "next_step"),
    [
        ("forward", True, True, False, False),
        ("prompt", False, False, True, False),
        ("step", True, True, True, True),
    ],
)
def test_when_it_is_due(when, prompt, chunk_after, step_after_prompt, next_step):
    layer = driven(when=when)
    own, turn = layer.layer.eviction, Turn(rows=layer.rows)
    assert is_due(own, turn, 9) is prompt
    turn.waiting = True
    assert is_due(own, turn, 2) is chunk_after
    assert is_due(own, turn, 1) is step_after_prompt
    evict([(own, turn)])
    assert is_due(own, turn, 1) is next_step


def test_a_method_has_its_own_time_and_the_budget_the_last_word():
    for name, own in (("knorm", "forward"), ("h2o", "step")):
        policy = preset(name, capacity=64)
        assert DrivenLayer(policy, SHAPE).layer.eviction.when == own
        policy = preset(name, capacity=64, when="prompt")
        assert DrivenLayer(policy, SHAPE).layer.eviction.when == "prompt"


def test_spared_layers_have_no_eviction():
    policy = knorm(whole_layers=(0,))
    layer = DrivenLayer(policy, SHAPE, num_layers=4)
    assert layer.layer.eviction is None
    layer.prompt(*rows())
    assert not layer.rows.evicted
    assert layer.evict() == 0


def test_nothing_goes_before_something_was_attended():
    layer = driven()
    layer.rows.append(*rows()[1:])
    assert layer.evict() == 0
    assert layer.rows.longest == SEQ


# how much -------------------------------------------------------------------------------------


def test_it_tells_how_many_rows_went():
    layer = driven(when="prompt")
    layer.prompt(*rows())
    assert layer.evict() == 2 * 2 * (SEQ - 10)
    assert layer.evict() == 0


def test_a_share_follows_the_tokens_not_the_rows():
    """A second eviction keeps a share of all tokens seen, not of what was left."""
    layer = DrivenLayer(preset("knorm", keep_share=0.5), SHAPE)
    layer.prompt(*rows())
    assert counts(layer) == [[15, 15]] * 2
    layer.prompt(*rows(10, seed=1))
    assert counts(layer) == [[20, 20]] * 2


def test_a_share_of_a_padded_row_is_of_its_own_tokens():
    layer = DrivenLayer(preset("knorm", keep_share=0.5), SHAPE)
    valid = torch.ones(2, SEQ, dtype=torch.bool)
    valid[1, :20] = False
    layer.prompt(*rows(), valid)
    assert counts(layer) == [[15, 15], [5, 5]]
    assert all(min(head) >= 20 for head in layer.positions()[1])


def test_a_second_prompt_is_judged_with_what_is_left_of_the_first():
    """Multi-turn: the rows of both turns compete for one capacity."""
    layer = driven(keep_first=2)
    layer.prompt(*rows())
    first = layer.positions()
    layer.prompt(*rows(12, seed=1))
    assert counts(layer) == [[10, 10]] * 2
    for before, after in zip(first, layer.positions(), strict=True):
        for old, head in zip(before, after, strict=True):
            assert {place for place in head if place < SEQ} <= set(old)
            assert head[:2] == [0, 1]
    assert layer.rows.seen == SEQ + 12


# who ------------------------------------------------------------------------------------------


def test_layers_with_one_budget_go_together():
    """Scope "model": one threshold, and the average over layers is what was asked for."""
    policy = preset("knorm", capacity=10, allocate="global_rows")
    layers = [DrivenLayer(policy, layer_shape(4, 2, 8), num_layers=3) for _ in range(3)]
    for index, layer in enumerate(layers):
        object.__setattr__(layer.layer.eviction.place.shape, "index", index)
        query, key, value = rows(seed=index)
        layer.prompt(query, key * (index + 1), value)
        assert not layer.rows.evicted
    dropped = DrivenLayer.evict_all(layers)
    held = [sum(map(sum, counts(layer))) for layer in layers]
    assert dropped == 3 * 2 * 2 * SEQ - sum(held)
    assert sum(held) == 3 * 2 * 2 * 10
    assert held[0] > held[2]  # small keys are kept first


def test_ragged_heads_are_judged_again_shard_by_shard():
    layer = DrivenLayer(preset("knorm", capacity=10, allocate="adaptive"), SHAPE)
    query, key, value = rows()
    key[:, 0] *= 3
    layer.prompt(query, key, value)
    lengths = counts(layer)
    assert all(a != b and a + b == 20 for a, b in lengths)
    query, key, value = rows(20, seed=1)
    key[:, 1] *= 3
    layer.prompt(query, key, value)
    assert [sum(row) for row in counts(layer)] == [20, 20]
    held = torch.tensor([head[-1] for row in layer.positions() for head in row])
    assert bool((held >= SEQ).any())


# the choice itself ----------------------------------------------------------------------------


@given(data=st.data())
def test_the_best_are_protected_rows_then_scores_then_the_lower_row(data):
    """Against a sort, with ties, NaN and padding; padding fills what is missing, from the end."""
    length = data.draw(st.integers(1, 12))
    number = st.sampled_from([0.0, 1.0, 2.0, float("nan"), float("inf"), float("-inf")])
    flags = st.lists(st.booleans(), min_size=length, max_size=length)
    scores = data.draw(st.lists(number, min_size=length, max_size=length))
    valid, guarded = data.draw(flags), data.draw(flags)
    least = max(1, sum(v and g for v, g in zip(valid, guarded, strict=True)))
    count = data.draw(st.integers(least, length))
    mask = best(
        torch.tensor(scores)[None, None],
        torch.tensor([[count]]),
        torch.tensor(guarded)[None, None],
        torch.tensor(valid)[None, None],
    )

    def rank(row):
        score = scores[row]
        known = -float("inf") if score != score else score
        if valid[row]:
            return (0, 0, row) if guarded[row] else (1, -known, row)
        return (2, 0, -row)

    expected = sorted(sorted(range(length), key=rank)[:count])
    assert mask[0, 0].nonzero()[:, 0].tolist() == expected


def test_a_mask_becomes_ascending_indices():
    mask = torch.tensor([[[0, 1, 1, 0, 1], [0, 0, 0, 1, 0]]]).bool()
    kept = keep_set(mask)
    assert kept.indices.tolist() == [[[1, 2, 4], [3, -1, -1]]]
    assert kept.counts.tolist() == [[3, 1]]


def test_padding_is_found_by_position_after_rows_went():
    layer = driven()
    layer.prompt(*rows())
    cache = layer.rows.whole
    tokens = torch.ones(2, 1, SEQ, dtype=torch.bool)
    tokens[1, :, 15:] = False
    found = valid_rows(Shard(cache), tokens)
    assert bool(found[0].all())
    assert torch.equal(found[1], cache.positions[1] < 15)
    assert torch.equal(valid_rows(Shard(cache), tokens[1:]), cache.positions < 15)
