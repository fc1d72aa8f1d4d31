"""PCAAttn, the negative control: attend with the truncated scores themselves.

Paper: arXiv 2406.02542, appendix E. It must collapse where Loki at the same rank does not; it is
no method of the library because nobody should use it.
"""

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from loki_attn import Policy
from loki_attn.basis import LayerBasis
from loki_attn.cache import LayerCache
from loki_attn.select.base import Select, Selector
from loki_attn.types import AttentionCall, LayerShape


@final
@dataclass(frozen=True, kw_only=True)
class PcaAttn(Select):
    """Store and use only the `rank` leading coordinates of keys and queries."""

    method: ClassVar[str] = "pca_attn"
    needs_basis: ClassVar[bool] = True
    rank: int

    def bind(self, shape: LayerShape, basis: LayerBasis | None) -> Selector:
        """Bind to a layer with its basis."""
        del shape
        if basis is None:
            raise ValueError("PCAAttn needs a basis.")
        return _Truncated(basis, self.rank)


@final
class _Truncated(Selector):
    def __init__(self, basis: LayerBasis, rank: int) -> None:
        self._key_map = basis.key_map[..., :rank]
        self._query_map = basis.query_map[..., :rank]

    def rows(self, key: Tensor) -> Tensor:
        """The leading coordinates only: what is lost is lost."""
        return (key.float() @ self._key_map).to(key.dtype)

    def query_rows(self, query: Tensor) -> Tensor:
        """The leading coordinates of the query."""
        batch, heads, q_len, dim = query.shape
        grouped = query.float().reshape(batch, len(self._query_map), -1, dim)
        return (grouped @ self._query_map).reshape(batch, heads, q_len, -1).to(query.dtype)

    def score(self, query: Tensor, cache: LayerCache, call: AttentionCall) -> None:
        """Nothing is chosen: all rows are attended to."""
        del query, cache, call

    def score_bytes(self, cache: LayerCache) -> int:
        """Nothing is read to choose."""
        del cache
        return 0


def pca_attn(rank: int) -> Policy:
    """The control at one rank."""
    return Policy(select=PcaAttn(rank=rank), name="pca-attn")
