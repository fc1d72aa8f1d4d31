"""Nouns of the straight line.

Layout, said once: every public tensor is [batch, heads, seq, head_dim]; queries have `num_heads`
heads, keys and values `num_kv_heads`, and the `group = num_heads // num_kv_heads` query heads
`h * group .. h * group + group - 1` read KV head `h`. KV heads are never repeated in storage.
"""

from dataclasses import dataclass
from typing import Literal, final

from torch import Tensor

from loki_attn.tiles import Tiles

GroupReduce = Literal["softmax_sum", "softmax_max", "sum", "max", "none"]
"""How a group of query heads agrees on what to read: the sum or the largest of their soft-max
weights, the sum or the largest of their scores; "none" lets every query head choose alone."""

Mode = Literal["decode", "every_query"]
"""When selection acts: on single-token steps, or on every query row of every forward."""


@final
@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """The sizes of one attention layer.

    Attributes:
        index: The layer's index in the model.
        num_heads: Query heads.
        num_kv_heads: KV heads; divides `num_heads`.
        head_dim: Size of a key row, in elements.
        value_dim: Size of a value row, in elements.
    """

    index: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.num_heads // self.num_kv_heads


@final
@dataclass(frozen=True, kw_only=True)
class AttentionCall:
    """What the model asks of one attention call, beside the tensors.

    Attributes:
        scaling: Factor on q.k before the soft-max.
        softcap: If set, logits become `softcap * tanh(logits / softcap)`.
        sink_logits: If set, float [num_heads]: one more logit per head in the soft-max
            denominator, without a value row (gpt-oss).
    """

    scaling: float
    softcap: float | None = None
    sink_logits: Tensor | None = None


@final
@dataclass(frozen=True)
class Selection:
    """The rows that one single-token attention call reads. Nothing is evicted by it.

    Attributes:
        indices: int64 [batch, num_kv_heads or num_heads, k]: rows of the cache, unique and
            ascending, padded at the end with -1 where a row reads fewer.
        counts: int64 [batch, num_kv_heads or num_heads]: how many of them are real, at least 1.
    """

    indices: Tensor
    counts: Tensor


@final
@dataclass(frozen=True)
class KeepSet:
    """The rows that stay after an eviction; all others are gone for good. Never a selection.

    Attributes:
        indices: int64 [batch, num_kv_heads, most]: rows of the cache, unique and ascending, padded
            at the end with -1 where a head keeps fewer.
        counts: int64 [batch, num_kv_heads]: how many of them are real.
    """

    indices: Tensor
    counts: Tensor


@final
@dataclass(frozen=True)
class AttentionOutput:
    """The result of an attention call.

    Attributes:
        output: [batch, num_heads, q_len, value_dim], dtype of the query.
        log_sum_exp: float32 [batch, num_heads, q_len]: of the logits that were read, sink logits
            included; -inf where a query sees nothing (its output is then 0).
    """

    output: Tensor
    log_sum_exp: Tensor


@final
@dataclass(frozen=True)
class Lead:
    """What ranks the rows of one layer: their leading coordinates, and how a query meets them.

    Attributes:
        plane: [batch, kv_heads, length, rank] float rows, or tiles; None ranks by recency, later
            rows first, and reads nothing.
        scales: For tiles of codes, float16 [batch, kv_heads, length]: factor of each row's codes.
        query_map: float32 [kv_heads, head_dim, rank], contiguous; None where the first `rank`
            coordinates of the query itself rank the rows.
    """

    plane: Tensor | Tiles | None
    scales: Tensor | None = None
    query_map: Tensor | None = None


@final
@dataclass(frozen=True, kw_only=True)
class Reading:
    """How much one single-token step reads: a budget, resolved for the rows that are visible.

    Attributes:
        counts: Rows to read, sinks and recents included: a number where no mask is given, int64
            [batch or 1] with a mask, None where the scores decide, by `mass`.
        sinks: First visible rows that are always read.
        recents: Last visible rows that are always read.
        mass: With counts None: share of the estimated attention to reach, in (0, 1].
        cap: With `mass`: most rows to read; None for no limit.
        floor: With `mass`: fewest rows to read, where that many are visible.
        dense_below: With `mass`: where at most this many rows are visible, all are read.
        most: A bound on counts that is known without looking at a tensor; None where the scores
            decide.
        held: int64 [1] on the device: rows that are written of storage of fixed size, where others
            are hidden; None where all are. It says nothing that a mask does not say, but sooner.
    """

    counts: int | Tensor | None
    sinks: int = 0
    recents: int = 0
    mass: float | None = None
    cap: int | None = None
    floor: int = 1
    dense_below: int = 0
    most: int | None = None
    held: Tensor | None = None


@final
@dataclass(frozen=True, kw_only=True)
class AppendRequest:
    """New rows of one layer and the storage that they go to, which has room for them.

    Attributes:
        key: [batch, kv_heads, tokens, head_dim], stored as it is.
        value: [batch, kv_heads, tokens, value_dim].
        keys: Storage [batch, kv_heads, capacity, head_dim], dtype of `key`.
        values: Storage [batch, kv_heads, capacity, value_dim], dtype of `value`.
        positions: Storage int32 [batch, kv_heads, capacity]; None where positions are not kept.
        start: Rows held; the new ones are written behind them. An int64 tensor [1] on the device of
            the rows where the storage never grows, so that nobody waits for it.
        first_position: Position of the first new token; the others follow it one by one.
        lead: Storage of the lead plane with the length that the append leaves; None without one.
        lead_scales: Storage float16 [batch, kv_heads, capacity], for a lead of codes.
        key_map: float32 [kv_heads, head_dim, rank], contiguous: keys to lead coordinates.
    """

    key: Tensor
    value: Tensor
    keys: Tensor
    values: Tensor
    positions: Tensor | None
    start: int | Tensor
    first_position: int
    lead: Tiles | None = None
    lead_scales: Tensor | None = None
    key_map: Tensor | None = None
