"""H2O: keep the rows that received most attention so far, and the most recent ones.

Paper: H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models
arXiv: 2306.14048
What it does: adds up the attention that every row receives from all queries, of the prompt and of
    every step; when there are more rows than the budget, the last ones stay (half of the budget)
    and the best of the others; dropped rows lose their score with their place.
What we do differently: one choice per KV head, from the sum over its query heads; rows really go,
    and those that stay keep their order and their positions; the prompt is judged at its end, by
    column sums, without the matrix of weights; queries that are padding judge nothing. The budget
    follows the text by default (`keep_share`, a fifth of the tokens seen so far, half of it recent
    as in the paper), where the paper freezes it at the prompt's length. `normalise` divides by how
    many queries could see a row, which the paper does not: old rows then lose their head start.
    Under a selection that ranks all rows by logits, a step adds its estimated weights. Truncated
    queries leave what they added. `burst` lets a step evict many rows at once.
Bytes read per decode step: per KV head, capacity * (head_dim + value_dim) * b, the keys once more
    where the attention hands out no weights, and 4 * capacity for the scores.
State per token: 4 bytes per KV head; 8 with `normalise`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final, final

import torch
from torch import Tensor

from loki_attn.cache import LayerCache
from loki_attn.errors import PolicyError
from loki_attn.evict.base import Attended, Evict, Evictor, Needs, Place, best
from loki_attn.kernels import ops
from loki_attn.pieces.real_tokens import seen_by_real
from loki_attn.pieces.recents import with_recents
from loki_attn.pieces.reduction import over_group
from loki_attn.row_format import Mark
from loki_attn.types import AttentionCall

PRESETS: Final = {
    "h2o": {
        "select": {"method": "dense"},
        "evict": {"method": "h2o"},
        "keep": {"keep_share": 0.2},
    }
}

_RECEIVED: Final = "received"
_AGE: Final = "age"


@final
@dataclass(frozen=True, kw_only=True)
class H2O(Evict):
    """Score by the attention received so far.

    Attributes:
        recent_share: Share of the budget that is for the last rows, in [0, 1], rounded down.
        normalise: Whether what a row received is divided by how many queries could see it.
    """

    method: ClassVar[str] = "h2o"
    needs: ClassVar[Needs] = "attention of all queries"
    each_step: ClassVar[bool] = True
    recent_share: float = 0.5
    normalise: bool = False

    def __post_init__(self) -> None:
        """Refuse what is no share."""
        if not 0 <= self.recent_share <= 1:
            raise PolicyError(
                f"recent_share is a share of the budget in [0, 1], got {self.recent_share!r}."
            )

    def bind(self, place: Place) -> Evictor:
        """Bind to a layer; nothing about it matters."""
        del place
        return _H2O(self)


@final
class _H2O(Evictor):
    wants_weights: ClassVar[bool] = True

    def __init__(self, spec: H2O) -> None:
        self._spec = spec

    def marks(self) -> Mapping[str, Mark]:
        """What a row received, and how many queries could see it."""
        received = {_RECEIVED: Mark(torch.float32)}
        return received | ({_AGE: Mark(torch.int32)} if self._spec.normalise else {})

    def observe(self, cache: LayerCache, seen: Attended) -> None:
        """Add what the rows receive."""
        visible, new = seen_by_real(seen), seen.weights
        if new is not None and visible is not None:
            new = new.masked_fill(~visible.any(-1), 0.0)
        elif new is None:
            sums = ops().column_sums(seen.query, cache.keys, visible, seen.call)
            new = over_group(sums, cache.keys.shape[1], "sum")
        cache.plane(_RECEIVED).add_(new)
        if self._spec.normalise:
            age = cache.plane(_AGE)
            age += _seen_by(cache.length, seen.query.shape[2], visible, age)

    def scores(self, cache: LayerCache, call: AttentionCall, valid: Tensor | None) -> Tensor:
        """What was received, per query that could see the row if asked for."""
        del call, valid
        received = cache.plane(_RECEIVED)
        return received / cache.plane(_AGE).clamp(min=1) if self._spec.normalise else received

    def keep(self, scores: Tensor, counts: Tensor, protected: Tensor, valid: Tensor) -> Tensor:
        """The last rows, then the best of the others."""
        protected = with_recents(protected, counts, valid, self._spec.recent_share)
        return best(scores, counts, protected, valid)


def _seen_by(length: int, q_len: int, visible: Tensor | None, like: Tensor) -> Tensor:
    """How many of the queries see each row, broadcastable to [batch, kv_heads, length]."""
    if visible is not None:
        return visible.sum(2, dtype=like.dtype)
    rows = torch.arange(length, 0, -1, dtype=like.dtype, device=like.device)
    return rows.clamp(max=q_len)
