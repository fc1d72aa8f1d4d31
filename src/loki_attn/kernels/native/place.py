"""Where the library of the native kernels lies, and why where there is none."""

import sys
from pathlib import Path
from typing import Final

from loki_attn.errors import InputError

LIBRARY_NAME: Final = "libloki_attn.dylib" if sys.platform == "darwin" else "libloki_attn.so"

_FOLDER: Final = Path(__file__).parent  # an editable installation builds into src/
_REASON: Final = "native_missing.txt"  # CMakeLists.txt writes it instead of the library
_chosen: Path | None = None


def find_library() -> Path | None:
    """Return the library to load.

    Returns:
        The one given to `use_library`, else the installed one, else None; `why_missing` then
        says why.
    """
    if _chosen is not None:
        return _chosen
    installed = _FOLDER / LIBRARY_NAME
    return installed if installed.is_file() else None


def why_missing() -> str:
    """Say why no library is installed, to be read after "cannot run because" or "but"."""
    try:
        reason = (_FOLDER / _REASON).read_text(encoding="utf-8").strip()
    except OSError:
        reason = "it was not built; install loki-attn again with pip"
    return f"its library is missing: {reason}"


def use_library(path: Path) -> None:
    """Load this library instead of the installed one; only before anything has been loaded.

    Args:
        path: A library built from the same sources, with a sanitizer for example.

    Raises:
        InputError: If there is no such file.
    """
    global _chosen
    if not path.is_file():
        raise InputError(
            f"There is no native library at {str(path)!r}; build one with CMake, as "
            f"tools/sanitize.sh does."
        )
    _chosen = path.resolve()
