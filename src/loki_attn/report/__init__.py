"""Report: measured rows become a page or a table. No model is ever run here.

rows --check--> sections (one task, model and protocol each) --tables, figures--> page
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from loki_attn.errors import InputError
from loki_attn.report.figures import draw
from loki_attn.report.files import write_whole
from loki_attn.report.forms import unify
from loki_attn.report.page import write_html
from loki_attn.report.rows import Section, sections
from loki_attn.report.tables import figure_block, origin_block, section_block
from loki_attn.report.tidy import write_csv

__all__ = ["Section", "sections", "write_csv", "write_html", "write_markdown"]

_INTRODUCTION = (
    "Every figure on this page was measured; the last section says with what and where. "
    "**Bold** marks the best of the sparse policies in its group; dense attention is the "
    "reference. ± is one standard error of the mean, brackets hold a 95 % interval, n is the "
    "number of items behind a row."
)


def write_markdown(
    rows: Iterable[Mapping[str, Any]],
    out: Path,
    figures: bool = True,
    *,
    title: str = "What was measured",
    introduction: str = "",
) -> Path:
    """Write rows as a Markdown page, its figures in a folder of the same name beside it.

    The page and every figure are replaced whole: an interrupt leaves the old ones.

    Args:
        rows: Rows as `loki_attn.evaluate.results` or the bench write them.
        out: The page, a `.md` file; an existing folder gets a `report.md`.
        figures: Whether to draw; needs matplotlib.
        title: The page's first heading.
        introduction: Markdown between the heading and the first section.

    Returns:
        The page.

    Raises:
        InputError: If there are no rows, a row lacks something (the text says which and what),
            matplotlib is missing or the page cannot be written.
    """
    found = sections(unify(rows))
    page = out / "report.md" if out.is_dir() else out
    if page.suffix != ".md":
        raise InputError(f"The page is a Markdown file; got {str(out)!r}, expected a name in .md.")
    parts = [f"# {title}", introduction, _INTRODUCTION]
    try:
        for number, section in enumerate(found, 1):
            parts.append(section_block(section))
            if figures:
                parts += _draw(section, number, page)
        parts.append(origin_block(found))
        write_whole(page, ("\n\n".join(part for part in parts if part) + "\n").encode())
    except OSError as error:
        raise InputError(f"Cannot write {str(page)!r}: {error.strerror or error}.") from error
    return page


def _draw(section: Section, number: int, page: Path) -> list[str]:
    blocks = []
    for figure in draw(section):
        file = page.with_suffix("") / f"{number}-{figure.name}.png"
        write_whole(file, figure.png)
        blocks.append(figure_block(figure, file.relative_to(page.parent).as_posix()))
    return blocks
