"""Report: measured rows become a Markdown page with tables and figures. No model is ever run here.

rows --check--> sections (one task, model and protocol each) --tables, figures--> page
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from loki_attn.errors import InputError
from loki_attn.report.figures import draw
from loki_attn.report.rows import Section, sections
from loki_attn.report.tables import figure_block, origin_block, section_block

__all__ = ["Section", "sections", "write_markdown"]

_INTRODUCTION = (
    "Every figure on this page was measured; the last section says with what and where. "
    "**Bold** marks the best of the sparse policies in its group; dense attention is the "
    "reference. ± is one standard error of the mean, n the number of items behind a row."
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
        rows: Rows as `loki_attn.evaluate.results` writes them.
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
    found = sections(rows)
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
        _write_whole(page, ("\n\n".join(part for part in parts if part) + "\n").encode())
    except OSError as error:
        raise InputError(f"Cannot write {str(page)!r}: {error.strerror or error}.") from error
    return page


def _draw(section: Section, number: int, page: Path) -> list[str]:
    blocks = []
    for figure in draw(section):
        file = page.with_suffix("") / f"{number}-{figure.name}.png"
        _write_whole(file, figure.png)
        blocks.append(figure_block(figure, file.relative_to(page.parent).as_posix()))
    return blocks


def _write_whole(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # The same folder, because a rename is atomic only inside one file system.
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
