"""Heat maps: cells in eleven steps of a colour ramp, light or dark as the page is."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, final

from loki_attn.report.page.svg import element, letters, picture

STEPS: Final = 10
_RIGHT, _TOP, _BOTTOM = 4.0, 4.0, 34.0
_LETTER: Final = 6.4
_GAP: Final = 1.0
_LINE: Final = 15.0
_ROOM_FOR_TEXT: Final = (22.0, 14.0)


@final
@dataclass(frozen=True, kw_only=True)
class Tile:
    """One cell: how far up the ramp it is (0 to 1), what it says, what pointing at it tells."""

    level: float
    words: str = ""
    told: str = ""


@final
@dataclass(frozen=True, kw_only=True)
class HeatMap:
    """A grid of cells.

    Attributes:
        columns: Texts along the bottom.
        lines: Texts along the left.
        tiles: By line and column; None where nothing was measured.
        x_name: What the columns are.
        y_name: What the lines are.
        ramp: "q" for amounts, "s" for scores.
    """

    columns: Sequence[str]
    lines: Sequence[str]
    tiles: Sequence[Sequence[Tile | None]]
    x_name: str
    y_name: str
    ramp: str = "q"


def step_of(level: float) -> int:
    """The step of the ramp that shows a level."""
    return round(min(max(level, 0.0), 1.0) * STEPS)


def heat_map(found: HeatMap, alt: str, *, width: float = 380.0, tallest: float = 190.0) -> str:
    """Draw a heat map as SVG.

    Args:
        found: What it shows.
        alt: The same in words.
        width: Of the drawing, in its own units.
        tallest: Height of all cells together, at most.

    Returns:
        Markup of one picture.
    """
    # The name of the lines stands at their foot, where no text is turned on its side.
    left = 6 + _LETTER * max(len(words) for words in (*found.lines, found.y_name))
    wide = (width - left - _RIGHT) / len(found.columns)
    tall = min(tallest / len(found.lines), 26.0)
    every = max(math.ceil(_LINE / tall - 0.2), 1)
    parts = []
    for at, words in enumerate(found.lines):
        if at % every == 0:
            parts.append(letters(left - 5, _TOP + tall * (at + 0.5) + 4, words, "tick", "end"))
        for across, tile in enumerate(found.tiles[at]):
            place = (left + across * wide, _TOP + at * tall)
            parts.append(_tile(tile, place, (wide, tall), found.ramp))
    bottom = _TOP + tall * len(found.lines)
    parts.append(letters(left - 5, bottom + 14, found.y_name, "axis", "end"))
    parts += _columns(found.columns, left, wide, bottom + 14)
    parts.append(letters(width - _RIGHT, bottom + 29, found.x_name, "axis", "end"))
    return picture(width, bottom + _BOTTOM, alt, *parts)


def _tile(
    tile: Tile | None, place: tuple[float, float], size: tuple[float, float], ramp: str
) -> str:
    gap = _GAP if min(size) > 6 else 0.3
    kind = f"{ramp}{step_of(tile.level)}" if tile else "none"
    box = element(
        "rect",
        *(
            [element("title", tile.told.replace("&", "&amp;").replace("<", "&lt;"))]
            if tile and tile.told
            else []
        ),
        class_=f"tile {kind}",
        x=place[0],
        y=place[1],
        width=size[0] - gap,
        height=size[1] - gap,
        rx=1.5 if gap == _GAP else None,
    )
    if not tile or not tile.words or size[0] < _ROOM_FOR_TEXT[0] or size[1] < _ROOM_FOR_TEXT[1]:
        return box
    x, y = place[0] + size[0] / 2, place[1] + size[1] / 2 + 4
    return box + letters(x, y, tile.words, f"intile {kind}", "middle")


def _columns(words: Sequence[str], left: float, wide: float, y: float) -> list[str]:
    widest = max(len(text) for text in words) * _LETTER + 6
    # Round distances are easier to count with: 1, 2, 5, 10.
    every = next((n for n in (1, 2, 5, 10, 20, 50) if n * wide >= widest), 100)
    return [
        letters(left + wide * (at + 0.5), y, text, "tick", "middle")
        for at, text in enumerate(words)
        if at % every == 0
    ]
