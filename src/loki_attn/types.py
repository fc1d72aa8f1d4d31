"""Nouns of the straight line.

Layout, said once: every public tensor is [batch, heads, seq, head_dim]; queries have `num_heads`
heads, keys and values `num_kv_heads`, and the `group = num_heads // num_kv_heads` query heads
`h * group .. h * group + group - 1` read KV head `h`. KV heads are never repeated in storage.
"""

from dataclasses import dataclass
from typing import Literal, final

from torch import Tensor

GroupReduce = Literal["softmax_sum", "max", "none"]
"""How a group of query heads agrees on what to read; "none" lets every query head choose alone."""

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
class AttentionOutput:
    """The result of an attention call.

    Attributes:
        output: [batch, num_heads, q_len, value_dim], dtype of the query.
        log_sum_exp: float32 [batch, num_heads, q_len]: of the logits that were read, sink logits
            included; -inf where a query sees nothing (its output is then 0).
    """

    output: Tensor
    log_sum_exp: Tensor
