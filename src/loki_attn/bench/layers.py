"""Layer caches as a model's layers have them: independent, so that none of them stays warm."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, final

import torch
from torch import Tensor

from loki_attn.attention import LayerPolicy, bind
from loki_attn.basis import LayerBasis
from loki_attn.bench.shapes import Shape
from loki_attn.cache import LayerCache
from loki_attn.policy import preset
from loki_attn.testing import tiny_basis
from loki_attn.types import AttentionCall

_CHUNK_TOKENS: Final = 4096
# Coprime to every context that is a power of two, so that no two layers begin alike.
_STRIDE: Final = 977


@final
@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the contenders of one context have in common.

    Attributes:
        shape: Sizes of the layer.
        batch: Batch rows.
        context: Rows of each cache, in tokens.
        dtype: Dtype of keys, values and queries.
        rank: Coordinates of the lead planes.
        planes: Number formats of the lead planes, one cache for each.
        device: Where the caches lie and the steps are computed.
    """

    shape: Shape
    batch: int
    context: int
    dtype: torch.dtype
    rank: int
    planes: tuple[str, ...]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def call(self) -> AttentionCall:
        """The usual scaling."""
        return AttentionCall(scaling=self.shape.head_dim**-0.5)

    def row_bytes(self) -> int:
        """Bytes of a key row and its value row, over all KV heads and batch rows."""
        return self.batch * self.shape.num_kv_heads * 2 * self.shape.head_dim * self.dtype.itemsize

    def layer_bytes(self) -> int:
        """Bytes that one layer holds: rows, positions and a lead plane, once per number format."""
        heads = self.batch * self.shape.num_kv_heads
        tokens = -(-self.context // 64) * 64  # a cache grows in 64s
        # A lead plane takes at most 4 bytes per coordinate and 2 for a scale, a position 4.
        return len(self.planes) * tokens * (self.row_bytes() + heads * (4 * self.rank + 6))


@final
@dataclass(frozen=True)
class Layer:
    """One layer: a query, and the same rows in one cache for each number format of the plane.

    Attributes:
        query: [batch, heads, 1, head_dim].
        caches: By number format of the lead plane.
        bound: The Loki policy of each format, bound to this layer's own basis.
        basis: The basis.
    """

    query: Tensor
    caches: Mapping[str, LayerCache]
    bound: Mapping[str, LayerPolicy]
    basis: LayerBasis

    @property
    def rows(self) -> LayerCache:
        """The cache that contenders without a lead plane read."""
        return next(iter(self.caches.values()))

    @property
    def keys(self) -> Tensor:
        """[batch, kv_heads, context, head_dim], contiguous for a context in whole 64s."""
        return self.rows.keys

    @property
    def values(self) -> Tensor:
        """[batch, kv_heads, context, head_dim], a view alike."""
        return self.rows.values


def make_layers(plan: Plan, count: int, seed: int = 0) -> list[Layer]:
    """Fill `count` independent layers.

    Normal numbers are drawn once; each layer holds them from another row on, which keeps the layers
    apart in memory and in what they select, at the price of one draw.
    """
    draw = torch.Generator().manual_seed(seed)
    shape = plan.shape
    size = (plan.batch, shape.num_kv_heads, plan.context, shape.head_dim)
    key = torch.randn(size, generator=draw, dtype=plan.dtype)
    value = torch.randn(size, generator=draw, dtype=plan.dtype)
    heads = (plan.batch, shape.num_heads, 1, shape.head_dim)
    return [
        _fill(plan, key, value, torch.randn(heads, generator=draw, dtype=plan.dtype), index)
        for index in range(count)
    ]


def _fill(plan: Plan, key: Tensor, value: Tensor, query: Tensor, index: int) -> Layer:
    shape = plan.shape.layer()
    basis = tiny_basis(shape, seed=index)
    caches, bound = {}, {}
    for plane in plan.planes:
        policy = preset("loki", rank=plan.rank, plane_dtype=plane)
        bound[plane] = bind(policy, shape, 1, basis)
        cache = LayerCache(bound[plane].selector, reserve_tokens=plan.context)
        for begin, end in _turned(plan.context, index * _STRIDE % plan.context):
            cache.append(key[:, :, begin:end], value[:, :, begin:end])
        caches[plane] = cache
    return Layer(query, caches, bound, basis.layer(0))


def _turned(length: int, offset: int) -> Iterator[tuple[int, int]]:
    """Chunks of all rows, from `offset` round to `offset`."""
    for begin, end in ((offset, length), (0, offset)):
        for at in range(begin, end, _CHUNK_TOKENS):
            yield at, min(at + _CHUNK_TOKENS, end)


def layers_wanted(plan: Plan, touched_bytes: Sequence[int], cache_bytes: int, limit: int) -> int:
    """How many layers keep every visit cold.

    Args:
        plan: What the layers hold.
        touched_bytes: What each contender touches per visit.
        cache_bytes: What must be touched between two visits of the same layer.
        limit: Memory that the layers may take, in bytes.

    Returns:
        The fewest layers that come to `cache_bytes` even where the most frugal contender makes
        every step, or as many as fit; 0 where not even one fits.
    """
    wanted = -(-cache_bytes // max(1, min(touched_bytes)))
    # The numbers that the layers are filled from are held until the last one is full.
    noise = plan.context * plan.row_bytes()
    return max(0, min(wanted, (limit - noise) // plan.layer_bytes()))
