"""Reuse: who chooses again and who reads on, one batch row at a time."""

from dataclasses import replace

import pytest
import torch

from loki_attn import attention
from loki_attn.budget import Budget
from loki_attn.cache import LayerCache
from loki_attn.policy import Policy, preset
from loki_attn.select.exact_topk import ExactTopK
from loki_attn.testing import layer_shape, plain_attention, random_rows
from loki_attn.types import AttentionCall

SHAPE = layer_shape(6, 2, 32)
CALL = AttentionCall(scaling=32**-0.5)


class Run:
    """Decode steps of one cache, and who scored in them."""

    def __init__(self, above, batch=1, seq=60, how="softmax_sum", seed=0, **amount):
        amount = amount or {"top_k": 9, "sinks": 1, "recents": 2}
        policy = Policy(
            select=ExactTopK(), budget=Budget(**amount), group_reduce=how, reuse_above=above
        )
        self.layer = attention.bind(policy, SHAPE, 1, None)
        self.query, key, value = random_rows(SHAPE, seq, batch=batch, seed=seed)
        self.cache = LayerCache(self.layer.selector)
        self.cache.append(key, value)

    def step(self, query=None, visible=None):
        """What is read, as marks, and whether anything was scored."""
        query = self.query if query is None else query
        out, selection, logits = attention.decode_weighing(
            query, self.cache, self.layer, CALL, visible
        )
        self.out = out
        marks = torch.zeros(*selection.indices.shape[:2], self.cache.length + 1, dtype=torch.bool)
        marks.scatter_(
            2, selection.indices.masked_fill(selection.indices < 0, self.cache.length), True
        )
        marks = marks[..., :-1]
        assert torch.equal(marks.sum(-1), selection.counts)
        return marks, logits is not None

    def append(self, tokens=1, seed=7):
        batch = self.query.shape[0]
        self.cache.append(*random_rows(SHAPE, tokens, batch=batch, seed=seed)[1:])


def turned(query, cosine, seed=3):
    """Queries whose every head has this cosine with those given."""
    other = random_rows(SHAPE, 1, batch=query.shape[0], seed=seed)[0]
    own = query / query.norm(dim=-1, keepdim=True)
    off = other - (other * own).sum(-1, keepdim=True) * own
    off = off / off.norm(dim=-1, keepdim=True)
    return cosine * own + (1 - cosine**2) ** 0.5 * off


def test_above_one_every_step_chooses():
    run = Run(above=1.5)
    for _ in range(4):
        assert run.step()[1]


@pytest.mark.parametrize("above", [-1.0, -1])
def test_at_minus_one_only_the_first_step_chooses(above):
    run = Run(above=above)
    first, scored = run.step()
    assert scored
    for query in (-run.query, random_rows(SHAPE, 1, seed=5)[0], torch.zeros_like(run.query)):
        again, scored = run.step(query)
        assert not scored
        assert torch.equal(again, first)


@pytest.mark.parametrize("above", [0.0, 0.85, 1.0])
def test_equal_queries_never_choose_again(above):
    for seed in range(10):
        run = Run(above=above, seed=seed)
        first, _ = run.step()
        again, scored = run.step(run.query.clone())
        assert not scored
        assert torch.equal(again, first)


def test_the_mean_cosine_over_the_heads_decides():
    run = Run(above=0.85)
    run.step()
    assert not run.step(turned(run.query, 0.86))[1]
    assert run.step(turned(run.query, 0.84))[1]
    # One head turned away, five alike: the mean is (5 - 0.5) / 6 = 0.75.
    run = Run(above=0.74)
    run.step()
    mixed = run.query.clone()
    mixed[:, 2] = turned(run.query, -0.5)[:, 2]
    assert not run.step(mixed)[1]
    assert run.step(turned(run.query, 0.73))[1]


def test_the_length_of_queries_does_not_matter():
    run = Run(above=0.99)
    run.step()
    assert not run.step(run.query * 40)[1]


def test_slow_drift_is_measured_from_the_last_choice():
    run = Run(above=0.9)
    run.step()
    scored = [run.step(turned(run.query, cosine))[1] for cosine in (0.98, 0.95, 0.92, 0.89)]
    assert scored == [False, False, False, True]


def test_rows_that_came_since_are_read():
    run = Run(above=0.5)
    first, _ = run.step()
    for tokens in (1, 3):
        run.append(tokens)
    again, scored = run.step()
    assert not scored
    assert torch.equal(again[..., :60], first)
    assert bool(again[..., 60:].all())


def test_what_is_read_again_is_attended_to_exactly():
    run = Run(above=0.5, batch=2)
    run.step()
    run.append()
    query = turned(run.query, 0.8)
    marks, scored = run.step(query)
    assert not scored
    mask = marks.repeat_interleave(3, 1)[:, :, None]
    expected = plain_attention(query, run.cache.keys, run.cache.values, mask, CALL)
    torch.testing.assert_close(run.out, expected)


@pytest.mark.parametrize("how", ["softmax_sum", "none"])
def test_a_batch_row_decides_alone(how):
    """One row reads again, one chooses: each as if it were alone, step after step."""
    batch = Run(above=0.85, batch=3, how=how)
    alone = [Run(above=0.85, batch=3, how=how) for _ in range(3)]
    for row, run in enumerate(alone):
        run.cache.select_batch(torch.tensor([row]))
    start = batch.query
    steps = [
        (1.0, 1.0, 1.0),
        (0.95, 0.5, 0.9),
        (0.3, 0.95, 0.9),
        (0.9, 0.9, 0.9),
        (0.2, 0.1, 0.95),
    ]
    seen = set()
    for number, cosines in enumerate(steps):
        turns = torch.tensor(cosines).view(3, 1, 1, 1)
        query = turned(start, turns, seed=20 + number)
        together, _ = batch.step(query)
        for row, run in enumerate(alone):
            single, scored = run.step(query[row : row + 1])
            seen.add((number, row, scored))
            assert torch.equal(together[row : row + 1], single)
            torch.testing.assert_close(batch.out[row : row + 1], run.out)
        for run in (batch, *alone):
            run.cache.append(
                *(
                    t[:1].expand(run.cache.keys.shape[0], -1, -1, -1)
                    for t in random_rows(SHAPE, 1, seed=number)[1:]
                )
            )
    assert {scored for number, row, scored in seen if number == 1} == {True, False}


def test_choices_of_several_sizes_are_read_again():
    """By mass, heads read different numbers of rows; batch rows too."""
    run = Run(above=0.5, batch=2, mass=0.6)
    first, _ = run.step()
    assert len(set(first.sum(-1).flatten().tolist())) > 1
    run.append()
    again, scored = run.step()
    assert not scored
    assert torch.equal(again[..., :60], first)


def test_padding_is_not_read_again():
    """A sequence that has ended: its new rows are padding, whoever reads again."""
    run = Run(above=0.5, batch=2)
    visible = torch.ones(2, 1, 1, 60, dtype=torch.bool)
    visible[0, ..., :20] = False
    first, _ = run.step(visible=visible)
    assert not bool(first[0, :, :20].any())
    run.append(2)
    visible = torch.nn.functional.pad(visible, (0, 2), value=True)
    visible[1, ..., 60:] = False
    again, scored = run.step(visible=visible)
    assert not scored
    assert torch.equal(again[..., :60], first)
    assert bool(again[0, :, 60:].all())
    assert not bool(again[1, :, 60:].any())


def test_queries_that_are_no_numbers_choose():
    run = Run(above=-1.0)
    run.step()
    assert run.step(run.query * float("nan"))[1]


@pytest.mark.parametrize("change", ["keep", "truncate", "reset"])
def test_a_choice_ends_when_rows_move(change):
    run = Run(above=-1.0)
    run.step()
    if change == "keep":
        run.cache.keep(torch.arange(0, 60, 2).expand(1, 2, -1))
    elif change == "truncate":
        run.cache.truncate(40)
    else:
        run.cache.reset()
        run.append(30)
    marks, scored = run.step()
    assert scored
    assert marks.shape[-1] == run.cache.length
    assert not run.step()[1]


def test_a_choice_goes_with_its_batch_row():
    run = Run(above=0.9, batch=3)
    first, _ = run.step()
    order = torch.tensor([2, 0, 0])
    run.cache.select_batch(order)
    again, scored = run.step(run.query[order])
    assert not scored
    assert torch.equal(again, first[order])


def test_two_requests_share_nothing():
    run = Run(above=-1.0)
    run.step()
    other = LayerCache(run.layer.selector)
    other.append(*random_rows(SHAPE, 50, seed=2)[1:])
    run.cache = other
    assert run.step()[1]


def test_a_correction_of_the_output_is_for_batch_rows_that_chose():
    """What is read again has no scores, so its output stays as it is in any company."""
    run = Run(above=0.85, batch=2)
    selector = run.layer.selector
    finished = type("Finished", (type(selector),), {"finish": lambda self, out, *_: out + 100})()
    run.layer = replace(run.layer, selector=finished)
    run.step()
    assert float(run.out.min()) > 50
    query = run.query.clone()
    query[1] = -query[1]
    run.step(query)
    assert float(run.out[0].abs().max()) < 50
    assert float(run.out[1].min()) > 50


def test_any_policy_takes_a_trigger():
    policy = preset("exact-topk", reuse_above=0.9)
    assert Policy.from_json(policy.to_json()) == policy
    with pytest.raises(ValueError, match="reuse_above is a cosine"):
        preset("exact-topk", reuse_above=3)
