"""Basis: per layer and KV head, the coordinates in which a few leading columns rank keys well."""

import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar, final

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
from loki_attn.errors import BasisError, InputError

BasisKind = Literal["pca", "balanced", "mixed", "random", "identity"]
Side = Literal["post", "pre"]

_Name = TypeVar("_Name", bound=str)
_KINDS: tuple[BasisKind, ...] = ("pca", "balanced", "mixed", "random", "identity")
_SIDES: tuple[Side, ...] = ("post", "pre")
_RECALIBRATE = "Run `loki-attn calibrate` for this model and use the new file."
_FILE = ArtefactKind(
    format="loki-attn-basis", version="1", noun="basis", remedy=_RECALIBRATE, error=BasisError
)
_TENSOR_NAME = re.compile(r"layers\.(\d+)\.(key_map|query_map|spectrum)")
_ORTHOGONAL_TOLERANCE = 1e-4
_INVERSE_TOLERANCE = 1e-3
# Cumulative shares are sums of rounded numbers: .4 + .3 + .2 must reach .9.
_SHARE_SLACK = 1e-12


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class LayerBasis:
    """The bases of one layer, one per KV head; columns are basis vectors, leading ones first.

    Rows are mapped as `K' = K @ key_map` and `Q' = Q @ query_map`, and `Q' K'^T == Q K^T`.

    Attributes:
        key_map: float32 [num_kv_heads, head_dim, head_dim].
        query_map: float32 [num_kv_heads, head_dim, head_dim], the inverse transpose of `key_map`;
            equal to it where the basis is orthogonal.
        spectrum: float64 [num_kv_heads, head_dim], what each column contributes. For `pca`,
            `random` and `identity` the key variance along the column; for `balanced` and `mixed`
            the mean-square score that is lost when the column is left out.
    """

    key_map: Tensor
    query_map: Tensor
    spectrum: Tensor

    def heads(self, order: Sequence[int]) -> "LayerBasis":
        """Return the basis whose head i is head `order[i]` of this one."""
        index = torch.tensor(list(order))
        return LayerBasis(
            key_map=self.key_map[index],
            query_map=self.query_map[index],
            spectrum=self.spectrum[index],
        )


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Basis:
    """A calibrated basis of one model, checked when it is made. All tensors are on the CPU.

    Attributes:
        kind: How it was fitted.
        side: Whether the keys it was fitted on were taken after RoPE or before it. It is applied
            after RoPE in both cases.
        orthogonal: Whether it keeps norms and angles, so that `query_map` equals `key_map`.
        layers: The layers' bases by layer index, all of one shape.
        provenance: Where it comes from: `model` with `id` and `hash`, `rope`, `corpus`, `tokens`,
            `versions`, the settings of the fit.

    Raises:
        BasisError: If shapes or dtypes disagree, a number is not finite, or the two maps do not
            keep scores.
    """

    kind: BasisKind
    side: Side
    orthogonal: bool
    layers: Mapping[int, LayerBasis]
    provenance: Mapping[str, JSON] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check every layer."""
        if not self.layers:
            raise BasisError("The basis has no layers. " + _RECALIBRATE)
        ordered = dict(sorted(self.layers.items()))
        object.__setattr__(self, "layers", ordered)
        shape = next(iter(ordered.values())).key_map.shape
        for index, layer in ordered.items():
            _check_layer(index, layer, shape, self.orthogonal)

    @property
    def layer_indices(self) -> tuple[int, ...]:
        """The layers that have a basis, rising."""
        return tuple(self.layers)

    @property
    def num_kv_heads(self) -> int:
        """KV heads per layer."""
        return int(self._first.key_map.shape[0])

    @property
    def head_dim(self) -> int:
        """Size of a key row, in elements."""
        return int(self._first.key_map.shape[-1])

    def layer(self, index: int) -> LayerBasis:
        """Return the basis of one layer.

        Args:
            index: The layer's index in the model.

        Returns:
            Its basis.

        Raises:
            BasisError: If the layer was not calibrated.
        """
        if index not in self.layers:
            raise BasisError(
                f"The basis has no layer {index}; it has layers {list(self.layers)}. {_RECALIBRATE}"
            )
        return self.layers[index]

    def rank_at(self, variance: float) -> Tensor:
        """Find how many leading columns hold a share of the spectrum (arXiv 2406.02542, sec. 3).

        Args:
            variance: The share to reach, in (0, 1].

        Returns:
            int64 [layers, num_kv_heads]: the smallest rank whose cumulative share reaches it, at
            least 1.

        Raises:
            InputError: If `variance` is outside (0, 1].
        """
        if not 0.0 < variance <= 1.0:
            raise InputError(f"variance is a share in (0, 1], got {variance}.")
        held = torch.stack([layer.spectrum for layer in self.layers.values()]).cumsum(-1)
        total = held[..., -1:]
        share = torch.where(total > 0, held / total.clamp_min(1e-300), torch.ones_like(held))
        return (share < variance - _SHARE_SLACK).sum(-1) + 1

    def permute_heads(self, order: Sequence[int]) -> "Basis":
        """Reorder the KV heads of every layer.

        Args:
            order: A permutation of the head indices; head i becomes head `order[i]` of this one.

        Returns:
            The reordered basis.

        Raises:
            InputError: If `order` is not a permutation of all heads.
        """
        if sorted(order) != list(range(self.num_kv_heads)):
            raise InputError(
                f"order must name each of the {self.num_kv_heads} KV heads once, got {list(order)}."
            )
        layers = {index: layer.heads(order) for index, layer in self.layers.items()}
        return replace(self, layers=layers)

    def shuffle_heads(self, seed: int = 0) -> "Basis":
        """Give every head the basis of another head: the control that must rank worse.

        With one KV head per layer, every layer gets another layer's basis instead.

        Args:
            seed: Seed of the permutations, which differ between layers.

        Returns:
            The control; its provenance says so under `control`.

        Raises:
            InputError: If there is only one head in only one layer.
        """
        generator = torch.Generator().manual_seed(seed)
        indices, heads = self.layer_indices, self.num_kv_heads
        if heads > 1:
            layers = {i: self.layers[i].heads(_derangement(heads, generator)) for i in indices}
        elif len(indices) > 1:
            order = _derangement(len(indices), generator)
            layers = {
                i: self.layers[indices[source]] for i, source in zip(indices, order, strict=True)
            }
        else:
            raise InputError("A basis with one KV head in one layer has no other head to take.")
        note: dict[str, JSON] = {"shuffled_heads_seed": seed}
        return replace(self, layers=layers, provenance={**self.provenance, "control": note})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the basis as safetensors; an interrupt leaves the old file intact.

        Args:
            path: The file; missing folders are made.

        Raises:
            InputError: If the provenance is not plain JSON.
        """
        tensors: dict[str, Tensor] = {}
        for index, layer in self.layers.items():
            tensors[f"layers.{index}.key_map"] = layer.key_map
            tensors[f"layers.{index}.spectrum"] = layer.spectrum
            if not self.orthogonal:
                tensors[f"layers.{index}.query_map"] = layer.query_map
        metadata = {
            "kind": self.kind,
            "side": self.side,
            "orthogonal": "true" if self.orthogonal else "false",
            "provenance": to_json(self.provenance, "provenance"),
        }
        write_artefact(path, _FILE, tensors, metadata)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], *, model: Mapping[str, JSON] | None = None
    ) -> "Basis":
        """Read a basis and check it.

        Args:
            path: A file written by `save`.
            model: If given, the identity (`id`, `hash`, optionally `rope`) of the model that the
                basis must have been fitted on.

        Returns:
            The basis.

        Raises:
            BasisError: If the file is missing, damaged or of another format, if its contents are
                not a basis, or if it belongs to another model.
        """
        tensors, metadata = read_artefact(path, _FILE)
        provenance = read_json_field(path, _FILE, metadata, "provenance")
        try:
            orthogonal = _known(metadata, "orthogonal", ("true", "false")) == "true"
            basis = cls(
                kind=_known(metadata, "kind", _KINDS),
                side=_known(metadata, "side", _SIDES),
                orthogonal=orthogonal,
                layers=_collect_layers(tensors, orthogonal),
                provenance=provenance,
            )
        except BasisError as error:
            raise BasisError(f"The basis file '{path}' cannot be used. {error}") from error
        if model is not None:
            basis._check_identity(model)
        return basis

    def check_model(
        self,
        *,
        layers: Collection[int],
        num_kv_heads: int,
        head_dim: int,
        model: Mapping[str, JSON] | None = None,
    ) -> None:
        """Refuse a model that this basis was not fitted for.

        Args:
            layers: The layers that will use the basis; it may hold more.
            num_kv_heads: The model's KV heads per layer.
            head_dim: The model's size of a key row, in elements.
            model: If given, the model's identity: `id`, `hash`, optionally `rope`. What either
                side leaves out is not compared.

        Raises:
            BasisError: If anything differs; the message says what was got and what to do.
        """
        if model is not None:
            self._check_identity(model)
        if (num_kv_heads, head_dim) != (self.num_kv_heads, self.head_dim):
            raise BasisError(
                f"The basis has {self.num_kv_heads} KV heads of head_dim {self.head_dim}, the "
                f"model has {num_kv_heads} of head_dim {head_dim}. {_RECALIBRATE}"
            )
        missing = sorted(set(layers) - set(self.layers))
        if missing:
            raise BasisError(
                f"The basis has no layers {missing}; it has {list(self.layers)}. {_RECALIBRATE}"
            )

    @property
    def _first(self) -> LayerBasis:
        return next(iter(self.layers.values()))

    def _check_identity(self, model: Mapping[str, JSON]) -> None:
        """Compare model hash and RoPE configuration where both sides state them."""
        fitted = self.provenance.get("model")
        own = fitted if isinstance(fitted, dict) else {}
        names = f"was fitted on model '{own.get('id')}'", f"is used with model '{model.get('id')}'"
        if _differ(own.get("hash"), model.get("hash")):
            raise BasisError(
                f"The basis {names[0]} (hash {own['hash']}) but {names[1]} "
                f"(hash {model['hash']}). {_RECALIBRATE}"
            )
        rope = self.provenance.get("rope", own.get("rope"))
        if _differ(rope, model.get("rope")):
            raise BasisError(
                f"The basis {names[0]} with RoPE settings {rope} but {names[1]} with "
                f"{model['rope']}. {_RECALIBRATE}"
            )


def _differ(one: JSON, other: JSON) -> bool:
    """Say whether two stated values differ; what is not stated differs from nothing."""
    return one is not None and other is not None and one != other


def _derangement(count: int, generator: torch.Generator) -> list[int]:
    """Draw a random cycle through all of `count` > 1 items, which moves each (Sattolo)."""
    order = list(range(count))
    for last in range(count - 1, 0, -1):
        other = int(torch.randint(last, (1,), generator=generator))
        order[last], order[other] = order[other], order[last]
    return order


def _check_layer(index: int, layer: LayerBasis, shape: torch.Size, orthogonal: bool) -> None:
    """Check the shapes, dtypes and numbers of one layer."""
    if len(shape) != 3 or shape[1] != shape[2] or 0 in shape:
        raise BasisError(
            f"Layer {index}: key_map must be [num_kv_heads, head_dim, head_dim], got "
            f"{list(shape)}. {_RECALIBRATE}"
        )
    for name, tensor, size, dtype in (
        ("key_map", layer.key_map, shape, torch.float32),
        ("query_map", layer.query_map, shape, torch.float32),
        ("spectrum", layer.spectrum, shape[:2], torch.float64),
    ):
        if tensor.shape != size or tensor.dtype != dtype:
            raise BasisError(
                f"Layer {index}: {name} must be {dtype} {list(size)}, got {tensor.dtype} "
                f"{list(tensor.shape)}. {_RECALIBRATE}"
            )
        if not bool(tensor.isfinite().all()):
            raise BasisError(f"Layer {index}: {name} holds NaN or infinity. {_RECALIBRATE}")
    if bool((layer.spectrum < 0).any()):
        raise BasisError(f"Layer {index}: spectrum holds a negative share. {_RECALIBRATE}")
    _check_scores_kept(index, layer, orthogonal)


def _check_scores_kept(index: int, layer: LayerBasis, orthogonal: bool) -> None:
    """Check key_map query_map^T == Id, which is what keeps q.k, whatever the columns' scales."""
    key_map, query_map = layer.key_map.double(), layer.query_map.double()
    identity = torch.eye(key_map.shape[-1], dtype=torch.float64)
    error = float((key_map @ query_map.mT - identity).abs().max())
    if orthogonal and not (
        torch.equal(layer.key_map, layer.query_map) and error <= _ORTHOGONAL_TOLERANCE
    ):
        raise BasisError(
            f"Layer {index}: the basis claims to be orthogonal but is not (largest deviation "
            f"{error:.1e}, allowed {_ORTHOGONAL_TOLERANCE:.0e}). {_RECALIBRATE}"
        )
    if error > _INVERSE_TOLERANCE:
        raise BasisError(
            f"Layer {index}: query_map is not the inverse of key_map (largest deviation "
            f"{error:.1e}, allowed {_INVERSE_TOLERANCE:.0e}). {_RECALIBRATE}"
        )


def _collect_layers(tensors: Mapping[str, Tensor], orthogonal: bool) -> dict[int, LayerBasis]:
    """Sort a file's tensors into layers."""
    found: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _TENSOR_NAME.fullmatch(name)
        if match is None:
            raise BasisError(f"It holds an unknown tensor '{name}'. {_RECALIBRATE}")
        found.setdefault(int(match[1]), {})[match[2]] = tensor
    layers: dict[int, LayerBasis] = {}
    for index, parts in found.items():
        if orthogonal and "key_map" in parts:
            parts.setdefault("query_map", parts["key_map"])
        missing = sorted({"key_map", "query_map", "spectrum"} - set(parts))
        if missing:
            raise BasisError(f"Layer {index} lacks {', '.join(missing)}. {_RECALIBRATE}")
        layers[index] = LayerBasis(**parts)
    return layers


def _known(metadata: Mapping[str, str], name: str, valid: tuple[_Name, ...]) -> _Name:
    """Read a header field that has few values."""
    got = metadata.get(name)
    for value in valid:
        if got == value:
            return value
    raise BasisError(f"Its {name} is '{got}', expected one of {', '.join(valid)}. {_RECALIBRATE}")
