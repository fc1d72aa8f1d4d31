"""R-KV: keep rows that matter to the last queries and that no later row repeats.

Paper: R-KV: Redundancy-aware KV Cache Compression for Reasoning Models
arXiv: 2505.24133
What it does: whenever the cache has grown by a burst beyond its budget, scores every row by
    `mix` * importance - (1 - mix) * redundancy. Importance is the mean attention of the last 8
    queries, the largest over the group, max-pooled over 7 rows. Redundancy is the soft-max over the
    rows of each row's mean cosine similarity with the others; a row's newest near-duplicate
    (cosine above 0.5) is not charged for it, so that of rows alike the newest survives.
What we do differently: the window is masked causally, and its own columns stay in the soft-max;
    every batch row has its own similarities; only a later row counts as the newest near-duplicate,
    so that of two equal keys the older one goes (the released code spares both of a pair, and row 0
    where a row has none). No matrix of similarities is held: sums of cosines come from the sum of
    the unit keys, near-duplicates are searched in blocks, newest first. A prompt beyond the budget
    is judged at its end, once. The default budget is 1024 rows with a burst of 128; a burst is full
    when any row of a batch is, padding included.
Bytes read per decode step: per KV head, (capacity + burst / 2) * (head_dim + value_dim) * b; an
    eviction, one step in `burst`, reads the keys once more for the window and compares them with
    each other.
State per token: none; the last `window` queries of a layer.
"""

from dataclasses import dataclass
from typing import ClassVar, Final, final

import torch
from torch import Tensor
from torch.nn.functional import normalize

from loki_attn.cache import LayerCache
from loki_attn.errors import PolicyError
from loki_attn.evict.base import Attended, Evict, Evictor, Needs, Place
from loki_attn.pieces.queries import are_queries, remember_queries, window_sums
from loki_attn.pieces.reduction import over_group
from loki_attn.pieces.smoothing import pool
from loki_attn.types import AttentionCall

PRESETS: Final = {
    "rkv": {
        "select": {"method": "dense"},
        "evict": {"method": "rkv"},
        "keep": {"capacity": 1024, "burst": 128},
    }
}

_BLOCK: Final = 128


@final
@dataclass(frozen=True, kw_only=True)
class RKV(Evict):
    """Score by importance and redundancy.

    Attributes:
        mix: Share of importance in the score, in [0, 1] (the paper's lambda).
        window: Last queries that judge, whose rows stay.
        kernel: Rows that importance is max-pooled over, an odd number; 1 pools nothing.
        threshold: Cosine above which two keys are near-duplicates.
    """

    method: ClassVar[str] = "rkv"
    needs: ClassVar[Needs] = "attention of the last queries"
    each_step: ClassVar[bool] = True
    mix: float = 0.07
    window: int = 8
    kernel: int = 7
    threshold: float = 0.5

    def __post_init__(self) -> None:
        """Refuse what mixes, judges or pools nothing."""
        if not 0 <= self.mix <= 1:
            raise PolicyError(f"mix is a share in [0, 1], got {self.mix!r}.")
        if self.window < 1:
            raise PolicyError(f"R-KV needs a window of at least one query, got {self.window}.")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise PolicyError(f"R-KV pools over an odd number of rows, got kernel={self.kernel}.")

    def bind(self, place: Place) -> Evictor:
        """Bind to a layer; nothing about it matters."""
        del place
        return _RKV(self)


@final
class _RKV(Evictor):
    def __init__(self, spec: RKV) -> None:
        self._spec = spec

    def observe(self, cache: LayerCache, seen: Attended) -> None:
        """Remember the last queries."""
        remember_queries(cache, seen, self._spec.window)

    def scores(self, cache: LayerCache, call: AttentionCall, valid: Tensor | None) -> Tensor:
        """Importance less redundancy."""
        spec, keys = self._spec, cache.keys
        asked = are_queries(cache).sum(-1, keepdim=True).clamp(1, cache.length)
        received = over_group(window_sums(cache, call, valid), keys.shape[1], "max") / asked
        importance = pool(received, spec.kernel, "max")
        if spec.mix == 1:
            return importance
        # The soft-max makes a share of redundancy, as importance is one.
        alike = mean_similarity(keys, valid, spec.threshold)
        if valid is not None:
            alike = alike.masked_fill(~valid, float("-inf"))
        return spec.mix * importance - (1 - spec.mix) * alike.softmax(-1)


def mean_similarity(keys: Tensor, valid: Tensor | None, threshold: float) -> Tensor:
    """Mean cosine of every row with the others (arXiv 2505.24133), newest copies spared.

    A row is not charged for the rows whose newest near-duplicate it is.

    Reads length * head_dim elements, and those of rows without a near-duplicate once per block.

    Args:
        keys: [batch, kv_heads, length, head_dim].
        valid: None, or bool [batch, kv_heads or 1, length]: rows that are no padding.
        threshold: Cosine above which a later row is a near-duplicate.

    Returns:
        float32 [batch, kv_heads, length]; 0 for padding.
    """
    unit, length = keys.float(), keys.shape[2]
    open_rows = torch.ones(keys.shape[:3], dtype=torch.bool, device=keys.device)
    if valid is not None:
        open_rows &= valid
        unit = unit.masked_fill(~open_rows[..., None], 0.0)
    others = (open_rows.sum(-1, keepdim=True) - 1).clamp(min=1)
    unit = normalize(unit, dim=-1)
    total = (unit @ unit.sum(2)[..., None])[..., 0] - unit.square().sum(-1)
    for stop in range(length, 1, -_BLOCK):
        start = max(0, stop - _BLOCK)
        # Rows that still look for a near-duplicate behind them, in any head.
        rows = open_rows[..., : stop - 1].flatten(0, 1).any(0).nonzero()[:, 0]
        if not rows.numel():
            break
        cosines = unit.index_select(2, rows) @ unit[:, :, start:stop].mT
        columns = torch.arange(start, stop, device=rows.device)
        near = (cosines > threshold) & (columns > rows[:, None])
        near &= open_rows.index_select(2, rows)[..., None]
        newest = torch.where(near, columns, -1).amax(-1, keepdim=True)
        total[:, :, start:stop] -= torch.where(columns == newest, cosines, 0.0).sum(2)
        open_rows[:, :, rows] &= newest[..., 0] < 0
    return total / others
