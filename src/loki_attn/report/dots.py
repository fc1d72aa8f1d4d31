"""Figures with a line of the page per contender: dots with error bars, and cells of k out of n."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, final

from loki_attn.report.canvas import apply_scale, canvas, look, png, stem
from loki_attn.report.origin import MISSING
from loki_attn.report.rows import series_name
from loki_attn.report.tables import Best, FigureFile, written
from loki_attn.report.words import alt_text, extremes

_FEW: Final = 8
_LINE_INCHES: Final = 0.23
_LETTER_INCHES: Final = 0.085


@final
@dataclass(frozen=True, kw_only=True)
class Measure:
    """One panel of dots: [value, standard error or None] per contender; always log, or at need."""

    name: str
    values: tuple[tuple[float, float | None], ...]
    form: str
    best: Best = None
    log: bool = False


@final
@dataclass(frozen=True, kw_only=True)
class Hits:
    """One cell: k of n."""

    k: int
    n: int


def dot_figure(
    name: str, title: str, labels: Sequence[str], measures: Sequence[Measure]
) -> FigureFile:
    """Draw a line per contender from the top, a dot per panel, error bars of one error."""
    widest = _LETTER_INCHES * max(len(label) for label in labels)
    size = (widest + 3.6 * len(measures), 1.2 + _LINE_INCHES * max(len(labels), 5))
    figure, axes = canvas(len(measures), size)
    kinds = [stem(series_name(label)) for label in labels]
    order = list(dict.fromkeys(kinds))
    looks = [look(order.index(kind)) for kind in kinds]
    for ax, measure in zip(axes, measures, strict=True):
        kind = apply_scale(ax, "x", [value for value, _ in measure.values], log=measure.log)
        for at, ((value, error), (colour, marker)) in enumerate(
            zip(measure.values, looks, strict=True)
        ):
            ax.errorbar(value, at, xerr=error, fmt=marker, color=colour, markersize=5, capsize=3)
        ax.set_yticks(range(len(labels)), labels if ax is axes[0] else [""] * len(labels))
        ax.set_ylim(len(labels) - 0.4, -0.6)
        ax.tick_params(axis="y", length=0, labelsize=9)
        ax.set_xlabel(measure.name + (f" ({kind} axis)" if kind != "linear" else ""))
    data = tuple((label, *(_cell(m, at) for m in measures)) for at, label in enumerate(labels))
    return FigureFile(
        name=name,
        title=title,
        alt=alt_text(
            "Dot plot",
            title,
            [_said(labels, m, all_of_them=len(labels) <= _FEW) for m in measures],
            [_said(labels, m, all_of_them=False) for m in measures],
        ),
        header=("contender", *(measure.name for measure in measures)),
        data=data,
        png=png(figure, title),
    )


def hits_figure(
    name: str, title: str, columns: Sequence[str], lines: Mapping[str, Sequence[Hits | None]]
) -> FigureFile:
    """Draw a heat map of shares, each cell with its k/n; a cell not measured stays empty."""
    labels = list(lines)
    widest = _LETTER_INCHES * max(len(label) for label in labels)
    size = (max(widest + 1.6 + 0.9 * len(columns), 6.0), 1.3 + _LINE_INCHES * max(len(labels), 4))
    figure, (ax,) = canvas(1, size)
    shares = [[c.k / c.n if c else float("nan") for c in cells] for cells in lines.values()]
    image = ax.imshow(shares, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    for y, cells in enumerate(lines.values()):
        for x, hits in enumerate(cells):
            colour = "black" if hits and hits.k > 0.6 * hits.n else "white"
            text, shade = (_hits(hits), colour) if hits else (MISSING, "black")
            ax.text(x, y, text, ha="center", va="center", color=shade, fontsize=9)
    ax.set_xticks(range(len(columns)), columns)
    ax.set_yticks(range(len(labels)), labels, fontsize=9)
    ax.set_xticks([at + 0.5 for at in range(len(columns) - 1)], minor=True)
    ax.set_yticks([at + 0.5 for at in range(len(labels) - 1)], minor=True)
    ax.tick_params(which="both", length=0)
    ax.spines[:].set_visible(False)
    ax.grid(visible=False)
    ax.grid(visible=True, which="minor", color="white", linewidth=1.5)
    ax.set_xlabel("prompt, tokens")
    figure.colorbar(image, ax=ax, label="share of keys found")
    said = _hits_said(columns, lines)
    return FigureFile(
        name=name,
        title=title,
        alt=alt_text("Heat map", title, said[:1], said[1:]),
        header=("contender", *(f"at {column} tokens" for column in columns)),
        data=tuple((label, *(_hits(hits) for hits in cells)) for label, cells in lines.items()),
        png=png(figure, title),
    )


def _cell(measure: Measure, at: int) -> str:
    value, error = measure.values[at]
    text = written(value, measure.form)
    form = measure.form.lstrip("+")
    return text if error is None else f"{text} ± {written(error, form)}"


def _said(labels: Sequence[str], measure: Measure, *, all_of_them: bool) -> str:
    values = [
        (label, value, written(value, measure.form))
        for label, (value, _) in zip(labels, measure.values, strict=True)
    ]
    name = f"{measure.name[:1].upper()}{measure.name[1:]}"
    if all_of_them:
        return f"{name}: " + "; ".join(f"{label}: {text}" for label, _, text in values) + "."
    return f"{name} of {len(labels)} contenders: {extremes(values, measure.best)}."


def _hits(hits: Hits | None) -> str:
    return MISSING if hits is None else f"{hits.k}/{hits.n}"


def _hits_said(columns: Sequence[str], lines: Mapping[str, Sequence[Hits | None]]) -> list[str]:
    """Every cell in words, and all of them in brief."""
    cells = [
        (label, hits.k / hits.n, f"{_hits(hits)} at {column} tokens")
        for label, line in lines.items()
        for column, hits in zip(columns, line, strict=True)
        if hits
    ]
    full = sum(share == 1 for _, share, _ in cells)
    each = "; ".join(f"{label}: {text}" for label, _, text in cells)
    ends = extremes(cells, "high")
    return [
        f"Keys found: {each}.",
        f"Keys found, {len(lines)} contenders: every key in {full} of {len(cells)} cells; {ends}.",
    ]
