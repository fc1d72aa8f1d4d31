"""Which implementation of the ops runs, and why. An explicit choice never falls back."""

import importlib
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Final, final

from loki_attn.errors import LokiAttnError, unknown_name

ENVIRONMENT_VARIABLE: Final = "LOKI_ATTN_BACKEND"
_NOT_BACKENDS: Final = {"__init__", "backends"}
# Which backends are tried for tensors of a device, the best first; plain torch serves the rest.
_PREFERENCE: Final[dict[str, tuple[str, ...]]] = {"cpu": ("native",), "cuda": ("triton",)}
PLAIN: Final = "reference"


@final
@dataclass(frozen=True)
class Accepted:
    """The backend can run here."""

    name: str
    module: ModuleType


@final
@dataclass(frozen=True)
class Rejected:
    """The backend cannot run here, with the reason in the user's words."""

    name: str
    reason: str


@final
class Unserved(Exception):
    """A backend does not serve these tensors; the text says why, to be read after "because"."""


def names() -> tuple[str, ...]:
    """Backends that this installation has: the modules and packages of this folder."""
    here = Path(__file__).parent
    found = [f.stem for f in here.glob("*.py")] + [
        f.parent.name for f in here.glob("*/__init__.py")
    ]
    return tuple(sorted(name for name in found if name not in _NOT_BACKENDS))


def probe(name: str) -> Accepted | Rejected:
    """Say whether a backend can run here.

    Raises:
        UnknownNameError: If no backend has this name.
    """
    if name not in names():
        raise unknown_name("backend", name, names())
    try:
        module = importlib.import_module(f"loki_attn.kernels.{name}")
    except (ImportError, OSError) as error:
        return Rejected(name, f"cannot be loaded: {error}")
    reason = getattr(module, "why_not", lambda: None)()
    return Rejected(name, reason) if reason else Accepted(name, module)


def asked(name: str | None = None) -> str | None:
    """The backend asked for by name or, without one, by the environment; None for neither."""
    return name or os.environ.get(ENVIRONMENT_VARIABLE) or None


def resolve(name: str | None = None, device: str = "cpu") -> Accepted:
    """Return the backend to use: the named one, the environment's, or the best that runs.

    Args:
        name: A backend's name, or None for the environment variable `LOKI_ATTN_BACKEND` and,
            without it, the first that runs here.
        device: Type of the device whose tensors are to be served, where nobody is named.

    Raises:
        UnknownNameError: If the name is not known.
        LokiAttnError: If the named backend cannot run here; it never falls back.
    """
    wanted = asked(name)
    if wanted:
        answer = probe(wanted)
        if isinstance(answer, Rejected):
            raise LokiAttnError(f"Backend {wanted!r} was asked for but {answer.reason}.")
        return answer
    for candidate in (*_PREFERENCE.get(device, ()), PLAIN):
        if candidate in names() and isinstance(found := probe(candidate), Accepted):
            return found
    raise LokiAttnError("No backend runs here, not even the reference: reinstall loki-attn.")


def passed_over(op: str, by: str, why: object) -> None:
    """Trace that plain torch serves an op instead of a backend: once for each reason."""
    reason = (op, by, str(why))
    if reason not in _passed_over:
        _passed_over.add(reason)
        _log.info("%s is served by plain torch instead of %s, because %s", op, by, why)


def fallbacks() -> tuple[tuple[str, str, str], ...]:
    """What plain torch served in place of a backend so far: (op, backend, reason), each once."""
    return tuple(sorted(_passed_over))


_passed_over: set[tuple[str, str, str]] = set()
_log: Final = logging.getLogger("loki_attn.kernels")
