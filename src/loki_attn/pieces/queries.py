"""Recent queries: remembered beside the rows, and what the rows receive of their attention."""

from typing import Final, Literal

import torch
from torch import Tensor

from loki_attn.cache import LayerCache
from loki_attn.kernels import ops
from loki_attn.pieces.real_tokens import Seen, real_queries
from loki_attn.types import AttentionCall

QUERIES: Final = "recent_queries"
PLACES: Final = "recent_query_places"
_NOWHERE: Final = -1


def remember_queries(cache: LayerCache, seen: Seen, window: int) -> None:
    """Keep the last `window` queries that are no padding in the cache's memory, across forwards.

    Args:
        cache: The layer's rows, those of the call included; its memory gets queries
            [batch, kv_heads, group, up to window, head_dim] in the space of the stored key rows,
            and their positions, int64 [batch, kv_heads, up to window].
        seen: The call.
        window: How many are kept; a batch row that has fewer gets zeros before them.
    """
    query, real = seen.query, real_queries(seen)
    padded = real is not None and not bool(real.all())
    last = query if padded else query[:, :, -window:]
    new = last.reshape(last.shape[0], cache.keys.shape[1], -1, *last.shape[2:])
    places = cache.positions[:, :, cache.length - last.shape[2] :].long()
    if padded and real is not None:
        places = places.masked_fill(~real, _NOWHERE)
    held, before = cache.memory.get(QUERIES), cache.memory.get(PLACES)
    if held is not None and before is not None and not _full(places[:, :, -window:], window):
        new, places = torch.cat([held, new], 3), torch.cat([before, places], 2)
    new, places = _last(new, places, window)
    # Copies: views would keep the whole forward's queries alive.
    cache.memory[QUERIES], cache.memory[PLACES] = new.clone(), places.clone()


def keep_queries(cache: LayerCache, window: int) -> None:
    """Forget all remembered queries but the last `window`."""
    held, places = cache.memory.get(QUERIES), cache.memory.get(PLACES)
    if held is not None and places is not None and held.shape[3] > window:
        cache.memory[QUERIES] = held[:, :, :, -window:].clone()
        cache.memory[PLACES] = places[:, :, -window:].clone()


def recent_queries(cache: LayerCache) -> Tensor:
    """The remembered queries as [batch, heads, count, head_dim], oldest first."""
    return cache.memory[QUERIES].flatten(1, 2)


def are_queries(cache: LayerCache) -> Tensor:
    """Which of the remembered are queries, and no fill: bool [batch, kv_heads, count]."""
    return cache.memory[PLACES] != _NOWHERE


def window_mask(cache: LayerCache, count: int, valid: Tensor | None) -> Tensor | None:
    """What the last `count` queries see: None, or bool [batch, kv_heads, count, length]."""
    if valid is None:
        return None
    places = cache.memory[PLACES][:, :, -count:]
    return (cache.positions[:, :, None] <= places[..., None]) & valid[:, :, None]


def window_sums(
    cache: LayerCache,
    call: AttentionCall,
    valid: Tensor | None,
    how: Literal["sum", "max"] = "sum",
    *,
    window: int | None = None,
) -> Tensor:
    """What every row receives of the remembered queries' attention (arXiv 2404.14469, section 4).

    Without padding the queries are those of the last rows, which must not have been evicted.

    Args:
        cache: The layer's rows and their recent queries.
        call: Scaling, soft-cap, sink logits.
        valid: None, or bool [batch, kv_heads or 1, length]: rows that are no padding.
        how: Sum or maximum over the queries.
        window: Only the last `window` of them count; None for all.

    Returns:
        float32 [batch, heads, length], per query head.
    """
    query = recent_queries(cache)
    query = query[:, :, -min(cache.length, window or cache.length) :]
    seen = window_mask(cache, query.shape[2], valid)
    return ops().column_sums(query, cache.keys, seen, call, how=how)


def _full(places: Tensor, window: int) -> bool:
    """Whether there are `window` queries in every batch row."""
    return places.shape[2] == window and bool((places != _NOWHERE).all())


def _last(queries: Tensor, places: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """The last `window` real queries, behind as many others as are missing."""
    real = places != _NOWHERE
    if bool(real.all()):
        return queries[:, :, :, -window:], places[:, :, -window:]
    # Stable: real ones go to the end, in their order.
    order = real.byte().argsort(dim=-1, stable=True)[..., -window:]
    inner = order[:, :, None, :, None].expand(-1, -1, queries.shape[2], -1, queries.shape[4])
    picked, places = queries.gather(3, inner), places.gather(2, order)
    return picked.masked_fill((places == _NOWHERE)[:, :, None, :, None], 0.0), places
