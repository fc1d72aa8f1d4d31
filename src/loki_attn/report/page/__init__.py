"""Page: rows become one HTML file that needs nothing beside it.

sections --figures, sheets, headline--> parts --template--> page
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

from loki_attn.errors import InputError
from loki_attn.report.files import write_whole
from loki_attn.report.forms import is_bench, unify
from loki_attn.report.origin import basis_text, facts, policy_text
from loki_attn.report.page.headline import Headline, headline_of
from loki_attn.report.page.kept import kept_figures
from loki_attn.report.page.keys import key_figures
from loki_attn.report.page.matrices import matrix_figures
from loki_attn.report.page.needles import needle_figures
from loki_attn.report.page.parts import Figure, Table, anchor, plain
from loki_attn.report.page.quality import divergence_figures, score_figures
from loki_attn.report.page.sheets import Sheet, sheet_of
from loki_attn.report.page.speed import speed_figures
from loki_attn.report.rows import Section, sections

# After a comma or a colon between two words, but not inside an entity.
_SEAM: Final = re.compile(r"(?<=\w)([,:])(?=\w)")
_SPEED: Final = "Speed"
_TEMPLATE: Final = "page.html.jinja"
_RANKS_ONLY: Final = {"calibration", "ranks", "spectrum"}
_DRAWINGS: Final = (
    divergence_figures,
    score_figures,
    needle_figures,
    matrix_figures,
    kept_figures,
    key_figures,
    speed_figures,
)


@final
@dataclass(frozen=True, kw_only=True)
class Chapter:
    """What is known of one model: a headline, figures, then tables."""

    name: str
    title: str
    headline: Headline
    figures: tuple[Figure, ...]
    sheets: tuple[Sheet, ...]


def write_html(rows: Iterable[Mapping[str, Any]], out: Path, *, title: str = "") -> Path:
    """Write rows as one self-contained HTML page; it loads nothing and runs no model.

    Args:
        rows: Rows as `loki_attn.evaluate.results` or the bench write them.
        out: The page, a `.html` file.
        title: Its heading; by default the names of the models.

    Returns:
        The page.

    Raises:
        InputError: If there are no rows, a row lacks something (the text says which and what),
            jinja2 is missing or the page cannot be written.
    """
    if out.suffix != ".html":
        raise InputError(f"The page is an HTML file; got {str(out)!r}, expected a name in .html.")
    found = sections(unify(rows))
    text = _rendered(found, title)
    try:
        write_whole(out, text.encode())
    except OSError as error:
        raise InputError(f"Cannot write {str(out)!r}: {error.strerror or error}.") from error
    return out


def chapters(found: Sequence[Section]) -> list[Chapter]:
    """Sections by model, what the bench timed last; anchors differ from chapter to chapter."""
    taken: set[str] = set()
    return [_chapter(title, group, taken) for (_, title), group in _places(found).items()]


def _places(found: Sequence[Section]) -> dict[tuple[bool, str], list[Section]]:
    """Sections by model, in order of arrival; what the bench timed is together at the end."""
    groups: dict[tuple[bool, str], list[Section]] = {}
    for section in found:
        timed = is_bench({"task": section.task})
        groups.setdefault((timed, _SPEED if timed else section.model), []).append(section)
    return dict(sorted(groups.items(), key=lambda item: item[0][0]))


def _chapter(title: str, group: Sequence[Section], taken: set[str]) -> Chapter:
    figures = [figure for draw in _DRAWINGS for figure in draw(group)]
    sheets = [sheet_of(section) for section in group]
    place = _free(anchor(title), taken)
    return Chapter(
        name=place,
        title=title,
        headline=headline_of(title, group),
        figures=tuple(_renamed(figure, place, taken) for figure in figures),
        sheets=tuple(_renamed(sheet, place, taken) for sheet in sheets),
    )


def _renamed(part: Any, place: str, taken: set[str]) -> Any:
    from dataclasses import replace

    return replace(part, name=_free(f"{place}-{part.name}", taken))


def _free(wanted: str, taken: set[str]) -> str:
    """A name that no other place on the page has."""
    name, number = wanted or "part", 2
    while name in taken:
        name, number = f"{wanted or 'part'}-{number}", number + 1
    taken.add(name)
    return name


def _rendered(found: Sequence[Section], title: str) -> str:
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError as error:
        raise InputError(
            f"The page needs jinja2 ({error}); run: pip install 'loki-attn[report]', or name a "
            ".md or .csv file."
        ) from error
    environment = Environment(
        loader=PackageLoader("loki_attn.report.page", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["breakable"] = _breakable
    rows = [row for section in found for row in section.rows]
    shown = chapters(found)
    names = [name for timed, name in _places(found) if not timed] or [_SPEED]
    text: str = environment.get_template(_TEMPLATE).render(
        titles=[title] if title else names,
        chapters=shown,
        count=len(rows),
        contenders=len({row["contender"] for row in rows}),
        facts={name: values for name, values in facts(rows).items() if values},
        protocols=list(dict.fromkeys((s.task, s.protocol.strip().rstrip(".")) for s in found)),
        policies=_policies(rows),
    )
    return text.lstrip()


def _breakable(text: str) -> Any:
    """Markup of a text; a name such as "loki:rank=16,top_k=64" may go on in the next line."""
    from markupsafe import Markup, escape

    return Markup(_SEAM.sub(r"\1<wbr>", str(escape(text))))


def _policies(rows: Sequence[Mapping[str, Any]]) -> Table | None:
    kept = [row for row in rows if row["policy"] and row["task"] not in _RANKS_ONLY]
    lines = dict.fromkeys(
        (str(row["contender"]), policy_text(row), basis_text(row.get("basis"))) for row in kept
    )
    if not lines:
        return None
    return Table(
        title="Policies",
        header=("contender", "policy", "basis"),
        lines=tuple(tuple(plain(cell) for cell in line) for line in lines),
    )
