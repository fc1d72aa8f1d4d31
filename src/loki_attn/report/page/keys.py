"""Keys: how many coordinates their variance needs, per layer and KV head."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from loki_attn.report.intervals import number
from loki_attn.report.page.axes import Axis, linear
from loki_attn.report.page.heat import HeatMap, Tile, heat_map
from loki_attn.report.page.parts import Cell, Figure, Key, Panel, Ramp, Table, anchor, plain
from loki_attn.report.page.plot import GREY, Dot, Extra, Line, Look, chart, looks, swatch
from loki_attn.report.rows import Section, differing, labels_of
from loki_attn.report.words import alt_text

_Row = Mapping[str, Any]
_Grid = list[list[float]]

_SHARES: Final = (0.5, 0.9, 0.99)
_SIDES: Final = {"post": "after RoPE", "pre": "before RoPE"}
_OLD: Final = (("rank90_pre", "before RoPE"), ("rank90_post", "after RoPE"))
_RANK: Final = "rank at 90 %"


def key_figures(found: Sequence[Section]) -> list[Figure]:
    """The rank heat map, the spectra, and ranks per layer of rows that keep no more than these."""
    spectra = [section for section in found if section.task == "spectrum"]
    ranks = [section for section in found if section.task in {"ranks", "calibration"}]
    figures = [figure for s in spectra for figure in (*_rank_map(s), *_spectra(s))]
    return figures + [figure for s in ranks for figure in _rank_lines(s)]


def _rank_map(section: Section) -> list[Figure]:
    kept = [(row, grid) for row in section.rows if (grid := _grid(row, "rank_at_90"))]
    if not kept:
        return []
    values = [value for _, grid in kept for line in grid for value in line]
    low, high = min(values), max(values)
    panels, lines = [], []
    for row, grid in kept:
        title, layers = _title(row, section), _layers(row, len(grid))
        tiles = [
            [
                Tile(
                    level=(grid[at][head] - low) / ((high - low) or 1),
                    words=f"{grid[at][head]:g}",
                    told=f"layer {layer}, KV head {head}: {grid[at][head]:g}",
                )
                for at, layer in enumerate(layers)
            ]
            for head in range(len(grid[0]))
        ]
        shown = HeatMap(
            columns=layers,
            lines=[str(head) for head in range(len(grid[0]))],
            tiles=tiles,
            x_name="layer",
            y_name="KV head",
        )
        panels.append(Panel(title=title, svg=heat_map(shown, _rank_alt(row, grid, title))))
        lines += [
            (plain(title), plain(int(layer)), *(plain(value) for value in grid[at]))
            for at, layer in enumerate(layers)
        ]
    heads = max(len(grid[0]) for _, grid in kept)
    dims = sorted({f"{row['metrics'].get('head_dim', '?')}" for row, _ in kept})
    caption = (
        "How many coordinates of a centred key hold 90 % of its variance, by layer and KV head; "
        f"head_dim is {', '.join(dims)}. The fewer, the less a low-rank score loses."
    )
    return [
        Figure(
            name=anchor("rank-map"),
            title="Rank of the keys",
            caption=caption,
            alt=alt_text("Heat map", "Rank of the keys", [caption], [caption]),
            panels=tuple(panels),
            ramp=Ramp(kind="q", low=f"{low:g} coordinates", high=f"{high:g}"),
            data=Table(
                title="Rank of the keys: the data",
                header=("keys", "layer", *(f"KV head {head}" for head in range(heads))),
                lines=tuple(_filled(line, 2 + heads) for line in lines),
            ),
        )
    ]


def _rank_alt(row: _Row, grid: _Grid, title: str) -> str:
    flat = [(value, at, head) for at, line in enumerate(grid) for head, value in enumerate(line)]
    layers = _layers(row, len(grid))
    (low, a, i), (high, b, j) = min(flat), max(flat)
    mean = sum(value for value, *_ in flat) / len(flat)
    said = (
        f"{len(grid)} layers by {len(grid[0])} KV heads; mean {mean:.1f}, lowest {low:g} in layer "
        f"{layers[a]} head {i}, highest {high:g} in layer {layers[b]} head {j}."
    )
    return alt_text("Heat map", f"Rank of the keys, {title}", [said], [said])


def _spectra(section: Section) -> list[Figure]:
    kept = [(row, grid) for row in section.rows if (grid := _grid(row, "cumulative"))]
    if not kept:
        return []
    panels, lines = [], []
    for row, grid in kept:
        title = _title(row, section)
        mean = [sum(column) / len(column) for column in zip(*grid, strict=True)]
        reached = [
            (share, next((at for at, y in enumerate(mean, 1) if y >= share), len(mean)))
            for share in _SHARES
        ]
        drawn = [Line(label="", look=Look(1), dots=_curve(line), weight="faint") for line in grid]
        said = ", ".join(f"{share:.0%} at coordinate {at}" for share, at in reached)
        alt = alt_text(
            "Line chart", f"Spectra of the keys, {title}", [f"Mean over layers: {said}."], [said]
        )
        panels.append(Panel(title=title, svg=_spectrum(drawn, mean, reached, alt)))
        for at, line in enumerate(grid):
            needed = (next((i for i, y in enumerate(line, 1) if y >= s), None) for s in _SHARES)
            layer = _layers(row, len(grid))[at]
            lines.append((plain(title), plain(int(layer)), *(plain(one) for one in needed)))
    caption = (
        "Share of the variance of the centred keys in their leading coordinates: a faint line for "
        "each layer, a bold one for their mean; dotted, what 50, 90 and 99 % of it take."
    )
    return [
        Figure(
            name=anchor("spectra"),
            title="Spectra of the keys",
            caption=caption,
            alt=alt_text("Line chart", "Spectra of the keys", [caption], [caption]),
            panels=tuple(panels),
            data=Table(
                title="Spectra of the keys: coordinates needed, by layer",
                header=(
                    "keys",
                    "layer",
                    *(f"for {share:.0%} of the variance" for share in _SHARES),
                ),
                lines=tuple(lines),
            ),
        )
    ]


def _spectrum(
    drawn: Sequence[Line], mean: Sequence[float], reached: Sequence[tuple[float, int]], alt: str
) -> str:
    ticks = ((0.0, "0 %"), *((share, f"{share:.0%}".replace("%", " %")) for share in _SHARES))
    y = Axis(name="cumulative share of variance", low=0.0, high=1.0, ticks=ticks)
    places = linear([0.0, float(len(mean))], "coordinates", within=(0.0, float(len(mean))))
    whole = Line(label="mean", look=Look(GREY), dots=_curve(mean), weight="bold")
    crossings = tuple((float(at), mean[at - 1], str(at)) for _, at in reached)
    return chart(places, y, [*drawn, whole], alt, Extra(crossings=crossings, bare=True))


def _curve(values: Sequence[float]) -> tuple[Dot, ...]:
    return (Dot(x=0.0, y=0.0), *(Dot(x=float(at), y=y) for at, y in enumerate(values, 1)))


def _rank_lines(section: Section) -> list[Figure]:
    """Rank per layer, of rows that keep a mean over heads."""
    names = labels_of(section.rows)
    apart = () if len(set(names)) == len(names) else section.varying
    labels = [
        " ".join(filter(None, (name, differing(row, apart))))
        for name, row in zip(names, section.rows, strict=True)
    ]
    style = looks(labels)
    panels, lines = [], []
    for title, curves in _rank_curves(section, labels):
        values = [value for _, curve in curves for value in curve]
        y = linear([0.0, *values], _RANK, within=(0.0, max(values) * 1.5))
        longest = max(len(curve) for _, curve in curves)
        x = linear([0.0, longest - 1.0], "layer", within=(0.0, max(longest - 1.0, 1.0)))
        drawn = [
            Line(
                label=label,
                look=style[label],
                dots=tuple(Dot(x=float(at), y=value) for at, value in enumerate(curve)),
            )
            for label, curve in curves
        ]
        said = "; ".join(f"{label}: {min(c):.0f} to {max(c):.0f}" for label, c in curves)
        alt = alt_text("Line chart", f"Rank of the keys per layer, {title}", [said], [said])
        panels.append(Panel(title=title, svg=chart(x, y, drawn, alt, Extra(bare=True))))
        lines += [
            (plain(label), plain(title), plain(at), plain(value, ".1f"))
            for label, curve in curves
            for at, value in enumerate(curve)
        ]
    if not panels:
        return []
    caption = "Coordinates that hold 90 % of the variance of the keys, mean over the KV heads."
    return [
        Figure(
            name=anchor(section.task, "per-layer"),
            title="Rank of the keys per layer",
            caption=caption,
            alt=alt_text("Line chart", "Rank of the keys per layer", [caption], [caption]),
            panels=tuple(panels),
            keys=tuple(
                Key(sample=swatch(look, mark_it=False), name=label) for label, look in style.items()
            ),
            data=Table(
                title="Rank of the keys per layer: the data",
                header=("keys", "side", "layer", _RANK),
                lines=tuple(lines),
            ),
        )
    ]


def _rank_curves(
    section: Section, labels: Sequence[str]
) -> list[tuple[str, list[tuple[str, list[float]]]]]:
    """Titles of panels, and in each the curve of every row that has one."""
    calibration = section.task == "calibration"
    wanted = (("", ""),) if calibration else _OLD
    panels = []
    for name, title in wanted:
        curves = [
            (label, [float(value) for value in found])
            for label, row in zip(labels, section.rows, strict=True)
            if isinstance(found := _per_layer(row, name), list)
            and found
            and all(map(_is_number, found))
        ]
        if curves:
            panels.append((title, curves))
    return panels


def _per_layer(row: _Row, name: str) -> object:
    """A metric's list over the layers, where this kind of row keeps it."""
    if name:
        return row["metrics"].get(f"{name}_layers")
    layers = row["metrics"].get("layers")
    return layers.get("rank_at_90") if isinstance(layers, Mapping) else None


def _grid(row: _Row, metric: str) -> _Grid | None:
    """A metric's lists, one per layer; None unless they are of equal length and hold numbers."""
    found = row["metrics"].get(metric)
    if not isinstance(found, list) or not all(isinstance(line, list) and line for line in found):
        return None
    even = len({len(line) for line in found}) == 1
    return found if even and all(_is_number(v) for line in found for v in line) else None


def _layers(row: _Row, count: int) -> list[str]:
    index = row["metrics"].get("index")
    fits = isinstance(index, list) and len(index) == count
    return [str(at) for at in (index if fits and index else range(count))]


def _title(row: _Row, section: Section) -> str:
    side = str(row["settings"].get("side", ""))
    others = [name for name in section.varying if name != "side"]
    parts = (_SIDES.get(side, side), differing(row, others))
    name = row["contender"] if len({r["contender"] for r in section.rows}) > 1 else ""
    words = ", ".join(part for part in (*parts,) if part)
    return words if words or not name else str(name)


def _filled(line: Sequence[Cell], width: int) -> tuple[Cell, ...]:
    return (*line, *([plain(None)] * (width - len(line))))


def _is_number(value: object) -> bool:
    return number(value) is not None
