"""Expected Attention: keep what queries to come will attend to, by the distribution of past ones.

Paper: Expected Attention: KV Cache Compression by Estimating Attention from Future Queries
    Distribution
arXiv: 2510.00636
What it does: takes queries before RoPE as Gaussian with the mean and covariance seen so far, turns
    them by the average rotation of the next positions, and scores a row by the expected attention
    of such a query (the exact moment generating function of a Gaussian), mean over the group, times
    the length of its value. The first tokens stay. The paper recommends it inside Ada-KV:
    preset("expected-attention", allocate="adaptive").
What we do differently: positions to come are counted from the tokens really seen, not from the rows
    that happen to be at hand; statistics are gathered forward by forward, those of a decoded token
    included, and merged about their means. Averaging the rotation before the exponential is the
    paper's approximation. A soft-cap and sink logits have no part in the expectation.
Bytes read per decode step: per KV head, capacity * (head_dim + value_dim) * b.
State per token: none; per query head of a layer, (head_dim + 1) * head_dim * 4 bytes.
"""

from dataclasses import dataclass
from typing import ClassVar, Final, final

import torch
from torch import Tensor

from loki_attn.cache import LayerCache
from loki_attn.errors import PolicyError
from loki_attn.evict.base import Attended, Evict, Evictor, Needs, Place
from loki_attn.kernels import ops
from loki_attn.pieces.moments import add_moments, moments
from loki_attn.pieces.packing import real_rows, without_padding
from loki_attn.rope import Rope
from loki_attn.types import AttentionCall

PRESETS: Final = {
    "expected-attention": {
        "select": {"method": "dense"},
        "evict": {"method": "expected_attention"},
        "keep": {"capacity": 2048},
    }
}
_TOKENS: Final = "tokens_observed"
# Rows and queries at a time: bounds what is held in float32 beside the cache.
_BLOCK: Final = 1024


@final
@dataclass(frozen=True, kw_only=True)
class ExpectedAttention(Evict):
    """Score by the attention that queries to come are expected to give.

    Attributes:
        n_future: Positions to come that the rotation is averaged over.
        sinks: First tokens, which stay and whose queries do not count.
        covariance: Whether the spread of the queries counts, or their mean alone.
        epsilon: Added to the expected attention before the length of the value counts.
    """

    method: ClassVar[str] = "expected_attention"
    needs: ClassVar[Needs] = "statistics of the queries"
    moves_keys: ClassVar[bool] = True
    n_future: int = 512
    sinks: int = 4
    covariance: bool = True
    epsilon: float = 0.0

    def __post_init__(self) -> None:
        """Refuse futures without positions and negative sizes."""
        if self.n_future < 1:
            raise PolicyError(f"Expected Attention looks ahead, got n_future={self.n_future}.")
        if self.sinks < 0:
            raise PolicyError(f"Expected Attention keeps a number of sinks, got {self.sinks}.")
        if self.epsilon < 0:
            raise PolicyError(f"epsilon is added to a share, got {self.epsilon}; give 0 or more.")

    def bind(self, place: Place) -> Evictor:
        """Bind to a layer.

        Raises:
            PolicyError: If the layer's rotary embedding is not known.
        """
        if place.rope is None:
            raise PolicyError(
                "Expected Attention needs the rotary embedding of layer "
                f"{place.shape.index} to undo it, and it is not known; choose a method that works "
                "on keys as they are: snapkv, keydiff or knorm."
            )
        return _ExpectedAttention(self, place.rope)


@final
class _ExpectedAttention(Evictor):
    def __init__(self, spec: ExpectedAttention, rope: Rope) -> None:
        self._spec = spec
        self._rope = rope

    def observe(self, cache: LayerCache, seen: Attended) -> None:
        """Add the queries, before RoPE, to the statistics."""
        batch, kv_heads, _, dim = cache.keys.shape
        q_len = seen.query.shape[2]
        query = seen.query.reshape(batch, kv_heads, -1, q_len, dim)
        # The queries are those of the last rows, the same tokens in all heads.
        valid = None if seen.valid is None else seen.valid[..., -q_len:]
        asked = real_rows(valid, torch.Size((batch, kv_heads, q_len)), query.device)
        before = cache.memory.get(_TOKENS)
        if before is None:
            before = asked.new_full((batch, kv_heads), cache.seen - q_len, dtype=torch.int64)
        # Padding has no position: a token's is the number of real ones before it.
        position = before[..., None] + asked.cumsum(-1) - 1
        counted = asked & (position >= self._spec.sinks)
        places = position[:, :1, None]
        for start in range(0, q_len, _BLOCK):
            part = slice(start, start + _BLOCK)
            raw = self._rope.turn(query[:, :, :, part].float(), -places[..., part])
            add_moments(cache, raw, counted[..., part])
        cache.memory[_TOKENS] = before + asked.sum(-1)

    def scores(self, cache: LayerCache, call: AttentionCall, valid: Tensor | None) -> Tensor:
        """Expected attention times the length of the value."""
        mean, spread = moments(cache)
        ahead = self._average_turn(cache)
        mean, spread = mean @ ahead[:, None], ahead.mT[:, None, None] @ spread
        spread = spread @ ahead[:, None, None]
        if not self._spec.covariance:
            spread = torch.zeros_like(spread)
        exponents = _exponents(cache, mean, spread, call.scaling, valid)
        if valid is not None:
            exponents = exponents.masked_fill(~valid[:, :, None], float("-inf"))
        expected = exponents.softmax(-1).mean(2) + self._spec.epsilon
        lengths: Tensor = torch.linalg.vector_norm(cache.values, dim=-1, dtype=torch.float32)
        return expected * lengths

    def protected(self, cache: LayerCache, valid: Tensor | None) -> Tensor:
        """The sinks."""
        real = real_rows(valid, cache.positions.shape, cache.positions.device)
        return ops().protect(real[:, :, None], self._spec.sinks, 0)[:, :, 0]

    def _average_turn(self, cache: LayerCache) -> Tensor:
        """M with row @ M the mean of the row turned to the next positions, [batch, dim, dim]."""
        dim, device = cache.keys.shape[3], cache.keys.device
        rows = torch.eye(dim, device=device)
        total = torch.zeros_like(rows)
        for start in range(0, self._spec.n_future, _BLOCK // 8):
            stop = min(start + _BLOCK // 8, self._spec.n_future)
            ahead = torch.arange(start, stop, device=device)[:, None]
            total += self._rope.turn(rows.expand(stop - start, -1, -1), ahead).sum(0)
        # From the tokens seen on, whatever rows are left of them: R_a R_b = R_(a + b).
        seen = cache.memory[_TOKENS][:, :1]
        return self._rope.turn((total / self._spec.n_future).expand(len(seen), -1, -1), seen)


def _exponents(
    cache: LayerCache, mean: Tensor, spread: Tensor, scaling: float, valid: Tensor | None
) -> Tensor:
    """Logarithm of the expected exp(q.k): float32 [batch, kv_heads, group, length].

    Args:
        cache: The layer's rows.
        mean: float32 [batch, kv_heads, group, head_dim], of the queries to come.
        spread: float32 [batch, kv_heads, group, head_dim, head_dim], their covariance.
        scaling: Factor on q.k.
        valid: None, or bool [batch, kv_heads or 1, length].
    """
    found = []
    for start in range(0, cache.length, _BLOCK):
        part = slice(start, start + _BLOCK)
        rows = cache.keys[:, :, part]
        keys = without_padding(rows, None if valid is None else valid[..., part])[:, :, None]
        expected = (keys @ mean[..., None])[..., 0]
        variance = ((keys @ spread) * keys).sum(-1)
        found.append(scaling * expected + 0.5 * scaling**2 * variance)
    return torch.cat(found, -1)
