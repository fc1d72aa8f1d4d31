"""SVG as text: elements, escaped; colours and sizes of letters come from the page's style sheet."""

from html import escape
from typing import Final

# Half the width of a mark, in units of the drawing.
_RADIUS: Final = 4.0
MARKS: Final = ("disc", "square", "triangle", "diamond", "down", "cross", "plus")
DASHES: Final = ("", "6 3", "2 3", "9 3 2 3")


def element(name: str, *children: str, **attributes: object) -> str:
    """An element; children are markup already, attributes are escaped.

    Args:
        name: Of the element.
        *children: Markup.
        **attributes: Their names with "_" for "-", and "class_" for "class"; None leaves one out.

    Returns:
        Markup.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_value(value), quote=True)}"'
        for key, value in attributes.items()
        if value is not None
    )
    inside = "".join(children)
    return f"<{name}{written}>{inside}</{name}>" if inside else f"<{name}{written}/>"


def letters(x: float, y: float, words: str, class_: str = "tick", anchor: str = "start") -> str:
    """A line of text."""
    return element("text", escape(words), class_=class_, x=x, y=y, text_anchor=anchor)


def picture(width: float, height: float, alt: str, *children: str, class_: str = "plot") -> str:
    """A drawing with its name for those who cannot see it."""
    return element(
        "svg",
        *children,
        class_=class_,
        viewBox=f"0 0 {width:g} {height:g}",
        role="img",
        aria_label=alt,
    )


def path(points: "list[tuple[float, float]]", *, closed: bool = False, **attributes: object) -> str:
    """A line through points."""
    steps = "L".join(f"{_value(x)} {_value(y)}" for x, y in points)
    return element("path", d=f"M{steps}{'Z' if closed else ''}", **attributes)


def mark(kind: int, x: float, y: float, **attributes: object) -> str:
    """A mark around a point, told apart from others by its form."""
    name, r = MARKS[kind % len(MARKS)], _RADIUS
    if name == "disc":
        return element("circle", cx=x, cy=y, r=r, **attributes)
    if name == "square":
        side = 2 * r - 1
        return element(
            "rect", x=x - side / 2, y=y - side / 2, width=side, height=side, **attributes
        )
    forms = {
        "triangle": [(0, -r - 0.6), (r + 0.4, r - 0.6), (-r - 0.4, r - 0.6)],
        "down": [(0, r + 0.6), (r + 0.4, -r + 0.6), (-r - 0.4, -r + 0.6)],
        "diamond": [(0, -r - 0.8), (r + 0.8, 0), (0, r + 0.8), (-r - 0.8, 0)],
        "plus": _star(((1.4, 4.6), (1.4, 1.4), (4.6, 1.4))),
        "cross": _star(((0, 2), (2.3, 4.3), (4.3, 2.3), (2, 0))),
    }
    return path([(x + dx, y + dy) for dx, dy in forms[name]], closed=True, **attributes)


def _star(quarter: "tuple[tuple[float, float], ...]") -> "list[tuple[float, float]]":
    """A closed form from its lower right quarter, turned three times."""
    found: list[tuple[float, float]] = []
    for a, b in ((1, 0), (0, 1), (-1, 0), (0, -1)):
        found += [(a * x - b * y, b * x + a * y) for x, y in reversed(quarter)]
    return found


def _value(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.1f}".rstrip("0").rstrip(".") if value else "0"
    return str(value)
