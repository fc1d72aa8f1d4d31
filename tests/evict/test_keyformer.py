"""Keyformer: heavy hitters under noise and a growing temperature."""

from collections import defaultdict

import pytest
import torch
from stepping import best_of, pieces, scaling_of, shares, simulate, walk

from loki_attn.errors import PolicyError
from loki_attn.evict.base import Place
from loki_attn.evict.keyformer import Keyformer, gumbel
from loki_attn.policy import Policy, preset
from loki_attn.testing import layer_shape, random_rows
from loki_attn.types import AttentionCall, LayerShape

SHAPE = layer_shape(6, 2, 16)


def noise_of(layer):
    """The noise that a layer's rows hold, by their numbers."""
    return layer.rows.whole.plane("noise")


class Naive:
    """One head: scores by noisy weights whose temperature grows with every step."""

    def __init__(self, noise, prompt, capacity, recents, growth):
        self.noise, self.prompt, self.growth = noise.double(), prompt, growth
        self.capacity, self.recents = capacity, recents
        self.scores = defaultdict(float)

    def see(self, token, held, query, keys):
        tau = min(1 + self.growth * max(0, token - self.prompt + 1), 2.0)
        found = shares(query, keys[held], scaling_of(SHAPE), self.noise[held], tau).sum(0)
        for position, weight in zip(held, found.tolist(), strict=True):
            self.scores[position] += weight

    def drop(self, held, token):
        del token
        if len(held) <= self.capacity:
            return held
        last, others = held[-self.recents :], held[: -self.recents]
        return best_of(self.scores, others, self.capacity - self.recents) + last


@pytest.mark.parametrize("growth", [0.01, 0.3])
def test_it_is_the_loop_over_steps(growth):
    rows = random_rows(SHAPE, 70, batch=2, q_len=70)
    everything, _, _ = walk(preset("keyformer", capacity=100), SHAPE, rows, 70)
    noise = noise_of(everything)

    _, held, _ = walk(preset("keyformer", capacity=20, tau_step=growth), SHAPE, rows, 40)

    assert held == simulate(rows, 40, lambda b, h: Naive(noise[b, h], 40, 20, 6, growth))


def test_without_noise_and_heat_it_is_h2o():
    rows = random_rows(SHAPE, 60, batch=2, q_len=60)
    plain = preset("keyformer", capacity=16, noise=0.0, tau_step=0.0)
    h2o = preset("h2o", capacity=16, recent_share=0.3)
    assert walk(plain, SHAPE, rows, 40)[1] == walk(h2o, SHAPE, rows, 40)[1]


def test_great_heat_counts_who_saw_a_row_so_the_oldest_win():
    rows = random_rows(SHAPE, 60, q_len=60)
    policy = preset("keyformer", capacity=20, tau_init=1e6, tau_end=1e6)
    _, held, _ = walk(policy, SHAPE, rows, 40)
    for step, heads in enumerate(history[0] for history in held):
        assert heads == [[*range(14), *range(34 + step, 40 + step)]] * 2


def test_soft_caps_and_sink_logits_cool_with_the_logits():
    # softmax((cap(x) + zeta) / tau), the sink logit among x, by hand.
    rows = random_rows(SHAPE, 12, q_len=12)
    call = AttentionCall(scaling=0.5, softcap=3.0, sink_logits=torch.linspace(-1, 1, 6))
    layer, _, _ = walk(preset("keyformer", capacity=20, tau_init=1.7), SHAPE, rows, 12, call=call)
    query, key = rows[0].double(), rows[1].double()
    logits = query.view(1, 2, 3, 12, 16) @ key[:, :, None].mT * 0.5
    logits = 3.0 * (logits / 3.0).tanh() + noise_of(layer).double()[:, :, None, None]
    logits = logits.masked_fill(torch.ones(12, 12).triu(1).bool(), float("-inf"))
    sinks = call.sink_logits.double().view(1, 2, 3, 1, 1).expand(-1, -1, -1, 12, -1)
    weights = (torch.cat([logits, sinks], -1) / 1.7).softmax(-1)[..., :12]
    torch.testing.assert_close(
        layer.rows.whole.plane("received"), weights.sum((2, 3)).float(), rtol=1e-5, atol=1e-5
    )


def test_noise_is_standard_gumbel():
    drawn = torch.cat([gumbel(0, block, 8) for block in range(100)], 1).double()
    assert abs(float(drawn.mean()) - 0.5772) < 0.02
    assert abs(float(drawn.var()) - torch.pi**2 / 6) < 0.05


def test_noise_differs_between_tokens_heads_layers_and_seeds():
    rows = random_rows(SHAPE, 130, q_len=130)
    layers = []
    for index, seed in ((0, 0), (1, 0), (0, 1)):
        shape = LayerShape(index=index, num_heads=6, num_kv_heads=2, head_dim=16, value_dim=16)
        policy = preset("keyformer", capacity=200, seed=seed)
        layers.append(noise_of(walk(policy, shape, rows, 130, num_layers=2)[0]))
    everything = torch.cat(layers).flatten()
    assert everything.unique().numel() == everything.numel() == 3 * 2 * 130


def test_noise_is_the_same_in_every_run_batch_row_and_chunk():
    rows = random_rows(SHAPE, 90, batch=3, q_len=90)
    policy = preset("keyformer", capacity=200)
    once = noise_of(walk(policy, SHAPE, rows, 90)[0])
    assert torch.equal(once, once[:1].expand_as(once))
    again = noise_of(walk(policy, SHAPE, rows, 70, chunks=(1, 17, 64, 65))[0])
    assert torch.equal(once, again)


def test_noise_follows_a_token_through_left_padding():
    rows = random_rows(SHAPE, 40, batch=2, q_len=40)
    valid = torch.ones(2, 40, dtype=torch.bool)
    valid[0, :9] = False
    padded = noise_of(
        walk(preset("keyformer", capacity=99), SHAPE, rows, 20, chunks=(5, 12), valid=valid)[0]
    )
    assert torch.equal(padded[0, :, 9:], padded[1, :, :31])


def test_some_of_the_heads_have_their_own_noise():
    place = Place(shape=SHAPE, num_layers=1)
    whole = Keyformer().bind(place)
    part = whole.narrowed(torch.tensor([1]))
    numbers = torch.arange(100).expand(1, 2, -1)
    assert torch.equal(whole._drawn(numbers)[:, 1:], part._drawn(numbers[:, 1:]))


def test_heat_ends_where_it_is_said_to():
    rows = random_rows(SHAPE, 8, q_len=8)
    policy = preset("keyformer", capacity=99, tau_step=0.5, noise=0.0)
    layer, _, _ = walk(policy, SHAPE, rows, 8)
    own, cache = layer.layer.eviction.evictor, layer.rows.whole
    assert [own._tau(cache, q_len) for q_len in (1, 1, 1, 5, 1)] == [1.5, 2.0, 2.0, 2.0, 2.0]


def test_thirty_percent_of_the_budget_are_recent():
    rows = random_rows(SHAPE, 50, q_len=50)
    _, held, _ = walk(preset("keyformer"), SHAPE, rows, 50)
    for kept in held[-1][0]:
        assert len(kept) == 30
        assert kept[-9:] == list(range(41, 50))


def test_a_policy_holds_no_state_of_a_request():
    rows = random_rows(SHAPE, 40, q_len=40)
    policy = preset("keyformer", capacity=12)
    first = walk(policy, SHAPE, rows, 20)[1]
    walk(policy, SHAPE, pieces(random_rows(SHAPE, 40, q_len=40, seed=3), 0, 33), 20)
    assert walk(policy, SHAPE, rows, 20)[1] == first


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"recent_share": -0.1}, r"recent_share is a share of the budget in \[0, 1\], got -0.1"),
        ({"tau_init": 0.0}, "grows from tau_init > 0 to tau_end, got tau_init=0.0"),
        ({"tau_init": 3.0}, "got tau_init=3.0, tau_step=0.01, tau_end=2.0"),
        ({"tau_step": -1.0}, "tau_step=-1.0"),
        ({"noise": -1.0}, "noise and seed are not negative, got noise=-1.0, seed=0"),
        ({"seed": -1}, "got noise=1.0, seed=-1"),
    ],
)
def test_what_makes_no_sense_is_refused(fields, text):
    with pytest.raises(PolicyError, match=text):
        Keyformer(**fields)


def test_policies_with_it_survive_json():
    policy = preset("keyformer", seed=7, tau_end=3.0)
    assert Policy.from_json(policy.to_json()) == policy
