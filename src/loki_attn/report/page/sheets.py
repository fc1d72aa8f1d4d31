"""Sheets: the table of each section, with intervals and the best marked, and what is left out."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, final

from loki_attn.report.intervals import counted, estimate, measured_names, number
from loki_attn.report.page.measures import best_text, is_best, measure_of
from loki_attn.report.page.parts import Cell, Table, anchor, plain, sure
from loki_attn.report.rows import Section, labels_of
from loki_attn.report.tables import TITLES, budget_of

_Row = Mapping[str, Any]

_NO_BUDGET: Final = {"calibration", "ranks", "spectrum"}
_LEADING: Final = 1


@final
@dataclass(frozen=True, kw_only=True)
class Sheet:
    """A section's table.

    Attributes:
        name: Its anchor.
        title: One line.
        protocol: How it was measured, in words.
        conditions: Settings that all rows share, and what all lines would say alike.
        notes: What is left out, and why.
        table: The table; None if there is no figure to print.
    """

    name: str
    title: str
    protocol: str
    conditions: str
    notes: tuple[str, ...]
    table: Table | None


def sheet_of(section: Section) -> Sheet:
    """Lay out a section as a table.

    Args:
        section: Rows of one task, model and protocol.

    Returns:
        The table; sampled metrics without an interval are not in it but counted in a note.
    """
    metrics, hidden = _columns(section)
    title = TITLES.get(section.task, section.task.capitalize())
    if section.task.startswith("bench "):
        title = f"{title}: {section.model}"
    header, lines = _lines(section, metrics)
    header, lines, alike = _without_same(
        header, lines, _LEADING + len(section.varying), len(metrics)
    )
    said = [f"{name.replace('_', ' ')} {_text(value)}" for name, value in section.common.items()]
    said += [f"{head} {text}" for head, text in alike]
    notes = []
    if hidden:
        noun = "figure" if hidden == 1 else "figures"
        verb = "is" if hidden == 1 else "are"
        notes.append(f"{hidden} {noun} without an interval {verb} not shown.")
    if section.superseded:
        notes.append(f"{section.superseded} older rows of the same runs are left out.")
    if ways := _ways(section, metrics):
        notes.append(f"Intervals of 95 %: {ways}.")
    protocol = section.protocol.strip().rstrip(".")
    shown = Table(title=title, header=tuple(header), lines=tuple(map(tuple, lines)))
    return Sheet(
        name=anchor("table", section.task),
        title=title,
        protocol=f"{protocol[:1].upper()}{protocol[1:]}.",
        conditions=", ".join(said),
        notes=tuple(notes),
        table=shown if metrics else None,
    )


def _columns(section: Section) -> tuple[list[str], int]:
    """Metrics that are printed, and how many numbers are not."""
    names = dict.fromkeys(name for row in section.rows for name in measured_names(row))
    shown, hidden = [], 0
    for name in names:
        there = [row for row in section.rows if number(row["metrics"].get(name)) is not None]
        bare = [row for row in there if not counted(row, name) and estimate(row, name) is None]
        hidden += len(bare)
        if len(bare) < len(there):
            shown.append(name)
    texts = dict.fromkeys(
        name
        for row in section.rows
        for name, value in row["metrics"].items()
        if isinstance(value, str) and name != "intervals"
    )
    # What was sampled comes first: it is what people look for.
    shown.sort(key=lambda name: counted(section.rows[0], name))
    return [*shown, *texts], hidden


def _lines(section: Section, metrics: list[str]) -> tuple[list[str], list[list[Cell]]]:
    budget = section.task not in _NO_BUDGET and not section.task.startswith("bench ")
    header = ["contender", *(name.replace("_", " ") for name in section.varying)]
    header += [
        *(["budget"] if budget else []),
        *(measure_of(m, section.task).head for m in metrics),
        "n",
    ]
    groups: dict[str, list[_Row]] = {}
    for row in section.rows:
        groups.setdefault(_setting(row, section), []).append(row)
    tops = {
        (key, metric): best_text(rows, metric, measure_of(metric, section.task).best)
        for key, rows in groups.items()
        for metric in metrics
    }
    lines = []
    for label, row in zip(labels_of(section.rows), section.rows, strict=True):
        key = _setting(row, section)
        line = [plain(label)]
        line += [plain(_value(row["settings"].get(name))) for name in section.varying]
        line += [plain(budget_of(row))] if budget else []
        line += [_cell(row, metric, tops[key, metric]) for metric in metrics]
        lines.append([*line, plain(row["n"])])
    return header, lines


def _cell(row: _Row, metric: str, top: str | None) -> Cell:
    measure = measure_of(metric, str(row["task"]))
    value = row["metrics"].get(metric)
    if isinstance(value, str):
        return plain(value)
    best = is_best(row, metric, top)
    found = estimate(row, metric)
    if found is not None:
        return sure(found, measure.form, best=best)
    exact = number(value)
    if exact is None or not counted(row, metric):
        return plain(None)
    return plain(exact * measure.scale, measure.form)


def _without_same(
    header: list[str], lines: list[list[Cell]], leading: int, metrics: int
) -> tuple[list[str], list[list[Cell]], list[tuple[str, str]]]:
    """Take out a budget or n that all lines share, and say it once.

    n stays where a column with an interval stands: there it belongs in every line.
    """
    budget = len(header) - leading - metrics - 1
    same = [
        at
        for at in range(leading, leading + budget)
        if len(lines) > 1 and len({line[at].text for line in lines}) == 1
    ]
    kept = [at for at in range(len(header)) if at not in same]
    alike = [(header[at], lines[0][at].text) for at in same]
    return [header[at] for at in kept], [[line[at] for at in kept] for line in lines], alike


def _ways(section: Section, metrics: list[str]) -> str:
    """How the intervals came about, as the rows or their numbers say."""
    told = [
        row["metrics"].get("intervals") or row["settings"].get("intervals") for row in section.rows
    ]
    found = (estimate(row, metric) for row in section.rows for metric in metrics)
    texts = [str(text) for text in told if text] or [one.how for one in found if one]
    return "; ".join(dict.fromkeys(text.removeprefix("95 %: ") for text in texts))


def _setting(row: _Row, section: Section) -> str:
    return json.dumps([row["settings"].get(n) for n in section.varying], default=str)


def _value(value: object) -> object:
    if isinstance(value, str):
        # A list of names may break into lines.
        return value.replace(",", ", ").replace(",  ", ", ")
    return json.dumps(value) if isinstance(value, list | dict | bool) else value


def _text(value: object) -> str:
    return str(_value(value))
