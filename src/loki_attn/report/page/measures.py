"""Measures: how a metric is called, how it is written, and which end of it is good."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, final

from loki_attn.report.intervals import counted, estimate, number
from loki_attn.report.rows import is_dense
from loki_attn.report.tables import Best

_Row = Mapping[str, Any]

_DELTA: Final = "_delta"


@final
@dataclass(frozen=True)
class Measure:
    """A metric's heading, format, which end is good, and what it is multiplied with."""

    head: str
    form: str = ".4g"
    best: Best = None
    scale: float = 1.0


_KNOWN: Final[dict[str, Measure]] = {
    "perplexity": Measure("perplexity", ".3f", "low"),
    "perplexity_dense": Measure("perplexity of dense", ".3f"),
    "nll_delta": Measure("nll, difference to dense, nats", "+.4f", "low"),
    "kl_to_dense": Measure("KL to dense, nats", ".4f", "low"),
    "top1_agreement": Measure("same top token", ".1%", "high"),
    "read_bytes_share": Measure("KV bytes read", ".1%"),
    "predicted_read_bytes_share": Measure("KV bytes read, predicted", ".1%"),
    "recall": Measure("recall of exact top-k", ".3f", "high"),
    "mass": Measure("captured mass", ".4f", "high"),
    "exact_mass": Measure("mass of exact top-k", ".4f"),
    "output_error": Measure("output error", ".4f", "low"),
    "accuracy": Measure("accuracy", ".1%", "high"),
    "token_accuracy": Measure("token accuracy", ".1%", "high"),
    "score": Measure("score", ".1%", "high"),
    "shared_tokens": Measure("shared tokens", ".1f", "high"),
    "rank_at_90": Measure("rank at 90 %", ".1f"),
    "head_dim": Measure("head_dim", ".0f"),
    "tokens_per_s": Measure("tokens per second", ".2f"),
    "read_bytes_per_token": Measure("KV KiB read per token", ",.0f", None, 1 / 1024),
    "selecting_calls": Measure("selecting calls", ",.0f"),
    "median_us": Measure("median, µs", ",.1f"),
    "p20_us": Measure("20th percentile, µs", ",.1f"),
    "p80_us": Measure("80th percentile, µs", ",.1f"),
    "predicted_us": Measure("predicted, µs", ",.1f"),
    "gb_per_s": Measure("GB/s", ".2f"),
    "share_of_bandwidth": Measure("of the bandwidth", ".1%"),
    "ratio_best_torch": Measure("times as fast as the best of torch", ".2f"),
    "ratio_dense_native": Measure("times as fast as our dense", ".2f"),
    "acc": Measure("accuracy", ".1%", "high"),
    "acc_norm": Measure("accuracy, normalised", ".1%", "high"),
    "exact_match": Measure("exact match", ".1%", "high"),
    "shared_share": Measure("shared part", ".1%", "high"),
    "identical": Measure("identical", ".1%", "high"),
    "predicted_step_us": Measure("step predicted, µs", ",.1f"),
    "speedup": Measure("times as fast as dense", ".2f"),
}
# One word, two meanings.
_IN_TASK: Final = {("lm-eval", "recall"): Measure("recall", ".1%", "high")}


def measure_of(metric: str, task: str = "") -> Measure:
    """How a metric is written; one that is not known here is written plainly and not judged."""
    if (task, metric) in _IN_TASK:
        return _IN_TASK[task, metric]
    if metric in _KNOWN:
        return _KNOWN[metric]
    base = metric.removesuffix(_DELTA)
    if base != metric and base in _KNOWN:
        known = _KNOWN[base]
        form = "+" + known.form.lstrip("+,")
        return replace(known, head=f"{known.head}, difference to dense", form=form, best=None)
    return Measure(metric.replace("_", " "))


def scored_metric(rows: Sequence[_Row]) -> str | None:
    """The metric that a task of scores is read by: the first known one with an interval."""
    wanted = ("score", "shared_tokens", "accuracy", "acc_norm", "acc", "exact_match", "f1")
    names: dict[str, None] = dict.fromkeys([*wanted, *(n for row in rows for n in row["metrics"])])
    for name in names:
        plain = name != "read_bytes_share" and not name.endswith(_DELTA)
        if plain and any(estimate(row, name) for row in rows if not counted(row, name)):
            return name
    return None


def best_text(peers: Sequence[_Row], metric: str, best: Best) -> str | None:
    """What the best of the sparse contenders reads, as written.

    Where more than half of them read so, and where there is one only, nobody is best.
    """
    if best is None:
        return None
    pick: Callable[..., float] = min if best == "low" else max
    sparse = (number(peer["metrics"].get(metric)) for peer in peers if not is_dense(peer))
    values = [value for value in sparse if value is not None]
    if len(values) < 2:
        return None
    form = measure_of(metric).form
    top = format(pick(values), form)
    alike = sum(format(value, form) == top for value in values)
    return top if 2 * alike <= len(values) else None


def is_best(row: _Row, metric: str, top: str | None) -> bool:
    """Whether a sparse contender reads as the best one does."""
    value = number(row["metrics"].get(metric))
    if top is None or value is None or is_dense(row):
        return False
    return format(value, measure_of(metric).form) == top
