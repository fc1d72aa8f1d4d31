"""Where LongBench's data lies: a path, or a data set on the hub."""

import re
from pathlib import Path
from typing import Final

from loki_attn.errors import InputError
from loki_attn.models.datasets import fetch_dataset_file

_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SUFFIXES: Final = frozenset({".json", ".jsonl", ".zip"})


def located(path: str | Path, hub_file: str) -> Path:
    """Return the local path of the data, fetching it where a hub id is given.

    Args:
        path: A file, a folder, or a hub id such as "THUDM/LongBench".
        hub_file: What to fetch from the hub.

    Raises:
        InputError: If there is neither a file nor a folder, nor could it be a hub id.
        ModelError: If the hub does not give it.
    """
    local = Path(path).expanduser()
    if local.exists():
        return local
    # A mistyped file should say so, not ask the network.
    may_be_id = _HUB_ID.fullmatch(str(path)) and local.suffix not in _SUFFIXES
    if may_be_id and not local.parent.exists():
        return fetch_dataset_file(str(path), hub_file)
    raise InputError(
        f"No file or folder at {str(path)!r}; expected LongBench's published files, or a hub id "
        "such as 'THUDM/LongBench'."
    )
