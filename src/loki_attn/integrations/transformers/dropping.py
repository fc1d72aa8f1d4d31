"""Dropping: evictions of the layers of a transformers cache, in time or looking back."""

from collections.abc import Collection, Iterable, Sequence
from typing import final

from torch import Tensor
from transformers import Cache

from loki_attn.attention import LayerPolicy
from loki_attn.errors import CacheError
from loki_attn.evict.base import Attended
from loki_attn.eviction import LayerEviction, evict, is_due, observe
from loki_attn.integrations.transformers.function import LayerState, Shared
from loki_attn.integrations.transformers.layers import LokiLayer, plain_tensors


@final
class Dropper:
    """Drops what the layers of one attachment need not keep, when it is time.

    Args:
        shared: What the layers share; rows that go are counted in its traffic.
    """

    def __init__(self, shared: Shared) -> None:
        """Wait for layers to attend."""
        self._shared = shared
        self._due: list[tuple[LayerEviction, LokiLayer]] = []

    def attended(self, state: LayerState, q_len: int, layers: Collection[int]) -> None:
        """Drop what a layer need not keep, at once or after the last of these layers."""
        policy, layer = state.policy, state.layer
        if layer is None or policy is None:
            return
        scales = self._shared.scales
        if scales is not None:
            scales.weigh(state.index, layer.rows.nbytes())
        if state.index == min(layers):
            self._due = []  # a forward that failed may have left some
        eviction = policy.eviction
        if eviction is not None:
            layer.turn.waiting |= q_len > 1
            if self._shared.mode == "decode" and is_due(eviction, layer.turn, q_len):
                self._due.append((eviction, layer))
        alone = eviction is not None and eviction.allocate.scope == "layer"
        if self._due and (alone or state.index == max(layers)):
            due, self._due = self._due, []
            self._drop(due)

    def compress(self, states: Iterable[LayerState], cache: Cache) -> int:
        """Evict from a cache whose queries were recorded; see `Attachment.compress`."""
        before, due = self._shared.traffic.evicted_rows, []
        for state in states:
            layer, policy = cache.layers[state.index], state.policy
            if policy is None:
                continue
            if not isinstance(layer, LokiLayer) or layer.asked is None or layer.rows.evicted:
                raise CacheError(
                    "compress needs a cache that was filled inside `recording()`, of which nothing "
                    "was evicted."
                )
            layer.follow(policy)
            if policy.eviction is not None:
                _look_back(policy, layer)
                due.append((policy.eviction, layer))
        self._drop(due)
        return self._shared.traffic.evicted_rows - before

    def _drop(self, due: Sequence[tuple[LayerEviction, LokiLayer]]) -> None:
        """Evict, in storage that may be written in any mode."""
        if not due:
            return
        together = due[0][0].allocate.scope == "model"
        with plain_tensors():
            for part in [due] if together else [[one] for one in due]:
                turns = [(eviction, layer.turn) for eviction, layer in part]
                self._shared.traffic.evicted_rows += evict(turns)
            for eviction, layer in due:
                layer.show()
                if self._shared.scales is not None:
                    index = eviction.place.shape.index
                    self._shared.scales.weigh(index, layer.rows.nbytes())


def _look_back(policy: LayerPolicy, layer: LokiLayer) -> None:
    """Let a policy's eviction learn from the recorded queries of a prompt, as if read in one go."""
    asked, eviction, call = layer.asked, policy.eviction, layer.turn.call
    if asked is None or eviction is None or call is None:
        raise CacheError("There are no recorded queries to look back at.")
    rows: Tensor = policy.selector.query_rows(asked)
    with plain_tensors():
        for shard in layer.rows:
            observe(eviction, layer.turn, shard, Attended(query=rows, call=call))
    layer.asked = None
