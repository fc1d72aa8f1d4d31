"""Speed against context: what a decode step takes as the context grows."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from loki_attn.report.intervals import number
from loki_attn.report.page.axes import doublings, duration, logarithmic, tokens
from loki_attn.report.page.parts import Figure, Key, Panel, Table, anchor, plain
from loki_attn.report.page.plot import GREY, Dot, Line, Look, chart, looks, swatch
from loki_attn.report.rows import Section
from loki_attn.report.words import alt_text

_Row = Mapping[str, Any]

_TASKS: Final = {
    "bench decode": ("Speed of a decode step", "one layer, one token"),
    "bench generate": ("Speed of generation", "whole model, one token"),
}
_DENSE: Final = {"torch", "dense"}
_DENSE_MODELS: Final = {"attached dense", "stock dynamic", "stock static"}
_SAME: Final = ("batch", "dtype", "threads")


def speed_figures(found: Sequence[Section]) -> list[Figure]:
    """Time against context, a figure for each shape."""
    figures = []
    for section in found:
        if section.task not in _TASKS:
            continue
        groups: dict[str, list[_Row]] = {}
        for row in section.rows:
            if row["settings"].get("part") is None and number(row["settings"].get("context")):
                groups.setdefault(_conditions(row), []).append(row)
        kept = {said: rows for said, rows in groups.items() if len(_contexts(rows)) > 1}
        if kept:
            figures.append(_figure(section, kept))
    return figures


def is_dense_step(row: _Row) -> bool:
    """Whether a timed row reads all of the cache."""
    kind = row["settings"].get("kind")
    return kind in _DENSE if kind else str(row["contender"]) in _DENSE_MODELS


def curve_names(rows: Sequence[_Row]) -> dict[int, str]:
    """By `id` of a row its contender's name, without a k that grows with the context.

    The k stays where a context has several, or all contexts have one: there it tells something.
    """
    ks: dict[tuple[object, object], dict[float, set[object]]] = {}
    for row in rows:
        settings = row["settings"]
        own = ks.setdefault((settings.get("kind"), settings.get("plane")), {})
        own.setdefault(_context(row), set()).add(settings.get("k"))
    grows = {
        kind: len(set().union(*own.values())) > 1 and all(len(found) == 1 for found in own.values())
        for kind, own in ks.items()
    }
    names = {}
    for row in rows:
        settings, name = row["settings"], str(row["contender"])
        if grows[settings.get("kind"), settings.get("plane")]:
            name = name.replace(f" k={settings.get('k')}", "")
        names[id(row)] = name
    return names


def _figure(section: Section, kept: Mapping[str, Sequence[_Row]]) -> Figure:
    head, what = _TASKS[section.task]
    title = f"{head}: {section.model}"
    names = {at: name for rows in kept.values() for at, name in curve_names(rows).items()}
    measured = sum(map(len, kept.values()))
    kept = {said: _curves(rows, names) for said, rows in kept.items()}
    every = [row for rows in kept.values() for row in rows]
    short = (
        " Contenders timed at one context are in the table only." if len(every) < measured else ""
    )
    dense = list(dict.fromkeys(names[id(row)] for row in every if is_dense_step(row)))
    style = looks([names[id(row)] for row in every if not is_dense_step(row)])
    style |= {name: Look(GREY, at + 1, at) for at, name in enumerate(dense)}
    panels = []
    for said, rows in kept.items():
        shown = said if len(kept) > 1 else ""
        panels.append(Panel(title=shown, svg=_draw(rows, names, style, f"{title}, {said}", what)))
    caption = (
        f"Median time of {what}, on two logarithmic axes; bands reach from the 20th to the 80th "
        f"percentile. Grey reads the whole cache."
        f"{short}{_alike(kept)}"
    )
    return Figure(
        name=anchor(section.task, section.model),
        title=title,
        caption=caption,
        alt=alt_text("Line chart", title, [caption], [caption]),
        panels=tuple(panels),
        keys=tuple(Key(sample=swatch(look), name=name) for name, look in style.items()),
        data=Table(
            title=f"{title}: the data",
            header=("contender", "context, tokens", "median, µs", "20th to 80th", "n"),
            lines=tuple(
                (
                    plain(row["contender"]),
                    plain(row["settings"]["context"]),
                    plain(row["metrics"].get("median_us"), ",.1f"),
                    plain(f"{row['metrics']['p20_us']:,.1f} to {row['metrics']['p80_us']:,.1f}"),
                    plain(row["n"]),
                )
                for row in every
            ),
        ),
    )


def _curves(rows: Sequence[_Row], names: Mapping[int, str]) -> list[_Row]:
    """Rows of contenders that were timed at two contexts or more."""
    contexts: dict[str, set[float]] = {}
    for row in rows:
        contexts.setdefault(names[id(row)], set()).add(_context(row))
    return [row for row in rows if len(contexts[names[id(row)]]) > 1]


def _alike(kept: Mapping[str, object]) -> str:
    """Conditions that all panels share; several stand above their panels."""
    said = next(iter(kept))
    return f" {said[:1].upper()}{said[1:]}." if said and len(kept) == 1 else ""


def _draw(
    rows: Sequence[_Row],
    names: Mapping[int, str],
    style: Mapping[str, Look],
    title: str,
    what: str,
) -> str:
    groups: dict[str, list[_Row]] = {}
    for row in rows:
        groups.setdefault(names[id(row)], []).append(row)
    lines = [
        Line(
            label=name,
            look=style[name],
            dots=tuple(_dot(row, name) for row in sorted(group, key=_context)),
            band=True,
        )
        # Dense is drawn first, so that it lies behind.
        for name, group in sorted(groups.items(), key=lambda item: style[item[0]].colour != GREY)
    ]
    heights = [float(row["metrics"][n]) for row in rows for n in ("p20_us", "p80_us")]
    longest = max(_contexts(rows))
    last = {
        names[id(row)]: float(row["metrics"]["median_us"])
        for row in rows
        if _context(row) == longest
    }
    said = ", ".join(f"{name} {duration(value)}" for name, value in last.items())
    quickest = min(last, key=lambda name: last[name])
    short = f"Fastest at {tokens(longest)} tokens: {quickest}, {duration(last[quickest])}."
    alt = alt_text("Line chart", title, [f"At {tokens(longest)} tokens: {said}."], [short])
    x = doublings(sorted(_contexts(rows)), "context, tokens")
    return chart(x, logarithmic(heights, f"time: {what}", form=duration), lines, alt)


def _dot(row: _Row, name: str) -> Dot:
    metrics = row["metrics"]
    told = f"{name}, {tokens(_context(row))} tokens: {duration(metrics['median_us'])}"
    low, high = float(metrics["p20_us"]), float(metrics["p80_us"])
    return Dot(x=_context(row), y=float(metrics["median_us"]), low=low, high=high, name=told)


def _conditions(row: _Row) -> str:
    settings = row["settings"]
    said = {"batch": "batch {}", "dtype": "{}", "threads": "{} threads"}
    return ", ".join(said[n].format(settings[n]) for n in _SAME if settings.get(n) is not None)


def _contexts(rows: Sequence[_Row]) -> set[float]:
    return {_context(row) for row in rows}


def _context(row: _Row) -> float:
    return float(row["settings"]["context"])
