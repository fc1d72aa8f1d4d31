"""LagKV: keep the rows that vary most, measured by the range of the chunk that follows.

Paper: LagKV: Lag-Relative Information of the KV Cache Tells Which Tokens Are Important
arXiv: 2504.04704
What it does: cuts the rows behind the sinks into chunks, scales every channel of keys and values by
    its range in the next chunk, scores a row by the standard deviation over its channels, soft-max
    within the chunk, mean of keys and values, and ranks the rows of a chunk by it. So every chunk
    keeps the same share. Sinks, the last chunk and what follows it have no next chunk and stay.
What we do differently: a channel that is constant in the next chunk counts as 0 (the reference
    divides by its range of 0); rows of equal rank go by position, lower first. Rows before the last
    `lag` ones that have no whole next chunk stay first, as far as the capacity goes.
Bytes read per decode step: per KV head, capacity * (head_dim + value_dim) * b.
State per token: none.
"""

from dataclasses import dataclass
from typing import ClassVar, Final, final

import torch
from torch import Tensor

from loki_attn.cache import LayerCache
from loki_attn.errors import PolicyError
from loki_attn.evict.base import Evict, Evictor, Needs, Place
from loki_attn.kernels import ops
from loki_attn.pieces.packing import Packing, real_rows
from loki_attn.types import AttentionCall

PRESETS: Final = {
    "lagkv": {
        "select": {"method": "dense"},
        "evict": {"method": "lagkv"},
        "keep": {"capacity": 2048},
    }
}


@final
@dataclass(frozen=True, kw_only=True)
class LagKV(Evict):
    """Score by the spread over channels, relative to the next chunk.

    Attributes:
        lag: Rows of a chunk; the last `lag` rows stay.
        sinks: First tokens that stay.
    """

    method: ClassVar[str] = "lagkv"
    needs: ClassVar[Needs] = "values"
    moves_keys: ClassVar[bool] = True
    lag: int = 128
    sinks: int = 4

    def __post_init__(self) -> None:
        """Refuse chunks that cannot be ranked."""
        if self.lag < 1:
            raise PolicyError(f"LagKV needs chunks of at least one row, got lag={self.lag}.")
        if self.sinks < 0:
            raise PolicyError(f"LagKV keeps a number of sinks, got {self.sinks}.")

    @property
    def window(self) -> int:
        """The last chunk stays."""
        return self.lag

    def bind(self, place: Place) -> Evictor:
        """Bind to a layer; nothing about it matters."""
        del place
        return _LagKV(self)


@final
class _LagKV(Evictor):
    def __init__(self, spec: LagKV) -> None:
        self._spec = spec

    def scores(self, cache: LayerCache, call: AttentionCall, valid: Tensor | None) -> Tensor:
        """Rank within the chunk as a share in [0, 1); 1 for rows without a whole next chunk."""
        del call
        lag, sinks = self._spec.lag, self._spec.sinks
        shape, device = cache.positions.shape, cache.positions.device
        scores = torch.ones(shape, device=device)
        chunks = (shape[2] - sinks) // lag
        if chunks < 2:
            return scores
        packing = Packing.of(valid)
        spread = sum(
            _spread(packing.pack(rows)[:, :, sinks : sinks + chunks * lag].float(), chunks)
            for rows in (cache.keys, cache.values)
        )
        order = torch.as_tensor(spread).argsort(dim=-1, descending=True, stable=True)
        best_first = torch.arange(lag, device=device).expand_as(order)
        rank = torch.empty_like(order).scatter_(-1, order, best_first)
        share = (lag - 1 - rank).float() / lag
        # Rows behind a shorter batch row's last whole chunk are padding or have no next chunk.
        whole = (real_rows(valid, shape, device).sum(-1) - sinks) // lag
        followed = torch.arange(chunks - 1, device=device) < whole[..., None] - 1
        judged = torch.where(followed[..., None], share, 1.0).flatten(2)
        scores[:, :, sinks : sinks + judged.shape[2]] = judged
        return packing.unpack(scores)

    def protected(self, cache: LayerCache, valid: Tensor | None) -> Tensor:
        """The sinks."""
        real = real_rows(valid, cache.positions.shape, cache.positions.device)
        return ops().protect(real[:, :, None], self._spec.sinks, 0)[:, :, 0]


def _spread(rows: Tensor, chunks: int) -> Tensor:
    """Soft-max in each chunk but the last of the rows' spread, [batch, kv_heads, chunks - 1, lag].

    Args:
        rows: float32 [batch, kv_heads, chunks * lag, dim].
        chunks: At least 2.
    """
    parts = rows.reshape(*rows.shape[:2], chunks, -1, rows.shape[3])
    judged, following = parts[:, :, :-1], parts[:, :, 1:]
    low, high = following.amin(3, keepdim=True), following.amax(3, keepdim=True)
    span = high - low
    scaled = torch.where(span > 0, (judged - low) / torch.where(span > 0, span, 1.0), 0.0)
    return scaled.std(-1, correction=0).softmax(-1)
