"""KVzip: keep what the model reads when it repeats its prompt, whatever will be asked about it.

Paper: KVzip: Query-Agnostic KV Cache Compression with Context Reconstruction
arXiv: 2505.23416
What it does: after the prompt was read, the model is made to repeat it, chunk by chunk, on top of
    the full cache. A row's score is the largest soft-max weight that any query of the repeated
    chunk, of any query head of its group, gives to it; the soft-max runs over the first rows, the
    chunk's own rows and the repeated text alone. The best rows of the whole model stay (preset
    "kvzip", heads get lengths of their own), or of every head (allocate="uniform").
What we do differently: rows are judged in float32 and counts are exact, where the released code
    drops all rows that tie at the threshold; rows really go, nothing is masked; the pass leaves the
    cache as it was, and no forward is patched. What no second pass has judged stays: a plain
    `generate` evicts nothing, and neither do the turns after `compress`. The first rows that stay
    and take part in every soft-max are `keep_first` (4 in the preset, attention sinks; give it the
    length of a system prompt). The instruction to repeat is our own, without a chat template, and
    for later chunks the quote directly precedes the chunk. Not here: the variant that classifies
    heads (see duo_attention), and KVzip+, which needs output projections and hidden states.
Bytes read per decode step: per KV head, capacity * (head_dim + value_dim) * b, averaged over layers
    and heads.
State per token: 4 bytes per KV head; the pass itself needs room for one repeated chunk in the
    cache.
"""

from dataclasses import dataclass
from typing import ClassVar, Final, final

import torch
from torch import Tensor

from loki_attn.cache import LayerCache
from loki_attn.errors import CacheError, PolicyError
from loki_attn.evict.base import Evict, Evictor, Needs, Place
from loki_attn.kernels import ops
from loki_attn.pieces.reduction import over_group
from loki_attn.row_format import Mark
from loki_attn.types import AttentionCall

PRESETS: Final = {
    "kvzip": {
        "select": {"method": "dense"},
        "evict": {"method": "kvzip"},
        "keep": {"keep_share": 0.3, "keep_first": 4},
        "allocate": {"method": "global_rows"},
    }
}
_READ: Final = "read_in_repeating"
_UNJUDGED: Final = float("inf")


@final
@dataclass(frozen=True, kw_only=True)
class KVzip(Evict):
    """Score by the attention of a second pass over the prompt.

    Attributes:
        chunk: Tokens of the prompt that are repeated at a time.
        quote: Last tokens of the chunk before, which lead into a later chunk.
    """

    method: ClassVar[str] = "kvzip"
    needs: ClassVar[Needs] = "a second pass over the prompt"
    chunk: int = 2048
    quote: int = 8

    def __post_init__(self) -> None:
        """Refuse chunks that repeat nothing."""
        if self.chunk < 1:
            raise PolicyError(f"KVzip repeats at least one token at a time, got {self.chunk}.")
        if self.quote < 0:
            raise PolicyError(f"KVzip quotes a number of tokens, got {self.quote}; give 0 or more.")

    def bind(self, place: Place) -> Evictor:
        """Bind to a layer; nothing about it matters."""
        del place
        return _KVzip()


@final
class _KVzip(Evictor):
    def marks(self) -> dict[str, Mark]:
        """What every row was given at most; infinite until a second pass has judged it."""
        return {_READ: Mark(torch.float32, fill=_UNJUDGED)}

    def scores(self, cache: LayerCache, call: AttentionCall, valid: Tensor | None) -> Tensor:
        """The largest weight of the second pass; 1 where there was none."""
        del call, valid
        return cache.plane(_READ).clamp(max=1.0)

    def protected(self, cache: LayerCache, valid: Tensor | None) -> Tensor:
        """Rows that no second pass has judged."""
        del valid
        return cache.plane(_READ) == _UNJUDGED

    def settle(self, cache: LayerCache) -> None:
        """Rows go once: what is left stays, until another pass judges it."""
        forget(cache)


def judge(
    cache: LayerCache, query: Tensor, call: AttentionCall, chunk: slice, keep_first: int
) -> None:
    """Judge the rows of one chunk by what was read in repeating it (arXiv 2505.23416).

    Reads the rows that take part, once per block of queries; no matrix of weights is held.

    Args:
        cache: All rows of the prompt, and behind them those of the repeated text.
        query: [batch, heads, q_len, head_dim]: the queries of the repeated text, in the space of
            the stored key rows.
        call: Scaling, soft-cap, and sink logits, which join the denominator.
        chunk: The rows that were repeated.
        keep_first: First rows of the prompt that take part in the soft-max of every chunk.

    Raises:
        CacheError: If the chunk is empty, or not of the prompt.
    """
    keys, q_len = cache.keys, query.shape[2]
    if not 0 <= chunk.start < chunk.stop <= cache.length - q_len:
        raise CacheError(
            f"The rows {chunk.start} to {chunk.stop} of a prompt were to be judged, but it has "
            f"{cache.length - q_len}: the cache's {cache.length} without the repeated text."
        )
    first = min(keep_first, chunk.start)
    # The repeated text is last: causal attention lets it see the others and itself so far.
    read = torch.cat([keys[:, :, :first], keys[:, :, chunk], keys[:, :, -q_len:]], 2)
    largest = ops().column_sums(query, read, None, call, how="max")
    own = largest[:, :, first : first + chunk.stop - chunk.start]
    cache.plane(_READ)[:, :, chunk] = over_group(own, keys.shape[1], "max")


def forget(cache: LayerCache) -> None:
    """Forget what second passes have judged: all rows stay until the next one."""
    cache.plane(_READ).fill_(_UNJUDGED)
