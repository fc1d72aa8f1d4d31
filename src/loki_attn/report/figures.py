"""Which figure helps to read which section."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from loki_attn.report.canvas import COLOURS, DENSE, canvas, png
from loki_attn.report.dots import Hits, Measure, dot_figure, hits_figure
from loki_attn.report.lines import LAYER, Panel, Series, line_figure
from loki_attn.report.rows import (
    AMOUNTS,
    Section,
    amounts,
    basis_kind,
    by_setting,
    is_dense,
    series_name,
)
from loki_attn.report.tables import Best, FigureFile, budget_of, error_of, written
from loki_attn.report.words import alt_text

_Row = Mapping[str, Any]
_Place = Callable[[_Row], float]
# Metric, its heading, format, the metric of its standard error, which end is good.
_Wanted = tuple[str, str, str, str | None, Best]

_MANY: Final = 6
_KL: Final[_Wanted] = ("kl_to_dense", "KL to dense, nats", ".4f", "kl_standard_error", "low")
_PERPLEXITY: Final[_Wanted] = ("perplexity", "perplexity", ".3f", None, "low")
_NLL: Final[_Wanted] = (
    "nll_delta",
    "nll - dense, nats",
    "+.4f",
    "nll_delta_standard_error",
    "low",
)
_RECALL: Final[_Wanted] = ("recall", "recall of the exact top-k", ".3f", None, "high")
_MASS: Final[_Wanted] = ("mass", "captured attention mass", ".4f", None, "high")


def draw(section: Section) -> list[FigureFile]:
    """Draw what helps to read a section, if anything does."""
    drawing = _DRAWINGS.get(section.task)
    return [] if drawing is None else drawing(section)


def _parts(section: Section) -> list[tuple[str, str, Section]]:
    """Rows that fit one figure, with a number and a note for its name and title."""
    parts = by_setting(section) if len(section.rows) > _MANY else [section]
    if len(parts) == 1:
        return [("", section.model, section)]
    return [
        (f"-{number}", f"{section.model}; {_differing(part.rows[0], section.varying)}", part)
        for number, part in enumerate(parts, 1)
    ]


def _perplexity(section: Section) -> list[FigureFile]:
    figures = []
    for number, note, part in _parts(section):
        rows = [row for row in part.rows if not is_dense(row)] or list(part.rows)
        name = f"perplexity{number}"
        if not all("read_bytes_share" in row["metrics"] for row in rows):
            change = all("nll_delta" in row["metrics"] for row in rows)
            title = f"Divergence from dense ({note})"
            wanted = (_NLL if change else _PERPLEXITY, _KL)
            figures.append(_dots(name, title, rows, part.varying, wanted))
            continue
        dense = {row["metrics"].get("perplexity_dense") for row in rows} - {None}
        level = [Series(label="dense", points=((0.0, float(y), None),)) for y in dense]
        panels = [
            _panel(
                rows,
                part.varying,
                wanted,
                lambda row: 100 * float(row["metrics"]["read_bytes_share"]),
                x_name="share of dense KV bytes read, %",
                x_form=".1f",
                reference=level[0] if wanted is _PERPLEXITY and len(level) == 1 else None,
            )
            for wanted in (_PERPLEXITY, _KL)
        ]
        figures.append(line_figure(name, f"Quality against what is read ({note})", panels))
    return figures


def _fidelity(section: Section) -> list[FigureFile]:
    figures = []
    for number, note, part in _parts(section):
        name = f"fidelity{number}"
        rows = [row for row in part.rows if not is_dense(row)] or list(part.rows)
        if len(rows) <= _MANY:
            panels = [_layers(part, wanted) for wanted in (_RECALL, _MASS)]
            figures += _if_any(name, f"What each layer keeps ({note})", panels)
        elif amount := _varied_amount(rows):
            title = f"What the selection keeps by budget ({note})"
            figures.append(line_figure(name, title, _by_budget(rows, part.varying, amount)))
        else:
            title = f"What the selection keeps ({note})"
            figures.append(_dots(name, title, rows, part.varying, (_MASS, _RECALL)))
    return figures


def _varied_amount(rows: Sequence[_Row]) -> str | None:
    """The amount by which every row's budget is given, if it takes several values."""
    for name in AMOUNTS:
        if len({amounts(row).get(name) for row in rows} - {None}) > 1 and all(
            name in amounts(row) for row in rows
        ):
            return name
    return None


def _by_budget(rows: Sequence[_Row], varying: Sequence[str], amount: str) -> list[Panel]:
    def place(row: _Row) -> float:
        return float(amounts(row)[amount])

    best: dict[float, list[float]] = {}
    for row in rows:
        if "exact_mass" in row["metrics"]:
            best.setdefault(place(row), []).append(float(row["metrics"]["exact_mass"]))
    points = tuple((x, sum(ys) / len(ys), None) for x, ys in sorted(best.items()))
    exact = Series(label="mass of the exact top-k", points=points) if points else None
    return [
        _panel(
            rows,
            varying,
            wanted,
            place,
            x_name=f"budget, {amount}",
            x_form="g",
            doublings=True,
            reference=exact if wanted is _MASS else None,
        )
        for wanted in (_MASS, _RECALL)
    ]


def _panel(
    rows: Sequence[_Row], varying: Sequence[str], wanted: _Wanted, place: _Place, **options: Any
) -> Panel:
    """Join rows that differ in their budget alone."""
    metric, heading, form, error, best = wanted
    groups: dict[tuple[object, ...], list[_Row]] = {}
    for row in rows:
        select = row["policy"].get("select")
        known = select if isinstance(select, Mapping) else {}
        variant = [str(known.get(name)) for name in ("method", "rank", "plane_dtype")]
        key = (_labelled(series_name(row["contender"]), row, varying), basis_kind(row), *variant)
        groups.setdefault(key, []).append(row)
    series = tuple(
        Series(
            label=str(label),
            points=tuple(
                sorted(
                    (place(r), float(r["metrics"][metric]), error_of(r, error) if error else None)
                    for r in group
                )
            ),
        )
        for (label, *_), group in groups.items()
    )
    return Panel(
        y_name=heading, series=series, form=form, best=best, log=metric == "kl_to_dense", **options
    )


def _dots(
    name: str,
    title: str,
    rows: Sequence[_Row],
    varying: Sequence[str],
    measures: Sequence[_Wanted],
) -> FigureFile:
    return dot_figure(
        name,
        title,
        [_labelled(row["contender"], row, varying) for row in rows],
        [
            Measure(
                name=heading,
                values=tuple(
                    (float(row["metrics"][metric]), error_of(row, error) if error else None)
                    for row in rows
                ),
                form=form,
                best=best,
                log=metric == "kl_to_dense",
            )
            for metric, heading, form, error, best in measures
        ],
    )


def _calibration(section: Section) -> list[FigureFile]:
    wanted: _Wanted = ("rank_at_90", "rank at 90 % of the variance", ".1f", None, None)
    title = f"Rank of the keys per layer ({section.model})"
    return _if_any("rank", title, [_layers(section, wanted)])


def _ranks(section: Section) -> list[FigureFile]:
    """Rank per layer on both sides of RoPE; these rows keep their lists beside the means."""
    panels = []
    names = [row["contender"] for row in section.rows]
    told_apart = () if len(set(names)) == len(names) else section.varying
    for metric, side in (("rank90_pre", "before RoPE"), ("rank90_post", "after RoPE")):
        series = []
        for row in section.rows:
            found = row["metrics"].get(f"{metric}_layers")
            values = found if isinstance(found, list) else []
            points = tuple((float(at), float(value), None) for at, value in enumerate(values))
            label = _labelled(row["contender"], row, told_apart)
            series.append(Series(label=label, points=points))
        name = f"rank at 90 %, {side}"
        panels.append(
            Panel(
                x_name=LAYER, y_name=name, series=tuple(s for s in series if s.points), form=".1f"
            )
        )
    return _if_any("ranks", f"Rank of the keys per layer ({section.model})", panels)


def _layers(section: Section, wanted: _Wanted) -> Panel:
    metric, heading, form, _, best = wanted
    series = []
    for row in section.rows:
        layers = row["metrics"].get("layers", {})
        pairs = zip(layers.get("index", ()), layers.get(metric, ()), strict=False)
        points = tuple((float(x), float(y), None) for x, y in pairs)
        if points:
            label = _labelled(row["contender"], row, section.varying)
            series.append(Series(label=label, points=points))
    return Panel(x_name=LAYER, y_name=heading, series=tuple(series), form=form, best=best)


def _if_any(name: str, title: str, panels: Sequence[Panel]) -> list[FigureFile]:
    drawable = [panel for panel in panels if panel.series]
    return [line_figure(name, title, drawable)] if drawable else []


def _passkey(section: Section) -> list[FigureFile]:
    """Contenders by length of the prompt."""
    found: dict[str, dict[int, Hits]] = {}
    for row in section.rows:
        length = row["settings"].get("length_tokens")
        others = [name for name in section.varying if name != "length_tokens"]
        label = _labelled(row["contender"], row, others)
        if int(length or 0) in found.get(label, {}):
            label = f"{label} ({budget_of(row)}, {basis_kind(row) or 'no'} basis)"
        hits = Hits(k=round(row["metrics"]["accuracy"] * row["n"]), n=row["n"])
        found.setdefault(label, {})[int(length or 0)] = hits
    lengths = sorted({length for cells in found.values() for length in cells})
    columns = [f"{length:,}" if length else "unknown" for length in lengths]
    lines = {label: [cells.get(at) for at in lengths] for label, cells in found.items()}
    return [hits_figure("passkey", f"Passkeys found ({section.model})", columns, lines)]


def _generation(section: Section) -> list[FigureFile]:
    wanted = [
        ("KV KiB read per token", "read_bytes_per_token", ",.0f", 1 / 1024),
        ("decode tokens per second", "tokens_per_s", ".2f", 1.0),
    ]
    labels = [_labelled(row["contender"], row, section.varying) for row in section.rows]
    figure, axes = canvas(len(wanted), (9.2, 1.2 + 0.45 * len(labels)))
    data = [[label] for label in labels]
    for ax, (heading, metric, form, scale) in zip(axes, wanted, strict=True):
        values = [scale * float(row["metrics"][metric]) for row in section.rows]
        bars = ax.barh(range(len(values)), values, color=_bar_colours(section), height=0.6)
        texts = [written(value, form) for value in values]
        ax.bar_label(bars, texts, padding=4, fontsize=9)
        ax.set_yticks(range(len(labels)), labels if ax is axes[0] else [""] * len(labels))
        ax.invert_yaxis()
        ax.margins(x=0.25)
        ax.locator_params(axis="x", nbins=5)
        ax.set_xlabel(heading)
        ax.grid(visible=False, axis="y")
        for line, text in zip(data, texts, strict=True):
            line.append(text)
    header = ("contender", *(part[0] for part in wanted))
    said = [
        f"{line[0]}: " + ", ".join(f"{h} {v}" for h, v in zip(header[1:], line[1:], strict=True))
        for line in data
    ]
    title = f"What a decode step reads and how fast it is ({section.model})"
    return [
        FigureFile(
            name="generation",
            title=title,
            alt=alt_text("Bar chart", title, [f"{'; '.join(said)}."], [f"{'; '.join(said[:4])}."]),
            header=header,
            data=tuple(tuple(line) for line in data),
            png=png(figure, title),
        )
    ]


def _bar_colours(section: Section) -> list[str]:
    """Dense in grey; the others as in the line charts, where dense has no line."""
    sparse = [row["contender"] for row in section.rows if not is_dense(row)]
    return [
        DENSE if is_dense(row) else COLOURS[sparse.index(row["contender"]) % len(COLOURS)]
        for row in section.rows
    ]


def _labelled(label: str, row: _Row, names: Sequence[str]) -> str:
    return " ".join(part for part in (label, _differing(row, names)) if part)


def _differing(row: _Row, names: Sequence[str]) -> str:
    return ", ".join(f"{n.replace('_', ' ')} {row['settings'].get(n)}" for n in names)


_DRAWINGS: Final[dict[str, Callable[[Section], list[FigureFile]]]] = {
    "perplexity": _perplexity,
    "fidelity": _fidelity,
    "passkey": _passkey,
    "calibration": _calibration,
    "ranks": _ranks,
    "generation": _generation,
}
