"""From lm-eval's results to rows like those of our own evaluations: means with intervals."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from loki_attn.errors import InputError
from loki_attn.integrations.lm_eval.scores import Score, observations, score

_PROTOCOLS: Final = {
    ("loglikelihood", "decode"): (
        "log-likelihood: context read densely, every scored token predicted by a single-token step"
    ),
    ("loglikelihood", "every_query"): (
        "log-likelihood: one forward per request, in which every row selects for itself"
    ),
    ("loglikelihood_rolling", "decode"): (
        "rolling log-likelihood: windows of max_length tokens, every scored token after the first "
        "prefix_tokens predicted by a single-token step"
    ),
    ("loglikelihood_rolling", "every_query"): (
        "rolling log-likelihood: windows of max_length tokens, one forward each, in which every "
        "row selects for itself"
    ),
    ("generate_until", "decode"): (
        "generation: prompt read densely, every new token after the first from a single-token step"
    ),
    ("generate_until", "every_query"): (
        "generation: every row of the prompt selects for itself, then every single-token step"
    ),
}
_INTERVALS: Final = (
    "95 %: Wilson's score interval for yes or no, a percentile bootstrap of 2,000 resamples of "
    "documents, seed 0, for other means (of the linearised ratio, for perplexities), and lm-eval's "
    "stderr times 1.96 where no samples were logged"
)
_DATED: Final = re.compile(r"_(\d{4}-\d\d-\d\dT[\d.-]+)\.json$")
_NOT_RUN: Final = -1.0


def rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Make rows of the results of one run with `LokiLM`.

    Args:
        results: What `lm_eval.simple_evaluate` returned, or `read_results`. With the samples
            (log_samples) the intervals come from them, else from lm-eval's stderr.

    Returns:
        Plain JSON: task ("lm-eval:" and its name), protocol, model, contender, policy, basis,
        settings, metrics, n and provenance; one row per task, filter and length (RULER's tasks
        report a metric per length). Each metric `m` comes with `m_low` and `m_high`; those that
        have no interval are left out and named under "without_interval".

    Raises:
        InputError: If the run was not one of `LokiLM`, or a task has no metric with an interval.
    """
    record = results.get("config", {}).get("loki_attn")
    if not isinstance(record, Mapping):
        raise InputError(
            "These results say nothing of loki-attn, so they are of another model; run lm-eval "
            "with --model loki-attn."
        )
    return [
        row
        for task in results["results"]
        if task in record["traffic"]
        for row in _rows_of_task(task, results, record)
    ]


def read_results(path: Path) -> Iterator[dict[str, Any]]:
    """Read what lm-eval's command line wrote, with its samples where they were logged.

    Args:
        path: The folder given as --output_path, or one file of results.

    Yields:
        The results of each run, oldest first.

    Raises:
        InputError: If nothing was written there.
    """
    found = path.rglob("*.json") if path.is_dir() else [path]
    dated = sorted((m[1], f) for f in found if f.is_file() and (m := _DATED.search(f.name)))
    if not dated:
        raise InputError(f"There are no results of lm-eval at {str(path)!r}; give --output_path.")
    for date, file in dated:
        results = json.loads(file.read_text(encoding="utf-8"))
        logged = {
            task: file.with_name(f"samples_{task}_{date}.jsonl")
            for task in results.get("configs", {})
        }
        results["samples"] = {
            task: [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
            for task, samples in logged.items()
            if samples.is_file()
        }
        yield results


def _rows_of_task(
    task: str, results: Mapping[str, Any], record: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """The rows of one task."""
    kinds = record["traffic"][task]
    for (name, length), scored in _scores(task, results).items():
        kept = {metric: found for metric, found in scored.items() if found.interval is not None}
        left = sorted(scored.keys() - kept)
        if not kept:
            raise InputError(
                f"Task {task!r} has no metric with an interval, got {', '.join(left)}; run it with "
                "log_samples on two documents at least."
            )
        metrics: dict[str, Any] = {}
        for metric, found in kept.items():
            low, high = found.interval or (math.nan, math.nan)
            metrics |= {metric: found.value, f"{metric}_low": low, f"{metric}_high": high}
        yield {
            "task": f"lm-eval:{task}",
            "protocol": "; ".join(_PROTOCOLS[kind, record["mode"]] for kind in kinds),
            **{key: record[key] for key in ("model", "contender", "policy", "basis")},
            "settings": _settings(task, name, length, results, record),
            "metrics": {
                **metrics,
                **_traffic(kinds),
                **({"without_interval": left} if left else {}),
                "intervals": _INTERVALS,
            },
            "n": min(found.n for found in kept.values()),
            "provenance": record["provenance"],
        }


def _scores(
    task: str, results: Mapping[str, Any]
) -> dict[tuple[str, int | None], dict[str, Score]]:
    """Scores by filter and length, then by metric."""
    values = results["results"][task]
    samples = results.get("samples", {}).get(task, [])
    documents = int(results["n-samples"][task]["effective"])
    found: dict[tuple[str, int | None], dict[str, Score]] = {}
    for key, value in values.items():
        metric, comma, name = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        # RULER's metrics are lengths, and -1 stands for those that were not run.
        length = int(metric) if metric.isdecimal() else None
        if length is not None and value == _NOT_RUN:
            continue
        own = observations(samples, metric, name)
        if length is not None:
            own = [one for one in own if one != _NOT_RUN]
        made = score(float(value), values.get(f"{metric}_stderr,{name}"), own, documents)
        found.setdefault((name, length), {})["recall" if length else metric] = made
    return found


def _settings(
    task: str,
    name: str,
    length: int | None,
    results: Mapping[str, Any],
    record: Mapping[str, Any],
) -> dict[str, Any]:
    """Numbers that define the run; what does not apply is left out."""
    rolling = "loglikelihood_rolling" in record["traffic"][task]
    # lm-eval's word for a task that names no version.
    version = results.get("versions", {}).get(task, "Yaml")
    settings = {
        "mode": record["mode"],
        "task_version": version if version != "Yaml" else None,
        "num_fewshot": results.get("n-shot", {}).get(task),
        "filter": None if name == "none" else name,
        "length_tokens": length,
        "max_length_tokens": record["max_length"],
        "prefix_tokens": record["prefix_tokens"] if record["prefix_tokens"] or rolling else None,
        "batch_size": record["batch_size"],
        "gen_kwargs": results["config"].get("gen_kwargs") or None,
        "limit": results["config"].get("limit"),
    }
    return {key: value for key, value in settings.items() if value is not None}


def _traffic(kinds: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
    """Selecting calls, and the share of the cache's bytes that single-token steps read."""
    names = next(iter(kinds.values()))
    total = {name: sum(counts[name] for counts in kinds.values()) for name in names}
    found: dict[str, Any] = {"selecting_calls": total["sparse_calls"]}
    if total["every_query_calls"]:
        found["every_query_calls"] = total["every_query_calls"]
    if total["dense_bytes"]:
        found |= {name: total[name] for name in ("read_bytes", "dense_bytes")}
        found["read_bytes_share"] = total["read_bytes"] / total["dense_bytes"]
    return found
