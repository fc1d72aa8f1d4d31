"""How the site is built: `sphinx-build -W -n docs build/docs`, offline, warnings being errors."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

from loki_attn import __version__

project = "loki-attn"
author = "The loki-attn authors"
project_copyright = "The loki-attn authors, Apache-2.0"
release = version = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "docstrings",
    "generated",
    "offline_math",
]
exclude_patterns = ["_ext"]
nitpicky = True
nitpick_ignore_regex = [
    # Other projects' types, the standard library's too: their sites would have to be fetched, and
    # the build is offline.
    ("py:.*", r"(numpy|np|torch|transformers)\..*"),
    ("py:.*", r"(abc|collections|contextlib|os|pathlib|types|typing)\..*"),
    ("py:class", r"(Tensor|Path|PreTrainedModel|PreTrainedTokenizerBase|DataclassInstance)"),
    # Rooms that have no reference, named in signatures of those that have.
    ("py:.*", r"loki_attn\.(bench|kernels|report\.rows|tune\.space)\..*"),
    ("py:.*", r"loki_attn\.integrations\.transformers\.(binding|function|traffic)\..*"),
    # A recursive alias: inside itself it is a name in quotes that no module can be found for.
    ("py:class", "JSON"),
    # A dataclass field with a default factory: Sphinx then splits the signature at every comma.
    ("py:class", r"dict\[int"),
]

# MyST: formulas between dollars, tables and lists as on any forge.
myst_enable_extensions = ["deflist", "dollarmath"]
myst_heading_anchors = 3
html_math_renderer = "offline_mathml"

# Quotes may curl; dashes stay, because two of them begin an option.
smartquotes_action = "q"

# Docstrings put code between single backticks, and are written in Google's form.
default_role = "code"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_default_options = {"members": True}

html_theme = "furo"
html_title = f"loki-attn {release}"
html_show_sourcelink = False
html_copy_source = False
templates_path: list[str] = []
