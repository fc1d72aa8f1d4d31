"""Needle maps: what is found at which depth of how long a text, a small map per contender."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from loki_attn.report.intervals import Estimate, estimate, number, share
from loki_attn.report.page.axes import tokens
from loki_attn.report.page.heat import HeatMap, Tile, heat_map
from loki_attn.report.page.parts import (
    Figure,
    Panel,
    Ramp,
    Table,
    anchor,
    interval,
    plain,
    sure,
    written,
)
from loki_attn.report.page.quality import pooled
from loki_attn.report.rows import Section, differing, labels_of
from loki_attn.report.words import alt_text

_Row = Mapping[str, Any]
# By depth and length.
_Cells = dict[tuple[float, int], Estimate]

_SMALL: Final = 190.0
_TALLEST: Final = 132.0
_OWN: Final = ("kind", "length_tokens")
_FORM: Final = ".0%"


def needle_figures(found: Sequence[Section]) -> list[Figure]:
    """A figure for each kind of needle."""
    figures = []
    for section in found:
        if section.task != "needle":
            continue
        kinds = dict.fromkeys(str(row["settings"].get("kind", "")) for row in section.rows)
        for kind in kinds:
            rows = [r for r in section.rows if str(r["settings"].get("kind", "")) == kind]
            figures += _figure(section, kind, rows)
    return figures


def _figure(section: Section, kind: str, rows: Sequence[_Row]) -> list[Figure]:
    others = [name for name in section.varying if name not in _OWN]
    groups: dict[str, list[_Row]] = {}
    for label, row in zip(labels_of(rows), rows, strict=True):
        groups.setdefault(" ".join(filter(None, (label, differing(row, others)))), []).append(row)
    maps = {label: cells for label, group in groups.items() if (cells := _cells(group))}
    if not maps:
        return []
    lengths = sorted({length for cells in maps.values() for _, length in cells})
    depths = sorted({depth for cells in maps.values() for depth, _ in cells})
    title = f"Needles: {kind}" if kind else "Needles"
    panels, lines = [], []
    for label, cells in maps.items():
        whole = [e for row in groups[label] if (e := estimate(row, "score"))]
        mean = pooled(whole) if whole else None
        said = (
            f"{written(mean.value, _FORM)} ({interval(mean, _FORM)}, n {mean.n:,})" if mean else ""
        )
        alt = _alt(title, label, said, cells)
        panels.append(Panel(title=label, note=said, svg=_draw(cells, depths, lengths, alt)))
        lines += [
            (
                plain(label),
                plain(length),
                plain(depth, ".0%"),
                sure(one, _FORM),
                plain(one.n),
            )
            for (depth, length), one in sorted(cells.items(), key=lambda item: item[0][::-1])
        ]
    caption = (
        "Share of needles found by how deep in the text the needle lies (down) and how long the "
        "text is (across). Each cell says how many of how many; beside the name stands the mean "
        "with its 95 % interval."
    )
    return [
        Figure(
            name=anchor("needle", kind),
            title=title,
            caption=caption,
            alt=alt_text("Heat maps", title, [caption], [caption]),
            panels=tuple(panels),
            small=True,
            ramp=Ramp(kind="s", low="none found", high="all found"),
            data=Table(
                title=f"{title}: the data",
                header=("contender", "length, tokens", "depth", "found", "n"),
                lines=tuple(lines),
            ),
        )
    ]


def _cells(rows: Sequence[_Row]) -> _Cells:
    cells: _Cells = {}
    for row in rows:
        length = int(number(row["settings"].get("length_tokens")) or 0)
        by_depth = row["metrics"].get("by_depth")
        for entry in by_depth if isinstance(by_depth, list) else ():
            if found := _cell(entry):
                cells[float(entry["depth"]), length] = found
    return cells


def _cell(entry: object) -> Estimate | None:
    """A cell's share with its interval: as stated, or from how many were found."""
    if not isinstance(entry, Mapping) or number(entry.get("depth")) is None:
        return None
    score, n = number(entry.get("score")), number(entry.get("n"))
    if score is None or not n or not 0 <= score <= 1:
        return None
    low, high = number(entry.get("score_low")), number(entry.get("score_high"))
    if low is not None and high is not None:
        return Estimate(value=score, low=low, high=high, n=int(n), how="")
    return share(score, int(n))


def _draw(cells: _Cells, depths: Sequence[float], lengths: Sequence[int], alt: str) -> str:
    shown = HeatMap(
        columns=[tokens(length) for length in lengths],
        lines=[f"{depth:.0%}" for depth in depths],
        tiles=[[_tile(cells, depth, length) for length in lengths] for depth in depths],
        x_name="length, tokens",
        y_name="depth",
        ramp="s",
    )
    return heat_map(shown, alt, width=_SMALL, tallest=_TALLEST)


def _tile(cells: _Cells, depth: float, length: int) -> Tile | None:
    one = cells.get((depth, length))
    if one is None:
        return None
    hits = one.value * one.n
    exact = abs(hits - round(hits)) < 1e-6
    told = f"{length:,} tokens, depth {depth:.0%}: {written(one.value, _FORM)}"
    return Tile(
        level=one.value,
        words=f"{round(hits)}/{one.n}" if exact else "",
        told=f"{told} ({interval(one, _FORM)}, n {one.n})",
    )


def _alt(title: str, label: str, said: str, cells: _Cells) -> str:
    worst = min(cells, key=lambda place: cells[place].value)
    value = cells[worst].value
    short = f"{label}: {said}." if said else f"{label}."
    where = f"at depth {worst[0]:.0%} of {worst[1]:,} tokens"
    full = "All found." if value == 1 else f"Worst {written(value, _FORM)} {where}."
    return alt_text("Heat map", title, [short, full], [short])
