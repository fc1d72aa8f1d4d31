"""What is asked: bounds, stretches of text, refusals."""

import math

import pytest

from loki_attn.errors import InputError
from loki_attn.tune import Bound, Spec

KL = Bound("kl", 0.02)
SMALL = {"bound": KL, "context": 64, "windows": 2, "heldout_windows": 1, "window_tokens": 32}
METRICS = {
    "kl_to_dense": 0.01,
    "kl_to_dense_low": 0.008,
    "kl_to_dense_high": 0.013,
    "nll_delta": 0.1,
    "nll_delta_low": -0.05,
    "nll_delta_high": 0.2,
    "perplexity_dense": 8.0,
}


def test_a_bound_on_divergence_reads_it():
    found = KL.read(METRICS)
    assert (found.mean, found.low, found.high) == (0.01, 0.008, 0.013)


def test_a_bound_on_perplexity_reads_the_paired_difference_of_losses():
    found = Bound("ppl", 1.0).read(METRICS)
    assert found.mean == pytest.approx(8 * math.exp(0.1) - 8)
    assert found.low == pytest.approx(8 * math.exp(-0.05) - 8)
    assert found.high == pytest.approx(8 * math.exp(0.2) - 8)


@pytest.mark.parametrize("limit", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize(("measure", "words"), [("kl", "KL"), ("ppl", "perplexity")])
def test_a_bound_is_above_zero(measure, words, limit):
    with pytest.raises(InputError, match=f"A bound on {words}.* must be a number above 0, got"):
        Bound(measure, limit)


def test_stretches_are_whole_and_share_no_token():
    spec, ids = Spec(**SMALL), list(range(64 * 7 + 5))
    judged, heldout = spec.stretches(ids)
    assert (len(judged), len(heldout)) == (128, 64)
    assert len({*judged, *heldout}) == 192
    for start in (judged[:64], judged[64:], heldout):
        assert start[0] % 64 == 0
        assert list(start) == list(range(start[0], start[0] + 64))


def test_the_seed_draws_the_stretches():
    ids = list(range(64 * 9))
    drawn = {Spec(**SMALL, seed=seed).stretches(ids) for seed in range(8)}
    assert len(drawn) > 4
    assert Spec(**SMALL, seed=3).stretches(ids) == Spec(**SMALL, seed=3).stretches(ids)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cost": "tme"}, "Unknown cost 'tme'. Did you mean 'time'"),
        ({"windows": 0}, "windows must be 1 or more, got 0"),
        ({"rounds": 0}, "rounds must be 1 or more, got 0"),
        ({"window_tokens": 31}, "A window scores 32 tokens or more .* window_tokens=31"),
        ({"context": 63}, "at least twice as long; got window_tokens=32, context=63"),
        ({"minutes": 0.0}, "minutes must be above 0, got 0.0"),
        ({"minutes": math.nan}, "minutes must be above 0, got nan"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(InputError, match=message):
        Spec(**{**SMALL, **changes})


def test_a_short_text_is_refused():
    with pytest.raises(InputError, match="of 64 tokens each, need 192 tokens; the text has 191"):
        Spec(**SMALL).stretches(range(191))
