"""SparQ: rank the rows by the channels in which this query is largest, make up for the rest.

Paper: SparQ Attention: Bandwidth-Efficient LLM Inference
arXiv: 2312.04985
What it does: takes the `rank` channels with the largest |q|, summed over a group, reads those
    columns of the keys, and scales the logits by 1 / sqrt(head_dim * |q_r|_1 / |q|_1); attends to
    the best k rows exactly, and gives the share of attention that the estimate sees elsewhere to
    the mean of the values.
What we do differently: the share is 1 minus the estimated mass of the rows that are not read, the
    same unless there are sink logits. The mean is that of the rows that the query sees, from sums
    of 64 value rows each, so it is exact under masks and after an eviction; values that are not
    finite count as 0. The current token is one of the k, among the recents. Ties between channels
    go to the lower one. Several queries at once (mode "every_query") read whole keys. On CPUs plain
    torch gathers columns no faster than the native kernel reads whole keys: copy_channels=False
    saves the copy then.
Bytes read per decode step: per KV head, T * rank * b for the columns (T * head_dim * b without
    their copy), T * value_dim / 16 for the sums of values, and k * (head_dim + value_dim) * b.
State per token: head_dim * b bytes per KV head for the copy by channels, and value_dim / 16 for the
    sums of values.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final, final

import torch
from torch import Tensor

from loki_attn.basis import LayerBasis
from loki_attn.cache import LayerCache
from loki_attn.errors import PolicyError
from loki_attn.kernels import ops
from loki_attn.pieces import ranks
from loki_attn.select.base import Estimate, Select, Selector
from loki_attn.types import AttentionCall, LayerShape, Selection

CHANNELS: Final = "channels"
VALUE_SUM: Final = "value_sum"
# Rows of one block: a channel's share of it is a whole line of memory, in 2-byte elements even two.
_PAGE: Final = 64
_SUM_BYTES: Final = 4
PRESETS: Final[dict[str, dict[str, Any]]] = {
    "sparq": {
        "select": {"method": "sparq", "rank": 0.25},
        "budget": {"top_k": 128, "recents": 32},
        "group_reduce": "sum",
    },
}


@final
@dataclass(frozen=True, kw_only=True)
class SparQ(Select):
    """Rank by the query's largest channels.

    Attributes:
        rank: Channels that are read: a whole number of them, or a share of head_dim below 1 as a
            float.
        copy_channels: Whether a copy of the keys by channels is kept, so that only those channels
            are read; without it the keys are read whole.
        mean_value: Whether the output is corrected by the mean of the values.
    """

    method: ClassVar[str] = "sparq"
    rank: int | float = 0.25
    copy_channels: bool = True
    mean_value: bool = True

    def __post_init__(self) -> None:
        """Refuse values that no layer could serve."""
        ranks.require_rank(self.rank)
        for name in ("copy_channels", "mean_value"):
            if not isinstance(getattr(self, name), bool):
                raise PolicyError(f"{name} is true or false, got {getattr(self, name)!r}.")

    def bind(
        self,
        shape: LayerShape,
        basis: LayerBasis | None = None,
        profile: Mapping[str, Tensor] | None = None,
    ) -> Selector:
        """Bind to a layer; a basis does not matter."""
        del basis, profile
        rank = ranks.coordinates(self.rank, shape.head_dim)
        return _SparQSelector(rank, copy=self.copy_channels, mean=self.mean_value)


@final
class _SparQSelector(Selector):
    def __init__(self, rank: int, *, copy: bool, mean: bool) -> None:
        self._rank = rank
        self._copy = copy
        self._mean = mean

    def page_rows(self) -> int:
        """Rows of one block of columns, and of one sum of values."""
        return _PAGE if self._copy or self._mean else 0

    def summarise(self, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
        """The keys by channels [..., head_dim, rows], and the sums of the values."""
        found = {}
        if self._copy:
            # A short last page is filled up: a name's shape never changes.
            room = keys.new_zeros(*keys.shape[:3], keys.shape[4], _PAGE)
            room[..., : keys.shape[3]] = keys.mT
            found[CHANNELS] = room
        if self._mean:
            found[VALUE_SUM] = torch.nan_to_num(_sound(values).sum(3))
        return found

    def score(self, query: Tensor, cache: LayerCache, call: AttentionCall) -> Tensor:
        """Logits of the largest channels alone, as if the others added in proportion."""
        channels = largest_channels(query, cache.keys.shape[1], self._rank)
        unread = _unread(query, channels)
        if self._copy and query.shape[2] == 1:
            logits = _score_columns(query, cache, channels[:, :, 0], call.scaling)
        else:
            read = query.masked_fill(unread, 0.0)
            logits = ops().score(read, cache.keys, None, replace(call, softcap=None))
        logits.mul_(temperature(query, unread)[..., None])
        return logits if call.softcap is None else torch.tanh(logits / call.softcap) * call.softcap

    def finish(self, output: Tensor, chosen: Tensor | Selection, read: Estimate) -> Tensor:
        """Give what the estimate sees in the other rows to the mean of the values."""
        if not self._mean:
            return output
        heads = output.shape[1]
        visible = _per_head(read.visible, heads)
        weights = ops().estimated_weights(read.logits, visible, read.call)
        if isinstance(chosen, Selection):
            others = _without(weights, chosen)
        else:
            others = weights.masked_fill(_per_head(chosen, heads), 0.0)
        share = others.sum(-1, keepdim=True).clamp(max=1.0)
        mean = _per_head(visible_mean(read.cache, read.visible), heads)
        return ((1 - share) * output + share * mean).to(output.dtype)

    def score_bytes(self, cache: LayerCache) -> float:
        """The columns, or the whole key, and a row's share of the sums of values."""
        read = self._rank if self._copy else cache.keys.shape[3]
        sums = cache.values.shape[3] * _SUM_BYTES / _PAGE if self._mean else 0.0
        return read * cache.keys.itemsize + sums


def largest_channels(query: Tensor, num_kv_heads: int, rank: int) -> Tensor:
    """Find the channels in which the query heads of a group are largest together.

    Args:
        query: [batch, heads, q_len, head_dim].
        num_kv_heads: KV heads that the heads share.
        rank: How many channels.

    Returns:
        int64 [batch, kv_heads, q_len, rank], ascending; ties go to the lower channel.
    """
    batch, _, q_len, dim = query.shape
    wide = torch.promote_types(query.dtype, torch.float32)
    size = query.to(wide).abs().view(batch, num_kv_heads, -1, q_len, dim).sum(2)
    order = size.sort(dim=-1, descending=True, stable=True).indices
    return order[..., :rank].sort(-1).values


def temperature(query: Tensor, unread: Tensor) -> Tensor:
    """Return sqrt(|q|_1 / |q_r|_1) [batch, heads, q_len], what partial logits are multiplied by.

    Args:
        query: [batch, heads, q_len, head_dim].
        unread: bool of the same shape, channels that are left out.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    size = query.to(wide).abs()
    whole, part = size.sum(-1), size.masked_fill(unread, 0.0).sum(-1)
    # A head that is 0 in all channels of its group's choice has logits of 0 at any temperature.
    return torch.sqrt(whole / part).masked_fill(part == 0, 1.0)


def visible_mean(cache: LayerCache, visible: Tensor) -> Tensor:
    """Return the mean of the values that each query sees, reading single rows only where it must.

    Args:
        cache: The rows, with sums of values.
        visible: bool [batch or 1, kv_heads or 1, q_len, length].

    Returns:
        float32 or wider [batch, kv_heads, q_len, value_dim]; 0 for a query that sees nothing.
    """
    whole = cache.length // _PAGE
    paged = visible[..., : whole * _PAGE]
    full = paged.reshape(*visible.shape[:3], whole, _PAGE).all(-1)
    loose = visible.clone()
    loose[..., : whole * _PAGE] &= ~full.repeat_interleave(_PAGE, -1)
    rows = loose.flatten(0, 2).any(0).nonzero()[:, 0]
    # A short last page is read row by row: in a prefix its sum may know of later rows.
    sums = cache.summary(VALUE_SUM)[:, :, :whole]
    total = full.to(sums.dtype) @ sums
    total = total + loose[..., rows].to(sums.dtype) @ _sound(cache.values[:, :, rows])
    return total / visible.sum(-1, keepdim=True).clamp(min=1)


def _score_columns(query: Tensor, cache: LayerCache, channels: Tensor, scaling: float) -> Tensor:
    """Logits [batch, heads, 1, length] from these channels [batch, kv_heads, rank] alone."""
    blocks = cache.summary(CHANNELS)
    batch, kv_heads, pages, _, size = blocks.shape
    columns = blocks.new_empty(batch, kv_heads, channels.shape[2], pages, size)
    for b in range(batch):
        for h in range(kv_heads):
            # Ten times as fast as one gather, which copies element by element.
            picked = blocks[b, h].transpose(0, 1)
            torch.index_select(picked, 0, channels[b, h], out=columns[b, h])
    wide = torch.promote_types(query.dtype, torch.float32)
    grouped = query.view(batch, kv_heads, -1, query.shape[3])
    asked = grouped.gather(3, channels[:, :, None].expand(-1, -1, grouped.shape[2], -1))
    logits = asked.to(wide) @ columns.flatten(3).to(wide)
    return logits.view(*query.shape[:3], -1)[..., : cache.length].mul_(scaling)


def _unread(query: Tensor, channels: Tensor) -> Tensor:
    """Bool [batch, heads, q_len, head_dim]: channels that its group does not read."""
    unread = query.new_ones(*channels.shape[:3], query.shape[3], dtype=torch.bool)
    return _per_head(unread.scatter_(3, channels, False), query.shape[1])


def _without(weights: Tensor, chosen: Selection) -> Tensor:
    """Weights [batch, heads, 1, length], 0 where rows were chosen."""
    read = weights.new_zeros(*chosen.indices.shape[:2], weights.shape[3] + 1, dtype=torch.bool)
    read.scatter_(2, chosen.indices.masked_fill(chosen.indices < 0, weights.shape[3]), True)
    return weights.masked_fill(_per_head(read[:, :, None, :-1], weights.shape[1]), 0.0)


def _per_head(rows: Tensor, heads: int) -> Tensor:
    """What is the same for a group, for each of its query heads."""
    return rows if rows.shape[1] == 1 else rows.repeat_interleave(heads // rows.shape[1], 1)


def _sound(values: Tensor) -> Tensor:
    """Values in float32 or wider, 0 where they are not finite."""
    wide = torch.promote_types(values.dtype, torch.float32)
    return values.to(wide).masked_fill(~torch.isfinite(values), 0.0)
