"""Matrices: a task's items by contenders, each cell a score with its interval."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from loki_attn.report.intervals import estimate
from loki_attn.report.page.heat import step_of
from loki_attn.report.page.measures import Measure, best_text, is_best, measure_of, scored_metric
from loki_attn.report.page.parts import Cell, Figure, Ramp, Table, anchor, plain, sure, written
from loki_attn.report.rows import Section, differing, labels_of
from loki_attn.report.tables import TITLES
from loki_attn.report.words import alt_text, extremes

_Row = Mapping[str, Any]
# By item and contender.
_Cells = dict[tuple[str, str], _Row]

_TASKS: Final = {
    "agreement",
    "lm-eval",
    "longbench",
    "multi-question",
    "passkey",
    "ruler",
}


def matrix_figures(found: Sequence[Section]) -> list[Figure]:
    """A matrix for each section of a task of scores."""
    figures = []
    for section in found:
        if section.task not in _TASKS:
            continue
        # Tasks of the harness differ in what they measure.
        cells: dict[str, _Cells] = {}
        for label, row in zip(labels_of(section.rows), section.rows, strict=True):
            if metric := scored_metric([row]):
                # The sub-task is named even where it is the only one.
                names = dict.fromkeys(("subtask", *section.varying))
                place = (differing(row, names) or "all", label)
                cells.setdefault(metric, {})[place] = row
        figures += [_figure(section, metric, own) for metric, own in cells.items()]
    return figures


def _figure(section: Section, metric: str, cells: _Cells) -> Figure:
    measure, title = measure_of(metric, section.task), TITLES[section.task]
    highest = max(float(row["metrics"][metric]) for row in cells.values())
    top = 1.0 if measure.form.endswith("%") else highest or 1.0
    caption = (
        f"{measure.head.capitalize()}, and below it the 95 % interval. A star marks the best of "
        "the sparse contenders; dense attention is the reference."
    )
    values = [
        (
            f"{label} ({item})",
            float(row["metrics"][metric]),
            written(float(row["metrics"][metric]), measure.form),
        )
        for (item, label), row in cells.items()
    ]
    return Figure(
        name=anchor(section.task, "matrix"),
        title=title,
        caption=caption,
        alt=alt_text("Heat table", title, [f"{extremes(values, measure.best)}."], []),
        matrix=_matrix(cells, metric, measure, top),
        ramp=_ramp(measure, top),
        data=_data(section, cells, metric, title),
    )


def _matrix(cells: _Cells, metric: str, measure: Measure, top: float) -> Table:
    items = list(dict.fromkeys(item for item, _ in cells))
    labels = list(dict.fromkeys(label for _, label in cells))
    peers = {item: [row for (i, _), row in cells.items() if i == item] for item in items}
    tops = {item: best_text(rows, metric, measure.best) for item, rows in peers.items()}
    named = {item: f"{item} (n\N{NO-BREAK SPACE}{_counts(rows)})" for item, rows in peers.items()}

    def shaded(item: str, label: str) -> Cell:
        row = cells.get((item, label))
        if row is None:
            return plain(None)
        best = is_best(row, metric, tops[item])
        # Without knowing which end is good, a colour would judge.
        level = step_of(float(row["metrics"][metric]) / top)
        shade = f"s{level}" if measure.best == "high" else ""
        return sure(estimate(row, metric), measure.form, best=best, shade=shade)

    # The longer of the two goes down, because pages are longer than wide.
    if len(items) >= len(labels):
        header = ("", *labels)
        lines = [(plain(named[item]), *(shaded(item, label) for label in labels)) for item in items]
    else:
        header = ("", *named.values())
        lines = [(plain(label), *(shaded(item, label) for item in items)) for label in labels]
    return Table(title=measure.head, header=header, lines=tuple(lines), matrix=True)


def _ramp(measure: Measure, top: float) -> Ramp | None:
    if measure.best != "high":
        return None
    return Ramp(kind="s", low=written(0.0, measure.form), high=written(top, measure.form))


def _counts(rows: Sequence[_Row]) -> str:
    low, high = min(row["n"] for row in rows), max(row["n"] for row in rows)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _data(section: Section, cells: _Cells, metric: str, title: str) -> Table:
    names = [metric, f"{metric}_delta", "read_bytes_share"]
    there = [n for n in names if any(n in row["metrics"] for row in cells.values())]
    measures: dict[str, Measure] = {n: measure_of(n, section.task) for n in there}
    lines = []
    for (item, label), row in cells.items():
        values = [
            plain(row["metrics"].get(name), measure.form)
            if name == "read_bytes_share"
            else sure(estimate(row, name), measure.form)
            for name, measure in measures.items()
        ]
        lines.append((plain(label), plain(item), *values, plain(row["n"])))
    heads = (measure.head for measure in measures.values())
    return Table(
        title=f"{title}: the data",
        header=("contender", ", ".join(section.varying) or "setting", *heads, "n"),
        lines=tuple(lines),
    )
