"""The contract of a selection method: a frozen specification that binds to one layer."""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from loki_attn.basis import LayerBasis
from loki_attn.cache import LayerCache, RowFormat
from loki_attn.kernels import ops
from loki_attn.tiles import Tiles
from loki_attn.types import AttentionCall, LayerShape, Lead


class Selector(RowFormat, ABC):
    """A method bound to one layer: it scores rows, and says how rows and planes are stored."""

    def query_rows(self, query: Tensor) -> Tensor:
        """Map a query [batch, heads, q_len, head_dim] to the space of the stored key rows."""
        return query

    def lead(self, cache: LayerCache) -> Lead | None:
        """Return what ranks the rows of the cache; None for a method that scores in its own way.

        A method with a lead has nothing else to define, and fused kernels serve it.
        """
        del cache
        return None

    def score(self, query: Tensor, cache: LayerCache, call: AttentionCall) -> Tensor | None:
        """Score every row of the cache, by its lead unless a method has its own way.

        Args:
            query: [batch, heads, q_len, head_dim], as the model made it.
            cache: The layer's rows and planes, in this selector's row format.
            call: Scaling and soft-cap of the logits.

        Returns:
            float32 [batch, heads, q_len, length] estimated logits, or None if the method
            reads only what the budget protects.

        Raises:
            NotImplementedError: If the method defines neither a lead nor its own score.
        """
        lead = self.lead(cache)
        if lead is None:
            raise NotImplementedError(f"{type(self).__name__} must define lead or score.")
        if lead.plane is None:
            return None
        if lead.query_map is None:
            rank = lead.plane.rank if isinstance(lead.plane, Tiles) else lead.plane.shape[-1]
            mapped = query[..., :rank]
        else:
            mapped = map_query(query, lead.query_map)
        return ops().score(mapped, lead.plane, lead.scales, call)

    @abstractmethod
    def score_bytes(self, cache: LayerCache) -> int:
        """Bytes that scoring one row of one KV head reads."""


class Select(ABC):
    """The specification of a method: subclasses are frozen dataclasses in a file of their own."""

    method: ClassVar[str]
    needs_basis: ClassVar[bool] = False

    @abstractmethod
    def bind(self, shape: LayerShape, basis: LayerBasis | None) -> Selector:
        """Return the selector of one layer.

        Raises:
            PolicyError: If the specification does not fit the layer or the basis.
        """


def map_query(query: Tensor, query_map: Tensor) -> Tensor:
    """Map each query head by the matrix of its KV head.

    Args:
        query: [batch, heads, q_len, head_dim].
        query_map: float32 [kv_heads, head_dim, r], on the device of the query.

    Returns:
        [batch, heads, q_len, r], float32 or wider.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    batch, heads, q_len, dim = query.shape
    rows = query.to(wide).reshape(batch, query_map.shape[0], -1, dim)
    return (rows @ query_map.to(wide)).reshape(batch, heads, q_len, -1)
