"""An empty figure in the house style, and its way into a file."""

import io
import math
import re
from collections.abc import Sequence
from typing import Any, Final

from loki_attn.errors import InputError

# Okabe and Ito's colours, told apart by nearly everyone; markers repeat the message.
COLOURS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DENSE: Final = "#666666"
PANEL_INCHES: Final = (4.6, 3.3)
# One more than colours, so that a colour comes back with another marker.
_MARKERS: Final = "osD^vPX*"
_LINES: Final = ("-", "--", ":", "-.")
_DPI: Final = 130
_WIDE_RANGE: Final = 30
# Rank and number format of the rank planes: variants of a method, not methods.
_VARIANT: Final = re.compile(r"[\s,:](?:rank=\d+|(?:plane_dtype=)?(?:fp|bf|int)\d+)(?=[\s,]|$)")


def canvas(panels: int, size: tuple[float, float] | None = None) -> tuple[Any, list[Any]]:
    """A figure and its axes, side by side.

    Raises:
        InputError: If matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(
            f"Figures need matplotlib ({error}); run: pip install 'loki-attn[report]', or leave "
            "the figures out."
        ) from error
    size = size or (max(panels * PANEL_INCHES[0], 6.0), PANEL_INCHES[1] + 0.7)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(visible=True, alpha=0.25)
        ax.set_axisbelow(True)
    return figure, axes


def png(figure: Any, title: str) -> bytes:
    """The picture under its title."""
    figure.suptitle(title, fontsize=11)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    return buffer.getvalue()


def look(at: int) -> tuple[str, str]:
    """Colour and marker of the n-th thing, no two alike before all pairs are spent."""
    return _nth(COLOURS, at), _nth(_MARKERS, at)


def stem(label: str) -> str:
    """A label without rank and number format."""
    return _VARIANT.sub("", label) or label


def styles(labels: Sequence[str]) -> list[tuple[str, str, str]]:
    """Colour, marker and line of each: a colour per method, marker and line per variant of it."""
    stems = list(dict.fromkeys(stem(label) for label in labels))
    if len(stems) in {1, len(labels)}:
        return [(*look(at), "-") for at in range(len(labels))]
    variants = list(dict.fromkeys(_variant(label) for label in labels))
    return [
        (
            _nth(COLOURS, stems.index(stem(label))),
            _nth(_MARKERS, variants.index(_variant(label))),
            _nth(_LINES, variants.index(_variant(label))),
        )
        for label in labels
    ]


def scale_of(values: Sequence[float], *, log: bool = False) -> tuple[str, dict[str, Any]]:
    """The axis scale on which all values can be told apart, and its options."""
    sizes = [abs(value) for value in values if value]
    if not sizes or (not log and max(sizes) <= _WIDE_RANGE * min(sizes)):
        return "linear", {}
    if min(values) > 0:
        return "log", {"nonpositive": "clip"}
    # A power of ten, so that no tick falls between it and zero.
    smallest = max(min(sizes), max(sizes) / 1000)
    return "symlog", {"linthresh": 10.0 ** math.floor(math.log10(smallest))}


def apply_scale(ax: Any, which: str, values: Sequence[float], *, log: bool = False) -> str:
    """Scale the x or y axis for its values, with ticks that can be read; the scale's name."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    kind, options = scale_of(values, log=log)
    if kind != "linear":
        (ax.set_xscale if which == "x" else ax.set_yscale)(kind, **options)
    if kind == "log":
        axis = ax.xaxis if which == "x" else ax.yaxis
        # Within a decade or so, powers of ten alone would label one tick or none.
        wide = max(values) > _WIDE_RANGE * min(values)
        axis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0)))
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(NullFormatter())
    elif kind == "symlog":
        (ax.xaxis if which == "x" else ax.yaxis).set_major_formatter(StrMethodFormatter("{x:g}"))
    return kind


def _variant(label: str) -> str:
    return "".join(_VARIANT.findall(label))


def _nth(items: Sequence[str], at: int) -> str:
    return items[at % len(items)]
