"""Write rows of `loki-attn bench` as Markdown tables.

    python tools/speed_table.py docs/results/speed.jsonl > docs/results/speed.md

One table per shape, context and batch of `bench decode`, one per model of `bench generate`; every
figure is a row's own, and the last section says what made it.
"""

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]

HEAD = """\
# Speed

Written by `python tools/speed_table.py docs/results/speed.jsonl`; `docs/bench.md` says how it is
measured. Times are medians of one process in which the contenders took turns; a ratio of 2 means
twice as fast. *of limit* is the time that the touched bytes would take at the read bandwidth
measured in the same run, by the time they took.
"""


def main(path: str) -> None:
    """Print the page."""
    rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    steps = [row for row in rows if row["task"] == "bench decode"]
    speech = [row for row in rows if row["task"] == "bench generate"]
    print(HEAD)
    for _, group in grouped(steps, "shape", "context", "batch", "threads"):
        print(step_table(group))
    for _, group in grouped(speech, "shape", "dtype", "threads"):
        print(speech_table(group))
    print(origins(rows))


def grouped(rows: Iterable[Row], *names: str) -> list[tuple[tuple[Any, ...], list[Row]]]:
    """Rows with equal fields together, in order of the first of each."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    return list(found.items())


def step_table(rows: list[Row]) -> str:
    """One layer's step at one context."""
    first = rows[0]
    lines = [
        f"## {first['shape']}, {first['context']:,} tokens, batch {first['batch']}, "
        f"{first['threads']} thread{'s' if first['threads'] > 1 else ''}",
        "",
        f"{first['num_heads']} query heads, {first['num_kv_heads']} KV heads of "
        f"{first['head_dim']}, {first['dtype']}; {first['layers']} layers in turn; reading memory "
        f"{first['read_gb_per_s']:.1f} GB/s.",
        "",
        "| contender | median µs | p20 to p80 | MB | GB/s | of limit "
        "| x transformers | x best torch | x dense native |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        share = "" if row["part"] else f"{row['share_of_bandwidth']:.0%}"
        peers = ("ratio_hf", "ratio_best_torch", "ratio_dense_native")
        ratios = " | ".join("" if row[n] is None else f"{row[n]:.1f}" for n in peers)
        lines.append(
            f"| {row['contender']} | {row['median_us']:,.0f} | {row['p20_us']:,.0f} to "
            f"{row['p80_us']:,.0f} | {row['bytes_touched'] / 1e6:.1f} | {row['gb_per_s']:.1f} | "
            f"{share} | {ratios} |"
        )
    return "\n".join([*lines, ""])


def speech_table(rows: list[Row]) -> str:
    """A model's generation at several contexts."""
    first = rows[0]
    lines = [
        f"## {first['shape']}, generating, {first['dtype']}, {first['threads']} threads",
        "",
        "| context | contender | tokens/s | x stock dynamic | x stock static | prefill s "
        "| cache MB | peak MB added | sparse calls |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        name = row["contender"] + (f" ({row['note']})" if row["note"] else "")
        peers = (row["ratio_stock_dynamic"], row["ratio_stock_static"])
        ratios = " | ".join("" if peer is None else f"{peer:.2f}" for peer in peers)
        peak = row["peak_added_bytes"]
        lines.append(
            f"| {row['context']:,} | {name} | {row['tokens_per_s']:.2f} | {ratios} | "
            f"{row['prefill_s']:.1f} | {row['cache_bytes'] / 1e6:,.0f} | "
            f"{'unknown' if peak is None else format(peak / 1e6, ',.0f')} | {row['sparse_calls']} |"
        )
    return "\n".join([*lines, ""])


def origins(rows: list[Row]) -> str:
    """What made the rows."""
    seen: dict[str, None] = {}
    for row in rows:
        origin = row["provenance"]
        versions = ", ".join(f"{name} {version}" for name, version in origin["versions"].items())
        made = f"- `{origin['command']}` at {origin['commit']}; {versions}; {origin['processor']}"
        seen[made] = None
    return "\n".join(["## Made by", "", *seen])


if __name__ == "__main__":
    main(sys.argv[1])
