"""Double Sparsity: rank the rows by a few channels that were chosen once, attend exactly.

Paper: Post-Training Sparse Attention with Double Sparsity
arXiv: 2408.07092
What it does: finds offline the channels in which |q k| of a token with itself is largest on
    average, keeps them of every key in a plane of their own, ranks all rows by them, and attends to
    the best k with all channels.
What we do differently: channels are chosen per KV head, by the sum over its query heads, in post-
    RoPE keys. The plane is int8 with one scale per row by default, int4 being the published small
    one and bf16 that of the released code. The query heads of a group share one choice;
    group_reduce="none" is the published form. The first two layers are sparse too, unless
    dense_layers=(0, 1) is asked for. channels="random" takes random ones, the same for all heads of
    a layer, as a control that needs no profile.
Bytes read per decode step: per KV head, T * (rank + 2) with an int8 plane (T * (rank / 2 + 2) in
    int4, T * rank * 2 in bf16, T * rank * 4 in fp32), and k * (head_dim + value_dim) * b. A plane's
    bytes per row are rounded up to a multiple of 4.
State per token: rank + 2 bytes per KV head with an int8 plane, rank / 2 + 2 in int4, 2 * rank in
    bf16, 4 * rank in fp32, rounded up alike.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal, Self, final

import torch
from torch import Tensor
from torch.nn import functional

from loki_attn.basis import LayerBasis
from loki_attn.cache import LayerCache
from loki_attn.errors import InputError, PolicyError, unknown_name
from loki_attn.pieces import ranks
from loki_attn.pieces.lead_plane import PLANE_DTYPES, LeadPlane
from loki_attn.row_format import LeadFormat
from loki_attn.select.base import Select, Selector
from loki_attn.tiles import Kind
from loki_attn.types import LayerShape, Lead

CHANNELS: Final = "channels"
_SOURCES: Final = ("profile", "random")
PRESETS: Final[dict[str, dict[str, Any]]] = {
    "double-sparsity": {
        "select": {"method": "double_sparsity", "rank": 0.0625},
        "budget": {"fraction": 0.0625},
    },
}


@final
class ChannelCalibrator:
    """Finds the channels in which queries meet their own keys most, per layer and KV head.

    Attributes:
        settings: Empty: how many channels are used is decided when the profile is.
    """

    def __init__(self) -> None:
        """Start with nothing observed."""
        self.settings: dict[str, Any] = {}
        self._sums: dict[int, Tensor] = {}
        self._tokens: dict[int, int] = {}

    def observe(self, layer_index: int, query: Tensor, key: Tensor) -> None:
        """Add the tokens of one window.

        Args:
            layer_index: The layer.
            query: [batch, heads, tokens, head_dim], after RoPE.
            key: [batch, kv_heads, tokens, head_dim], after RoPE, of the same tokens.

        Raises:
            InputError: If queries and keys are not of the same tokens.
        """
        batch, kv_heads, tokens, dim = key.shape
        if (query.shape[0], *query.shape[2:]) != (batch, tokens, dim) or query.shape[1] % kv_heads:
            raise InputError(
                "Channels are found from queries and keys of the same tokens, [batch, heads, "
                f"tokens, head_dim]; got {list(query.shape)} and {list(key.shape)}."
            )
        size = query.double().abs().view(batch, kv_heads, -1, tokens, dim).sum(2)
        met = (size * key.double().abs()).sum((0, 2)).cpu()
        self._sums[layer_index] = self._sums.get(layer_index, torch.zeros_like(met)) + met
        self._tokens[layer_index] = self._tokens.get(layer_index, 0) + batch * tokens

    def means(self, layer_index: int) -> Tensor:
        """Return the mean |q k| of a layer, float64 [kv_heads, head_dim], summed over groups.

        Raises:
            InputError: If none of its tokens were observed.
        """
        if not self._tokens.get(layer_index):
            raise InputError(f"No token of layer {layer_index} was observed; calibrate with text.")
        return self._sums[layer_index] / self._tokens[layer_index]

    def finish(self) -> dict[int, dict[str, Tensor]]:
        """Return "channels" of every layer, int64 [kv_heads, head_dim]: all, the best first.

        Raises:
            InputError: If nothing was observed.
        """
        if not self._sums:
            raise InputError("No token was observed; calibrate with text.")
        return {
            layer: {CHANNELS: self.means(layer).sort(dim=-1, descending=True, stable=True).indices}
            for layer in sorted(self._sums)
        }


@final
@dataclass(frozen=True, kw_only=True)
class DoubleSparsity(Select):
    """Rank by a few channels of the keys.

    Attributes:
        rank: Channels that rank the rows: a whole number of them, or a share of head_dim below 1
            as a float.
        plane_dtype: "int8" or "int4" with a float16 scale per row, "bf16" or "fp32".
        channels: "profile" takes calibrated channels, "random" random ones.
    """

    method: ClassVar[str] = "double_sparsity"
    needs_profile: ClassVar[bool] = True
    rank: int | float = 0.0625
    plane_dtype: Literal["int8", "int4", "bf16", "fp32"] = "int8"
    channels: Literal["profile", "random"] = "profile"

    def __post_init__(self) -> None:
        """Refuse values that no layer could serve."""
        ranks.require_rank(self.rank)
        if self.plane_dtype not in PLANE_DTYPES:
            raise unknown_name("plane_dtype", self.plane_dtype, PLANE_DTYPES)
        if self.channels not in _SOURCES:
            raise unknown_name("channels", self.channels, _SOURCES)

    @classmethod
    def calibrator(cls) -> ChannelCalibrator:
        """Return what finds the channels for a profile."""
        return ChannelCalibrator()

    def bind(
        self,
        shape: LayerShape,
        basis: LayerBasis | None = None,
        profile: Mapping[str, Tensor] | None = None,
    ) -> Selector:
        """Bind to a layer with its channels."""
        del basis
        rank = ranks.coordinates(self.rank, shape.head_dim)
        if self.channels == "random":
            draw = torch.Generator().manual_seed(shape.index)
            chosen = torch.randperm(shape.head_dim, generator=draw).expand(shape.num_kv_heads, -1)
        else:
            chosen = _calibrated(shape, profile, rank)
        # A product with 0 and 1 is exact: the plane holds the channels themselves.
        one_hot = functional.one_hot(chosen[:, :rank], shape.head_dim).mT.float().contiguous()
        return _ChannelSelector(LeadPlane(one_hot, one_hot, self.plane_dtype))


@final
class _ChannelSelector(Selector):
    """Rows untouched, beside tiles of their chosen channels."""

    def __init__(self, plane: LeadPlane) -> None:
        self._plane = plane

    def narrowed(self, heads: Tensor) -> Self:
        """The channels of these heads."""
        return type(self)(self._plane.narrowed(heads))

    def planes(self, key: Tensor) -> dict[str, Tensor]:
        """Encode the chosen channels of new keys."""
        return self._plane.planes(key)

    def tiled(self) -> dict[str, Kind]:
        """The plane of channels."""
        return self._plane.tiled()

    def lead_format(self, device: torch.device) -> LeadFormat:
        """Its map, on the device where it is needed."""
        return self._plane.format(device)

    def lead(self, cache: LayerCache) -> Lead:
        """The plane of channels and its scales."""
        return self._plane.lead(cache)

    def score_bytes(self, cache: LayerCache) -> int:
        """The plane of channels and its scales."""
        return self._plane.row_bytes(cache)


def _calibrated(shape: LayerShape, profile: Mapping[str, Tensor] | None, rank: int) -> Tensor:
    """The layer's channels in a profile, best first, int64 [kv_heads, rank or more]."""
    if profile is None or CHANNELS not in profile:
        raise PolicyError(
            f"Double Sparsity needs the channels of layer {shape.index}; make a profile with "
            "`loki-attn profile --method double_sparsity` and pass profile=, or take "
            "channels='random' as a control."
        )
    found = profile[CHANNELS]
    if found.ndim != 2 or found.shape[0] != shape.num_kv_heads or found.shape[1] < rank:
        raise PolicyError(
            f"Layer {shape.index} needs channels [kv_heads={shape.num_kv_heads}, at least {rank}], "
            f"the profile has {list(found.shape)}: it is of another model, or rank is too high."
        )
    ordered = found.long().sort(-1).values
    inside = bool((ordered >= 0).all()) and bool((ordered < shape.head_dim).all())
    if not inside or bool((ordered[:, 1:] == ordered[:, :-1]).any()):
        raise PolicyError(
            f"Channels of layer {shape.index} must differ and lie in 0..{shape.head_dim - 1}; the "
            "profile has others: it belongs to another model."
        )
    return found.long()
