"""Dropping: evictions of the layers of a transformers cache, in time or looking back."""

import warnings
from collections.abc import Collection, Sequence
from itertools import groupby
from typing import final

from torch import Tensor
from transformers import Cache, PreTrainedModel

from loki_attn.attention import LayerPolicy
from loki_attn.errors import CacheError
from loki_attn.evict.base import Attended
from loki_attn.eviction import LayerEviction, evict, is_due, observe
from loki_attn.integrations.transformers.function import LayerState, Shared
from loki_attn.integrations.transformers.layers import LokiLayer, plain_tensors
from loki_attn.integrations.transformers.second_pass import Prompt, reads_twice, second_pass


@final
class Dropper:
    """Drops what the layers of one attachment need not keep, when it is time.

    Args:
        shared: What the layers share; rows that go are counted in its meter.
    """

    def __init__(self, shared: Shared) -> None:
        """Wait for layers to attend."""
        self._shared = shared
        self._due: list[tuple[LayerEviction, LokiLayer]] = []
        self._told = False

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
        if eviction is not None and reads_twice(eviction):
            self._tell(q_len)
        elif eviction is not None:
            layer.turn.waiting |= q_len > 1
            if self._shared.mode == "decode" and is_due(eviction, layer.turn, q_len):
                self._due.append((eviction, layer))
        last = state.index == max(layers)
        if eviction is not None and eviction.allocate.scope == "layer":
            # Layers that keep the same rows are evicted from together, after the last of them.
            leader = eviction.evict.leader
            last = state.index == max(i for i in layers if leader(i) == leader(state.index))
        if self._due and last:
            due, self._due = self._due, []
            self._drop(due)

    def compress(
        self,
        model: PreTrainedModel,
        states: Collection[LayerState],
        cache: Cache,
        prompt: Prompt | None,
    ) -> int:
        """Evict from a cache of a prompt that was read densely; see `Attachment.compress`."""
        before, due = self._shared.meter.counts.evicted_rows, []
        bound = [(s.policy, cache.layers[s.index]) for s in states if s.policy is not None]
        twice = any(p.eviction is not None and reads_twice(p.eviction) for p, _ in bound)
        for policy, layer in bound:
            ours = isinstance(layer, LokiLayer) and not layer.rows.evicted
            if not ours or (layer.asked is None and not twice):
                raise CacheError(
                    "compress needs a cache that was filled inside `recording()`, of which nothing "
                    "was evicted."
                )
            layer.follow(policy)
            if policy.eviction is not None:
                due.append((policy.eviction, layer))
            if policy.eviction is not None and not twice:
                _look_back(policy, layer)
        if twice:
            self._told = True
            second_pass(model, self._shared, states, cache, prompt)
        for _, layer in bound:
            layer.asked = None
        self._drop(due)
        return self._shared.meter.counts.evicted_rows - before

    def _tell(self, q_len: int) -> None:
        """Say once that nothing goes without a second pass."""
        if self._told or q_len > 1 or self._shared.mode != "decode":
            return
        self._told = True
        warnings.warn(
            "This eviction judges rows in a second pass over the prompt, which generate does not "
            "make: nothing is evicted. Read the prompt into attachment.cache(), call "
            "attachment.compress(cache, Prompt(ids=..., tokenizer=...)), then go on from it.",
            stacklevel=2,
        )

    def _drop(self, due: Sequence[tuple[LayerEviction, LokiLayer]]) -> None:
        """Evict, in storage that may be written in any mode."""
        if not due:
            return
        together = due[0][0].allocate.scope == "model"
        with plain_tensors():
            groups = groupby(due, key=lambda one: one[0].evict.leader(one[0].place.shape.index))
            for part in [due] if together else [list(group) for _, group in groups]:
                turns = [(eviction, layer.turn) for eviction, layer in part]
                self._shared.meter.counts.evicted_rows += evict(turns)
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
            own = shard.of_queries(rows, policy.shape.num_kv_heads)
            observe(eviction, layer.turn, shard, Attended(query=own, call=call))
