"""CORM: drop rows that mattered to none of the recent queries; there is no budget.

Paper: CORM: Cache Optimization with Recent Message for Large Language Model Inference
arXiv: 2404.15949
What it does: a row is important for a query if it receives at least 1/t of its attention, t being
    the rows that the query sees. Rows that none of the last `queries` queries found important go,
    but for the last `window` rows.
What we do differently: a row stays if any query head of its group finds it important; t counts the
    rows that are there, not those that were dropped (the paper leaves it open, and only so does
    every query find a row important). A sink logit takes no share: it is no row. Queries that are
    padding judge nothing and take no place among the last ones. Rows go at the end of a forward,
    the prompt's included. With a capacity, which the paper has not, rows that most of the last
    queries found important stay; `burst` does not matter. Bits are exact in every step, also
    under a selection: keys are read for them.
Bytes read per decode step: per KV head, rows * (2 * head_dim + value_dim) * b, and the bits.
State per token: queries / 8 bytes per KV head, in whole words of 4 bytes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Final, final

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from loki_attn.cache import LayerCache
from loki_attn.errors import PolicyError
from loki_attn.evict.base import Attended, Evict, Evictor, Needs, Place, best
from loki_attn.kernels import ops
from loki_attn.pieces.real_tokens import count_tokens, real_queries
from loki_attn.row_format import Mark
from loki_attn.types import AttentionCall

PRESETS: Final = {"corm": {"select": {"method": "dense"}, "evict": {"method": "corm"}}}

_BITS: Final = "important"
_WORD: Final = 32
_BLOCK: Final = 32
# What equal logits may differ by after the order of a sum; rows at the threshold stay.
_ROUNDING: Final = 1e-5


@final
@dataclass(frozen=True, kw_only=True)
class CORM(Evict):
    """Keep what mattered lately.

    Attributes:
        queries: Last queries that judge (the paper's w).
        window: Last rows that stay in any case (the paper's r).
    """

    method: ClassVar[str] = "corm"
    needs: ClassVar[Needs] = "attention of the last queries"
    each_step: ClassVar[bool] = True
    needs_budget: ClassVar[bool] = False
    queries: int = 256
    window: int = 256

    def __post_init__(self) -> None:
        """Refuse judges that are none."""
        if self.queries < 1 or self.window < 0:
            raise PolicyError(
                "CORM needs at least one query that judges and no negative window, got queries="
                f"{self.queries}, window={self.window}."
            )

    def bind(self, place: Place) -> Evictor:
        """Bind to a layer; nothing about it matters."""
        del place
        return _CORM(self)


@final
class _CORM(Evictor):
    def __init__(self, spec: CORM) -> None:
        self._spec = spec
        self._words = -(-spec.queries // _WORD)

    def marks(self) -> Mapping[str, Mark]:
        """One bit per query, in a ring."""
        return {_BITS: Mark(torch.int32, (self._words,))}

    def observe(self, cache: LayerCache, seen: Attended) -> None:
        """Write the bits of the last queries over those of the oldest."""
        q_len, real = seen.query.shape[2], real_queries(seen)
        # A token's number is its place in the ring, which so needs no pointer.
        slots = count_tokens(cache, seen) % self._spec.queries
        if real is None:
            real = torch.ones(1, 1, q_len, dtype=torch.bool, device=slots.device)
        from_end = real.flip(-1).cumsum(-1).flip(-1)
        judges = real & (from_end <= self._spec.queries)
        asked = judges.flatten(0, 1).any(0).nonzero()
        for start in range(int(asked.min()) if asked.numel() else q_len, q_len, _BLOCK):
            block = slice(start, min(start + _BLOCK, q_len))
            marks = _important(cache, seen, block) & judges[:, :, block, None]
            _write(cache.plane(_BITS), slots[:, :, block], judges[:, :, block], marks)

    def scores(self, cache: LayerCache, call: AttentionCall, valid: Tensor | None) -> Tensor:
        """How many of the last queries found a row important."""
        del call, valid
        bits = cache.plane(_BITS)
        none = torch.zeros_like(bits[:, :, :1])
        return ops().hamming(none, bits)[:, :, 0]

    def keep(self, scores: Tensor, counts: Tensor, protected: Tensor, valid: Tensor) -> Tensor:
        """Important and protected rows, or the best of them."""
        wanted = (((scores > 0) | protected) & valid).sum(-1).clamp(min=1)
        return best(scores, counts.minimum(wanted), protected, valid)


def _important(cache: LayerCache, seen: Attended, block: slice) -> Tensor:
    """Which rows matter to a block of queries, bool [batch, kv_heads, queries, length]."""
    keys, query, visible = cache.keys, seen.query[:, :, block], seen.visible
    if visible is None:
        visible = ops().causal_mask(seen.query.shape[2], cache.length, keys.device)
    visible = visible[:, :, block]
    # Rows share the attention among themselves, so that the largest share is at least the mean.
    call = replace(seen.call, sink_logits=None)
    logits = ops().score(query, keys, None, call)
    group = query.shape[1] // keys.shape[1]
    by_head = visible if visible.shape[1] == 1 else visible.repeat_interleave(group, 1)
    weights = ops().estimated_weights(logits, by_head, call)
    weights = weights.reshape(*keys.shape[:2], group, *weights.shape[2:])
    fair = (1 - _ROUNDING) / visible.sum(-1, keepdim=True)
    return ((weights >= fair[:, :, None]) & visible[:, :, None]).any(2)


def _write(bits: Tensor, slots: Tensor, judges: Tensor, marks: Tensor) -> None:
    """Write one bit per query and row.

    Args:
        bits: int32 [batch, kv_heads, length, words], changed in place.
        slots: int64 [batch, kv_heads, queries]: each query's bit; those of judges differ.
        judges: bool [batch or 1, 1, queries]: the others write nothing.
        marks: bool [batch, kv_heads, queries, length].
    """
    # Different powers of two add up to what "or" makes of them, exactly in float64: so a matrix
    # product writes all queries at once.
    powers = torch.exp2((slots % _WORD).double()) * judges
    words = one_hot(slots // _WORD, bits.shape[3]).double() * powers[..., None]
    written = words.sum(2).long().to(torch.int32)
    new = (marks.mT.double() @ words).long().to(torch.int32)
    bits.copy_((bits & ~written[:, :, None]) | new)
