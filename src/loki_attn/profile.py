"""Profile: what was calibrated or trained for methods, per layer: hash weights, channels, gates."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import final

import torch
from torch import Tensor

from loki_attn.artefact import (
    JSON,
    ArtefactKind,
    read_artefact,
    read_json_field,
    to_json,
    write_artefact,
)
from loki_attn.errors import ProfileError

_AGAIN = "Run `loki-attn profile` for this model and method and use the new file."
_FILE = ArtefactKind(
    format="loki-attn-profile", version="1", noun="profile", remedy=_AGAIN, error=ProfileError
)
_TENSOR_NAME = re.compile(r"layers\.(\d+)\.([a-z0-9_]+)")


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Profile:
    """What methods were given for one model. All tensors are on the CPU.

    Attributes:
        layers: By layer index, tensors by name, [num_kv_heads, ...] each.
        provenance: Where it comes from: `model` with `id`, `hash` and `rope`, and under `methods`,
            by method, its settings, corpus, tokens, window, versions.

    Raises:
        ProfileError: If there is no layer, layers have other names, or a number is not finite.
    """

    layers: Mapping[int, Mapping[str, Tensor]]
    provenance: Mapping[str, JSON] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check every layer."""
        if not self.layers:
            raise ProfileError("The profile has no layers. " + _AGAIN)
        ordered = dict(sorted(self.layers.items()))
        object.__setattr__(self, "layers", ordered)
        for index, layer in ordered.items():
            if set(layer) != set(self.names):
                raise ProfileError(
                    f"Layer {index} of the profile holds {sorted(layer)}, others hold "
                    f"{sorted(self.names)}. {_AGAIN}"
                )
            for name, tensor in layer.items():
                if not bool(torch.isfinite(tensor).all()):
                    raise ProfileError(f"{name} of layer {index} is not finite. {_AGAIN}")

    @property
    def names(self) -> tuple[str, ...]:
        """What every layer holds."""
        return tuple(next(iter(self.layers.values())))

    def layer(self, index: int) -> Mapping[str, Tensor]:
        """Return what one layer was given, by name.

        Raises:
            ProfileError: If the layer is not there.
        """
        if index not in self.layers:
            raise ProfileError(
                f"The profile has no layer {index}; it has layers {list(self.layers)}. {_AGAIN}"
            )
        return self.layers[index]

    def table(self, name: str) -> Tensor:
        """Return one name's tensors of all layers, stacked [layers, num_kv_heads, ...].

        Raises:
            ProfileError: If no layer holds it.
        """
        if name not in self.names:
            raise ProfileError(f"The profile holds {sorted(self.names)}, not {name!r}. {_AGAIN}")
        return torch.stack([layer[name] for layer in self.layers.values()])

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods that it was made for, as far as it says so."""
        return tuple(sorted(self._about_methods))

    def permute_heads(self, order: Sequence[int]) -> "Profile":
        """Return the profile whose KV head i is head `order[i]` of this one, in every layer."""
        index = torch.tensor(list(order))
        layers = {
            i: {name: tensor[index] for name, tensor in layer.items()}
            for i, layer in self.layers.items()
        }
        return replace(self, layers=layers)

    def merged(self, other: "Profile") -> "Profile":
        """Return what both hold; the other's tensors win.

        Raises:
            ProfileError: If they have other layers or belong to other models.
        """
        if list(self.layers) != list(other.layers):
            raise ProfileError(
                f"One profile has layers {list(self.layers)}, the other {list(other.layers)}; only "
                "profiles of one model merge."
            )
        own, got = self._model.get("hash"), other._model.get("hash")
        if own is not None and got is not None and own != got:
            raise ProfileError(
                f"One profile is of model '{self._model.get('id')}' (hash {own}), the other of "
                f"'{other._model.get('id')}' (hash {got}); only profiles of one model merge."
            )
        layers = {i: {**layer, **other.layers[i]} for i, layer in self.layers.items()}
        methods: dict[str, JSON] = {**self._about_methods, **other._about_methods}
        provenance = {**self.provenance, **other.provenance, "methods": methods}
        return Profile(layers=layers, provenance=provenance)

    def check_model(self, model: Mapping[str, JSON]) -> None:
        """Refuse a model that this profile was not made for.

        Args:
            model: The model's identity: `id`, `hash`. What either side leaves out is not compared.

        Raises:
            ProfileError: If the hashes differ.
        """
        own, got = self._model.get("hash"), model.get("hash")
        if own is not None and got is not None and own != got:
            raise ProfileError(
                f"The profile was made for model '{self._model.get('id')}' (hash {own}) but is "
                f"used with model '{model.get('id')}' (hash {got}). {_AGAIN}"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the profile as safetensors; an interrupt leaves the old file intact."""
        # Copies: layers may share a tensor, which the file format does not.
        tensors = {
            f"layers.{index}.{name}": tensor.clone()
            for index, layer in self.layers.items()
            for name, tensor in layer.items()
        }
        write_artefact(path, _FILE, tensors, {"provenance": to_json(self.provenance, "provenance")})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Profile":
        """Read a profile and check it.

        Raises:
            ProfileError: If the file is missing, damaged or of another format.
        """
        tensors, metadata = read_artefact(path, _FILE)
        provenance = read_json_field(path, _FILE, metadata, "provenance")
        layers: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            match = _TENSOR_NAME.fullmatch(name)
            if match is None:
                raise ProfileError(
                    f"The profile file '{path}' holds {name!r}, no profile. {_AGAIN}"
                )
            layers.setdefault(int(match[1]), {})[match[2]] = tensor
        return cls(layers=layers, provenance=provenance)

    @property
    def _model(self) -> Mapping[str, JSON]:
        return self._about("model")

    @property
    def _about_methods(self) -> Mapping[str, JSON]:
        return self._about("methods")

    def _about(self, what: str) -> Mapping[str, JSON]:
        found = self.provenance.get(what)
        return found if isinstance(found, dict) else {}
