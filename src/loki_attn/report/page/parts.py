"""What a page is made of: figures and tables, still without a template."""

import re
from dataclasses import dataclass
from typing import Final, final

from loki_attn.report.intervals import Estimate

MISSING: Final = "\N{EN DASH}"
_NO_NAME: Final = re.compile(r"[^a-z0-9]+")


@final
@dataclass(frozen=True, kw_only=True)
class Cell:
    """A cell of a table.

    Attributes:
        text: What it says.
        note: The interval, in smaller letters.
        order: What it is sorted by; None for nothing measured, always last.
        best: Whether it is the best of the sparse contenders.
        shade: Class of its background, or none.
    """

    text: str
    note: str = ""
    order: float | str | None = None
    best: bool = False
    shade: str = ""


@final
@dataclass(frozen=True, kw_only=True)
class Table:
    """A table; the first cell of each line names it."""

    title: str
    header: tuple[str, ...]
    lines: tuple[tuple[Cell, ...], ...]
    matrix: bool = False

    @property
    def kinds(self) -> tuple[str, ...]:
        """Of each column "number" or "text", which says to which side it is set."""
        columns = zip(*self.lines, strict=True)
        return tuple(
            "text" if any(isinstance(cell.order, str) for cell in column) else "number"
            for column in columns
        )


@final
@dataclass(frozen=True, kw_only=True)
class Panel:
    """One picture of a figure, under its own small title and a note."""

    title: str
    svg: str
    note: str = ""


@final
@dataclass(frozen=True, kw_only=True)
class Key:
    """One entry of a legend: a sample, as markup, and its name."""

    sample: str
    name: str


@final
@dataclass(frozen=True, kw_only=True)
class Listing:
    """A numbered list beside a figure, such as the members of a front."""

    title: str
    items: tuple[tuple[str, str], ...]


@final
@dataclass(frozen=True, kw_only=True)
class Ramp:
    """The legend of a heat map: its ramp and the texts of its ends."""

    kind: str
    low: str
    high: str


@final
@dataclass(frozen=True, kw_only=True)
class Figure:
    """A figure with all that a reader who cannot see it needs.

    Attributes:
        name: Its anchor.
        title: One line.
        caption: What is drawn and how to read it.
        alt: What it shows, in words and figures.
        panels: Its pictures; none for a matrix.
        small: Whether the panels are small multiples.
        keys: Its legend.
        ramp: The legend of a heat map.
        listings: Numbered lists.
        matrix: The figure itself, where it is a table of shaded cells.
        data: What is drawn.
    """

    name: str
    title: str
    caption: str
    alt: str
    data: Table
    panels: tuple[Panel, ...] = ()
    small: bool = False
    keys: tuple[Key, ...] = ()
    ramp: Ramp | None = None
    listings: tuple[Listing, ...] = ()
    matrix: Table | None = None


def anchor(*words: str) -> str:
    """A name for a place on the page."""
    return _NO_NAME.sub("-", " ".join(words).lower()).strip("-")


def plain(value: object, form: str = "") -> Cell:
    """A cell that needs no interval: a text, or a number that was counted."""
    if value is None or value == "":
        return Cell(text=MISSING)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return Cell(text=written(float(value), form) if form else f"{value:,}", order=float(value))
    return Cell(text=str(value), order=str(value))


def sure(found: Estimate | None, form: str, *, best: bool = False, shade: str = "") -> Cell:
    """A cell with its interval; nothing where there is none."""
    if found is None:
        return Cell(text=MISSING)
    return Cell(
        text=written(found.value, form),
        note=interval(found, form),
        order=found.value,
        best=best,
        shade=shade,
    )


def interval(found: Estimate, form: str) -> str:
    """The interval, as written under its number."""
    low, high = (
        written(end, form).removesuffix("\N{NO-BREAK SPACE}%") for end in (found.low, found.high)
    )
    return f"{low} to {high}"


def written(value: float, form: str) -> str:
    """A number; a minus is a minus, and a per-cent sign stands apart."""
    return format(value, form).replace("-", "\N{MINUS SIGN}").replace("%", "\N{NO-BREAK SPACE}%")
