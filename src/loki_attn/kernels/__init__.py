"""The ops of the decode step, as the chosen backend implements them.

A backend is a module of this folder with some of the functions of `reference.py`; `backends.py`
chooses one for each type of device. Ops that it does not have, and calls of several query tokens,
are plain torch whatever the backend: fast kernels are for decoding, but for a few that say so.
Tensors that it does not serve (another dtype, say) go to plain torch as well, and the reason is
traced, unless the backend was asked for by name: that never falls back.
"""

from functools import cache
from types import ModuleType
from typing import Any, Final, Literal, Protocol, cast, final

from torch import Tensor

from loki_attn.errors import LokiAttnError
from loki_attn.kernels import backends
from loki_attn.tiles import Tiles
from loki_attn.types import (
    AppendRequest,
    AttentionCall,
    AttentionOutput,
    GroupReduce,
    Lead,
    Reading,
    Selection,
)


class Ops(Protocol):
    """What every backend offers; `reference.py` documents each op."""

    def append(self, request: AppendRequest) -> bool:
        """Write new rows and their lead, or nothing."""

    def step(  # noqa: PLR0913 - what its three parts take together
        self,
        query: Tensor,
        rows_query: Tensor,
        keys: Tensor,
        values: Tensor,
        lead: Lead,
        reading: Reading,
        how: GroupReduce,
        call: AttentionCall,
        visible: Tensor | None,
    ) -> tuple[Tensor, Selection] | None:
        """Score, choose and attend in one, or None."""

    def score(
        self, query: Tensor, plane: Tensor | Tiles, scales: Tensor | None, call: AttentionCall
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

    def dense_column_sums(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        visible: Tensor | None,
        call: AttentionCall,
    ) -> tuple[Tensor, Tensor]:
        """Dense attention of one query token, and what every row received."""

    def column_sums(
        self,
        query: Tensor,
        keys: Tensor,
        visible: Tensor | None,
        call: AttentionCall,
        *,
        window: int | None = None,
        bias: Tensor | None = None,
        how: Literal["sum", "max"] = "sum",
    ) -> Tensor:
        """What every row receives of the attention of many queries."""

    def hamming(self, query_codes: Tensor, codes: Tensor) -> Tensor:
        """How many bits of the codes of queries and rows differ."""

    def causal_mask(self, q_len: int, seq: int, device: Any) -> Tensor:
        """Which rows the last q_len queries see."""


@cache
def ops(backend: str | None = None) -> Ops:
    """Return the ops of a backend, by default the best that runs here.

    Raises:
        UnknownNameError: If no backend has this name.
        LokiAttnError: If the named one cannot run here, or later meets tensors it does not serve.
    """
    named = backends.asked(backend)
    plain = backends.resolve(backends.PLAIN).module
    chosen = backends.resolve(backend)  # a named one that cannot run is refused here and now
    if named == backends.PLAIN:
        return cast("Ops", plain)
    return cast("Ops", _Routed(chosen if named else None, plain))


# Ops whose fast kernels take any number of queries.
_MANY_QUERIES: Final = frozenset({"append", "column_sums", "hamming"})


@final
class _Routed:
    """Sends every op to the backend of its tensors' device, or to plain torch where none serves it.

    Args:
        named: The backend that was asked for by name: it serves all devices, and what it has and
            cannot serve is refused. None for the best of each device.
        plain: Plain torch.
    """

    def __init__(self, named: backends.Accepted | None, plain: ModuleType) -> None:
        self._named = named
        self._of_device: dict[str, backends.Accepted] = {}
        for op in (name for name in vars(Ops) if not name.startswith("_")):
            setattr(self, op, self._route(op, getattr(plain, op)))

    def _chosen(self, device: str) -> backends.Accepted:
        """The backend for a type of device, found when its first tensor comes."""
        if self._named is not None:
            return self._named
        if device not in self._of_device:
            self._of_device[device] = backends.resolve(None, device)
        return self._of_device[device]

    def _route(self, op: str, plain: Any) -> Any:
        def served(*args: Any, **kwargs: Any) -> Any:
            first = args[0] if args else next(iter(kwargs.values()))
            tensor = first.key if isinstance(first, AppendRequest) else first
            if not isinstance(tensor, Tensor):
                return plain(*args, **kwargs)
            if op not in _MANY_QUERIES and tensor.shape[2] != 1:
                return plain(*args, **kwargs)
            chosen = self._chosen(tensor.device.type)
            fast = getattr(chosen.module, op, plain)
            try:
                return fast(*args, **kwargs)
            except backends.Unserved as why:
                if self._named is not None:
                    raise LokiAttnError(
                        f"Backend {chosen.name!r} was asked for, and cannot run {op!r} here "
                        f"because {why}; drop the request to let plain torch serve it."
                    ) from why
                backends.passed_over(op, chosen.name, why)
            return plain(*args, **kwargs)

        return served
