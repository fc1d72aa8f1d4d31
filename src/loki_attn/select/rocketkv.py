"""RocketKV: evict by SnapKV, then rank small pages by a bound in the query's largest channels.

Paper: RocketKV: Accelerating Long-Context LLM Inference via Two-Stage KV Cache Compression
arXiv: 2502.14051
What it does: this file is the second stage: holds the least and greatest key of every few rows,
    channel by channel, takes the channels with the largest |query| summed over the group, bounds in
    them what any row of a page can score, adds the bounds over the group, and reads the best rows.
    The preset puts it behind SnapKV (window 32, pooling by maximum over 63 rows, sum over the
    group), which is the first stage. `split` turns one number of tokens into all settings.
What we do differently: the published code takes one sign per channel for the whole group, so that
    what it calls a bound is none for a head of the opposite sign; here every head has its own
    bound, and the bounds are added. Bounds are re-made from the rows that survive an eviction.
    The page of the query itself is always read as long as it is unfinished. A page cut by the
    budget gives its first row. The multi-turn variant, which keeps everything, is this selection
    without the eviction (evict="keep_all"). A preset cannot know the length of a prompt: its
    settings are those of 8,192 tokens and t = 1,024; use `split` for others.
Bytes read per decode step: per KV head, T / chunk * 2 * head_dim * b for the bounds, since pages
    lie row by row and scattered channels of them share cache lines (the paper's own count, with
    channels stored apart, is T / chunk * 2 * channels * b), and k * (head_dim + value_dim) * b.
State per token: 2 * head_dim * b / chunk bytes per KV head and row kept.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final, final

import torch
from torch import Tensor

from loki_attn.basis import LayerBasis
from loki_attn.budget import require_count
from loki_attn.cache import KEY, LayerCache
from loki_attn.errors import PolicyError
from loki_attn.kernels import ops
from loki_attn.pieces.pages import behind, to_rows, whole_pages
from loki_attn.select.base import Select, Selector
from loki_attn.types import AttentionCall, LayerShape

BOUNDS: Final = "bounds"
PRESETS: Final[dict[str, dict[str, Any]]] = {
    "rocketkv": {
        "select": {"method": "rocketkv", "chunk": 2, "channels": 0.551},
        "budget": {"top_k": 512},
        "group_reduce": "sum",
        "evict": {
            "method": "snapkv",
            "window": 32,
            "kernel": 63,
            "pooling": "max",
            "reduce": "sum",
        },
        "keep": {"capacity": 3717},
    },
}


@final
@dataclass(frozen=True, kw_only=True)
class Split:
    """What one number of tokens comes to; the fields of a policy, for `preset("rocketkv", ...)`.

    Attributes:
        capacity: Rows that the first stage keeps per KV head, in tokens.
        chunk: Rows per page of the second stage, in tokens.
        channels: Channels that the second stage reads.
        top_k: Rows that are read, in tokens.
    """

    capacity: int
    chunk: int
    channels: int
    top_k: int


def split(seq: int, tokens: int, head_dim: int) -> Split:
    """Split a compression to `tokens` over both stages (arXiv 2502.14051, section 3.4).

    With c = seq / tokens, the first stage keeps seq / c ** a, a = min(0.2 + 0.06 log2 c, 0.8); what
    is left to the second is shared between pages and channels.

    Args:
        seq: Tokens of the prompt.
        tokens: What a step may cost, as rows read in full (the paper's t); half of it reads rows.
        head_dim: Size of a key row, in elements.

    Returns:
        The settings. A prompt of at most `tokens` is kept whole.

    Raises:
        BudgetError: If one of them is not a whole number of at least 1.
    """
    for name, value in (("seq", seq), ("tokens", tokens), ("head_dim", head_dim)):
        require_count(name, value, at_least=1)
    ratio = max(1.0, seq / tokens)
    share = min(0.2 + 0.06 * math.log2(ratio), 0.8)
    kept = seq / ratio**share
    left = max(1.0, kept / tokens)
    chunk = max(1, min(math.floor(left), math.ceil(math.sqrt(left))))
    return Split(
        capacity=min(seq, round(kept)),
        chunk=chunk,
        channels=min(head_dim, max(1, round(head_dim * chunk / left))),
        top_k=max(1, min(tokens // 2, round(kept))),
    )


@final
@dataclass(frozen=True, kw_only=True)
class RocketKV(Select):
    """Rank pages by a bound of their logits in some channels.

    Attributes:
        chunk: Rows per page, in tokens.
        channels: Channels of the query that rank: a whole number of them, or a share of head_dim
            up to 1 as a float.
    """

    method: ClassVar[str] = "rocketkv"
    estimates_mass: ClassVar[bool] = False
    chunk: int = 2
    channels: int | float = 0.551

    def __post_init__(self) -> None:
        """Refuse pages without rows and ranks without channels."""
        require_count("chunk", self.chunk, at_least=1)
        whole = type(self.channels) is int and self.channels >= 1
        if not whole and not (isinstance(self.channels, float) and 0 < self.channels <= 1):
            raise PolicyError(
                "channels must be a whole number >= 1, or a share of head_dim between 0 and 1 as "
                f"a float, got {self.channels!r}."
            )

    @property
    def unit(self) -> int:
        """A page."""
        return self.chunk

    def coordinates(self, head_dim: int) -> int:
        """Return how many channels rank keys of `head_dim` elements."""
        if isinstance(self.channels, float):
            return max(1, round(self.channels * head_dim))
        return self.channels

    def bind(
        self,
        shape: LayerShape,
        basis: LayerBasis | None = None,
        profile: Mapping[str, Tensor] | None = None,
    ) -> Selector:
        """Bind to a layer; a basis does not matter."""
        del basis, profile
        channels = self.coordinates(shape.head_dim)
        if channels > shape.head_dim:
            raise PolicyError(f"channels={channels} is above head_dim={shape.head_dim}; lower it.")
        return _RocketSelector(self.chunk, channels)


@final
class _RocketSelector(Selector):
    def __init__(self, chunk: int, channels: int) -> None:
        self._chunk = chunk
        self._channels = channels

    def page_rows(self) -> int:
        """Rows of a page."""
        return self._chunk

    def summarise(self, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
        """The greatest and the least of every channel; 0 where none of them is finite."""
        del values
        sound = keys.isfinite()
        known = sound.any(3)
        greatest = keys.masked_fill(~sound, float("-inf")).amax(3).masked_fill(~known, 0.0)
        least = keys.masked_fill(~sound, float("inf")).amin(3).masked_fill(~known, 0.0)
        # Side by side, so that a bound is one product.
        return {BOUNDS: torch.cat([greatest, least], -1)}

    def score(self, query: Tensor, cache: LayerCache, call: AttentionCall) -> Tensor:
        """The bound of each row's page, per query head."""
        bounds = cache.summary(BOUNDS)
        asked = query.masked_fill(~self._loud(query, bounds.shape[1]), 0.0)
        # A positive coordinate reaches most at the greatest key, a negative one at the least:
        # every head by its own signs, or the sum would bound nothing.
        reach = torch.cat([asked.clamp(min=0), asked.clamp(max=0)], -1)
        logits = ops().score(reach, bounds, None, call)
        return to_rows(logits, self._chunk, cache.length)

    def always(self, cache: LayerCache, visible: Tensor) -> Tensor:
        """What a query sees of its own unfinished page."""
        return visible & behind(whole_pages(visible, self._chunk), self._chunk, cache.length)

    def score_bytes(self, cache: LayerCache) -> float:
        """A row's share of its page's bounds."""
        return 2 * cache.row_bytes(KEY) / self._chunk

    def _loud(self, query: Tensor, kv_heads: int) -> Tensor:
        """The channels with the largest |query|, summed over each group, bool like the query."""
        batch, heads, q_len, dim = query.shape
        loudness = query.float().abs().reshape(batch, kv_heads, -1, q_len, dim).sum(2)
        every = torch.ones_like(loudness, dtype=torch.bool)
        counts = torch.full(loudness.shape[:-1], self._channels, device=query.device)
        loud = ops().choose_mask(loudness, counts, every, ~every)
        return loud.repeat_interleave(heads // kv_heads, 1)
