"""The ops of the decode step, as the chosen backend implements them.

A backend is a module of this folder with the functions of `reference.py`; `backends.py` chooses.
"""

from functools import cache
from typing import Any, Protocol, cast

from torch import Tensor

from loki_attn.kernels import backends
from loki_attn.types import AttentionCall, AttentionOutput, GroupReduce, Selection


class Ops(Protocol):
    """What every backend offers; `reference.py` documents each op."""

    def score(
        self, query: Tensor, plane: Tensor, scales: Tensor | None, call: AttentionCall
    ) -> Tensor:
        """Logits of every row from its leading coordinates."""

    def reduce_group(
        self,
        logits: Tensor,
        num_kv_heads: int,
        how: GroupReduce,
        visible: Tensor | None,
        call: AttentionCall,
    ) -> Tensor:
        """One score per row and KV head."""

    def estimated_weights(
        self, logits: Tensor, visible: Tensor | None, call: AttentionCall
    ) -> Tensor:
        """Soft-max weights of the visible rows."""

    def protect(self, visible: Tensor, sinks: int, recents: int) -> Tensor:
        """Mark sinks and recents."""

    def mass_counts(self, weights: Tensor, forced: Tensor, mass: float) -> Tensor:
        """Smallest sets that reach a mass."""

    def choose_mask(
        self, scores: Tensor, counts: Tensor, visible: Tensor, forced: Tensor
    ) -> Tensor:
        """Mark the best rows."""

    def choose(self, scores: Tensor, counts: Tensor, visible: Tensor, forced: Tensor) -> Selection:
        """The best rows as indices."""

    def attend(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        selection: Selection,
        call: AttentionCall,
    ) -> AttentionOutput:
        """Exact attention to the selected rows."""

    def attend_masked(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        mask: Tensor | None,
        call: AttentionCall,
    ) -> AttentionOutput:
        """Exact attention to the marked rows."""

    def dense(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        visible: Tensor | None,
        call: AttentionCall,
        *,
        causal: bool,
    ) -> Tensor:
        """Dense attention."""

    def causal_mask(self, q_len: int, seq: int, device: Any) -> Tensor:
        """Which rows the last q_len queries see."""


@cache
def ops(backend: str | None = None) -> Ops:
    """Return the ops of a backend, by default the best that runs here."""
    return cast("Ops", backends.resolve(backend).module)
