"""What a selection keeps: recall and mass against the rank of the score."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from loki_attn.report.canvas import stem
from loki_attn.report.intervals import estimate, number
from loki_attn.report.page.axes import Axis, doublings, linear
from loki_attn.report.page.measures import measure_of
from loki_attn.report.page.parts import Figure, Key, Panel, Table, anchor, plain, sure, written
from loki_attn.report.page.plot import Dot, Line, Look, chart, looks, swatch
from loki_attn.report.rows import Section, amounts, apart, by_setting, differing, series_name
from loki_attn.report.words import alt_text

_Row = Mapping[str, Any]
_Curves = dict[str, list[_Row]]

_METRICS: Final = ("recall", "mass")


def kept_figures(found: Sequence[Section]) -> list[Figure]:
    """Recall and mass against rank, a panel for each budget and text."""
    parts = [
        (part.rows, budgets)
        for section in found
        if section.task == "fidelity"
        for part in by_setting(section)
        if (budgets := _by_budget(part))
    ]
    names = apart(rows for rows, _ in parts)
    groups = [
        (", ".join(filter(None, (said, differing(rows[0], names)))), curves)
        for rows, budgets in parts
        for said, curves in budgets
    ]
    labels = list(dict.fromkeys(label for _, curves in groups for label in curves))
    style = looks(labels)
    figures = []
    for metric in _METRICS:
        shown = [
            (title, curves)
            for title, curves in groups
            if any(estimate(row, metric) for rows in curves.values() for row in rows)
        ]
        if not shown:
            continue
        axes = _axes(
            [row for _, curves in shown for rows in curves.values() for row in rows], metric
        )
        panels = [
            Panel(title=title, svg=_draw(curves, metric, style, axes, title))
            for title, curves in shown
        ]
        title = f"{measure_of(metric).head.capitalize()} against rank"
        caption = (
            f"{measure_of(metric).head.capitalize()} by the number of coordinates that rank the "
            "cached tokens, at equal budgets. Bands are 95 % intervals."
        )
        figures.append(
            Figure(
                name=anchor(metric, "rank"),
                title=title,
                caption=caption,
                alt=alt_text("Line chart", title, [caption], [caption]),
                panels=tuple(panels),
                keys=tuple(Key(sample=swatch(look), name=label) for label, look in style.items()),
                data=_data(groups, metric, title),
            )
        )
    return figures


def _by_budget(part: Section) -> list[tuple[str, _Curves]]:
    """Rows with a rank, by budget and then by what ranks them; budgets with one rank are left."""
    budgets: dict[str, _Curves] = {}
    for row in part.rows:
        if _rank(row) is None:
            continue
        said = ", ".join(f"{name} = {value:g}" for name, value in amounts(row).items())
        label = stem(series_name(str(row["contender"])))
        budgets.setdefault(said, {}).setdefault(label, []).append(row)
    return [
        (said, curves)
        for said, curves in budgets.items()
        if any(len({_rank(row) for row in rows}) > 1 for rows in curves.values())
    ]


def _rank(row: _Row) -> float | None:
    select = row["policy"].get("select")
    return number(select.get("rank")) if isinstance(select, Mapping) else None


def _axes(rows: Sequence[_Row], metric: str) -> tuple[Axis, Axis]:
    """The same for all panels of a figure, so that they can be compared."""
    found = [one for row in rows if (one := estimate(row, metric))]
    ends = [end for one in found for end in (one.low, one.high)]
    name, bounds = measure_of(metric).head, (0.0, 1.0)
    y = linear(ends, name, within=bounds, form=lambda value: written(value, ".2g"))
    return doublings([rank for row in rows if (rank := _rank(row))], "rank"), y


def _draw(
    curves: _Curves,
    metric: str,
    style: Mapping[str, Look],
    axes: tuple[Axis, Axis],
    title: str,
) -> str:
    drawn, said = [], []
    for label, rows in curves.items():
        points = sorted(
            (_rank(row) or 0.0, found.value, found.low, found.high)
            for row in rows
            if (found := estimate(row, metric))
        )
        if not points:
            continue
        dots = tuple(
            Dot(x=x, y=y, low=low, high=high, name=f"{label}, rank {x:g}: {y:.3f}")
            for x, y, low, high in points
        )
        drawn.append(Line(label=label, look=style[label], dots=dots, band=True))
        first, last = points[0], points[-1]
        said.append(f"{label}: {first[1]:.2f} at rank {first[0]:g}, {last[1]:.2f} at {last[0]:g}")
    head = f"{measure_of(metric).head} against rank, {title}"
    return chart(*axes, drawn, alt_text("Line chart", head, ["; ".join(said)], said[:2]))


def _data(groups: Sequence[tuple[str, _Curves]], metric: str, title: str) -> Table:
    measure = measure_of(metric)
    return Table(
        title=f"{title}: the data",
        header=("contender", "budget", "rank", measure.head, "n"),
        lines=tuple(
            (
                plain(label),
                plain(said),
                plain(int(_rank(row) or 0)),
                sure(estimate(row, metric), measure.form),
                plain(row["n"]),
            )
            for said, curves in groups
            for label, rows in curves.items()
            for row in rows
            if estimate(row, metric)
        ),
    )
