"""DuoAttention: retrieval heads keep everything, the other heads keep sinks and recents.

Paper: DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads
arXiv: 2410.10819
What it does: a gate per KV head, learnt once for a model, says how much it loses if the head sees
    only the first and the last tokens. The `sparsity` share of all heads of all layers with the
    lowest gates are streaming heads: they keep `sinks` first and `recents` last rows, at their true
    positions. The others are full heads and keep every row.
What we do differently: heads that tie are ordered by layer, then by head, without noise; the number
    of full heads is round((1 - sparsity) * all heads), exactly. No weights are permuted: heads of a
    kind share a cache. A prompt that comes in one forward is read densely by every head, and rows
    go afterwards, as in the reference; of a prompt in chunks a streaming head sees sinks, recents
    and the chunk, so the two differ. keep.when = "prompt" makes them alike: rows go once, at the
    first step after a prompt, and gather from then on. With `burst` a streaming head holds and
    reads up to that many rows more, so that rows need not move at every step (32 in the preset; the
    reference has none). `full_heads` names the full heads where there are no gates. Layers of
    `whole_layers` count among all heads, and keep everything whatever their gates are. Under a
    selection, Loki say, streaming heads have no index and read all that they hold.
Bytes read per decode step: per full KV head T * (head_dim + value_dim) * b, per streaming KV head
    min(T, sinks + recents + burst) * (head_dim + value_dim) * b at most.
State per token: none; 4 bytes per layer and KV head for the gates.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final, final

import torch
from torch import Tensor

from loki_attn.budget import require_count
from loki_attn.cache import LayerCache
from loki_attn.errors import PolicyError
from loki_attn.evict.base import Evict, Evictor, Needs, Place, best
from loki_attn.types import AttentionCall

PRESETS: Final = {
    "duo-attention": {
        "select": {"method": "dense"},
        "evict": {"method": "duo_attention"},
        "keep": {"burst": 32},
    }
}

GATES: Final = "gates"


@final
@dataclass(frozen=True, kw_only=True)
class DuoAttention(Evict):
    """Keep by the kind of head.

    Attributes:
        sparsity: Share of the KV heads of all layers that stream, in [0, 1]; without `full_heads`.
        sinks: First tokens that a streaming head keeps; a larger `keep_first` of the budget counts
            instead.
        recents: Last tokens that a streaming head keeps; a larger `keep_last` counts instead.
        full_heads: Per layer of the model, the KV heads that keep everything; empty where gates
            decide.
    """

    method: ClassVar[str] = "duo_attention"
    needs: ClassVar[Needs] = "a profile"
    each_step: ClassVar[bool] = True
    needs_budget: ClassVar[bool] = False
    sparsity: float = 0.5
    sinks: int = 64
    recents: int = 256
    full_heads: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        """Refuse what is no share, no number of rows or no head."""
        if isinstance(self.sparsity, bool) or not 0 <= self.sparsity <= 1:
            raise PolicyError(
                f"sparsity is the share of heads that stream, in [0, 1], got {self.sparsity!r}."
            )
        require_count("sinks", self.sinks, at_least=0)
        require_count("recents", self.recents, at_least=1)
        for layer in self.full_heads:
            for head in layer:
                require_count("a head of full_heads", head, at_least=0)

    @property
    def needs_profile(self) -> bool:  # type: ignore[override]
        """Whether gates decide."""
        return not self.full_heads

    def bind(self, place: Place) -> Evictor:
        """Bind to a layer, by the gates of all layers.

        Raises:
            PolicyError: If an amount is given, or there are no gates or heads that fit the model.
        """
        if not place.budget.keeps_everything:
            raise PolicyError(
                "duo_attention keeps by the kind of head, and takes no capacity or keep_share; set "
                "evict.sparsity, evict.sinks and evict.recents."
            )
        full = self._named(place) if self.full_heads else self._gated(place)
        sinks = max(self.sinks, place.budget.keep_first)
        return _DuoAttention(~full, sinks, max(self.recents, place.budget.keep_last))

    def _named(self, place: Place) -> Tensor:
        """The full heads of a layer, bool [kv_heads], as the user names them."""
        index, heads = place.shape.index, place.shape.num_kv_heads
        if len(self.full_heads) != place.num_layers:
            raise PolicyError(
                f"full_heads names heads of {len(self.full_heads)} layers, the model has "
                f"{place.num_layers}; give one tuple per layer, () where all heads stream."
            )
        bad = [head for head in self.full_heads[index] if head >= heads]
        if bad:
            raise PolicyError(
                f"full_heads names the KV heads {bad} of layer {index}, which has 0 to {heads - 1}."
            )
        full = torch.zeros(heads, dtype=torch.bool)
        full[list(self.full_heads[index])] = True
        return full

    def _gated(self, place: Place) -> Tensor:
        """The full heads of a layer, bool [kv_heads], by the gates."""
        known, index = place.model_profile, place.shape.index
        if known is None or GATES not in known.names:
            raise PolicyError(
                "duo_attention needs gates: learn them with optimise_gates(model, tokenizer, text) "
                "of loki_attn.integrations.transformers.gates, and pass profile=; or name the full "
                "heads of every layer with full_heads."
            )
        full = full_by_gates({i: layer[GATES] for i, layer in known.layers.items()}, self.sparsity)
        expected = (place.shape.num_kv_heads,)
        if index not in full or tuple(full[index].shape) != expected:
            found = list(full[index].shape) if index in full else "none"
            raise PolicyError(
                f"Layer {index} needs gates [kv_heads] = {list(expected)}, the profile has {found}:"
                " it belongs to another model."
            )
        return full[index]


def full_by_gates(gates: Mapping[int, Tensor], sparsity: float) -> dict[int, Tensor]:
    """Choose the full heads: those with the highest gates, of equals the first in the model.

    Args:
        gates: By layer index, float [kv_heads].
        sparsity: Share of all heads that are not full.

    Returns:
        By layer index, bool [kv_heads], round((1 - sparsity) * all heads) of them true.
    """
    layers = dict(sorted(gates.items()))
    flat = torch.cat([gate.double().cpu() for gate in layers.values()])
    count = round((1 - sparsity) * flat.numel())
    full = torch.zeros(flat.numel(), dtype=torch.bool)
    full[flat.argsort(descending=True, stable=True)[:count]] = True
    parts = torch.split(full, [gate.numel() for gate in layers.values()])
    return dict(zip(layers, parts, strict=True))


@final
class _DuoAttention(Evictor):
    def __init__(self, streams: Tensor, sinks: int, recents: int) -> None:
        self._streams, self._sinks, self._recents = streams, sinks, recents
        self._any = bool(streams.any())

    def narrowed(self, heads: Tensor) -> Evictor:
        """The kinds of these heads."""
        return _DuoAttention(self._streams[heads.cpu()], self._sinks, self._recents)

    def plain_heads(self) -> Tensor | None:
        """Streaming heads: they read all that they hold."""
        return self._streams

    def may_drop(self, cache: LayerCache, burst: int) -> bool:
        """Whether there are streaming heads, with more rows than they may hold."""
        return self._any and cache.length > self._sinks + self._recents + burst

    def scores(self, cache: LayerCache, call: AttentionCall, valid: Tensor | None) -> Tensor:
        """Later rows first."""
        del call, valid
        rows = torch.arange(cache.length, dtype=torch.float32, device=cache.keys.device)
        return rows.expand(*cache.positions.shape[:2], -1)

    def protected(self, cache: LayerCache, valid: Tensor | None) -> Tensor | None:
        """The sinks: the first rows that are no padding."""
        if valid is None:
            return (torch.arange(cache.length, device=cache.keys.device) < self._sinks)[None, None]
        return valid & (valid.cumsum(-1) <= self._sinks)

    def keep(self, scores: Tensor, counts: Tensor, protected: Tensor, valid: Tensor) -> Tensor:
        """Everything, or sinks and recents, by the kind of head.

        Every batch row keeps as many, with padding where it is short: so they share a cache.
        """
        kept = torch.ones(scores.shape, dtype=torch.bool, device=scores.device)
        heads = self._streams.nonzero()[:, 0].to(scores.device)
        if heads.numel():
            most = min(scores.shape[-1], self._sinks + self._recents)
            own = torch.full_like(counts[:, heads], most)
            kept[:, heads] = best(scores[:, heads], own, protected[:, heads], valid[:, heads])
        return kept
