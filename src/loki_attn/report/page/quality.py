"""Quality against what is read: divergence and scores, with intervals and the Pareto front."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, final

from loki_attn.report.intervals import Estimate, estimate, number
from loki_attn.report.page.axes import Axis, linear, logarithmic, percent
from loki_attn.report.page.measures import measure_of, scored_metric
from loki_attn.report.page.parts import (
    Cell,
    Figure,
    Key,
    Listing,
    Panel,
    Table,
    anchor,
    interval,
    plain,
    sure,
    written,
)
from loki_attn.report.page.plot import GREY, Dot, Extra, Line, Look, chart, looks, swatch
from loki_attn.report.pareto import Candidate, pareto_front
from loki_attn.report.rows import (
    Section,
    apart,
    by_setting,
    differing,
    is_dense,
    labels_of,
    series_name,
)
from loki_attn.report.tables import TITLES
from loki_attn.report.words import alt_text, extremes

_Row = Mapping[str, Any]

_ITEMS: Final = ("subtask", "kind")
_LISTED: Final = 24
_X: Final = "share of dense attention's KV bytes read"
_READ: Final = "KV bytes read"


@final
@dataclass(frozen=True, kw_only=True)
class Point:
    """One contender: what it reads and how good it is."""

    name: str
    share: float
    found: Estimate
    dense: bool = False


@final
@dataclass(frozen=True, kw_only=True)
class _Cloud:
    """The points of one panel."""

    title: str
    points: Sequence[Point]


def divergence_figures(found: Sequence[Section]) -> list[Figure]:
    """KL to dense against bytes read, a panel for each text and length."""
    every = [
        (part.rows, _points(part.rows))
        for section in found
        if section.task == "perplexity"
        for part in by_setting(section)
    ]
    parts = [(rows, points) for rows, points in every if _several(points)]
    names = apart(rows for rows, _ in parts)
    clouds = [_Cloud(title=differing(rows[0], names), points=points) for rows, points in parts]
    return _figure(
        clouds,
        "divergence",
        "Quality against bytes read",
        "kl_to_dense",
        "KL divergence from dense attention's next-token distribution, lower is better, against "
        "the share of the KV cache that is read.",
    )


def score_figures(found: Sequence[Section]) -> list[Figure]:
    """Mean scores of each task against bytes read, a panel for each length."""
    figures = []
    for section in found:
        if section.task in {"perplexity", "fidelity"} or not section.rows:
            continue
        metric = scored_metric(section.rows)
        if metric is None or metric not in {"score", "shared_tokens", "accuracy"}:
            continue
        clouds = [
            _Cloud(title=title, points=_averaged(rows, metric))
            for title, rows in _by_others(section)
        ]
        several = any(name in section.varying for name in _ITEMS)
        mean = " Means over all kinds, taken as independent." if several else ""
        title = f"{TITLES.get(section.task, section.task.capitalize())} against bytes read"
        caption = f"{measure_of(metric).head.capitalize()}, higher is better.{mean}"
        figures += _figure(clouds, f"{section.task}-bytes", title, metric, caption)
    return figures


def _points(rows: Sequence[_Row]) -> list[Point]:
    points = []
    for row, name in zip(rows, labels_of(rows), strict=True):
        read = number(row["metrics"].get("read_bytes_share"))
        found = estimate(row, "kl_to_dense")
        dense = is_dense(row)
        if found and (read or dense):
            points.append(Point(name=name, share=read or 1.0, found=found, dense=dense))
    return points


def _several(points: Sequence[Point]) -> bool:
    return sum(not point.dense for point in points) > 1


def _by_others(section: Section) -> list[tuple[str, list[_Row]]]:
    """Rows by what differs between them beside the kind of item."""
    others = [name for name in section.varying if name not in _ITEMS]
    groups: dict[str, list[_Row]] = {}
    for row in section.rows:
        groups.setdefault(differing(row, others), []).append(row)
    return list(groups.items())


def _averaged(rows: Sequence[_Row], metric: str) -> list[Point]:
    """A point per contender: the mean over its items, if it has all of them."""
    names = labels_of(rows)
    groups: dict[str, list[_Row]] = {}
    for row, name in zip(rows, names, strict=True):
        groups.setdefault(name, []).append(row)
    most = max(len(group) for group in groups.values())
    points = []
    for name, group in groups.items():
        found = [e for row in group if (e := estimate(row, metric))]
        shares = [s for r in group if (s := number(r["metrics"].get("read_bytes_share")))]
        dense = is_dense(group[0])
        if len(found) == most and (len(shares) == most or dense):
            read = 1.0 if dense and len(shares) < most else sum(shares) / most
            points.append(Point(name=name, share=read, found=pooled(found), dense=dense))
    return points


def pooled(found: Sequence[Estimate]) -> Estimate:
    """The mean of independent estimates; the distances to the ends add up as squares do."""
    count = len(found)
    mean = sum(e.value for e in found) / count
    down = sum((e.value - e.low) ** 2 for e in found) ** 0.5 / count
    up = sum((e.high - e.value) ** 2 for e in found) ** 0.5 / count
    total = sum(e.n for e in found)
    return Estimate(value=mean, low=mean - down, high=mean + up, n=total, how=found[0].how)


def _figure(
    clouds: Iterable[_Cloud], name: str, title: str, metric: str, caption: str
) -> list[Figure]:
    kept = [cloud for cloud in clouds if _several(cloud.points)]
    if not kept:
        return []
    measure = measure_of(metric)
    series = [series_name(p.name) for c in kept for p in c.points if not p.dense]
    style = looks(series)
    panels, listings, lines = [], [], []
    axes = _axes([p for cloud in kept for p in cloud.points], metric)
    for cloud in kept:
        front = _front(cloud, upward=measure.best == "high")
        alt = _alt(cloud, front, title, metric)
        panels.append(Panel(title=cloud.title, svg=_draw(cloud, front, metric, style, axes, alt)))
        listings.append(_listing(cloud, front, measure.form))
        on = {p.name for p in front}
        lines += [_line(cloud, p, measure.form, on_front=p.name in on) for p in cloud.points]
    keys = [Key(sample=swatch(look), name=label) for label, look in style.items()]
    if any(p.dense for c in kept for p in c.points) and measure.best == "high":
        keys.append(Key(sample=swatch(Look(GREY)), name="dense attention"))
    header = ("contender", "setting", _READ, measure.head, "on the front", "n")
    return [
        Figure(
            name=anchor(name),
            title=title,
            caption=f"{caption} Bars are 95 % intervals. The shaded steps are the Pareto front: no "
            "other contender reads less and does as well.",
            alt=alt_text("Chart", title, [caption], [caption]),
            panels=tuple(panels),
            keys=tuple(keys),
            listings=tuple(listings),
            data=Table(title=f"{title}: the data", header=header, lines=tuple(lines)),
        )
    ]


def _front(cloud: _Cloud, *, upward: bool) -> list[Point]:
    sparse = [p for p in cloud.points if not p.dense]
    candidates = [Candidate(name=p.name, cost=p.share, quality=p.found.value) for p in sparse]
    by_name = {p.name: p for p in sparse}
    return [by_name[name] for name in pareto_front(candidates, maximise=upward)]


def _axes(points: Sequence[Point], metric: str) -> tuple[Axis, Axis]:
    """The same for all panels of a figure, so that they can be compared."""
    measure = measure_of(metric)
    if measure.best == "high":
        ends = [end for p in points for end in (p.found.low, p.found.high)]
        bounds = (0.0, 1.0) if measure.form.endswith("%") else (0.0, max(ends) * 2)
        form = percent if measure.form.endswith("%") else "{:g}".format
        shares, y = points, linear(ends, measure.head, within=bounds, form=form)
    else:
        shares = [p for p in points if not p.dense]
        values = [p.found.value for p in shares]
        # An interval that reaches down to nothing would stretch the axis without end.
        lows = [p.found.low for p in shares if p.found.low > min(values) / 4]
        highs = [p.found.high for p in shares]
        y = logarithmic([*values, *lows, *highs], f"{measure.head} (log)")
    return logarithmic([p.share for p in shares], _X, form=percent, ceiling=1.12), y


def _listing(cloud: _Cloud, front: Sequence[Point], form: str) -> Listing:
    where = f" ({cloud.title})" if cloud.title else ""
    counts = {p.found.n for p in front}
    # One n for all is said once.
    alike = f", n {counts.pop():,} each" if len(counts) == 1 else ""
    items = tuple((p.name, _said(p, form, count=not alike)) for p in front[:_LISTED])
    some = f"; the first {_LISTED} of {len(front)}" if len(front) > _LISTED else ""
    return Listing(title=f"The front, cheapest first{where}{alike}{some}", items=items)


def _draw(
    cloud: _Cloud,
    front: Sequence[Point],
    metric: str,
    style: Mapping[str, Look],
    axes: tuple[Axis, Axis],
    alt: str,
) -> str:
    sparse = [p for p in cloud.points if not p.dense]
    upward = measure_of(metric).best == "high"
    groups: dict[str, list[Point]] = {}
    for point in sparse:
        groups.setdefault(series_name(point.name), []).append(point)
    drawn = [
        Line(label=label, look=style[label], dots=tuple(_dot(p, metric) for p in group))
        for label, points in groups.items()
        for group in [sorted(points, key=lambda p: p.share)]
    ]
    levels: tuple[tuple[float, str], ...] = ()
    if upward:
        dense = [p for p in cloud.points if p.dense]
        drawn += [Line(label="dense", look=Look(GREY), dots=(_dot(p, metric),)) for p in dense]
        levels = tuple((p.found.value, "dense") for p in dense[:1])
    extra = Extra(
        front=tuple((p.share, p.found.value) for p in front), upward=upward, levels=levels
    )
    return chart(*axes, drawn, alt, extra)


def _dot(point: Point, metric: str) -> Dot:
    form = measure_of(metric).form
    told = f"{point.name}: {_said(point, form)}"
    found = point.found
    return Dot(x=point.share, y=found.value, low=found.low, high=found.high, name=told)


def _said(point: Point, form: str, *, count: bool = True) -> str:
    found = point.found
    value, read = written(found.value, form), written(point.share, ".1%")
    n = f", n {found.n:,}" if count else ""
    return f"{value} ({interval(found, form)}{n}) at {read}"


def _alt(cloud: _Cloud, front: Sequence[Point], title: str, metric: str) -> str:
    measure = measure_of(metric)
    where = f"{title}, {cloud.title}" if cloud.title else title
    values = [(p.name, p.found.value, written(p.found.value, measure.form)) for p in cloud.points]
    ends = f"{measure.head}: {extremes(values, measure.best)}."
    names = ", ".join(f"{p.name} at {written(p.share, '.1%')}" for p in front)
    return alt_text("Chart", where, [ends, f"Pareto front: {names}."], [ends])


def _line(cloud: _Cloud, point: Point, form: str, *, on_front: bool) -> tuple[Cell, ...]:
    return (
        plain(point.name),
        plain(cloud.title),
        plain(point.share, ".1%"),
        sure(point.found, form),
        plain("yes" if on_front else ""),
        plain(point.found.n),
    )
