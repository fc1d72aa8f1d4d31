"""ShadowKV's selection: rank chunks of rows by their mean keys, read badly described ones anyway.

Paper: ShadowKV: KV Cache in Shadows for High-Throughput Long-Context LLM Inference
arXiv: 2410.21465
What it does: describes every chunk of keys by its mean, the landmark, and ranks the chunks by the
    soft-max weights of their landmarks, the largest among the query heads of a group. The last
    chunks are always read, and so are the outliers: the chunks with the key that is least like its
    landmark, by cosine.
What we do differently: it is the selection alone; rows stay whole and in place, no value moves to
    a host and no key is rebuilt from a low-rank factor. Generated tokens are in chunks with
    landmarks as well, not exact for ever, and the outliers are the worst of all chunks that end
    before the local ones at every step, not once after the prompt: what a step reads does not
    depend on how the rows came, nor on the length of a forward. The budget counts rows, outliers
    and local chunks included, and a chunk cut by it gives its first rows. Landmarks are kept in the
    dtype of the keys; keys that are not finite are left out of them. The scale is the model's own.
    group_reduce="softmax_max" is the published agreement, "none" lets every query head choose.
Bytes read per decode step: per KV head, T / chunk * (head_dim * b + 4) for landmarks and cosines,
    and k * (head_dim + value_dim) * b.
State per token: (head_dim * b + 4) / chunk bytes per KV head.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final, final

import torch
from torch import Tensor
from torch.nn import functional

from loki_attn.basis import LayerBasis
from loki_attn.budget import require_count
from loki_attn.cache import KEY, LayerCache
from loki_attn.kernels import ops
from loki_attn.pieces.pages import behind, finite_rows, mean_row, to_rows, whole_pages
from loki_attn.select.base import Select, Selector
from loki_attn.types import AttentionCall, LayerShape

LANDMARK: Final = "landmark"
COSINE: Final = "least_cosine"
_COSINE_BYTES: Final = 4
PRESETS: Final[dict[str, dict[str, Any]]] = {
    "shadowkv": {
        "select": {"method": "shadowkv", "chunk": 8, "outliers": 48, "local": 4},
        # 2,048 rows that are chosen, 48 outliers and 4 local chunks.
        "budget": {"top_k": 2464},
        "group_reduce": "softmax_max",
    },
}


@final
@dataclass(frozen=True, kw_only=True)
class ShadowKV(Select):
    """Rank chunks by their landmarks.

    Attributes:
        chunk: Rows per chunk, in tokens.
        outliers: Chunks that are always read because their landmark describes a key of them badly.
        local: Last whole chunks that are always read, beside the unfinished one.
    """

    method: ClassVar[str] = "shadowkv"
    estimates_mass: ClassVar[bool] = False
    chunk: int = 8
    outliers: int = 48
    local: int = 4

    def __post_init__(self) -> None:
        """Refuse chunks without rows."""
        require_count("chunk", self.chunk, at_least=1)
        require_count("outliers", self.outliers, at_least=0)
        require_count("local", self.local, at_least=0)

    @property
    def unit(self) -> int:
        """A chunk."""
        return self.chunk

    def bind(
        self,
        shape: LayerShape,
        basis: LayerBasis | None = None,
        profile: Mapping[str, Tensor] | None = None,
    ) -> Selector:
        """Bind to a layer; neither its sizes nor a basis matter."""
        del shape, basis, profile
        return _ShadowSelector(self)


@final
class _ShadowSelector(Selector):
    def __init__(self, spec: ShadowKV) -> None:
        self._spec = spec

    def page_rows(self) -> int:
        """Rows of a chunk."""
        return self._spec.chunk

    def summarise(self, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
        """The mean key of every chunk, and the smallest cosine of a key to it."""
        del values
        rows, real = finite_rows(keys)
        mean = mean_row(rows, real)
        cosine = functional.cosine_similarity(rows, mean[..., None, :], dim=-1)
        # A chunk of padding is no outlier.
        least = cosine.masked_fill(~real, 1.0).amin(-1).float()
        return {LANDMARK: mean.to(keys.dtype), COSINE: least}

    def score(self, query: Tensor, cache: LayerCache, call: AttentionCall) -> Tensor:
        """The logit of each row's landmark."""
        logits = ops().score(query, cache.summary(LANDMARK), None, call)
        return to_rows(logits, self._spec.chunk, cache.length)

    def always(self, cache: LayerCache, visible: Tensor) -> Tensor:
        """The last chunks, the unfinished one, and the outliers among the others."""
        spec, length = self._spec, cache.length
        far = (whole_pages(visible, spec.chunk) - spec.local).clamp(min=0)
        local = visible & behind(far, spec.chunk, length)
        if not spec.outliers or int(far.max()) == 0:
            return local
        cosine = cache.summary(COSINE)[:, :, None]
        chunks = torch.arange(cosine.shape[-1], device=cosine.device)
        short = cosine.shape[-1] * spec.chunk - length
        seen = functional.pad(visible, (0, short)).unfold(-1, spec.chunk, spec.chunk).any(-1)
        seen = (seen & (chunks < far)).expand(cosine.shape[0], cosine.shape[1], -1, -1)
        counts = seen.sum(-1).clamp(max=spec.outliers)
        worst = ops().choose_mask(
            -cosine.expand(seen.shape), counts, seen, torch.zeros_like(seen[:1, :1])
        )
        return local | (visible & to_rows(worst, spec.chunk, length))

    def score_bytes(self, cache: LayerCache) -> float:
        """A row's share of its chunk's landmark and cosine."""
        return (cache.row_bytes(KEY) + _COSINE_BYTES) / self._spec.chunk
