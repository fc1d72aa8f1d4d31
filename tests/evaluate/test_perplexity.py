"""Perplexity: both protocols against stock logits, errors and bytes against sums by hand."""

import math

import pytest
import torch

pytest.importorskip("transformers")

from tiny_models import build, prompts, random_basis

from loki_attn import Budget, Policy
from loki_attn.errors import InputError, LokiAttnError
from loki_attn.evaluate.perplexity import PROTOCOLS, perplexity
from loki_attn.evaluate.protocol import Contender
from loki_attn.policy import preset
from loki_attn.select.exact_topk import ExactTopK
from loki_attn.select.loki import Loki

IDS = prompts(1, 400, seed=8)[0].tolist()
DENSE = Contender(name="dense", policy=preset("dense"))
FEW = Budget(top_k=6, sinks=1, recents=2)
EXACT = Contender(name="exact", policy=Policy(select=ExactTopK(), budget=FEW))
DECODE = {"protocol": "decode", "windows": 2, "window_tokens": 12, "prefix_tokens": 20}
EVERY_QUERY = {"protocol": "every_query", "windows": 3, "window_tokens": 24}


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
    assert row.protocol == f"{run['protocol']}: {PROTOCOLS[run['protocol']]}"


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


def test_means_and_paired_standard_errors_follow_their_formulas(lm):
    run = {"protocol": "every_query", "windows": 1, "window_tokens": 40}
    (row,) = perplexity(lm, IDS, [EXACT], **run)
    ids = torch.tensor([IDS[:40]])
    dense = torch.cat(list(lm.extend(None, ids)))[:-1].double()
    with lm.using(EXACT.policy, None, "every_query"):
        ours = torch.cat(list(lm.extend(None, ids)))[:-1].double()
    deltas, kls, agree = [], [], 0
    for place in range(39):
        p, q = dense[place].softmax(-1), ours[place].softmax(-1)
        token = ids[0, place + 1]
        deltas.append(float(p[token].log() - q[token].log()))
        kls.append(float((p * (p / q).log()).sum()))
        agree += int(p.argmax() == q.argmax())
    for name, values in (("nll_delta", deltas), ("kl_to_dense", kls)):
        mean = sum(values) / 39
        spread = math.sqrt(sum((v - mean) ** 2 for v in values) / 38)
        error = {"nll_delta": "nll_delta_standard_error", "kl_to_dense": "kl_standard_error"}[name]
        assert row.metrics[name] == pytest.approx(mean, abs=1e-6)
        assert row.metrics[error] == pytest.approx(spread / math.sqrt(39), abs=1e-6)
    assert row.metrics["kl_to_dense"] > 0.01
    assert row.metrics["top1_agreement"] == pytest.approx(agree / 39)
    assert row.metrics["selecting_calls"] == 2  # once per layer


def test_windows_follow_each_other_without_overlap(lm):
    """Two windows together are the two halves of the text, each by itself."""
    run = {"protocol": "decode", "window_tokens": 12, "prefix_tokens": 20}
    (both,) = perplexity(lm, IDS[:64], [EXACT], windows=2, **run)
    alone = [
        perplexity(lm, part, [EXACT], windows=1, **run)[0].metrics["nll_delta"]
        for part in (IDS[:32], IDS[32:64])
    ]
    assert both.metrics["nll_delta"] == pytest.approx(sum(alone) / 2, abs=1e-9)
    assert alone[0] != alone[1]


def test_share_of_bytes_read(lm):
    """Steps over 20, 21, 22, 23 rows; keys and values 64 bytes each, scoring reads whole keys."""
    run = {"protocol": "decode", "windows": 1, "window_tokens": 4, "prefix_tokens": 20}
    exact, dense = perplexity(lm, IDS, [EXACT, DENSE], **run)
    held = 20 + 21 + 22 + 23
    assert exact.metrics["read_bytes_share"] == (64 * held + 128 * 4 * 6) / (128 * held)
    assert exact.metrics["selecting_calls"] == 2 * 4
    assert dense.metrics["read_bytes_share"] == 1.0
    assert "read_bytes_share" not in perplexity(lm, IDS, [EXACT], **EVERY_QUERY)[0].metrics


def test_a_contender_is_measured_alone_and_beside_others_alike(lm):
    other = Contender(
        name="loki",
        policy=Policy(select=Loki(rank=4), budget=FEW),
        basis=random_basis(build("Llama")),
    )
    (alone,) = perplexity(lm, IDS, [EXACT], **DECODE)
    beside = perplexity(lm, IDS, [other, EXACT, DENSE], **DECODE)
    assert [row.contender for row in beside] == ["loki", "exact", "dense"]
    assert beside[1].metrics == alone.metrics
    assert beside[0].metrics != alone.metrics


@pytest.mark.parametrize("run", [DECODE, EVERY_QUERY], ids=["decode", "every_query"])
@pytest.mark.parametrize(
    "budget", [Budget(top_k=64), Budget(fraction=1.0), Budget(top_k=6, dense_layers=(0, 1))]
)
def test_a_policy_that_never_acts_is_refused(lm, run, budget):
    idle = Contender(name="idle", policy=Policy(select=ExactTopK(), budget=budget))
    with pytest.raises(LokiAttnError, match="idle never selected anything: its budget covers"):
        perplexity(lm, IDS, [EXACT, idle], **run)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"windows": 13}, "13 windows of 32 tokens need 416 tokens, the text has 400; give more"),
        ({"prefix_tokens": 250}, "262 tokens per window exceed the model's context of 256"),
        ({"protocol": "every_query", "window_tokens": 257}, "257 tokens per window exceed"),
        ({"prefix_tokens": 0}, "a prefix of at least 2 in protocol 'decode'; got 2 windows of 12"),
        ({"windows": 0}, "got 0 windows"),
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
    news, counts = [], []
    perplexity(lm, IDS, [EXACT, DENSE], **run, progress=news.append, advance=counts.append)
    assert counts == sorted(counts)
    assert counts[-1] == run["windows"] * 2 * run["window_tokens"]
    assert len(news) == run["windows"] * 2
    assert news[0].startswith(f"window 1/{run['windows']}  exact")
