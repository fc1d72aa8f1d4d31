"""The chart: lines, dots with intervals and bands between two axes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, final

from loki_attn.report.canvas import stem
from loki_attn.report.page.axes import Axis
from loki_attn.report.page.svg import DASHES, MARKS, element, letters, mark, path, picture

WIDTH: Final = 380.0
HEIGHT: Final = 272.0
COLOURS: Final = 7
_LEFT, _RIGHT, _TOP, _BOTTOM = 46.0, 14.0, 26.0, 40.0
_LETTER: Final = 6.2
_APART: Final = 13.0
GREY: Final = 0


@final
@dataclass(frozen=True)
class Look:
    """How a series is told apart: number of a colour (0 is grey), form of its mark, its dashes."""

    colour: int
    mark: int = 0
    dash: int = 0


@final
@dataclass(frozen=True, kw_only=True)
class Dot:
    """A measured point; low and high are the ends of its interval."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    name: str = ""


@final
@dataclass(frozen=True, kw_only=True)
class Line:
    """A series of points; band draws intervals as an area; weight is full, faint or bold."""

    label: str
    look: Look
    dots: tuple[Dot, ...]
    band: bool = False
    weight: str = "full"


@final
@dataclass(frozen=True, kw_only=True)
class Extra:
    """What is drawn beside the lines.

    Attributes:
        front: Places of the Pareto front, numbered in this order.
        upward: Whether the front is good at the top; numbers stand where no point can be.
        levels: Heights of reference lines, each with its text.
        crossings: Points with a text at their lower right.
        bare: Whether lines carry no marks, as many or long ones cannot.
    """

    front: tuple[tuple[float, float], ...] = ()
    upward: bool = False
    levels: tuple[tuple[float, str], ...] = ()
    crossings: tuple[tuple[float, float, str], ...] = ()
    bare: bool = False


def looks(labels: Sequence[str]) -> dict[str, Look]:
    """A look per label: a colour for each method, mark and dashes for each variant of it."""
    stems = list(dict.fromkeys(stem(label) for label in labels))
    found: dict[str, Look] = {}
    for label in dict.fromkeys(labels):
        kind = stems.index(stem(label))
        seen = sum(stem(other) == stem(label) for other in found)
        # The mark moves on with the colour too, so that no two methods share one.
        turn = kind // COLOURS
        found[label] = Look(1 + kind % COLOURS, (kind + seen) % len(MARKS), (seen + turn) % 4)
    return found


def chart(x: Axis, y: Axis, lines: Sequence[Line], alt: str, extra: Extra | None = None) -> str:
    """Draw a chart as SVG.

    Args:
        x: The axis along the bottom.
        y: The axis along the left.
        lines: What is drawn, the first at the back.
        alt: What the chart shows, in words.
        extra: A front, levels and crossings.

    Returns:
        Markup of one picture.
    """
    extra = extra or Extra()
    parts = [_grid(x, y)]
    for height, words in extra.levels:
        at = _y(y, height)
        parts.append(path([(_LEFT, at), (WIDTH - _RIGHT, at)], class_="level"))
        parts.append(letters(WIDTH - _RIGHT, at - 4, words, "note", "end"))
    if extra.front:
        parts.append(path(_stairs(x, y, extra), class_="front"))
    parts += [_line(x, y, line) for line in lines]
    if not extra.bare:
        parts += [_marks(x, y, line) for line in lines]
    parts += _numbers(x, y, extra) + [_crossing(x, y, *one) for one in extra.crossings]
    return picture(WIDTH, HEIGHT, alt, *parts)


def swatch(look: Look, *, mark_it: bool = True) -> str:
    """A sample of a look, for a legend."""
    shape = mark(look.mark, 13.0, 7.0, class_=f"mark f{look.colour}") if mark_it else ""
    stroke = path([(0, 7), (26, 7)], class_=f"line k{look.colour}", stroke_dasharray=_dashes(look))
    return element("svg", stroke, shape, class_="swatch", viewBox="0 0 26 14", aria_hidden="true")


def _x(axis: Axis, value: float) -> float:
    return _LEFT + axis.place(value) * (WIDTH - _LEFT - _RIGHT)


def _y(axis: Axis, value: float) -> float:
    return HEIGHT - _BOTTOM - axis.place(value) * (HEIGHT - _TOP - _BOTTOM)


def _grid(x: Axis, y: Axis) -> str:
    parts = []
    bottom, taken = HEIGHT - _BOTTOM, -1e9
    for value, words in y.ticks:
        at = _y(y, value)
        parts.append(path([(_LEFT, at), (WIDTH - _RIGHT, at)], class_="grid"))
        parts.append(letters(_LEFT - 6, at + 4, words, "tick", "end"))
    for value, words in x.ticks:
        at, half = _x(x, value), len(words) * _LETTER / 2
        parts.append(path([(at, bottom), (at, bottom + 4)], class_="stub"))
        at = min(max(at, half), WIDTH - half)
        if at - half > taken:
            parts.append(letters(at, bottom + 17, words, "tick", "middle"))
            taken = at + half + 4
    parts.append(path([(_LEFT, bottom), (WIDTH - _RIGHT, bottom)], class_="base"))
    parts.append(letters(0, 11, y.name, "axis"))
    parts.append(letters(WIDTH - _RIGHT, HEIGHT - 4, x.name, "axis", "end"))
    return "".join(parts)


def _line(x: Axis, y: Axis, line: Line) -> str:
    colour = line.look.colour
    places = [(_x(x, dot.x), _y(y, dot.y)) for dot in line.dots]
    parts = []
    edges = [
        (_x(x, d.x), _y(y, d.low), _y(y, d.high))
        for d in line.dots
        if d.low is not None and d.high is not None
    ]
    if line.band and len(edges) > 1:
        outline = [(at, top) for at, _, top in edges] + [(at, low) for at, low, _ in edges[::-1]]
        parts.append(path(outline, closed=True, class_=f"band f{colour}"))
    else:
        parts += [path([(at, low), (at, top)], class_=f"bar k{colour}") for at, low, top in edges]
    if len(places) > 1:
        parts.append(
            path(
                places, class_=f"line {line.weight} k{colour}", stroke_dasharray=_dashes(line.look)
            )
        )
    return "".join(parts)


def _marks(x: Axis, y: Axis, line: Line) -> str:
    return "".join(
        mark(line.look.mark, _x(x, dot.x), _y(y, dot.y), class_=f"mark f{line.look.colour}")
        if not dot.name
        else element(
            "g",
            element("title", _plain(dot.name)),
            mark(line.look.mark, _x(x, dot.x), _y(y, dot.y), class_=f"mark f{line.look.colour}"),
        )
        for dot in line.dots
    )


def _stairs(x: Axis, y: Axis, extra: Extra) -> list[tuple[float, float]]:
    """The front as steps: up to the next cost, the quality is that of the last."""
    places: list[tuple[float, float]] = []
    for value, quality in extra.front:
        at, height = _x(x, value), _y(y, quality)
        if places:
            places.append((at, places[-1][1]))
        places.append((at, height))
    return [*places, (WIDTH - _RIGHT, places[-1][1])]


def _numbers(x: Axis, y: Axis, extra: Extra) -> list[str]:
    """Numbers on the front, where there is room for one."""
    parts: list[str] = []
    taken: list[tuple[float, float]] = []
    for number, (value, quality) in enumerate(extra.front, 1):
        at = _x(x, value) - 7
        height = _y(y, quality) + (-7 if extra.upward else 14)
        if all(abs(at - a) > _APART or abs(height - h) > _APART for a, h in taken):
            parts.append(letters(at, height, str(number), "number", "end"))
            taken.append((at, height))
    return parts


def _crossing(x: Axis, y: Axis, value: float, height: float, words: str) -> str:
    at, up = _x(x, value), _y(y, height)
    room = at + 8 + len(words) * _LETTER < WIDTH - _RIGHT
    place = letters(
        at + 8 if room else WIDTH - _RIGHT, up + 15, words, "number", "start" if room else "end"
    )
    drop = path([(at, up), (at, HEIGHT - _BOTTOM)], class_="drop")
    return drop + element("circle", class_="ring", cx=at, cy=up, r=4.0) + place


def _dashes(look: Look) -> str | None:
    return DASHES[look.dash % len(DASHES)] or None


def _plain(words: str) -> str:
    return words.replace("&", "&amp;").replace("<", "&lt;")
