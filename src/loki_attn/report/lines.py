"""Line charts: a curve per contender, one or more panels."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, final

from loki_attn.report.canvas import DENSE, PANEL_INCHES, apply_scale, canvas, png, styles
from loki_attn.report.tables import Best, FigureFile, written
from loki_attn.report.words import alt_text, extremes

_Line = tuple[str, ...]

LAYER: Final = "layer"
_FEW_POINTS: Final = 8
_LETTER_INCHES: Final = 0.085


@final
@dataclass(frozen=True, kw_only=True)
class Series:
    """Points of one contender: [x, y, standard error or None] each."""

    label: str
    points: tuple[tuple[float, float, float | None], ...]


@final
@dataclass(frozen=True, kw_only=True)
class Panel:
    """One pair of axes.

    Attributes:
        x_name: Of the horizontal axis.
        y_name: Of the vertical axis.
        series: The curves.
        form: How y is written.
        x_form: How x is written.
        best: Which end of y is good.
        log: Whether y is logarithmic at any range.
        doublings: Whether x is drawn by its doublings.
        reference: A curve to compare with, dashed; of one point, a level.
    """

    x_name: str
    y_name: str
    series: tuple[Series, ...]
    form: str
    x_form: str = ".0f"
    best: Best = None
    log: bool = False
    doublings: bool = False
    reference: Series | None = None


def line_figure(name: str, title: str, panels: Sequence[Panel]) -> FigureFile:
    """Draw panels that hold the same series."""
    drawn = [s.label for panel in panels for s in (*panel.series, panel.reference) if s]
    labels = list(dict.fromkeys(drawn))
    width = max(len(panels) * PANEL_INCHES[0], 6.0)
    each = 0.7 + _LETTER_INCHES * max(len(label) for label in labels)
    columns = max(1, min(4, int(width / each)))
    legend = 0.24 * math.ceil(len(labels) / columns)
    figure, axes = canvas(len(panels), (width, PANEL_INCHES[1] + 0.45 + legend))
    handles: dict[str, Any] = {}
    for ax, panel in zip(axes, panels, strict=True):
        _fill(ax, panel)
        found, names = ax.get_legend_handles_labels()
        handles |= dict(zip(names, found, strict=True))
    figure.legend(
        handles.values(), handles, loc="outside lower center", ncols=columns, frameon=False
    )
    header, data = _wide(panels) if panels[0].x_name == LAYER else _long(panels)
    return FigureFile(
        name=name,
        title=title,
        alt=alt_text("Line chart", title, [_said(p) for p in panels], [_ends(p) for p in panels]),
        header=header,
        data=data,
        png=png(figure, title),
    )


def _fill(ax: Any, panel: Panel) -> None:
    many = max((len(series.points) for series in panel.series), default=0) > 12
    looks = styles([series.label for series in panel.series])
    for series, (colour, marker, line) in zip(panel.series, looks, strict=True):
        xs, ys, errors = zip(*series.points, strict=True)
        ax.errorbar(
            xs,
            ys,
            yerr=[e or 0.0 for e in errors] if any(errors) else None,
            label=series.label,
            color=colour,
            marker=marker,
            linestyle=line,
            markersize=3.5 if many else 6,
            linewidth=1.4,
            capsize=3,
        )
    _refer(ax, panel.reference)
    everything = [s for s in (*panel.series, panel.reference) if s]
    heights = [y for series in everything for _, y, _ in series.points]
    if apply_scale(ax, "y", heights, log=panel.log) == "linear":
        ax.ticklabel_format(axis="y", useOffset=False)
    ax.margins(0.12 if not many else 0.03, 0.12)
    if panel.doublings:
        places = sorted({x for series in everything for x, _, _ in series.points})
        ax.set_xscale("log", base=2)
        ax.set_xticks(places, [written(x, panel.x_form) for x in places])
    ax.set_xlabel(panel.x_name)
    ax.set_ylabel(panel.y_name)


def _refer(ax: Any, reference: Series | None) -> None:
    if reference is None:
        return
    look: dict[str, Any] = {"color": DENSE, "linestyle": "--", "linewidth": 1.6}
    xs, ys, _ = zip(*reference.points, strict=True)
    if len(xs) == 1:
        ax.axhline(ys[0], label=reference.label, **look)
    else:
        ax.plot(xs, ys, label=reference.label, **look)


def _said(panel: Panel) -> str:
    """A panel in words: few points one by one, many by their range."""
    few = sum(len(series.points) for series in panel.series) <= _FEW_POINTS
    shown = panel.series if panel.reference is None else (*panel.series, panel.reference)
    parts = []
    for series in shown:
        values = [y for _, y, _ in series.points]
        if series is panel.reference and len(values) == 1:
            said = written(values[0], panel.form)
        elif few:
            said = ", ".join(
                f"{written(y, panel.form)} at {written(x, panel.x_form)}"
                for x, y, _ in series.points
            )
        else:
            low, high, mean = min(values), max(values), sum(values) / len(values)
            low_text, high_text, mean_text = (written(v, panel.form) for v in (low, high, mean))
            said = f"{low_text} to {high_text}, mean {mean_text}"
        parts.append(f"{series.label}: {said}")
    return f"{_axes(panel)}: {'; '.join(parts)}."


def _ends(panel: Panel) -> str:
    """A panel with many curves in words: its two ends, for layers those of the means."""
    values = []
    for series in panel.series:
        if panel.x_name == LAYER:
            mean = sum(y for _, y, _ in series.points) / len(series.points)
            values.append((series.label, mean, f"mean {written(mean, panel.form)}"))
            continue
        for x, y, _ in series.points:
            text = f"{written(y, panel.form)} at {written(x, panel.x_form)}"
            values.append((series.label, y, text))
    return f"{_axes(panel)}, {len(panel.series)} curves: {extremes(values, panel.best)}."


def _axes(panel: Panel) -> str:
    return f"{panel.y_name[:1].upper()}{panel.y_name[1:]} by {panel.x_name}"


def _long(panels: Sequence[Panel]) -> tuple[_Line, tuple[_Line, ...]]:
    """One line per point; the panels of a figure hold the same points."""
    lines = []
    for number, series in enumerate(panels[0].series):
        for at, (x, _, _) in enumerate(series.points):
            values = []
            for panel in panels:
                _, y, error = panel.series[number].points[at]
                text = written(y, panel.form)
                values.append(text if error is None else f"{text} ± {written(error, panel.form)}")
            lines.append((series.label, written(x, panels[0].x_form), *values))
    header = ("contender", panels[0].x_name, *(panel.y_name for panel in panels))
    return header, tuple(lines)


def _wide(panels: Sequence[Panel]) -> tuple[_Line, tuple[_Line, ...]]:
    """One line per layer, one column per panel and contender."""
    columns = [(panel, series) for panel in panels for series in panel.series]
    layers = sorted({x for _, series in columns for x, _, _ in series.points})
    found = [({x: y for x, y, _ in series.points}, panel.form) for panel, series in columns]
    header = (LAYER, *(f"{panel.y_name}, {series.label}" for panel, series in columns))
    lines = ((f"{x:.0f}", *(written(ys.get(x), form) for ys, form in found)) for x in layers)
    return header, tuple(lines)
