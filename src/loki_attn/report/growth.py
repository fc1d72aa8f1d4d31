"""The growth figure: what a decode step takes as the context grows, on two logarithmic axes."""

import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from loki_attn.errors import InputError
from loki_attn.report.canvas import DENSE, apply_scale, canvas, look

_Row = Mapping[str, Any]

_SIZE_INCHES: Final = (7.2, 4.6)
_FORMATS: Final = (".svg", ".png")
_GREY_LINES: Final = ("-", "--", ":", "-.")
_PART_ALPHA: Final = 0.55
_NEEDED: Final = ("contender", "kind", "context", "median_us", "p20_us", "p80_us", "shape")
# An SVG names its parts by this instead of at random, so that equal rows give an equal file.
_SVG_SALT: Final = "loki-attn"


def draw_growth(rows: Iterable[_Row], out: Path) -> Path:
    """Draw time against context from rows of "bench decode".

    Dense contenders are grey, choosing ones coloured, the parts of a step thin in the colour of the
    step; the bands reach from the 20th to the 80th percentile.

    Args:
        rows: Rows as `loki-attn bench decode` writes them, one shape, batch and dtype.
        out: The picture, `.svg` or `.png`.

    Returns:
        The picture.

    Raises:
        InputError: If there are no rows, a row lacks something, they are of several shapes, the
            name ends otherwise, or matplotlib is missing.
    """
    found = _checked(rows)
    if out.suffix not in _FORMATS:
        raise InputError(f"The figure is a .svg or a .png file; got {str(out)!r}.")
    figure, (ax,) = canvas(1, _SIZE_INCHES)
    curves = _curves(found)
    heights = []
    for label, look_of, points in curves:
        contexts, medians, lows, highs = zip(*points, strict=True)
        ax.plot(contexts, medians, label=label, **look_of)
        ax.fill_between(contexts, lows, highs, color=look_of["color"], alpha=0.12, linewidth=0)
        heights += [*lows, *highs]
    places = sorted({int(row["context"]) for row in found})
    ax.set_xscale("log", base=2)
    ax.set_xticks(places, [_tokens(place) for place in places])
    ax.minorticks_off()
    apply_scale(ax, "y", heights, log=True)
    ax.set_xlabel("context, tokens")
    ax.set_ylabel("one layer, one token: microseconds")
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    ax.set_title(_title(found[0]), fontsize=10)
    return _save(figure, out)


def _checked(rows: Iterable[_Row]) -> list[_Row]:
    found = list(rows)
    if not found:
        raise InputError("There are no rows to draw; `loki-attn bench decode` writes them.")
    for number, row in enumerate(found, 1):
        missing = [name for name in _NEEDED if name not in row]
        if missing:
            raise InputError(
                f"Row {number} lacks {', '.join(missing)}; expected rows of "
                "`loki-attn bench decode`."
            )
    settings = sorted({_title(row) for row in found})
    if len(settings) > 1:
        raise InputError(
            f"One figure shows one setting, got {len(settings)}: {'; '.join(settings)}."
        )
    return found


def _title(row: _Row) -> str:
    threads = row.get("threads", "?")
    return (
        f"A decode step of {row['shape']}, batch {row.get('batch', 1)}, {row.get('dtype', '?')}, "
        f"{threads} thread{'' if threads == 1 else 's'}"
    )


def _curves(rows: list[_Row]) -> list[tuple[str, dict[str, Any], list[tuple[float, ...]]]]:
    """Label, look and points of each contender; k, which may grow with the context, is left out."""
    groups: dict[str, list[_Row]] = {}
    for row in rows:
        groups.setdefault(_label(row, rows), []).append(row)
    dense = [label for label, group in groups.items() if _is_dense(group[0])]
    whole = [label for label, g in groups.items() if not _is_dense(g[0]) and not g[0].get("part")]
    curves = []
    for label, group in groups.items():
        points = sorted(
            tuple(float(row[n]) for n in ("context", "median_us", "p20_us", "p80_us"))
            for row in group
        )
        style: dict[str, Any] = {"linewidth": 1.6, "markersize": 5}
        if label in dense:
            at = dense.index(label)
            style |= {"color": DENSE, "marker": look(at)[1], "linestyle": _nth_line(at)}
        elif label in whole:
            colour, marker = look(whole.index(label))
            style |= {"color": colour, "marker": marker}
        else:
            parent = label.rpartition(": ")[0]
            colour, _ = look(whole.index(parent) if parent in whole else len(whole))
            parts = [other for other in groups if other.rpartition(": ")[0] == parent]
            line = _nth_line(1 + parts.index(label))
            style |= {"color": colour, "linestyle": line, "linewidth": 1, "alpha": _PART_ALPHA}
        curves.append((label, style, points))
    return curves


def _label(row: _Row, rows: list[_Row]) -> str:
    """The contender's name; without its k where every context has one k only."""
    ks = {other.get("k") for other in rows if _same_but_k(other, row)}
    name = str(row["contender"])
    return name.replace(f" k={row.get('k')}", "") if len(ks) == 1 else name


def _same_but_k(one: _Row, other: _Row) -> bool:
    names = ("context", "kind", "plane", "part")
    return all(one.get(name) == other.get(name) for name in names)


def _is_dense(row: _Row) -> bool:
    return row["kind"] in {"torch", "dense"}


def _nth_line(at: int) -> str:
    return _GREY_LINES[at % len(_GREY_LINES)]


def _tokens(count: int) -> str:
    return f"{count >> 10}k" if count % 1024 == 0 else f"{count:,}"


def _save(figure: Any, out: Path) -> Path:
    from matplotlib import rc_context

    buffer = io.BytesIO()
    kind = out.suffix[1:]
    metadata = {"Date": None} if kind == "svg" else {"Software": None}
    with rc_context({"svg.hashsalt": _SVG_SALT, "svg.fonttype": "none"}):
        figure.savefig(buffer, format=kind, metadata=metadata)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(buffer.getvalue())
    except OSError as error:
        raise InputError(f"Cannot write {str(out)!r}: {error.strerror or error}.") from error
    return out
