"""Write the page of a GPU from its rows.

    python tools/gpu_page.py docs/results/gpu-nvidia-h200.jsonl

Aims first, then every cell: Loki by the fastest dense contender of the same run, then the others.
Of a cell that was measured more than once, the last time counts.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
Cell = tuple[str, int, int]

PLANES = ("int8", "bf16", "int4")
HEAD = """\
# Decode steps on {gpu}

Written by `python tools/gpu_report.py`; [the bench](../bench.md) says how it is measured. One
decode step of one layer, {dtype}, cold caches, replayed as CUDA graphs, contenders in turns in one
process, each checked against float64 first. *x dense* is the time of the fastest dense contender of
the same run by that of the row: 2 means twice as fast. *of limit* is the time in which a copy
within the device's memory moves as many bytes as the step touches, by the time it took. Figures are
medians.

Driver {driver}, torch {torch}, CUDA {cuda}, {versions}{sms} SMs, {l2:.0f} MB of last cache; a copy
moved {slow:,.0f} to {fast:,.0f} GB/s. Commit {commits}.
"""


def write_page(path: Path, journal: Sequence[Row] = ()) -> Path:
    """Write the page beside the rows, whole or not at all.

    Args:
        path: The rows.
        journal: What happened to the cells, for what has no rows.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    page, unready = path.with_suffix(".md"), path.with_suffix(".md.part")
    unready.write_text(page_of([json.loads(line) for line in lines], journal), encoding="utf-8")
    return unready.replace(page)


def page_of(rows: Sequence[Row], journal: Sequence[Row] = ()) -> str:
    """The page as Markdown."""
    last = latest(rows)
    parts = [head(last), aims(last), "## Loki\n", loki_table(last), "## Dense and exact\n"]
    parts += [others_table(last), without(journal), commands(last)]
    return "\n".join(part for part in parts if part)


def latest(rows: Sequence[Row]) -> dict[Cell, list[Row]]:
    """Whole steps by cell, of the last run that measured it, cells in their natural order."""
    found: dict[Cell, dict[str, list[Row]]] = {}
    for row in rows:
        if row["task"] == "bench decode" and row["part"] is None:
            cell = row["shape"], row["batch"], row["context"]
            found.setdefault(cell, {}).setdefault(row["provenance"]["time"], []).append(row)
    order = sorted(found, key=lambda cell: (cell[0] != "llama-3.1-8b", cell))
    return {cell: found[cell][max(found[cell])] for cell in order}


def head(cells: Mapping[Cell, Sequence[Row]]) -> str:
    """What the figures are of."""
    rows = [row for own in cells.values() for row in own]
    origin = rows[-1]["provenance"]
    own = origin.get("gpu_versions", {})
    speeds = [row["read_gb_per_s"] for row in rows]
    return HEAD.format(
        gpu=origin.get("gpu", rows[-1]["device"]),
        dtype=rows[-1]["dtype"],
        driver=origin.get("gpu_driver") or "unknown",
        torch=origin["versions"]["torch"],
        cuda=origin.get("cuda") or "none",
        versions="".join(f"{name} {version}, " for name, version in own.items()),
        sms=origin.get("gpu_sm_count", "unknown"),
        l2=rows[-1]["last_level_cache_bytes"] / 1e6,
        slow=min(speeds),
        fast=max(speeds),
        commits=", ".join(sorted({str(row["provenance"]["commit"]) for row in rows})),
    )


def aims(cells: Mapping[Cell, Sequence[Row]]) -> str:
    """What was aimed at, beside what came of it; int8 is the library's default plane."""
    lines = ["## Aims\n", "| aim | cell | int8 | bf16 | int4 | reached by int8 |"]
    lines.append("|---|---|---|---|---|---|")
    gqa, mha = ("llama-3.1-8b", 8, 32768), "llama-2-7b"
    lines.append(aim(cells, gqa, 2048, "ratio_best_dense", 3.0))
    lines += [aim(cells, (mha, b, 32768), 512, "ratio_best_dense", 7.2) for b in (1, 8, 32)]
    lines.append(aim(cells, gqa, 2048, "share_of_byte_limit", 0.6))
    lines += [aim(cells, (mha, 8, 32768), 512, "share_of_byte_limit", 0.6)]
    return "\n".join([*lines, ""])


def aim(cells: Mapping[Cell, Sequence[Row]], cell: Cell, k: int, name: str, least: float) -> str:
    """One line of the aims."""
    share = name.startswith("share")
    found = {row["plane"]: row[name] for row in cells.get(cell, ()) if is_loki(row, k)}
    said = [shown(found.get(plane), share=share) for plane in PLANES]
    value = found.get("int8")
    verdict = "not measured" if value is None else "yes" if value >= least else "no"
    words = f"{least:.0%} of the byte limit" if share else f"{least:g} x the fastest dense"
    where = f"{cell[0]}, batch {cell[1]}, {cell[2]:,} tokens, k = {k:,}"
    return f"| {words} | {where} | {' | '.join(said)} | {verdict} |"


def loki_table(cells: Mapping[Cell, Sequence[Row]]) -> str:
    """Every cell and amount: Loki by plane, beside the fastest dense contender and exact top-k."""
    columns = ["shape", "batch", "tokens", "k", "fastest dense, µs", "exact top-k, µs"]
    for plane in PLANES:
        columns += [f"{plane} µs", "GB/s", "x dense", "of limit"]
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for cell, rows in cells.items():
        for k in sorted({row["k"] for row in rows if row["kind"] == "loki"}):
            own = {row["plane"]: row for row in rows if is_loki(row, k)}
            exact = [star(r) for r in rows if r["kind"] == "exact" and r["k"] == k]
            line = [cell[0], str(cell[1]), f"{cell[2]:,}", f"{k:,}", fastest(rows)]
            line.append(exact[0] if exact else "-")
            for plane in PLANES:
                line += figures(own.get(plane))
            lines.append(f"| {' | '.join(line)} |")
    return "\n".join([*lines, ""])


def others_table(cells: Mapping[Cell, Sequence[Row]]) -> str:
    """Microseconds of all who are not Loki, with their share of the limit."""
    names = list(dict.fromkeys(r["contender"] for own in cells.values() for r in own
                               if r["kind"] not in {"loki", "exact"}))  # fmt: skip
    lines = [f"| shape | batch | tokens | {' | '.join(names)} |", "|" + "---|" * (3 + len(names))]
    for cell, rows in cells.items():
        own = {row["contender"]: row for row in rows}
        said = [timed(own[name]) if name in own else "-" for name in names]
        lines.append(f"| {cell[0]} | {cell[1]} | {cell[2]:,} | {' | '.join(said)} |")
    note = "Microseconds, and the share of the byte limit. *: no graph holds it; timed by events."
    return "\n".join([note, "", *lines, ""])


def without(journal: Sequence[Row]) -> str:
    """Who has no row, and why; the last that was said of each counts."""
    found: dict[str, str] = {}
    for line in journal:
        own = line["cell"]
        where = f"{own['shape']}, batch {own['batch']}, {own['context']:,} tokens"
        if line["state"] == "broken":
            found[where] = line["reason"]
        if line["state"] == "done":
            found.pop(where, None)
        for name, why in {**line.get("left_out", {}), **line.get("failures", {})}.items():
            # What is said of a cell names it; what is missing everywhere is said once.
            found[f"{own['shape']}, {name}" if " tokens" in name else name] = why
    if not found:
        return ""
    return "\n".join(
        ["## Without a row\n", *(f"- {name}: {why}" for name, why in found.items()), ""]
    )


def commands(cells: Mapping[Cell, Sequence[Row]]) -> str:
    """What makes each cell again."""
    own = dict.fromkeys(str(rows[0]["provenance"]["command"]) for rows in cells.values())
    return "\n".join(["## Commands\n", "```text", *own, "```", ""])


def is_loki(row: Row, k: int) -> bool:
    """Whether a row is a Loki step that reads k rows."""
    return bool(row["kind"] == "loki" and row["k"] == k)


def fastest(rows: Sequence[Row]) -> str:
    """The fastest dense contender and its time."""
    dense = [row for row in rows if row["kind"] in {"torch", "library", "dense"}]
    if not dense:
        return "-"
    best = min(dense, key=lambda row: float(row["median_us"]))
    return f"{best['contender']}, {best['median_us']:,.1f}"


def figures(row: Row | None) -> list[str]:
    """Time, speed, ratio and share of a Loki step."""
    if row is None:
        return ["-"] * 4
    ratio = shown(row["ratio_best_dense"], share=False)
    return [star(row), f"{row['gb_per_s']:,.0f}", ratio, f"{row['share_of_byte_limit']:.0%}"]


def timed(row: Row) -> str:
    """Time and share of another step."""
    return f"{star(row)}, {row['share_of_bandwidth']:.0%}"


def star(row: Row) -> str:
    """The time, marked where no graph holds the step."""
    return f"{row['median_us']:,.1f}" + (" *" if row["timed_by"] == "events" else "")


def shown(value: float | None, *, share: bool) -> str:
    """A ratio or a share."""
    return "-" if value is None else f"{value:.0%}" if share else f"{value:.2f}"


if __name__ == "__main__":
    for given in sys.argv[1:]:
        print(write_page(Path(given)))
