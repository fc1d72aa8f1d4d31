"""Layers drawn where they lie: every format's plane beside the same rows, no copy of anything."""

from dataclasses import replace
from typing import Final, final

import torch
from torch import Tensor

from loki_attn.attention import bind
from loki_attn.bench.contenders import PLANE_BYTES, SCALE_BYTES
from loki_attn.bench.layers import Layer, Plan
from loki_attn.cache import KEY, POSITION, VALUE, LayerCache, allocate
from loki_attn.policy import preset
from loki_attn.row_format import RowFormat
from loki_attn.testing import tiny_basis
from loki_attn.tiles import CODE_KINDS

_SHARED: Final = {KEY, VALUE, POSITION}
_BLOCK_TOKENS: Final = 64
_POSITION_BYTES: Final = 4
# Rows drawn at once; encoding them takes a few times as much for a moment.
_CHUNK_BYTES: Final = 256 << 20


def draw_layers(plan: Plan, count: int, seed: int = 0) -> list[Layer]:
    """Draw `count` independent layers on the plan's device, a few launches per chunk of rows.

    Args:
        plan: What the layers hold.
        count: How many.
        seed: Of the device's own random numbers.
    """
    draw = torch.Generator(plan.device).manual_seed(seed)
    return [_draw(plan, index, draw) for index in range(count)]


def drawn_layer_bytes(plan: Plan) -> int:
    """Bytes that one drawn layer holds: the rows once, a plane for each format."""
    heads = plan.batch * plan.shape.num_kv_heads
    tokens = -(-plan.context // _BLOCK_TOKENS) * _BLOCK_TOKENS
    # A plane gives a row whole words of 4 bytes.
    words = sum(-(-plan.rank * PLANE_BYTES[plane] // 4) for plane in plan.planes)
    scales = sum(plane in CODE_KINDS for plane in plan.planes)
    beside = 4 * int(words) + SCALE_BYTES * scales + _POSITION_BYTES
    return tokens * (plan.row_bytes() + heads * beside)


def drawing_bytes(plan: Plan) -> int:
    """Bytes that are held beside the layers while they are drawn, at the most."""
    return 8 * _chunk_tokens(plan) * plan.row_bytes()


def _chunk_tokens(plan: Plan) -> int:
    blocks = max(1, _CHUNK_BYTES // (plan.row_bytes() * _BLOCK_TOKENS))
    return min(plan.context, blocks * _BLOCK_TOKENS)


def _draw(plan: Plan, index: int, draw: torch.Generator) -> Layer:
    shape = plan.shape.layer()
    basis = tiny_basis(shape, seed=index)
    bound = {
        plane: bind(preset("loki", rank=plan.rank, plane_dtype=plane), shape, 1, basis)
        for plane in plan.planes
    }
    caches: dict[str, _InPlace] = {}

    def normal(heads: int, tokens: int) -> Tensor:
        size = (plan.batch, heads, tokens, shape.head_dim)
        return torch.randn(size, generator=draw, dtype=plan.dtype, device=plan.device)

    none = normal(shape.num_kv_heads, 0)
    for plane, own in bound.items():
        beside = next(iter(caches.values()), None)
        caches[plane] = _InPlace(own.selector, none, plan.context, beside)
    step = _chunk_tokens(plan)
    for start in range(0, plan.context, step):
        tokens = min(step, plan.context - start)
        key, value = normal(shape.num_kv_heads, tokens), normal(shape.num_kv_heads, tokens)
        for cache in caches.values():
            cache.put(key, value)
    own_basis = basis.layer(0)
    maps = {name: getattr(own_basis, name).to(plan.device) for name in ("key_map", "query_map")}
    query = normal(shape.num_heads, 1)
    return Layer(query, dict(caches), bound, replace(own_basis, **maps))


@final
class _InPlace(LayerCache):
    """A cache with room for exactly its rows, which may be those of the cache beside it."""

    def __init__(
        self, row_format: RowFormat, none: Tensor, tokens: int, beside: "_InPlace | None"
    ) -> None:
        """Make room; `none` are no rows of the right shape, dtype and device."""
        super().__init__(row_format)
        room = -(-tokens // _BLOCK_TOKENS) * _BLOCK_TOKENS
        shared = {} if beside is None else beside._storage
        self._written = set()
        for name, storage in self._without_capacity(none, none).items():
            if name in _SHARED and name in shared:
                self._storage[name] = shared[name]
            else:
                self._storage[name] = storage.grown(room, 0, allocate)
                self._written.add(name)

    def put(self, key: Tensor, value: Tensor) -> None:
        """Write what is this cache's own of the next rows, in plain torch."""
        for name, rows in self._encode(key, value, None).items():
            if name in self._written:
                self._storage[name].write(self._length, rows)
        self._length += key.shape[2]
        self._seen += key.shape[2]
