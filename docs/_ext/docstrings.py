"""Docstrings of the house, made ready for napoleon.

Three things differ from what it expects. A module's docstring is prose for people who read the
file, so only its first paragraph goes to the site. A sentence with a colon is a sentence, where
napoleon would take what stands before the colon for a type. And bars are those of a formula, |q|,
where docutils would look for a name to put in their place.
"""

import re
from typing import Any, Final

from sphinx.application import Sphinx

_BEFORE_NAPOLEON: Final = 400
_AFTER_NAPOLEON: Final = 600
# A character of the private use area stands in for a colon while napoleon reads.
_STAND_IN: Final = "\ue000"
# Code stays as it is.
_BAR: Final = re.compile(r"(`[^`]*`)|\|")
_SECTIONS: Final = ("Args:", "Attributes:", "Raises:", "Returns:", "References:", "Yields:")
_PROSE: Final = ("Returns:", "References:", "Yields:")


def setup(app: Sphinx) -> dict[str, Any]:
    """Stand before and behind napoleon."""
    app.connect("autodoc-process-docstring", _prepare, priority=_BEFORE_NAPOLEON)
    app.connect("autodoc-process-docstring", _restore, priority=_AFTER_NAPOLEON)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}


def _prepare(
    app: Sphinx, what: str, name: str, value: object, options: object, lines: list[str]
) -> None:
    del app, name, value, options
    if what == "module":
        end = lines.index("") if "" in lines else len(lines)
        del lines[end:]
        return
    section = ""
    for at, line in enumerate(lines):
        if line in _SECTIONS:
            section = line
        elif section in _PROSE or (not section and what in {"attribute", "data", "property"}):
            lines[at] = line.replace(":", _STAND_IN)


def _restore(
    app: Sphinx, what: str, name: str, value: object, options: object, lines: list[str]
) -> None:
    del app, what, name, value, options
    for at, line in enumerate(lines):
        lines[at] = _BAR.sub(lambda found: found[1] or "\\|", line.replace(_STAND_IN, ":"))
