"""Print the rows of a sweep as the Markdown tables of docs/results/README.md.

python tools/sweep_table.py docs/results/sweeps/smollm2-135m.jsonl
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from loki_attn.evaluate.results import read_rows

_Row = Mapping[str, Any]


def main() -> None:
    """Print one table: a line per policy, a column per task, setting and metric."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("rows", type=Path)
    rows = list(read_rows(parser.parse_args().rows))
    columns = {title: cells for make in _COLUMNS for title, cells in make(rows).items()}
    policies = dict.fromkeys(name for cells in columns.values() for name in cells)
    print("| policy | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for policy in policies:
        cells = [columns[title].get(policy, "") for title in columns]
        if any(cells):
            print(f"| {policy} | " + " | ".join(cells) + " |")


def _divergence(rows: Sequence[_Row]) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for row in (row for row in rows if row["task"] == "perplexity"):
        title = f"KL at {row['settings']['prefix_tokens']:,}, n = {row['n']}"
        found.setdefault(title, {})[row["contender"]] = _spelt(row["metrics"], "kl_to_dense", ".4f")
        agreement = f"same top token at {row['settings']['prefix_tokens']:,}"
        found.setdefault(agreement, {})[row["contender"]] = (
            f"{row['metrics']['top1_agreement']:.1%}"
        )
    first = next((row["settings"] for row in rows if row["task"] == "perplexity"), None)
    for row in rows:
        if row["task"] == "perplexity" and row["settings"] == first:
            share = row["metrics"]["read_bytes_share"]
            found.setdefault("KV bytes read", {})[row["contender"]] = f"{share:.1%}"
    return found


def _scores(rows: Sequence[_Row]) -> dict[str, dict[str, str]]:
    """Scores of needle and RULER: every sub-task's share, with its interval."""
    found: dict[str, dict[str, str]] = {}
    for row in rows:
        if row["task"] not in {"needle", "ruler", "agreement"}:
            continue
        settings, metric = row["settings"], "score"
        if row["task"] == "agreement":
            title, metric = f"tokens as dense of {settings['new_tokens']}", "shared_tokens"
        else:
            what = settings.get("kind") or settings["subtask"]
            title = f"{what} at {settings['length_tokens']:,}"
        form = ".1f" if metric == "shared_tokens" else ".2f"
        cell = _spelt(row["metrics"], metric, form)
        found.setdefault(f"{title}, n = {row['n']}", {})[row["contender"]] = cell
    return found


def _spelt(metrics: Mapping[str, Any], name: str, form: str) -> str:
    low, high = metrics[f"{name}_low"], metrics[f"{name}_high"]
    return f"{metrics[name]:{form}} ({low:{form}} to {high:{form}})"


_COLUMNS: Final[tuple[Callable[[Sequence[_Row]], dict[str, dict[str, str]]], ...]] = (
    _divergence,
    _scores,
)

if __name__ == "__main__":
    main()
