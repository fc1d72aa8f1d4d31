"""Real tokens: padding asks nothing, and does not count where tokens are counted."""

from typing import Final, Protocol

from torch import Tensor

from loki_attn.cache import LayerCache

PADDING: Final = "padding"


class Seen(Protocol):
    """An attention call, as far as it is looked at here; `evict.base.Attended` says more."""

    @property
    def query(self) -> Tensor:
        """[batch, heads, q_len, head_dim], of the last rows."""

    @property
    def visible(self) -> Tensor | None:
        """None for causal, or bool [batch or 1, kv_heads or 1, q_len, length]."""


def real_queries(seen: Seen) -> Tensor | None:
    """Queries of a call that are no padding: None for all, or bool [batch or 1, 1, q_len].

    Padding is what the last query does not see.
    """
    if seen.visible is None:
        return None
    return seen.visible[:, :1, -1, seen.visible.shape[3] - seen.query.shape[2] :]


def seen_by_real(seen: Seen) -> Tensor | None:
    """What the queries of a call see, nothing where they are padding; of the shape of `visible`."""
    real = real_queries(seen)
    if seen.visible is None or real is None:
        return None
    return seen.visible & real[..., None]


def count_tokens(cache: LayerCache, seen: Seen) -> Tensor:
    """Number the tokens of a call, the first real one of the text being 0; padding has no number.

    So a token has the same number with padding before it as without, and in chunks of a prompt as
    in one go. Call it once per forward: padding is counted in the cache's memory.

    Args:
        cache: The layer's rows, those of the call included.
        seen: The call.

    Returns:
        int64 [batch, kv_heads, q_len].
    """
    places = cache.positions[:, :, cache.length - seen.query.shape[2] :].long()
    before, real = cache.memory.get(PADDING), real_queries(seen)
    if before is not None:
        places = places - before[..., None]
    if real is None or bool(real.all()):
        return places
    skipped = (~real).cumsum(-1).expand_as(places)
    counted = skipped[..., -1]
    cache.memory[PADDING] = counted.clone() if before is None else before + counted
    return places - skipped
