"""Eviction: the last stage of the straight line: observe what was attended, keep the best rows.

    query, rows --observe-->  marks and memory of the cache
    rows        --scores--->  [batch, kv_heads, length], higher means keep
    scores      --counts--->  rows per KV head, settled by the allocation
    scores      --keep----->  KeepSet; rows, planes and marks are gathered by it

It follows the attention of the call whose rows it drops: what is evicted was attended to.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, final

import torch
from torch import Tensor

from loki_attn.allocate.base import Allocate, Ballot
from loki_attn.errors import CacheError
from loki_attn.evict.base import Attended, Evict, Evictor, Place
from loki_attn.keep_budget import KeepBudget, When
from loki_attn.kernels import ops
from loki_attn.shards import LayerRows, Shard
from loki_attn.types import AttentionCall, KeepSet

# Behind every position, where a head holds fewer rows than another.
_NOWHERE: Final = torch.iinfo(torch.int32).max


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class LayerEviction:
    """An eviction bound to one layer.

    Attributes:
        evict: The method.
        evictor: The method, bound to the layer.
        allocate: How the budget is shared out.
        budget: The budget.
        place: The layer.
    """

    evict: Evict
    evictor: Evictor
    allocate: Allocate
    budget: KeepBudget
    place: Place

    @property
    def when(self) -> When:
        """When rows go."""
        own: When = "step" if self.evict.each_step else "forward"
        return self.budget.when or own

    def of(self, shard: Shard) -> Evictor:
        """The method for the heads of a shard."""
        return self.evictor if shard.heads is None else self.evictor.narrowed(shard.heads)


@dataclass
class Turn:
    """What an eviction must know of one layer beside its rows; it lives as long as the rows do.

    Attributes:
        rows: The layer's rows.
        call: Scaling, soft-cap, sink logits of the last attention call.
        valid: None, or bool [batch, 1, tokens seen]: tokens that are no padding.
        waiting: Whether a forward of several tokens has not been followed by an eviction yet.
    """

    rows: LayerRows
    call: AttentionCall | None = None
    valid: Tensor | None = None
    waiting: bool = False


def is_due(eviction: LayerEviction, turn: Turn, q_len: int) -> bool:
    """Whether rows go at the end of a forward of `q_len` tokens, if there are more than allowed."""
    if eviction.when == "step":
        return True
    if eviction.when == "forward":
        return q_len > 1
    return q_len == 1 and turn.waiting


def observe(eviction: LayerEviction, turn: Turn, shard: Shard, seen: Attended) -> None:
    """Let the method learn from a call that one shard answered."""
    eviction.of(shard).observe(shard.cache, seen)
    turn.call = seen.call


def evict(layers: Sequence[tuple[LayerEviction, Turn]]) -> int:
    """Evict from layers that share one budget or one choice: a layer, a group of them, or all.

    Args:
        layers: What is bound to each layer, and its rows, in the order of the model: the first of
            the layers that have the same `Evict.leader` leads the others.

    Returns:
        Rows dropped, summed over batch rows and KV heads.
    """
    for _, turn in layers:
        turn.waiting = False
    seen = [(eviction, turn) for eviction, turn in layers if turn.call is not None]
    own = [_capacity(eviction, turn) for eviction, turn in seen]
    over = [_surplus(*layer, rows) for layer, rows in zip(seen, own, strict=True)]
    if over and seen[0][0].allocate.scope == "model":
        # One budget: a layer may hold what others have given up.
        over = [torch.stack(over).sum(0)] * len(over)
    due = [
        (*layer, rows)
        for layer, rows, surplus in zip(seen, own, over, strict=True)
        if bool((surplus > 0).any())
    ]
    if not due or due[0][0].allocate.scope == "layer":
        return _each_by_itself(due)
    votes = [_vote(*layer) for layer in due]
    counts = votes[0].eviction.allocate.counts([vote.ballot for vote in votes])
    pairs = zip(votes, counts, strict=True)
    return sum(_keep(vote.eviction, vote.turn, _marked(vote, wanted)) for vote, wanted in pairs)


def _each_by_itself(layers: Sequence[tuple[LayerEviction, Turn, Tensor]]) -> int:
    """Evict from every layer by its own scores, or as the layer did that leads it."""
    kept: dict[int, Tensor] = {}
    dropped = 0
    for eviction, turn, capacity in layers:
        leader = eviction.evict.leader(eviction.place.shape.index)
        masks = _led(turn.rows, kept.get(leader))
        if masks is None:
            vote = _vote(eviction, turn, capacity)
            masks = _marked(vote, eviction.allocate.counts([vote.ballot])[0])
        dropped += _keep(eviction, turn, masks)
        places = [shard.cache.positions for shard in turn.rows]
        kept.setdefault(leader, turn.rows.together(places, _NOWHERE))
    return dropped


def _led(rows: LayerRows, places: Tensor | None) -> list[Tensor] | None:
    """Mark the rows at the places that a leader kept; None where it kept others than are here.

    Args:
        rows: The rows of a layer that is led.
        places: int [batch, kv_heads, most]: ascending positions, `_NOWHERE` at the end; None where
            nobody leads.
    """
    if places is None:
        return None
    masks = []
    for shard in rows:
        own = shard.cache.positions
        wanted = shard.of_rows(places).to(own.device, own.dtype).contiguous()
        slot = torch.searchsorted(wanted, own.contiguous()).clamp(max=wanted.shape[-1] - 1)
        masks.append(wanted.gather(-1, slot) == own)
        if bool((masks[-1].sum(-1) != (wanted != _NOWHERE).sum(-1)).any()):
            return None
    return masks


@dataclass(frozen=True, kw_only=True, eq=False)
class _Vote:
    """A layer that holds more than it may: per shard its scores, protected and valid rows."""

    eviction: LayerEviction
    turn: Turn
    parts: list[tuple[Tensor, Tensor, Tensor]]
    ballot: Ballot


def _capacity(eviction: LayerEviction, turn: Turn) -> Tensor:
    """Rows per KV head that a layer may keep, int64 [batch]."""
    budget, tokens = eviction.budget, _tokens_seen(turn)
    always = budget.keep_first + max(budget.keep_last, eviction.evict.window)
    shared = eviction.allocate.layer_capacities(
        budget.rows(tokens), always, tokens, eviction.place.num_layers
    )
    # Layers that keep the same rows keep as many: what they get together, shared evenly.
    leaders = [eviction.evict.leader(layer) for layer in range(eviction.place.num_layers)]
    group = [i for i, one in enumerate(leaders) if one == leaders[eviction.place.shape.index]]
    return shared[group].sum(0) // len(group)


def _surplus(eviction: LayerEviction, turn: Turn, capacity: Tensor) -> Tensor:
    """Rows of all heads above what they may hold, int64 [batch]; 0 or 1 without an amount."""
    room = eviction.budget.burst if eviction.when == "step" else 0
    if not (eviction.evict.needs_budget and eviction.allocate.needs_budget):
        due = any(eviction.of(shard).may_drop(shard.cache, room) for shard in turn.rows)
        return torch.full_like(capacity, int(due))
    held = _held(turn.rows)
    return held.sum(-1) - (capacity + room) * held.shape[1]


def _vote(eviction: LayerEviction, turn: Turn, capacity: Tensor) -> _Vote:
    """Judge a layer's rows."""
    rows, place, call = turn.rows, eviction.place, turn.call
    if call is None:
        raise CacheError("Nothing was attended to yet; evict after an attention call.")
    parts = [_judge(eviction, shard, call, turn.valid) for shard in rows]
    scores, protected, valid = (
        rows.together([part[i] for part in parts], fill)
        for i, fill in enumerate((float("-inf"), False, False))
    )
    ballot = Ballot(
        layer=place.shape.index,
        num_layers=place.num_layers,
        scores=scores,
        protected=protected,
        valid=valid,
        held=_held(rows).to(scores.device),
        capacity=capacity.to(scores.device),
        head_weights=_head_weights(eviction, turn),
    )
    return _Vote(eviction=eviction, turn=turn, parts=parts, ballot=ballot)


def _head_weights(eviction: LayerEviction, turn: Turn) -> Tensor | None:
    """What the method says the heads deserve, [batch, kv_heads], where that is asked for."""
    if not eviction.allocate.weighs_heads:
        return None
    found = []
    for shard in turn.rows:
        valid = None if turn.valid is None else valid_rows(shard, turn.valid)
        weights = eviction.of(shard).head_weights(shard.cache, valid)
        if weights is None:
            return None
        found.append(weights)
    return turn.rows.together(found, 0.0)


def _judge(
    eviction: LayerEviction, shard: Shard, call: AttentionCall, tokens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, protected and valid rows of a shard, each [batch, kv_heads, length]."""
    budget, evictor, cache = eviction.budget, eviction.of(shard), shard.cache
    shape = cache.positions.shape
    valid = None if tokens is None else valid_rows(shard, tokens)
    scores = evictor.scores(cache, call, valid).float().expand(shape)
    real = torch.ones(shape, dtype=torch.bool, device=scores.device) if valid is None else valid
    real = real.expand(shape)
    last = max(budget.keep_last, eviction.evict.window)
    # `protect` wants queries: every head is one.
    protected = ops().protect(real[:, :, None], budget.keep_first, last)[:, :, 0]
    more = evictor.protected(cache, valid)
    if more is not None:
        protected = protected | (more & real)
    return scores, protected, real


def _marked(vote: _Vote, counts: Tensor) -> list[Tensor]:
    """The rows that the method keeps of each shard."""
    masks = []
    for shard, (scores, protected, valid) in zip(vote.turn.rows, vote.parts, strict=True):
        evictor = vote.eviction.of(shard)
        masks.append(evictor.keep(scores, shard.of_rows(counts), protected, valid))
    return masks


def _keep(eviction: LayerEviction, turn: Turn, masks: Sequence[Tensor]) -> int:
    """Drop what is not marked; return how many rows that is."""
    rows = turn.rows
    before = int(_held(rows).sum())
    rows.keep(keep_set(rows.together(masks, False)))
    for shard in rows:
        eviction.of(shard).settle(shard.cache)
    return before - int(_held(rows).sum())


def keep_set(mask: Tensor) -> KeepSet:
    """The marked rows of bool [batch, kv_heads, length] as ascending indices."""
    counts = mask.sum(-1)
    most = int(counts.max())
    slot = (mask.cumsum(-1) - 1).masked_fill(~mask, most)
    indices = counts.new_full((*mask.shape[:2], most + 1), -1)
    rows = torch.arange(mask.shape[-1], device=mask.device).expand_as(mask)
    return KeepSet(indices.scatter_(2, slot, rows)[..., :most].contiguous(), counts)


def valid_rows(shard: Shard, tokens: Tensor) -> Tensor:
    """Rows of a shard that are no padding: bool [batch, kv_heads, length].

    Args:
        shard: The rows.
        tokens: bool [batch or 1, 1, tokens seen]: tokens that are no padding.
    """
    places = shard.cache.positions.long()
    own = shard.of_rows(tokens).to(places.device)
    return own.expand(*places.shape[:2], -1).gather(2, places)


def _tokens_seen(turn: Turn) -> Tensor:
    """Tokens that are no padding, int64 [batch]."""
    batch = turn.rows.batch
    if turn.valid is None:
        return torch.full((batch,), turn.rows.seen)
    return turn.valid[:, 0].sum(-1).cpu().expand(batch)


def _held(rows: LayerRows) -> Tensor:
    """Rows held by every head, int64 [batch, kv_heads]."""
    held = [torch.full(shard.cache.positions.shape[:2], shard.cache.length) for shard in rows]
    return rows.together(held, 0)
