"""Quest: rank pages of rows by a bound on their logits, attend exactly to the best pages.

Paper: Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference
arXiv: 2406.10774
What it does: holds the least and the greatest key of every page, channel by channel, bounds what
    any row of it can score by sum_i max(q_i min_i, q_i max_i), and reads the pages with the highest
    bounds; always the page of the query itself.
What we do differently: the budget counts rows, not pages, and a page cut by it gives its first
    rows, so a budget of whole pages is the published one. The query heads of a group share one
    choice by the highest bound of any of them; group_reduce="none" lets every head choose, as
    published, at up to group times the reading. The first two layers are sparse too, unless
    dense_layers=(0, 1) is asked for. At least three pages are read (min_k of the preset). Keys that
    are not finite are left out of the bounds; finite padding inside a page is not, and can only
    make that page's bound too high. After an eviction the surviving rows are paged anew, so bounds
    are tight, not stale. Bounds are those of the keys as stored, after RoPE: another basis would
    have others.
Bytes read per decode step: per KV head, T / page * 2 * head_dim * b for the bounds and
    k * (head_dim + value_dim) * b.
State per token: 2 * head_dim * b / page bytes per KV head.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final, final

import torch
from torch import Tensor

from loki_attn.basis import LayerBasis
from loki_attn.cache import KEY, LayerCache
from loki_attn.errors import PolicyError
from loki_attn.kernels import ops
from loki_attn.select.base import Select, Selector
from loki_attn.types import AttentionCall, LayerShape

BOUNDS: Final = "bounds"
PRESETS: Final[dict[str, dict[str, Any]]] = {
    "quest": {
        "select": {"method": "quest", "page": 16},
        "budget": {"top_k": 512, "min_k": 48},
        "group_reduce": "max",
    },
}


@final
@dataclass(frozen=True, kw_only=True)
class Quest(Select):
    """Rank pages by an upper bound of their logits.

    Attributes:
        page: Rows per page, in tokens.
    """

    method: ClassVar[str] = "quest"
    estimates_mass: ClassVar[bool] = False
    page: int = 16

    def __post_init__(self) -> None:
        """Refuse pages without rows."""
        if type(self.page) is not int or self.page < 1:
            raise PolicyError(
                f"page must be a whole number of tokens >= 1, got {self.page!r}; 16 is usual."
            )

    @property
    def unit(self) -> int:
        """A page."""
        return self.page

    def bind(
        self,
        shape: LayerShape,
        basis: LayerBasis | None = None,
        profile: Mapping[str, Tensor] | None = None,
    ) -> Selector:
        """Bind to a layer; neither its sizes nor a basis matter."""
        del shape, basis, profile
        return _QuestSelector(self.page)


@final
class _QuestSelector(Selector):
    def __init__(self, page: int) -> None:
        self._page = page

    def page_rows(self) -> int:
        """Rows of a page."""
        return self._page

    def summarise(self, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
        """The greatest key of every page beside the least, [batch, kv_heads, pages, 2 head_dim]."""
        del values
        sound = torch.isfinite(keys)
        known = sound.any(3)
        greatest = keys.masked_fill(~sound, float("-inf")).amax(3).masked_fill(~known, 0.0)
        least = keys.masked_fill(~sound, float("inf")).amin(3).masked_fill(~known, 0.0)
        return {BOUNDS: torch.cat([greatest, least], -1)}

    def score(self, query: Tensor, cache: LayerCache, call: AttentionCall) -> Tensor:
        """The bound of each row's page."""
        # A positive coordinate reaches most at the greatest key, a negative one at the least: the
        # bound is one product, which the kernels of a lead compute.
        reach = torch.cat([query.clamp(min=0), query.clamp(max=0)], -1)
        bounds = ops().score(reach, cache.summary(BOUNDS), None, call)
        return bounds.repeat_interleave(self._page, -1)[..., : cache.length]

    def always(self, cache: LayerCache, visible: Tensor) -> Tensor:
        """The page of the last row that a query sees: its bound may know of later rows."""
        del cache
        place = torch.arange(visible.shape[-1], device=visible.device)
        last = place.masked_fill(~visible, -1).amax(-1, keepdim=True)
        return visible & (place // self._page == last // self._page)

    def score_bytes(self, cache: LayerCache) -> float:
        """A row's share of its page's bounds."""
        return 2 * cache.row_bytes(KEY) / self._page
