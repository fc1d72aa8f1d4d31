"""StreamingLLM: keep the attention sinks and the most recent rows.

Paper: Efficient Streaming Language Models with Attention Sinks
arXiv: 2309.17453
What it does: keeps the first 4 tokens and the last ones, the same rows in every head and layer.
    With positions="slot", the paper's, a token's position is its place in the cache, so distances
    never grow beyond the capacity; with positions="keep" tokens keep their true positions.
What we do differently: "slot" turns the few sinks forward by the rows that were dropped behind
    them, which gives the distances of numbering all rows anew, at O(sinks) and not O(capacity) per
    step; always from the keys as they came, held in float32, so that rounding does not add up. It
    needs the layer's rotary embedding, and plain keys without row-aligned planes of a selection.
    Rows go after a forward, which attended to all of them: a prompt is read densely, and no call
    makes room before a turn. "slot" does not survive a truncation to a token that was dropped.
    Sinks count against the capacity, 2048 by default; `burst` lets a step drop many rows at once.
    The selection `streaming_llm` reads the same rows at true positions and drops none.
Bytes read per decode step: per KV head, capacity * (head_dim + value_dim) * b.
State per token: none; with "slot" 4 * head_dim bytes per sink and KV head.
"""

from dataclasses import dataclass
from typing import ClassVar, Final, Literal, final

import torch
from torch import Tensor

from loki_attn.cache import LayerCache
from loki_attn.errors import BudgetError, PolicyError
from loki_attn.evict.base import Attended, Evict, Evictor, Needs, Place
from loki_attn.rope import Rope
from loki_attn.row_format import RowFormat
from loki_attn.types import AttentionCall

PRESETS: Final = {
    "streaming-keep": {
        "select": {"method": "dense"},
        "evict": {"method": "streaming"},
        "keep": {"capacity": 2048},
    },
    "streaming-slot": {
        "select": {"method": "dense"},
        "evict": {"method": "streaming", "positions": "slot"},
        "keep": {"capacity": 2048},
    },
}

_REAL: Final = "rows_before"
_MOVED: Final = "sinks_moved"
_SINKS: Final = "sink_keys"


@final
@dataclass(frozen=True, kw_only=True)
class Streaming(Evict):
    """Keep the first and the last rows.

    Attributes:
        sinks: First tokens that stay; 0 is a sliding window. A larger `keep_first` of the budget
            counts instead.
        positions: "keep": true positions. "slot": positions in the cache.
    """

    method: ClassVar[str] = "streaming"
    needs: ClassVar[Needs] = "nothing"
    each_step: ClassVar[bool] = True
    sinks: int = 4
    positions: Literal["keep", "slot"] = "keep"

    def __post_init__(self) -> None:
        """Refuse what is no number of sinks."""
        if self.sinks < 0:
            raise PolicyError(f"sinks is a number of rows, got {self.sinks}.")
        if self.positions not in ("keep", "slot"):
            raise PolicyError(f"positions is 'keep' or 'slot', got {self.positions!r}.")

    @property
    def window(self) -> int:
        """The newest row, which a capacity of sinks alone would drop."""
        return 1

    @property
    def moves_keys(self) -> bool:  # type: ignore[override]
        """Whether stored keys are rotated."""
        return self.positions == "slot"

    def bind(self, place: Place) -> Evictor:
        """Bind to a layer.

        Raises:
            BudgetError: If the capacity has no room for the sinks and one row more.
            PolicyError: If keys must move and it is not known how the layer rotates them.
        """
        sinks, capacity = max(self.sinks, place.budget.keep_first), place.budget.capacity
        if capacity is not None and capacity < sinks + 1:
            raise BudgetError(
                f"capacity={capacity} has no room for {sinks} sinks and a recent row; raise "
                f"capacity to at least {sinks + 1} or lower evict.sinks."
            )
        if not self.moves_keys:
            return _Streaming(sinks, None)
        if place.rope is None:
            raise PolicyError(
                f"positions='slot' rotates keys, and how layer {place.shape.index} rotates them is "
                "not known; use positions='keep'."
            )
        return _Streaming(sinks, place.rope)


@final
class _Streaming(Evictor):
    def __init__(self, sinks: int, rope: Rope | None) -> None:
        self._sinks, self._rope = sinks, rope

    def observe(self, cache: LayerCache, seen: Attended) -> None:
        """Learn nothing; refuse planes that would not follow keys that move."""
        del seen
        if self._rope is not None and type(cache.row_format).planes is not RowFormat.planes:
            raise PolicyError(
                "positions='slot' rotates stored keys, and the planes that the selection keeps of "
                "them would not follow; use positions='keep', or a selection without planes."
            )

    def scores(self, cache: LayerCache, call: AttentionCall, valid: Tensor | None) -> Tensor:
        """Later rows first."""
        del call
        length, heads = cache.length, cache.positions.shape[:2]
        device = cache.keys.device
        if self._rope is not None:
            real = torch.full(heads, length, device=device) if valid is None else valid.sum(-1)
            cache.memory[_REAL] = real.expand(heads).clone()
        return torch.arange(length, dtype=torch.float32, device=device).expand(*heads, length)

    def protected(self, cache: LayerCache, valid: Tensor | None) -> Tensor | None:
        """The sinks: the first rows that are no padding."""
        if valid is None:
            return (torch.arange(cache.length, device=cache.keys.device) < self._sinks)[None, None]
        return valid & (valid.cumsum(-1) <= self._sinks)

    def settle(self, cache: LayerCache) -> None:
        """Turn the sinks forward by the rows that were dropped behind them."""
        before = cache.memory.pop(_REAL, None)
        if self._rope is None or before is None or not self._sinks:
            return
        # Padding goes first, so what is missing of the real rows was dropped.
        dropped = (before - cache.length).clamp(min=0)
        if not bool(dropped.any()):
            return
        moved, keys = cache.memory.get(_MOVED), cache.keys[:, :, : self._sinks]
        if moved is None:
            # Also after a truncation, which forgets: then as many are turned on from here.
            moved, cache.memory[_SINKS] = torch.zeros_like(dropped), keys.float()
        first = ((moved == 0) & (dropped > 0))[..., None, None]
        sinks = torch.where(first, keys.float(), cache.memory[_SINKS])
        moved = moved + dropped
        turned = self._rope.turn(sinks, moved[..., None]).to(keys.dtype)
        keys.copy_(torch.where((moved > 0)[..., None, None], turned, keys))
        cache.memory[_SINKS], cache.memory[_MOVED] = sinks, moved
