"""The contract of a selection method: a frozen specification that binds to one layer."""

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from loki_attn.basis import LayerBasis
from loki_attn.cache import LayerCache, RowFormat
from loki_attn.types import AttentionCall, LayerShape


class Selector(RowFormat, ABC):
    """A method bound to one layer: it scores rows, and says how rows and planes are stored."""

    def query_rows(self, query: Tensor) -> Tensor:
        """Map a query [batch, heads, q_len, head_dim] to the space of the stored key rows."""
        return query

    @abstractmethod
    def score(self, query: Tensor, cache: LayerCache, call: AttentionCall) -> Tensor | None:
        """Score every row of the cache.

        Args:
            query: [batch, heads, q_len, head_dim], as the model made it.
            cache: The layer's rows and planes, in this selector's row format.
            call: Scaling and soft-cap of the logits.

        Returns:
            float32 [batch, heads, q_len, length] estimated logits, or None if the method
            reads only what the budget protects.
        """

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
