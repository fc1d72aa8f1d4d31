"""Figures of a section, as PNG bytes with alt text and data."""

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Final, final

from loki_attn.errors import InputError
from loki_attn.report.rows import Section, is_dense
from loki_attn.report.tables import FigureFile, budget_of, error_of, written

_Row = Mapping[str, Any]
_Line = tuple[str, ...]

LAYER: Final = "layer"

# Okabe and Ito's colours, told apart by nearly everyone; markers repeat the message.
_COLOURS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS: Final = "osD^vPX"
_DENSE: Final = "#666666"
_DPI: Final = 130
_PANEL_INCHES: Final = (4.6, 3.3)
_ALT_POINTS: Final = 8


@final
@dataclass(frozen=True, kw_only=True)
class _Series:
    """Points of one contender: [x, y, standard error or None] each."""

    label: str
    points: tuple[tuple[float, float, float | None], ...]


@final
@dataclass(frozen=True, kw_only=True)
class _Panel:
    """One pair of axes."""

    x_name: str
    y_name: str
    series: tuple[_Series, ...]
    form: str
    x_form: str = ".0f"
    log: bool = False
    line: tuple[str, float] | None = None


def draw(section: Section) -> list[FigureFile]:
    """Draw what helps to read a section, if anything does."""
    return [_DRAWINGS[section.task](section)] if _drawable(section) else []


def _drawable(section: Section) -> bool:
    if section.task in {"fidelity", "calibration"}:
        return any("layers" in row["metrics"] for row in section.rows)
    return section.task in _DRAWINGS


def _perplexity(section: Section) -> FigureFile:
    rows = [row for row in section.rows if not is_dense(row)] or list(section.rows)
    name, place, form = _abscissa(rows)
    dense = {row["metrics"].get("perplexity_dense") for row in rows} - {None}
    line = ("dense", float(dense.pop())) if len(dense) == 1 else None
    panels = [
        _Panel(
            x_name=name,
            y_name=title,
            series=_series(rows, section, place, metric, error),
            form=number,
            x_form=form,
            log=metric == "kl_to_dense",
            line=line if metric == "perplexity" else None,
        )
        for title, metric, error, number in (
            ("perplexity", "perplexity", None, ".3f"),
            ("KL to dense, nats", "kl_to_dense", "kl_standard_error", ".4f"),
        )
    ]
    return _figure("perplexity", f"Quality against what is read ({section.model})", panels)


def _abscissa(rows: Sequence[_Row]) -> tuple[str, Callable[[_Row], float], str]:
    """What quality is drawn against: the share read, else the budget, else the order of rows."""
    if all("read_bytes_share" in row["metrics"] for row in rows):
        return (
            "share of dense KV bytes read, %",
            lambda r: 100 * r["metrics"]["read_bytes_share"],
            ".1f",
        )
    for amount in ("top_k", "fraction", "mass"):
        if all(budget_of(row).startswith(f"{amount}=") for row in rows):
            return (f"budget, {amount}", lambda r, name=amount: _amount(r, name), "g")
    places = {id(row): number for number, row in enumerate(rows, 1)}
    return ("row of the table", lambda r: places[id(r)], ".0f")


def _series(
    rows: Sequence[_Row],
    section: Section,
    place: Callable[[_Row], float],
    metric: str,
    error: str | None,
) -> tuple[_Series, ...]:
    """Join rows that differ in their budget alone."""
    groups: dict[str, list[_Row]] = {}
    for row in rows:
        basis = row.get("basis")
        kind = basis.get("kind") if isinstance(basis, Mapping) else None
        others = {n: row["settings"].get(n) for n in section.varying if n != "length_tokens"}
        policy = [row["policy"].get("select"), row["policy"].get("group_reduce"), kind, others]
        groups.setdefault(json.dumps(policy, sort_keys=True, default=str), []).append(row)
    return tuple(
        _Series(
            label=_label(group),
            points=tuple(
                sorted(
                    (place(r), float(r["metrics"][metric]), error_of(r, error) if error else None)
                    for r in group
                )
            ),
        )
        for group in groups.values()
    )


def _amount(row: _Row, name: str) -> float:
    return float(row["policy"]["budget"][name])


def _label(group: Sequence[_Row]) -> str:
    """What the names of a series have in common, without the number that tells them apart."""
    names = [str(row["contender"]) for row in group]
    if len(set(names)) == 1:
        return names[0]
    same = takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    return "".join(letters[0] for letters in same).rstrip(" -_=@,(0123456789") or names[0]


def _fidelity(section: Section) -> FigureFile:
    panels = [
        _layers(section, "recall", "recall of the exact top-k", ".3f"),
        _layers(section, "mass", "captured attention mass", ".4f"),
    ]
    return _figure("fidelity", f"What each layer keeps ({section.model})", panels)


def _calibration(section: Section) -> FigureFile:
    panel = _layers(section, "rank_at_90", "rank at 90 % of the variance", ".1f")
    return _figure("rank", f"Rank of the keys per layer ({section.model})", [panel])


def _layers(section: Section, metric: str, name: str, form: str) -> _Panel:
    series = []
    for row in section.rows:
        layers = row["metrics"].get("layers", {})
        pairs = zip(layers.get("index", ()), layers.get(metric, ()), strict=False)
        points = tuple((float(x), float(y), None) for x, y in pairs)
        if points:
            series.append(_Series(label=_with_settings(row, section), points=points))
    return _Panel(x_name=LAYER, y_name=name, series=tuple(series), form=form)


def _with_settings(row: _Row, section: Section) -> str:
    others = [f"{n.replace('_', ' ')} {row['settings'].get(n)}" for n in section.varying]
    return " ".join([str(row["contender"]), *others])


def _passkey(section: Section) -> FigureFile:
    if "length_tokens" in section.varying:
        panel = _Panel(
            x_name="prompt, tokens",
            y_name="share of keys found",
            series=_series(
                section.rows,
                section,
                lambda r: float(r["settings"]["length_tokens"]),
                "accuracy",
                "accuracy",
            ),
            form=".0%",
        )
        return _figure("passkey", f"Passkeys found ({section.model})", [panel])
    return _bars(
        section, "passkey", "Passkeys found", [("share of keys found", "accuracy", ".0%", 1.0)]
    )


def _generation(section: Section) -> FigureFile:
    wanted = [
        ("KV KiB read per token", "read_bytes_per_token", ",.0f", 1 / 1024),
        ("decode tokens per second", "tokens_per_s", ".2f", 1.0),
    ]
    return _bars(section, "generation", "What a decode step reads and how fast it is", wanted)


def _bars(
    section: Section, name: str, title: str, wanted: Sequence[tuple[str, str, str, float]]
) -> FigureFile:
    labels = [_with_settings(row, section) for row in section.rows]
    canvas, axes = _canvas(len(wanted), 1.2 + 0.45 * len(labels))
    data = [[label] for label in labels]
    colours = _bar_colours(section)
    for ax, (heading, metric, form, scale) in zip(axes, wanted, strict=True):
        values = [scale * float(row["metrics"][metric]) for row in section.rows]
        errors = [error_of(r, metric) or 0.0 if metric == "accuracy" else 0 for r in section.rows]
        bars = ax.barh(range(len(values)), values, xerr=errors, color=colours, height=0.6)
        texts = [written(value, form) for value in values]
        ax.bar_label(bars, texts, padding=4, fontsize=9)
        ax.set_yticks(range(len(labels)), labels)
        ax.invert_yaxis()
        ax.margins(x=0.25)
        ax.locator_params(axis="x", nbins=5)
        ax.set_xlabel(heading)
        ax.grid(visible=False, axis="y")
        for line, text in zip(data, texts, strict=True):
            line.append(text)
    header = ("contender", *(part[0] for part in wanted))
    said = "; ".join(
        f"{line[0]}: " + ", ".join(f"{h} {v}" for h, v in zip(header[1:], line[1:], strict=True))
        for line in data[:_ALT_POINTS]
    )
    title = f"{title} ({section.model})"
    return FigureFile(
        name=name,
        title=title,
        alt=f"Bar chart. {title}. {said}.",
        header=header,
        data=tuple(tuple(line) for line in data),
        png=_png(canvas, title),
    )


def _bar_colours(section: Section) -> list[str]:
    """Dense in grey; the others as in the line charts, where dense has no line."""
    sparse = [row["contender"] for row in section.rows if not is_dense(row)]
    return [
        _DENSE if is_dense(row) else _COLOURS[sparse.index(row["contender"]) % len(_COLOURS)]
        for row in section.rows
    ]


def _figure(name: str, title: str, panels: Sequence[_Panel]) -> FigureFile:
    canvas, axes = _canvas(len(panels))
    for ax, panel in zip(axes, panels, strict=True):
        _fill(ax, panel)
    handles, labels = axes[0].get_legend_handles_labels()
    header, data = _wide(panels) if panels[0].x_name == LAYER else _long(panels)
    canvas.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return FigureFile(
        name=name,
        title=title,
        alt=f"Line chart. {title}. " + " ".join(_said(panel) for panel in panels),
        header=header,
        data=data,
        png=_png(canvas, title),
    )


def _fill(ax: Any, panel: _Panel) -> None:
    many = max((len(series.points) for series in panel.series), default=0) > 12
    for number, series in enumerate(panel.series):
        xs, ys, errors = zip(*series.points, strict=True)
        ax.errorbar(
            xs,
            ys,
            yerr=[e or 0.0 for e in errors] if any(errors) else None,
            label=series.label,
            color=_COLOURS[number % len(_COLOURS)],
            marker=_MARKERS[number % len(_MARKERS)],
            markersize=3.5 if many else 7,
            linewidth=1.4,
            capsize=3,
        )
    if panel.line is not None:
        label, height = panel.line
        ax.axhline(height, color=_DENSE, linestyle="--", linewidth=1.2, label=label)
    if panel.log and all(y > 0 for series in panel.series for _, y, _ in series.points):
        ax.set_yscale("log")
    else:
        ax.ticklabel_format(axis="y", useOffset=False)
    ax.margins(0.12 if not many else 0.03, 0.12)
    ax.set_xlabel(panel.x_name)
    ax.set_ylabel(panel.y_name)


def _said(panel: _Panel) -> str:
    """A panel in words: few points one by one, many by their range."""
    parts = []
    for series in panel.series:
        values = [y for _, y, _ in series.points]
        if sum(len(s.points) for s in panel.series) <= _ALT_POINTS:
            points = ", ".join(
                f"{written(y, panel.form)} at {written(x, panel.x_form)}"
                for x, y, _ in series.points
            )
            parts.append(f"{series.label}: {points}")
            continue
        low, high, mean = min(values), max(values), sum(values) / len(values)
        parts.append(
            f"{series.label}: {written(low, panel.form)} to {written(high, panel.form)}, "
            f"mean {written(mean, panel.form)}"
        )
    if panel.line is not None:
        parts.append(f"{panel.line[0]}: {written(panel.line[1], panel.form)}")
    return f"{panel.y_name[:1].upper()}{panel.y_name[1:]} by {panel.x_name}: {'; '.join(parts)}."


def _long(panels: Sequence[_Panel]) -> tuple[_Line, tuple[_Line, ...]]:
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


def _wide(panels: Sequence[_Panel]) -> tuple[_Line, tuple[_Line, ...]]:
    """One line per layer, one column per panel and contender."""
    columns = [(panel, series) for panel in panels for series in panel.series]
    layers = sorted({x for _, series in columns for x, _, _ in series.points})
    found = [({x: y for x, y, _ in series.points}, panel.form) for panel, series in columns]
    header = (LAYER, *(f"{panel.y_name}, {series.label}" for panel, series in columns))
    lines = ((f"{x:.0f}", *(written(ys.get(x), form) for ys, form in found)) for x in layers)
    return header, tuple(lines)


def _canvas(panels: int, height: float = _PANEL_INCHES[1] + 0.7) -> tuple[Any, list[Any]]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(
            f"Figures need matplotlib ({error}); run: pip install 'loki-attn[report]', or leave "
            "the figures out."
        ) from error
    size = (max(panels * _PANEL_INCHES[0], 6.0), height)
    canvas = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(canvas)
    axes = list(canvas.subplots(1, panels, squeeze=False)[0])
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(visible=True, alpha=0.25)
        ax.set_axisbelow(True)
    return canvas, axes


def _png(canvas: Any, title: str) -> bytes:
    canvas.suptitle(title, fontsize=11)
    buffer = io.BytesIO()
    canvas.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    return buffer.getvalue()


_DRAWINGS: Final[dict[str, Callable[[Section], FigureFile]]] = {
    "perplexity": _perplexity,
    "fidelity": _fidelity,
    "passkey": _passkey,
    "calibration": _calibration,
    "generation": _generation,
}
