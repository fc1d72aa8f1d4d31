"""Calibrating: how a method learns what it needs of a model, from windows of text.

A method that needs a profile has a class method `calibrator(**settings)`. Whoever runs a model
shows the calibrator every layer's queries and keys; what it makes of them becomes a `Profile`.
"""

import inspect
from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from loki_attn.artefact import JSON
from loki_attn.errors import unknown_name
from loki_attn.policy import methods

_ROOMS = ("select", "evict", "allocate")


class Calibrator(Protocol):
    """Learns from queries and keys what one method needs, for all layers of a model."""

    @property
    def settings(self) -> Mapping[str, JSON]:
        """What it was made with, for the record."""

    def observe(self, layer_index: int, query: Tensor, key: Tensor) -> None:
        """Learn from one layer's view of one window, or of several as a batch.

        Args:
            layer_index: The layer.
            query: [batch, heads, tokens, head_dim], after RoPE; query i sees keys 0 to i.
            key: [batch, kv_heads, tokens, head_dim], after RoPE.
        """

    def finish(self) -> dict[int, dict[str, Tensor]]:
        """Return what was learnt: per layer, tensors [kv_heads, ...] by name.

        Raises:
            InputError: If too little was observed.
        """


def calibrated_methods() -> dict[str, Any]:
    """Methods that learn from text, by name, whatever their verb."""
    found = {name: kind for room in _ROOMS for name, kind in methods(room).items()}
    return {name: kind for name, kind in found.items() if hasattr(kind, "calibrator")}


def calibrator(method: str, /, **settings: Any) -> Calibrator:
    """Return a calibrator that has seen nothing yet.

    Args:
        method: One of `calibrated_methods()`.
        settings: The method's own, with its defaults for what is left out.

    Raises:
        UnknownNameError: If the method learns nothing, or has no such setting.
        InputError: If a setting's value cannot be used.
    """
    known = calibrated_methods()
    if method not in known:
        raise unknown_name("method with a profile", method, known)
    make = known[method].calibrator
    parameters = inspect.signature(make).parameters
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        for name in settings:
            if name not in parameters:
                raise unknown_name(f"setting of {method}", name, parameters)
    made: Calibrator = make(**settings)
    return made
