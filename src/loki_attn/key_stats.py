"""KeyStats: streamed second moments of keys and queries, in float64, holding no rows.

Every sum is exact to about 1e-15 relative: rows are cast to float64 before they are multiplied.
That costs about 20 ms per layer for 2,048 tokens of 9 query and 3 KV heads of 64 on one core.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, final

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
from loki_attn.basis import Side
from loki_attn.errors import InputError

Rows = Literal["key", "pre", "query", "sharp"]
_ROWS: tuple[Rows, ...] = ("key", "pre", "query", "sharp")

_FILE = ArtefactKind(
    format="loki-attn-key-stats",
    version="1",
    noun="calibration statistics",
    remedy="Run `loki-attn calibrate` again from the start.",
    error=InputError,
)
_TENSOR_NAME = re.compile(r"layers\.(\d+)\.(key|pre|query|sharp)\.(weight|total|outer)")


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Moments:
    """Weighted sums over rows, additive.

    Attributes:
        weight: float64 [num_kv_heads]: sum of the rows' weights; their count where all weigh 1.
        total: float64 [num_kv_heads, head_dim]: weighted sum of the rows.
        outer: float64 [num_kv_heads, head_dim, head_dim]: weighted sum of outer products.
    """

    weight: Tensor
    total: Tensor
    outer: Tensor

    def plus(self, other: "Moments") -> "Moments":
        """Add the sums of other rows."""
        return Moments(
            weight=self.weight + other.weight,
            total=self.total + other.total,
            outer=self.outer + other.outer,
        )

    def mean_outer(self, centred: bool) -> Tensor:
        """Return the second moment [num_kv_heads, head_dim, head_dim], about the mean or zero."""
        # Heads without any weight have zero sums; dividing by one keeps them zero.
        weight = torch.where(self.weight > 0, self.weight, 1.0)[:, None]
        moment = self.outer / weight[..., None]
        if centred:
            mean = self.total / weight
            moment = moment - mean[:, :, None] * mean[:, None, :]
        return (moment + moment.mT) / 2


@final
class KeyStats:
    """Streamed moments per layer and KV head; statistics of shards merge exactly.

    Recorded are keys after RoPE and before any repetition to query heads ("key"), keys before RoPE
    ("pre", optional), queries after RoPE summed over the group ("query"), and the same queries
    under a weight that the caller chose ("sharp", optional). See arXiv 2406.02542, section 3.
    """

    def __init__(self) -> None:
        """Start without any layer."""
        self._layers: dict[int, dict[Rows, Moments]] = {}

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers seen so far, rising."""
        return tuple(sorted(self._layers))

    @property
    def tokens(self) -> int:
        """Tokens seen by every layer (the fewest, should an interrupt have come between two)."""
        counts = [int(layer["key"].weight[0]) for layer in self._layers.values()]
        return min(counts, default=0)

    def shape(self, layer: int) -> tuple[int, int]:
        """Return (num_kv_heads, head_dim) of a layer."""
        heads, size = self.moments(layer, "key").total.shape
        return int(heads), int(size)

    def moments(self, layer: int, rows: Rows) -> Moments:
        """Return the raw sums of one layer.

        Args:
            layer: The layer's index.
            rows: Which rows: "key", "pre", "query" or "sharp".

        Returns:
            The sums.

        Raises:
            InputError: If the layer was not seen or such rows were not recorded.
        """
        if layer not in self._layers:
            raise InputError(f"No keys of layer {layer} were seen; seen: {list(self.layers)}.")
        if rows not in self._layers[layer]:
            lacking = {"pre": "pre_key", "sharp": "query_weight"}.get(rows, rows)
            raise InputError(
                f"Layer {layer} was calibrated without `{lacking}`, which this needs. "
                "Calibrate again and give it to every update."
            )
        return self._layers[layer][rows]

    def update(
        self,
        layer: int,
        key: Tensor,
        query: Tensor,
        *,
        pre_key: Tensor | None = None,
        query_weight: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> None:
        """Add the rows of one forward of one layer. Nothing changes if an argument is refused.

        Args:
            layer: The layer's index in the model.
            key: [batch, num_kv_heads, seq, head_dim], any float dtype, after RoPE.
            query: [batch, num_heads, seq, head_dim], after RoPE.
            pre_key: Like `key`, before RoPE.
            query_weight: [batch, num_heads, seq]: non-negative weights of the queries' "sharp"
                moment.
            valid: bool [batch, seq]: False where a row is padding, which is never read.

        Raises:
            InputError: If shapes or dtypes disagree, or a valid row holds NaN or infinity.
        """
        _check_shapes(layer, key, query, pre_key, query_weight, valid)
        num_kv_heads = key.shape[1]
        new: dict[Rows, Moments] = {
            "key": _sum_rows("key", _rows_per_kv_head(key, num_kv_heads, valid)),
        }
        if pre_key is not None:
            new["pre"] = _sum_rows("pre_key", _rows_per_kv_head(pre_key, num_kv_heads, valid))
        queries = _rows_per_kv_head(query, num_kv_heads, valid)
        new["query"] = _sum_rows("query", queries)
        if query_weight is not None:
            weights = _rows_per_kv_head(query_weight[..., None], num_kv_heads, valid)
            new["sharp"] = _sum_rows("query", queries, weights[..., 0])
        seen = self._layers.get(layer)
        # One assignment at the end, so that an interrupt cannot leave half an update.
        self._layers[layer] = new if seen is None else _add_layers(layer, seen, new)

    def merge(self, other: "KeyStats") -> "KeyStats":
        """Add the statistics of another shard of the same calibration.

        Args:
            other: Statistics of other text on the same model. Empty statistics merge with any.

        Returns:
            New statistics; both inputs stay as they are.

        Raises:
            InputError: If the layers, heads or head_dim differ.
        """
        if self._layers and other._layers and self.layers != other.layers:
            raise InputError(
                f"Cannot merge statistics of layers {list(self.layers)} with layers "
                f"{list(other.layers)}: they come from different models or interrupted forwards."
            )
        merged = KeyStats()
        merged._layers = {index: dict(layer) for index, layer in self._layers.items()}
        for index, layer in other._layers.items():
            own = merged._layers.get(index)
            merged._layers[index] = dict(layer) if own is None else _add_layers(index, own, layer)
        return merged

    def covariance(self, layer: int, side: Side = "post", centred: bool = True) -> Tensor:
        """Return the covariance of a layer's keys (divided by n, not n - 1).

        Args:
            layer: The layer's index.
            side: Keys after RoPE ("post") or before it ("pre").
            centred: Whether about the mean; else the second moment about zero.

        Returns:
            float64 [num_kv_heads, head_dim, head_dim], symmetric.

        Raises:
            InputError: If the layer was not seen, or without such keys.
        """
        return self.moments(layer, "key" if side == "post" else "pre").mean_outer(centred)

    def query_moment(self, layer: int, sharp: bool = False) -> Tensor:
        """Return the uncentred second moment of the group's queries.

        Args:
            layer: The layer's index.
            sharp: Whether under the weights given as `query_weight`.

        Returns:
            float64 [num_kv_heads, head_dim, head_dim], symmetric.

        Raises:
            InputError: If the layer was not seen, or without weights.
        """
        return self.moments(layer, "sharp" if sharp else "query").mean_outer(centred=False)

    def save(self, path: str | os.PathLike[str], provenance: Mapping[str, JSON]) -> None:
        """Write the statistics as safetensors; an interrupt leaves the old file intact.

        Args:
            path: The file; missing folders are made.
            provenance: Plain JSON: model, corpus, what is needed to resume.

        Raises:
            InputError: If the provenance is not plain JSON.
        """
        tensors = {
            f"layers.{index}.{rows}.{part}": getattr(moments, part)
            for index, layer in self._layers.items()
            for rows, moments in layer.items()
            for part in ("weight", "total", "outer")
        }
        metadata = {"provenance": to_json(provenance, "provenance")}
        write_artefact(path, _FILE, tensors, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> tuple["KeyStats", dict[str, JSON]]:
        """Read statistics written by `save`.

        Args:
            path: The file.

        Returns:
            The statistics and their provenance.

        Raises:
            InputError: If the file is missing, damaged or not such a file.
        """
        tensors, metadata = read_artefact(path, _FILE)
        provenance = read_json_field(path, _FILE, metadata, "provenance")
        stats = cls()
        try:
            stats._layers = _collect_layers(tensors)
        except InputError as error:
            raise InputError(f"The calibration statistics file '{path}': {error}") from error
        return stats, provenance


def _check_shapes(
    layer: int,
    key: Tensor,
    query: Tensor,
    pre_key: Tensor | None,
    query_weight: Tensor | None,
    valid: Tensor | None,
) -> None:
    """Check the shapes and dtypes of an update."""
    for name, tensor in (("key", key), ("query", query)):
        if tensor.dim() != 4 or not tensor.is_floating_point():
            raise InputError(
                f"Layer {layer}: {name} must be a float tensor [batch, heads, seq, head_dim], "
                f"got {tensor.dtype} {list(tensor.shape)}."
            )
    batch, heads, seq, size = key.shape
    if query.shape[::2] != key.shape[::2] or query.shape[3] != size:
        raise InputError(
            f"Layer {layer}: query {list(query.shape)} and key {list(key.shape)} must agree in "
            "batch, seq and head_dim."
        )
    if heads == 0 or size == 0 or query.shape[1] == 0 or query.shape[1] % heads:
        raise InputError(
            f"Layer {layer}: {query.shape[1]} query heads cannot be shared by {heads} KV heads. "
            "Give keys before they are repeated to query heads."
        )
    optional = (
        ("pre_key", pre_key, key.shape),
        ("query_weight", query_weight, query.shape[:3]),
        ("valid", valid, torch.Size((batch, seq))),
    )
    for name, given, shape in optional:
        if given is not None and given.shape != shape:
            raise InputError(
                f"Layer {layer}: {name} must be {list(shape)}, got {list(given.shape)}."
            )
    if valid is not None and valid.dtype != torch.bool:
        raise InputError(f"Layer {layer}: valid must be bool, got {valid.dtype}.")


def _rows_per_kv_head(rows: Tensor, num_kv_heads: int, valid: Tensor | None) -> Tensor:
    """Gather [batch, heads, seq, size] as [num_kv_heads, rows of the group, size], valid only."""
    batch, heads, seq, size = rows.shape
    grouped = rows.reshape(batch, num_kv_heads, heads // num_kv_heads, seq, size)
    grouped = grouped.permute(1, 2, 0, 3, 4)
    kept = grouped.flatten(2, 3) if valid is None else grouped[:, :, valid.to(rows.device)]
    return kept.flatten(1, 2)


def _sum_rows(name: str, rows: Tensor, weights: Tensor | None = None) -> Moments:
    """Sum rows [num_kv_heads, n, head_dim] in float64."""
    exact = _as_float64(rows)
    _check_finite(name, exact)
    if weights is None:
        weight = exact.new_full(exact.shape[:1], exact.shape[1])
        weighted = exact
    else:
        factors = _as_float64(weights)
        _check_finite("query_weight", factors)
        if bool((factors < 0).any()):
            raise InputError("query_weight holds a negative weight; weights must be 0 or more.")
        weight = factors.sum(1)
        weighted = exact * factors[..., None]
    return Moments(
        weight=weight.cpu(), total=weighted.sum(1).cpu(), outer=(weighted.mT @ exact).cpu()
    )


def _as_float64(tensor: Tensor) -> Tensor:
    """Cast to float64, on the CPU where the device has none."""
    plain = tensor.detach()
    return (plain.cpu() if plain.device.type == "mps" else plain).to(torch.float64)


def _check_finite(name: str, rows: Tensor) -> None:
    """Refuse NaN and infinity."""
    if not bool(rows.isfinite().all()):
        raise InputError(
            f"{name} holds NaN or infinity. Calibrate in bfloat16 or float32, and mask padding "
            "with `valid`."
        )


def _add_layers(
    index: int, one: Mapping[Rows, Moments], other: Mapping[Rows, Moments]
) -> dict[Rows, Moments]:
    """Add two layers' sums."""
    shapes = one["key"].total.shape, other["key"].total.shape
    if shapes[0] != shapes[1]:
        raise InputError(
            f"Layer {index} has [num_kv_heads, head_dim] {list(shapes[0])} so far, got "
            f"{list(shapes[1])}: these statistics belong to different models."
        )
    if set(one) != set(other):
        raise InputError(
            f"Layer {index} has statistics of {sorted(one)} so far, got {sorted(other)}: give "
            "pre_key and query_weight to every update or to none."
        )
    return {rows: moments.plus(other[rows]) for rows, moments in one.items()}


def _collect_layers(tensors: Mapping[str, Tensor]) -> dict[int, dict[Rows, Moments]]:
    """Sort a file's tensors into layers."""
    found: dict[tuple[int, str], dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _TENSOR_NAME.fullmatch(name)
        if match is None or tensor.dtype != torch.float64 or not bool(tensor.isfinite().all()):
            raise InputError(f"tensor '{name}' does not belong there. {_FILE.remedy}")
        found.setdefault((int(match[1]), match[2]), {})[match[3]] = tensor
    layers: dict[int, dict[Rows, Moments]] = {}
    for index in sorted({index for index, _ in found}):
        layers[index] = {
            rows: _complete(index, rows, found[index, rows])
            for rows in _ROWS
            if (index, rows) in found
        }
        if not {"key", "query"} <= set(layers[index]):
            raise InputError(f"layer {index} lacks keys or queries. {_FILE.remedy}")
    return layers


def _complete(index: int, rows: str, parts: Mapping[str, Tensor]) -> Moments:
    """Build moments whose three parts are there and agree."""
    if set(parts) == {"weight", "total", "outer"} and parts["total"].dim() == 2:
        heads, size = parts["total"].shape
        if parts["weight"].shape == (heads,) and parts["outer"].shape == (heads, size, size):
            return Moments(**parts)
    raise InputError(f"the '{rows}' sums of layer {index} do not fit together. {_FILE.remedy}")
