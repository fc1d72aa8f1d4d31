"""Errors of the library: each says what was got, what was expected and how to fix it."""

import difflib
from collections.abc import Iterable


class LokiAttnError(Exception):
    """Base of every error that this library raises on purpose."""


class InputError(LokiAttnError, ValueError):
    """A value given by the caller cannot be used."""


class BudgetError(InputError):
    """A budget that would read nothing, or more than there is."""


class PolicyError(InputError):
    """A policy whose parts do not fit each other or the model."""


class BasisError(InputError):
    """A basis that is damaged, or that belongs to another model."""


class ProfileError(InputError):
    """A profile that is damaged, or that belongs to another model or method."""


class CacheError(LokiAttnError, RuntimeError):
    """A cache used where, or in a way that, it cannot serve."""


class ModelError(LokiAttnError):
    """A model that cannot be had or loaded."""


class UnsupportedModelError(ModelError):
    """A model that cannot be served correctly; the message names the reason."""


class UnknownNameError(InputError):
    """A name that is not known; the message lists the valid ones and the nearest."""


def unknown_name(kind: str, got: str, valid: Iterable[str]) -> UnknownNameError:
    """Build the error for an unknown name.

    Args:
        kind: What the name stands for, in the user's words ("method", "policy field").
        got: The name that came.
        valid: The names that would have been accepted.

    Returns:
        The error to raise; its text lists `valid` and, where one is close, the nearest.
    """
    names = sorted(valid)
    nearest = difflib.get_close_matches(got, names, n=1, cutoff=0.5)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    listed = ", ".join(names) if names else "(none)"
    return UnknownNameError(f"Unknown {kind} {got!r}.{hint} Valid: {listed}.")
