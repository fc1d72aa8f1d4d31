"""Perplexity: both protocols against stock logits, errors and bytes against sums by hand."""

import math

import pytest
import torch

pytest.importorskip("transformers")

from tiny_models import build, prompts, random_basis

from loki_attn import Budget, Policy
from loki_attn.errors import InputError, LokiAttnError
from loki_attn.evaluate.journal import Journal
from loki_attn.evaluate.perplexity import PROTOCOLS, perplexity
from loki_attn.evaluate.protocol import Contender
from loki_attn.policy import preset
from loki_attn.select.exact_topk import ExactTopK
from loki_attn.select.loki import Loki
from loki_attn.statistics import mean_interval

IDS = prompts(1, 400, seed=8)[0].tolist()
DENSE = Contender(name="dense", policy=preset("dense"))
FEW = Budget(top_k=6, sinks=1, recents=2)
EXACT = Contender(name="exact", policy=Policy(select=ExactTopK(), budget=FEW))
DECODE = {"how": "decode", "windows": 2, "window_tokens": 12, "prefix_tokens": 20}
EVERY_QUERY = {"how": "every_query", "windows": 3, "window_tokens": 24}


def stock_nll(windows, span, first):
    """Hand-written cross entropy of the tokens from `first` on, on the stock model's logits."""
    model, found = build("Llama"), []
    for index in range(windows):
        ids = torch.tensor([IDS[index * span : (index + 1) * span]])
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0].double()
        for place in range(first, span):
            row = logits[place - 1]
            found.append(float(row.exp().sum().log() - row[ids[0, place]]))
    return found


@pytest.mark.parametrize(
    ("run", "span", "first"),
    [(EVERY_QUERY, 24, 1), (DECODE, 32, 20)],
    ids=["every_query", "decode"],
)
def test_dense_is_the_stock_models_cross_entropy(lm, run, span, first):
    (row,) = perplexity(lm, IDS, [DENSE], **run)
    expected = stock_nll(run["windows"], span, first)
    metrics = row.metrics
    assert row.n == len(expected)
    assert math.log(metrics["perplexity"]) == pytest.approx(sum(expected) / row.n, abs=1e-6)
    assert metrics["perplexity"] == pytest.approx(metrics["perplexity_dense"], rel=1e-6)
    assert metrics["nll_delta"] == pytest.approx(0, abs=1e-6)
    assert metrics["kl_to_dense"] == pytest.approx(0, abs=1e-6)
    assert metrics["top1_agreement"] == 1.0
    assert metrics["selecting_calls"] == 0
    assert row.protocol == f"{run['how']}: {PROTOCOLS[run['how']]}"


def test_n_counts_scored_tokens(lm):
    assert perplexity(lm, IDS, [DENSE], **EVERY_QUERY)[0].n == 3 * 23
    assert perplexity(lm, IDS, [DENSE], **DECODE)[0].n == 2 * 12


@pytest.mark.parametrize("group_reduce", ["softmax_sum", "none"])
@pytest.mark.parametrize("method", ["exact", "planes", "rotated"])
def test_decode_steps_are_the_every_query_chunk_after_the_same_prefix(lm, method, group_reduce):
    select = {
        "exact": ExactTopK(),
        "planes": Loki(rank=6),
        "rotated": Loki(rank=6, layout="rotated"),
    }[method]
    policy = Policy(select=select, budget=FEW, group_reduce=group_reduce)
    basis = None if method == "exact" else random_basis(build("Llama"))
    ids = torch.tensor([IDS[:40]])
    prefix = lm.prefill(ids[:, :25])
    with lm.using(policy, basis, "decode"):
        cache = lm.fork(prefix)
        steps = torch.cat([next(lm.extend(cache, token)) for token in ids[:, 25:].split(1, 1)])
    with lm.using(policy, basis, "every_query"):
        chunk = torch.cat(list(lm.extend(lm.fork(prefix), ids[:, 25:])))
    dense = torch.cat(list(lm.extend(lm.fork(prefix), ids[:, 25:])))
    torch.testing.assert_close(steps, chunk, atol=1e-4, rtol=0)
    assert float((steps - dense).abs().max()) > 0.05


def test_means_and_intervals_follow_their_formulas(lm):
    """Against distributions in float64, and intervals over blocks of 8 neighbouring tokens."""
    run = {"how": "every_query", "windows": 2, "window_tokens": 20}
    (row,) = perplexity(lm, IDS, [EXACT], **run)
    nll, deltas, kls, agrees = [], [], [], []
    for first in (0, 20):
        ids = torch.tensor([IDS[first : first + 20]])
        dense = torch.cat(list(lm.extend(None, ids)))[:-1].double()
        with lm.using(EXACT.policy, None, "every_query"):
            ours = torch.cat(list(lm.extend(None, ids)))[:-1].double()
        for place in range(19):
            p, q = dense[place].softmax(-1), ours[place].softmax(-1)
            token = ids[0, place + 1]
            nll.append(-float(q[token].log()))
            deltas.append(float(p[token].log() - q[token].log()))
            kls.append(float((p * (p / q).log()).sum()))
            agrees.append(float(p.argmax() == q.argmax()))
    blocks = [0] * 8 + [1] * 8 + [2] * 3 + [3] * 8 + [4] * 8 + [5] * 3  # none spans two windows
    wanted = {"nll": nll, "nll_delta": deltas, "kl_to_dense": kls, "top1_agreement": agrees}
    for name, values in wanted.items():
        interval = mean_interval(values, blocks)
        assert row.metrics[name] == pytest.approx(sum(values) / 38, abs=1e-6), name
        assert row.metrics[f"{name}_low"] == pytest.approx(interval.low, abs=1e-6), name
        assert row.metrics[f"{name}_high"] == pytest.approx(interval.high, abs=1e-6), name
        assert interval.low < interval.mean < interval.high
    assert row.metrics["kl_to_dense"] > 0.01
    assert row.metrics["selecting_calls"] == 0  # of single tokens
    assert row.metrics["every_query_calls"] == 2 * 2  # once per layer and window
    assert "2,000 resamples of 8-token blocks, seed 0" in row.metrics["intervals"]


def test_ends_of_the_perplexity_are_those_of_the_loss(lm):
    for row in perplexity(lm, IDS, [EXACT, DENSE], **DECODE):
        for end in ("", "_low", "_high"):
            loss = row.metrics[f"nll{end}"]
            assert row.metrics[f"perplexity{end}"] == pytest.approx(math.exp(loss), rel=1e-12)
        assert row.metrics["perplexity_low"] < row.metrics["perplexity"]
        assert row.metrics["perplexity"] < row.metrics["perplexity_high"]


def test_windows_follow_each_other_without_overlap(lm):
    """Two windows together are the two halves of the text, each by itself."""
    run = {"how": "decode", "window_tokens": 12, "prefix_tokens": 20}
    (both,) = perplexity(lm, IDS[:64], [EXACT], windows=2, **run)
    alone = [
        perplexity(lm, part, [EXACT], windows=1, **run)[0].metrics["nll_delta"]
        for part in (IDS[:32], IDS[32:64])
    ]
    assert both.metrics["nll_delta"] == pytest.approx(sum(alone) / 2, abs=1e-9)
    assert alone[0] != alone[1]


def test_share_of_bytes_read(lm):
    """Steps over 20, 21, 22, 23 rows; keys and values 64 bytes each, scoring reads whole keys."""
    run = {"how": "decode", "windows": 1, "window_tokens": 4, "prefix_tokens": 20}
    exact, dense = perplexity(lm, IDS, [EXACT, DENSE], **run)
    held = 20 + 21 + 22 + 23
    assert exact.metrics["read_bytes_share"] == (64 * held + 128 * 4 * 6) / (128 * held)
    assert exact.metrics["selecting_calls"] == 2 * 4
    assert dense.metrics["read_bytes_share"] == 1.0
    assert "read_bytes_share" not in perplexity(lm, IDS, [EXACT], **EVERY_QUERY)[0].metrics


def untimed(metrics):
    return {name: value for name, value in metrics.items() if name != "tokens_per_s"}


def test_a_contender_is_measured_alone_and_beside_others_alike(lm):
    other = Contender(
        name="loki",
        policy=Policy(select=Loki(rank=4), budget=FEW),
        basis=random_basis(build("Llama")),
    )
    (alone,) = perplexity(lm, IDS, [EXACT], **DECODE)
    beside = perplexity(lm, IDS, [other, EXACT, DENSE], **DECODE)
    assert [row.contender for row in beside] == ["loki", "exact", "dense"]
    assert untimed(beside[1].metrics) == untimed(alone.metrics)
    assert beside[0].metrics != alone.metrics


@pytest.mark.parametrize("run", [DECODE, EVERY_QUERY], ids=["decode", "every_query"])
@pytest.mark.parametrize(
    "budget", [Budget(top_k=64), Budget(fraction=1.0), Budget(top_k=6, dense_layers=(0, 1))]
)
def test_a_policy_that_never_acts_is_refused(lm, run, budget):
    idle = Contender(name="idle", policy=Policy(select=ExactTopK(), budget=budget))
    with pytest.raises(LokiAttnError, match="idle never selected anything"):
        perplexity(lm, IDS, [EXACT, idle], **run)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"windows": 13}, "13 windows of 32 tokens need 416 tokens, the text has 400; give more"),
        (
            {"prefix_tokens": 250, "windows": 1},
            "262 tokens per window exceed the model's context of 256",
        ),
        (
            {"how": "every_query", "window_tokens": 257, "windows": 1},
            "257 tokens per window exceed",
        ),
        ({"prefix_tokens": 0}, "a prefix of at least 2 in protocol 'decode'; got 2 windows of 12"),
        ({"windows": 0}, "got 0 windows"),
        ({"how": "decoed"}, "Unknown protocol 'decoed'. Did you mean 'decode'\\?"),
        ({"window_tokens": 1}, "a window of at least 2 tokens"),
    ],
)
def test_refusals(lm, changes, message):
    with pytest.raises(InputError, match=message):
        perplexity(lm, IDS, [EXACT], **{**DECODE, **changes})


def test_two_contenders_of_one_name_are_refused(lm):
    with pytest.raises(InputError, match="Contender 'exact' is given twice; give each a name"):
        perplexity(lm, IDS, [EXACT, DENSE, EXACT], **DECODE)


@pytest.mark.parametrize("run", [DECODE, EVERY_QUERY], ids=["decode", "every_query"])
def test_progress_ends_at_the_whole(lm, run):
    seen = []
    perplexity(lm, IDS, [EXACT, DENSE], **run, progress=lambda *news: seen.append(news))
    total = run["windows"] * 2
    assert [news[:2] for news in seen] == [(done + 1, total) for done in range(total)]
    windows = [f"window {index + 1}/{run['windows']}" for index in range(run["windows"])]
    names = [f"{window}  {name}" for window in windows for name in ("exact", "dense")]
    assert [news[2] for news in seen] == names


def test_a_journal_keeps_what_was_measured(lm, tmp_path):
    """The second run measures nothing and finds the same, the third measures one more."""
    file, counts = tmp_path / "journal.jsonl", []
    run = {**DECODE, "progress": lambda *news: counts.append(news[:2])}
    first = perplexity(lm, IDS, [EXACT], **run, journal=Journal(file))
    again = perplexity(lm, IDS, [EXACT], **run, journal=Journal(file))
    assert counts == [(1, 2), (2, 2)]
    assert again[0].metrics == first[0].metrics
    more = perplexity(lm, IDS, [EXACT], **{**run, "windows": 3}, journal=Journal(file))
    assert counts[2:] == [(3, 3)]
    assert more[0].n == 3 * 12
