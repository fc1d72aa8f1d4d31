"""The contract of a selection method: a frozen specification that binds to one layer."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from loki_attn.basis import LayerBasis
from loki_attn.cache import LayerCache
from loki_attn.kernels import ops
from loki_attn.row_format import RowFormat
from loki_attn.tiles import Tiles
from loki_attn.types import AttentionCall, LayerShape, Lead, Selection


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Estimate:
    """What a choice was made by.

    Attributes:
        query: [batch, heads, q_len, head_dim], as the model made it.
        cache: The rows.
        call: Scaling, soft-cap, sink logits.
        logits: float32 [batch, heads, q_len, length]: the method's scores, per query head.
        visible: bool [batch or 1, kv_heads or 1, q_len, length].
    """

    query: Tensor
    cache: LayerCache
    call: AttentionCall
    logits: Tensor
    visible: Tensor


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

    def always(self, cache: LayerCache, visible: Tensor) -> Tensor | None:
        """Return the rows that this method reads whatever their scores are; by default none.

        They come behind the rows that the budget protects and before all others, count against the
        budget, and take no part in the agreement of a group. A page that a query lies in belongs
        here: what summarises it may know of rows that the query must not see.

        Args:
            cache: The layer's rows; the queries are those of the last `q_len`.
            visible: bool [batch or 1, kv_heads or 1, q_len, length].

        Returns:
            bool [batch or 1, kv_heads or 1, q_len, length], or None.
        """
        del cache, visible
        return None

    @abstractmethod
    def score_bytes(self, cache: LayerCache) -> float:
        """Bytes that scoring one row of one KV head reads; a share of them where pages are read."""

    def finish(self, output: Tensor, chosen: Tensor | Selection, read: Estimate) -> Tensor:
        """Correct the output of the chosen rows by what is known of the others; by default nothing.

        Args:
            output: [batch, heads, q_len, value_dim]: attention to the chosen rows alone.
            chosen: What was read: a `Selection` for one query token, else bool
                [batch, kv_heads or heads, q_len, length].
            read: What it was chosen by.

        Returns:
            Of the shape and dtype of `output`.
        """
        del chosen, read
        return output

    def narrowed(self, heads: Tensor) -> "Selector":
        """Return the same selector for some of the KV heads, int64 [kv_heads]."""
        del heads
        return self


class Select(ABC):
    """The specification of a method: subclasses are frozen dataclasses in a file of their own.

    Attributes:
        method: Its name, that of its file.
        needs_basis: Whether `bind` needs the layer's basis.
        needs_profile: Whether `bind` needs what was calibrated for this method.
        estimates_mass: Whether its scores are logits, so that a budget may be a mass.
    """

    method: ClassVar[str]
    needs_basis: ClassVar[bool] = False
    needs_profile: ClassVar[bool] = False
    estimates_mass: ClassVar[bool] = True

    @property
    def unit(self) -> int:
        """Rows that are judged together; 1 where each row has a score of its own."""
        return 1

    @abstractmethod
    def bind(
        self,
        shape: LayerShape,
        basis: LayerBasis | None = None,
        profile: Mapping[str, Tensor] | None = None,
    ) -> Selector:
        """Return the selector of one layer.

        Args:
            shape: Sizes of the layer.
            basis: The layer's basis, for methods that need one.
            profile: What was calibrated for this method and layer, by name, where it needs that.

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
