"""Provenance: when, from which commit, with which versions and where something was measured."""

import platform
import subprocess
import time
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import torch

_PACKAGES: Final = ("loki-attn", "torch", "transformers")


def provenance() -> dict[str, Any]:
    """When, from which commit, with which versions, on which machine."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": _commit(Path(__file__)),
        "versions": {name: _version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "machine": platform.machine(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
    }


@cache
def _commit(source: Path) -> str | None:
    """The commit that a source file belongs to; None where git does not know the file."""
    git = ("git", "-C", str(source.parent))
    try:
        # An installed copy may lie inside the repository of something else.
        subprocess.run(
            [*git, "ls-files", "--error-unmatch", source.name], capture_output=True, check=True
        )
        head = subprocess.run(
            [*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        status = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{head}+changes" if status else head


@cache
def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


@cache
def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()
