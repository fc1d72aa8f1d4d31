"""Print the rows of a family sweep as one Markdown table, a line per policy.

python tools/family_table.py docs/results/sweeps/family-smollm2-135m.jsonl [--speed speed.jsonl]
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loki_attn.evaluate.results import read_rows

_Row = Mapping[str, Any]


def main() -> None:
    """Print one table; figures that were not measured stay empty."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("rows", type=Path)
    parser.add_argument("--speed", type=Path, help="Rows of `bench generate` of the same policies.")
    asked = parser.parse_args()
    rows = list(read_rows(asked.rows))
    speeds = list(read_rows(asked.speed)) if asked.speed else []
    titles = ["policy", "read", "kept", "KL to dense", "perplexity", *_tasks(rows)]
    titles += ["tokens/s, x stock", "cache MB, its peak"] if speeds else []
    print("| " + " | ".join(titles) + " |")
    print("|---" * len(titles) + "|")
    for policy in dict.fromkeys(row["contender"] for row in rows):
        print("| " + " | ".join(_line(policy, rows, speeds)) + " |")


def _line(policy: str, rows: Sequence[_Row], speeds: Sequence[_Row]) -> list[str]:
    own = [row for row in rows if row["contender"] == policy]
    decoded = next((row["metrics"] for row in own if row["task"] == "perplexity"), None)
    cells = [f"`{policy}`"]
    if decoded is None:
        cells += [""] * 4
    else:
        cells += [
            f"{decoded.get('read_bytes_share', 1):.1%}",
            f"{decoded.get('kept_bytes_share', 1):.1%}",
            _spelt(decoded, "kl_to_dense", ".4f"),
            _spelt(decoded, "perplexity", ".2f"),
        ]
    for title in _tasks(rows):
        found = [row["metrics"] for row in own if _title(row) == title]
        cells.append(_spelt(found[0], "score", ".2f") if found else "")
    if speeds:
        found = [row for row in speeds if row["contender"] == f"attached {policy}"]
        cells += _pace(found[0]) if found else ["", ""]
    return cells


def _pace(row: _Row) -> list[str]:
    peak = row["peak_cache_bytes"]
    return [
        f"{row['tokens_per_s']:.1f}, {row['ratio_stock_dynamic']:.2f}",
        f"{row['cache_bytes'] / 1e6:.1f}, {peak / 1e6:.1f}",
    ]


def _tasks(rows: Sequence[_Row]) -> list[str]:
    return list(dict.fromkeys(title for row in rows if (title := _title(row))))


def _title(row: _Row) -> str:
    """The column of a row that has a score."""
    if "score" not in row["metrics"]:
        return ""
    settings = row["settings"]
    what = settings.get("kind") or settings.get("subtask") or row["task"]
    return f"{what} at {settings['length_tokens']:,}, n = {row['n']}"


def _spelt(metrics: Mapping[str, Any], name: str, form: str) -> str:
    low, high = metrics[f"{name}_low"], metrics[f"{name}_high"]
    if math.isnan(low) or math.isnan(high):  # one context is no sample
        return f"{metrics[name]:{form}} (no interval)"
    return f"{metrics[name]:{form}} ({low:{form}} to {high:{form}})"


if __name__ == "__main__":
    main()
