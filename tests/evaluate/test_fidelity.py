"""Fidelity: recall, mass and output error against an independent formula in float64."""

from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from loki_attn import Budget, Policy, fit
from loki_attn.errors import BudgetError, InputError
from loki_attn.evaluate.fidelity import METRICS, Fidelity, fidelity
from loki_attn.evaluate.journal import Journal
from loki_attn.evaluate.protocol import Contender
from loki_attn.key_stats import KeyStats
from loki_attn.select.exact_topk import ExactTopK
from loki_attn.select.loki import Loki
from loki_attn.statistics import mean_interval
from loki_attn.types import AttentionCall

HEADS, KV_HEADS, DIM, TOKENS, QUERIES = 4, 2, 16, 40, 7
SINKS, RECENTS, TOP_K, RANK = 1, 2, 8, 4
FEW = Budget(top_k=TOP_K, sinks=SINKS, recents=RECENTS)


class Layers:
    """A language model of attention layers alone: `prefill` shows prepared rows."""

    def __init__(self, windows, num_layers=6):
        self.windows = list(windows)
        self.num_layers = num_layers
        self.context_tokens = 64
        self.identity = {"id": "layers"}
        self.dtype = "float32"

    @contextmanager
    def observing(self, observer):
        self.observer = observer
        yield

    def prefill(self, ids, *, record=False):
        assert ids.shape == (1, TOKENS)
        for layer in self.windows.pop(0):
            self.observer(layer)


def layer(index, seed, structure=None, **call):
    draw = torch.Generator().manual_seed(seed)
    query = torch.randn(1, HEADS, TOKENS, DIM, generator=draw)
    key = torch.randn(1, KV_HEADS, TOKENS, DIM, generator=draw)
    value = torch.randn(1, KV_HEADS, TOKENS, DIM, generator=draw)
    if structure is not None:
        key = key @ structure
    call = AttentionCall(scaling=0.4, **call)
    return SimpleNamespace(layer_index=index, query=query, key=key, value=value, call=call)


def stats_of(*layers):
    stats = KeyStats()
    for seen in layers:
        stats.update(seen.layer_index, seen.key, seen.query)
    return stats


def loki(basis, budget=FEW, group_reduce="softmax_sum", rank=RANK):
    select = Loki(rank=rank, layout="rotated")
    policy = Policy(select=select, budget=budget, group_reduce=group_reduce)
    return Contender(name="loki", policy=policy, basis=basis)


def exact(budget=FEW, **more):
    return Contender(name="exact", policy=Policy(select=ExactTopK(), budget=budget, **more))


def measure(windows, *contenders, queries=QUERIES, **more):
    lm = Layers(windows, **more)
    ids = list(range(TOKENS * len(lm.windows)))
    return fidelity(
        lm, ids, contenders, windows=len(lm.windows), window_tokens=TOKENS, queries=queries
    )


def soft_max(logits):
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def chosen(scores):
    """The forced rows and the best of the others, TOP_K in all."""
    seen = len(scores)
    forced = {*range(SINKS), *range(seen - RECENTS, seen)}
    others = sorted(set(range(seen)) - forced, key=lambda row: -scores[row])
    return forced | set(others[: TOP_K - len(forced)])


def expected(seen, basis, group_reduce):
    """The four metrics of a layer, by plain loops in float64."""
    q, k, v = (t[0].double().numpy() for t in (seen.query, seen.key, seen.value))
    lead = basis.layers[seen.layer_index].key_map.double().numpy()[..., :RANK]
    group, rows = HEADS // KV_HEADS, np.linspace(TOKENS // 2, TOKENS - 1, QUERIES).astype(int)
    recall, mass, exact_mass, error = [], [], [], []
    for t in rows:
        for kv in range(KV_HEADS):
            keys, heads = k[kv, : t + 1], range(kv * group, kv * group + group)
            true = {h: 0.4 * keys @ q[h, t] for h in heads}
            short = {h: 0.4 * (keys @ lead[kv]) @ (q[h, t] @ lead[kv]) for h in heads}
            if group_reduce == "none":
                ours = {h: chosen(short[h]) for h in heads}
                best = {h: chosen(true[h]) for h in heads}
            else:
                ours = dict.fromkeys(heads, chosen(sum(soft_max(x) for x in short.values())))
                best = dict.fromkeys(heads, chosen(sum(soft_max(x) for x in true.values())))
            for h in heads:
                weights = soft_max(true[h])
                picked = sorted(ours[h])
                whole = weights @ v[kv, : t + 1]
                part = soft_max(true[h][picked]) @ v[kv, picked]
                recall.append(len(ours[h] & best[h]) / len(best[h]))
                mass.append(weights[picked].sum())
                exact_mass.append(weights[sorted(best[h])].sum())
                error.append(np.linalg.norm(part - whole) / np.linalg.norm(whole))
    return [float(np.mean(x)) for x in (recall, mass, exact_mass, error)]


@pytest.mark.parametrize("group_reduce", ["softmax_sum", "none"])
def test_metrics_are_the_independent_formulas_layer_by_layer(group_reduce):
    """Layers come in any order; the lists follow their indices."""
    four, one = layer(4, seed=1), layer(1, seed=2)
    basis = fit(stats_of(one, four), "random")
    (row,) = measure([[four, one]], loki(basis, group_reduce=group_reduce))
    wanted = {seen.layer_index: expected(seen, basis, group_reduce) for seen in (one, four)}
    layers = row.metrics["layers"]
    assert layers["index"] == [1, 4]
    for place, name in enumerate(METRICS):
        values = [wanted[1][place], wanted[4][place]]
        assert layers[name] == pytest.approx(values, abs=1e-5), name
        assert row.metrics[name] == pytest.approx(sum(values) / 2, abs=1e-5), name
    assert 0.2 < row.metrics["recall"] < 0.9
    assert row.metrics["mass"] < row.metrics["exact_mass"]


def test_windows_are_averaged():
    basis = fit(stats_of(layer(0, seed=1)), "random")
    alone = [measure([[layer(0, seed)]], loki(basis))[0].metrics["mass"] for seed in (1, 2)]
    (both,) = measure([[layer(0, 1)], [layer(0, 2)]], loki(basis))
    assert both.metrics["mass"] == pytest.approx(sum(alone) / 2, abs=1e-6)
    assert both.n == 2 * QUERIES


@pytest.mark.parametrize("budget", [FEW, Budget(fraction=0.3), Budget(mass=0.7, sinks=1)])
@pytest.mark.parametrize("group_reduce", ["softmax_sum", "max", "none"])
def test_exact_top_k_recalls_itself(budget, group_reduce):
    (row,) = measure([[layer(0, seed=1)]], exact(budget, group_reduce=group_reduce))
    assert row.metrics["recall"] == 1.0
    assert row.metrics["mass"] == row.metrics["exact_mass"] < 0.99
    assert row.metrics["output_error"] > 0.01


@pytest.mark.parametrize(
    "call", [{}, {"softcap": 2.0}, {"sink_logits": torch.ones(HEADS)}], ids=["", "softcap", "sinks"]
)
def test_the_full_budget_keeps_everything(call):
    seen = layer(0, seed=1, **call)
    basis = fit(stats_of(seen), "random")
    (row,) = measure([[seen]], loki(basis, Budget(fraction=1.0)))
    assert row.metrics["recall"] == 1.0
    assert row.metrics["mass"] == pytest.approx(1.0, abs=1e-6)
    assert row.metrics["exact_mass"] == pytest.approx(1.0, abs=1e-6)
    assert row.metrics["output_error"] < 1e-6


def test_a_random_basis_is_worse_than_pca_where_keys_have_structure():
    turn = torch.linalg.qr(torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(5))).Q
    scales = torch.tensor([3.0] * RANK + [0.1] * (DIM - RANK))
    seen = layer(0, seed=1, structure=scales[:, None] * turn)
    stats = stats_of(seen)
    budget = Budget(top_k=TOP_K)
    pca, random = (
        measure([[seen]], loki(fit(stats, kind), budget))[0].metrics for kind in ("pca", "random")
    )
    assert pca["recall"] > random["recall"] + 0.2
    assert pca["mass"] > random["mass"] + 0.02
    assert pca["output_error"] < random["output_error"]


@pytest.mark.parametrize(("dense_layers", "full"), [((-1,), [5]), ((0, -3), [0, 3]), ((), [])])
def test_dense_layers_count_from_the_models_end(dense_layers, full):
    budget = Budget(top_k=TOP_K, dense_layers=dense_layers)
    seen = [layer(index, seed=index) for index in (0, 1, 3, 5)]
    (row,) = measure([seen], exact(budget))
    layers = row.metrics["layers"]
    whole = [i for i, m in zip(layers["index"], layers["mass"], strict=True) if m > 0.999]
    assert whole == full


def test_a_table_of_amounts_is_looked_up_by_layer_and_must_fit_the_model():
    seen = [layer(index, seed=1) for index in (0, 1)]
    budget = Budget(top_k=1, per_layer=(4, 16))
    (row,) = measure([seen], exact(budget), num_layers=2)
    separate = [measure([seen[:1]], exact(Budget(top_k=k)))[0].metrics["mass"] for k in (4, 16)]
    assert row.metrics["layers"]["mass"] == pytest.approx(separate, abs=1e-6)
    with pytest.raises(BudgetError, match="per_layer has 2 amounts for 6 layers"):
        measure([seen], exact(budget))


def test_n_is_the_number_of_queries_really_sampled():
    (row,) = measure([[layer(0, seed=1)]], exact(), queries=64)
    assert row.n == TOKENS // 2
    assert row.settings["queries"] == 64


def test_refusals():
    lm = Layers([])
    with pytest.raises(InputError, match="65 tokens per window exceed the model's context of 64"):
        fidelity(lm, [0] * 200, [exact()], windows=1, window_tokens=65)
    with pytest.raises(InputError, match="2 windows of 40 tokens need 80 tokens, the text has 79"):
        fidelity(lm, [0] * 79, [exact()], windows=2, window_tokens=40)
    with pytest.raises(InputError, match="Contender 'exact' is given twice"):
        fidelity(lm, [0] * 79, [exact(), exact()], windows=1, window_tokens=40)


def test_a_real_model_is_judged_on_its_full_attention_layers():
    pytest.importorskip("transformers")
    from tiny_models import build, prompts, random_basis

    from loki_attn.integrations.transformers import TransformersLM

    model = build("Gemma3 (windows)")
    basis, seen = random_basis(model), []
    with TransformersLM(model, None) as lm:
        row, other = fidelity(
            lm,
            prompts(1, 80)[0].tolist(),
            [loki(basis), exact()],
            windows=2,
            window_tokens=TOKENS,
            progress=lambda *news: seen.append(news),
        )
    assert row.metrics["layers"]["index"] == [1]
    assert row.metrics["exact_mass"] == other.metrics["mass"] > row.metrics["mass"]
    assert (row.basis["kind"], other.basis) == ("random", None)
    assert seen == [
        (1, 4, "window 1/2  loki"),
        (2, 4, "window 1/2  exact"),
        (3, 4, "window 2/2  loki"),
        (4, 4, "window 2/2  exact"),
    ]


def test_intervals_are_over_queries_and_layers_are_their_means():
    """Each query's mean over layers and heads is one observation, and stands alone."""
    seen = [layer(0, seed=1), layer(3, seed=2)]
    task = Fidelity(ids=tuple(range(TOKENS)), windows=1, window_tokens=TOKENS, queries=QUERIES)
    lm = Layers([seen])
    ((_, record),) = task.measure(lm, task.items(lm)[0], [exact()], None)
    (row,) = measure([seen], exact())
    for name in METRICS:
        values = record.values[name]
        assert len(values) == row.n == QUERIES
        interval = mean_interval(values)
        ends = (row.metrics[f"{name}_low"], row.metrics[f"{name}_high"])
        assert (row.metrics[name], *ends) == (interval.mean, interval.low, interval.high)
        assert sum(row.metrics["layers"][name]) / 2 == pytest.approx(interval.mean, abs=1e-6)
    assert row.metrics["mass_low"] < row.metrics["mass"] < row.metrics["mass_high"]
    assert "resamples of queries" in row.metrics["intervals"]


def test_contenders_found_in_a_journal_are_not_judged_again(tmp_path):
    """The windows are read for the new one only; once all are known, they are not read."""
    windows, file = [[layer(0, 1)], [layer(0, 2)]], tmp_path / "journal.jsonl"
    ids = list(range(2 * TOKENS))
    run = {"windows": 2, "window_tokens": TOKENS, "queries": QUERIES}
    other = Contender(name="other", policy=Policy(select=ExactTopK(), budget=Budget(top_k=5)))
    (first,) = fidelity(Layers(windows), ids, [exact()], **run, journal=Journal(file))
    lm, counts = Layers(windows), []
    again, _ = fidelity(
        lm,
        ids,
        [exact(), other],
        **run,
        journal=Journal(file),
        progress=lambda *news: counts.append(news),
    )
    assert again.metrics == first.metrics
    assert counts == [(3, 4, "window 1/2  other"), (4, 4, "window 2/2  other")]
    assert lm.windows == []
    known = Layers([])
    rows = fidelity(known, ids, [exact(), other], **run, journal=Journal(file))
    assert rows[0].metrics == first.metrics
