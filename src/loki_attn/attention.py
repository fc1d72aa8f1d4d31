"""The straight line: append, score, choose, attend. One layer, one forward, plain torch.

    k, v        --append-->  LayerCache: rows and side planes
    q, planes   --score--->  estimated logits   [batch, heads, q_len, seq]
    logits      --choose-->  Selection          [batch, kv_heads, k]
    q, rows     --attend-->  output             [batch, heads, q_len, head_dim]

This file is the documentation of a decode step and its end-to-end oracle; the integrations call
these functions. A backend may do a decode step in one kernel, and must then choose and return what
the line below does.
"""

from dataclasses import dataclass, field, replace
from typing import Final, final

import torch
from torch import Tensor

from loki_attn import reuse
from loki_attn.basis import Basis
from loki_attn.budget import Budget
from loki_attn.cache import LayerCache
from loki_attn.errors import PolicyError
from loki_attn.evict.base import Place
from loki_attn.eviction import LayerEviction
from loki_attn.kernels import ops
from loki_attn.policy import Policy
from loki_attn.profile import Profile
from loki_attn.rope import Rope
from loki_attn.row_format import RowFormat
from loki_attn.select.base import Estimate, Selector
from loki_attn.select.dense import Dense
from loki_attn.types import AttentionCall, GroupReduce, LayerShape, Selection

# Small enough that a block's logits stay in the processor's cache.
_QUERY_BLOCK: Final = 64


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class LayerPolicy:
    """A policy bound to one layer: its selector, its own budget, its way to agree in a group.

    `eviction` is None where everything is kept, `reuse_above` None where every step chooses anew.
    `estimates_mass` says whether the selector's scores are logits.
    `plain` marks KV heads that the selection leaves alone, bool [kv_heads]; None for none.
    """

    shape: LayerShape
    selector: Selector
    budget: Budget
    group_reduce: GroupReduce
    eviction: LayerEviction | None = None
    reuse_above: float | None = None
    estimates_mass: bool = True
    plain: Tensor | None = None
    # Not copied by `replace`: narrowed policies are those of this one.
    _of_heads: dict[tuple[int, ...], "LayerPolicy"] = field(default_factory=dict, init=False)

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """KV heads whose rows lie apart from the start, in formats of their own; () for one."""
        if self.plain is None:
            return ()
        return (~self.plain).nonzero()[:, 0], self.plain.nonzero()[:, 0]

    def of(self, heads: Tensor | None) -> "LayerPolicy":
        """Return the same for some of the KV heads, int64 [n]; None for all."""
        if heads is None:
            return self
        key = tuple(heads.tolist())
        if key not in self._of_heads:
            shape = replace(
                self.shape, num_kv_heads=len(key), num_heads=len(key) * self.shape.group
            )
            own = replace(self, shape=shape, selector=self.selector.narrowed(heads), plain=None)
            mine = None if self.plain is None else self.plain[heads.cpu()]
            self._of_heads[key] = own if mine is None else _leaving_alone(own, mine)
        return self._of_heads[key]


def bind(
    policy: Policy,
    shape: LayerShape,
    num_layers: int,
    basis: Basis | None,
    profile: Profile | None = None,
    rope: Rope | None = None,
) -> LayerPolicy:
    """Bind a policy to one layer.

    Args:
        policy: The policy.
        shape: Sizes of the layer.
        num_layers: Layers of the model, dense ones included.
        basis: For methods that need one.
        profile: What was calibrated for a method that needs it.
        rope: The layer's rotary embedding, None where it is not known.

    Raises:
        PolicyError: If a method needs what is missing, or two methods do not go together.
        BudgetError: If the budget names layers that the model has not.
    """
    layer_basis = basis.layer(shape.index) if basis and policy.select.needs_basis else None
    known = profile.layer(shape.index) if profile is not None else None
    selector = policy.select.bind(shape, layer_basis, known)
    bound = LayerPolicy(
        shape=shape,
        selector=selector,
        budget=policy.budget.for_layer(shape.index, num_layers),
        group_reduce=policy.group_reduce,
        eviction=_bind_eviction(
            policy,
            selector,
            Place(
                shape=shape,
                num_layers=num_layers,
                rope=rope,
                profile=known,
                basis=layer_basis,
                budget=policy.keep,
                model_profile=profile,
            ),
        ),
        reuse_above=policy.reuse_above,
        estimates_mass=policy.select.estimates_mass,
    )
    plain = None if bound.eviction is None else bound.eviction.evictor.plain_heads()
    if plain is None or policy.select.method == "dense":
        return bound
    return _leaving_alone(bound, plain)


def _leaving_alone(layer: LayerPolicy, plain: Tensor) -> LayerPolicy:
    """The same policy, but that the selection leaves these KV heads alone, bool [kv_heads]."""
    if not bool(plain.any()):
        return layer
    if not bool(plain.all()):
        return replace(layer, plain=plain.cpu())
    selector = Dense().bind(layer.shape)
    return replace(layer, selector=selector, budget=Budget(), reuse_above=None, plain=None)


def _bind_eviction(policy: Policy, selector: Selector, place: Place) -> LayerEviction | None:
    """The eviction of a layer, None where it keeps everything."""
    if not policy.evicts or policy.keep.spares(place.shape.index, place.num_layers):
        return None
    evict = policy.evict
    if evict.moves_keys and type(selector).rows is not RowFormat.rows:
        raise PolicyError(
            f"{evict.method} rotates stored keys or looks at single channels of them, and "
            f"{policy.select.method} stores keys in another basis, which does not commute with "
            "RoPE (R_shift P != P R_shift); use layout='planes', which leaves keys as they are."
        )
    return LayerEviction(
        evict=evict,
        evictor=evict.bind(place),
        allocate=policy.allocate,
        budget=policy.keep,
        place=place,
    )


def dense(
    query: Tensor,
    cache: LayerCache,
    layer: LayerPolicy,
    call: AttentionCall,
    visible: Tensor | None,
) -> Tensor:
    """Dense attention over the cache, whatever space its rows are stored in.

    `visible` is None for causal, or bool [batch or 1, kv_heads or 1, q_len, seq].
    """
    rows_query = layer.selector.query_rows(query)
    if visible is not None and visible.shape[1] > 1:
        # Heads that kept other rows have masks of their own, which the fused kernels do not take.
        return ops().attend_masked(rows_query, cache.keys, cache.values, visible, call).output
    return ops().dense(rows_query, cache.keys, cache.values, visible, call, causal=True)


def select(
    query: Tensor, cache: LayerCache, layer: LayerPolicy, call: AttentionCall, visible: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Score the rows and settle how many each query reads.

    Args:
        query: [batch, heads, q_len, head_dim], as the model made it.
        cache: The layer's rows.
        layer: The bound policy.
        call: What the model asks of the attention.
        visible: bool [batch or 1, kv_heads or 1, q_len, seq].

    Returns:
        What `ops().choose` needs: scores [batch, kv_heads or heads, q_len, seq], counts, forced.
    """
    return _settle(layer.selector.score(query, cache, call), query, cache, layer, call, visible)


def _settle(
    logits: Tensor | None,
    query: Tensor,
    cache: LayerCache,
    layer: LayerPolicy,
    call: AttentionCall,
    visible: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Settle by the selector's scores how many rows each query reads; see `select`."""
    budget, kernels, how = layer.budget, ops(), layer.group_reduce
    kv_heads = layer.shape.num_kv_heads
    forced = kernels.protect(visible, budget.sinks, budget.recents)
    if logits is None:
        scores = torch.arange(cache.length, device=query.device, dtype=torch.float32)
        scores = scores.expand(query.shape[0], kv_heads, query.shape[2], -1)
        return scores, budget.counts(visible.sum(-1)), forced
    always = layer.selector.always(cache, visible)
    # What is read anyway has no say in which of the others are read, unless they share a mass.
    judged = visible if always is None or budget.mass is not None else visible & ~always
    scores = kernels.reduce_group(logits, kv_heads, how, _per_head(judged, query), call)
    ranked = scores
    if always is not None:
        ranked = scores.masked_fill(_per_head(always, scores), float("inf"))
    if budget.mass is None:
        return ranked, budget.counts(visible.sum(-1)), forced
    weights = scores
    if not how.startswith("softmax") or logits.shape[1] == kv_heads:
        # Shares of the rows among themselves: sink logits, which are per query head, cancel.
        weights = kernels.estimated_weights(scores, visible, replace(call, sink_logits=None))
    first = forced if always is None else forced | always
    counts = kernels.mass_counts(weights.masked_fill(~visible, 0.0), first, budget.mass)
    return ranked, budget.clamp(counts, visible.sum(-1)), forced


def _per_head(visible: Tensor, rows: Tensor) -> Tensor:
    """A mask that differs between KV heads, for each head of `rows`."""
    if visible.shape[1] == 1:
        return visible
    return visible.repeat_interleave(rows.shape[1] // visible.shape[1], 1)


def decode(
    query: Tensor,
    cache: LayerCache,
    layer: LayerPolicy,
    call: AttentionCall,
    visible: Tensor | None = None,
) -> tuple[Tensor, Selection]:
    """One sparse decode step of one layer; the new row is already appended.

    Args:
        query: [batch, heads, 1, head_dim].
        cache: The layer's rows, the query's own included.
        layer: The bound policy.
        call: What the model asks of the attention.
        visible: None for all rows, or bool [batch or 1, kv_heads or 1, 1, seq].

    Returns:
        [batch, heads, 1, value_dim] in the query's dtype, and what was read.
    """
    rows_query = layer.selector.query_rows(query)
    at_once = _at_once(query, rows_query, cache, layer, call, visible)
    if at_once is not None:
        return at_once
    out, selection, _ = decode_weighing(query, cache, layer, call, visible)
    return out, selection


def decode_weighing(
    query: Tensor,
    cache: LayerCache,
    layer: LayerPolicy,
    call: AttentionCall,
    visible: Tensor | None = None,
) -> tuple[Tensor, Selection, Tensor | None]:
    """The same, stage by stage, with the scores that the choice was made by.

    Returns:
        As `decode`, and float32 [batch, heads, 1, seq]: the selector's logits, None where it reads
        nothing to choose or chose before and reads the same again.
    """
    rows_query = layer.selector.query_rows(query)
    if visible is None:
        visible = torch.ones(1, 1, 1, cache.length, dtype=torch.bool, device=query.device)
    again = None
    if layer.reuse_above is not None:
        again = reuse.last_choice(query, cache, layer.reuse_above, visible)
    if again is not None and again.for_all:
        selection = again.selection
        out = ops().attend(rows_query, cache.keys, cache.values, selection, call).output
        return out, selection, None
    logits = layer.selector.score(query, cache, call)
    scores, counts, forced = _settle(logits, query, cache, layer, call, visible)
    selection = ops().choose(scores, counts, visible, forced)
    if again is not None:
        selection = again.merged(selection)
    if layer.reuse_above is not None:
        reuse.remember(query, cache, selection, again)
    out = ops().attend(rows_query, cache.keys, cache.values, selection, call).output
    if logits is not None:
        read = Estimate(query=query, cache=cache, call=call, logits=logits, visible=visible)
        corrected = layer.selector.finish(out, selection, read)
        # A batch row that reads again has no scores to correct by, in whatever company it is.
        out = corrected if again is None else again.kept(out, corrected)
    return out, selection, logits


def _at_once(
    query: Tensor,
    rows_query: Tensor,
    cache: LayerCache,
    layer: LayerPolicy,
    call: AttentionCall,
    visible: Tensor | None,
) -> tuple[Tensor, Selection] | None:
    """The whole decode step in one kernel, where the method and the kernels have such a form."""
    lead = layer.selector.lead(cache)
    per_head = visible is not None and visible.shape[1] > 1
    if lead is None or per_head or layer.reuse_above is not None:
        return None
    reading = layer.budget.reading(cache.length, visible)
    return ops().step(
        query,
        rows_query,
        cache.keys,
        cache.values,
        lead,
        reading,
        layer.group_reduce,
        call,
        visible,
    )


def every_query(
    query: Tensor,
    cache: LayerCache,
    layer: LayerPolicy,
    call: AttentionCall,
    visible: Tensor | None = None,
) -> Tensor:
    """Let each query row of a multi-token forward select for itself (evaluation; not faster).

    Args:
        query: [batch, heads, q_len, head_dim], the last q_len rows of the cache.
        cache: The layer's rows, the queries' own included.
        layer: The bound policy.
        call: What the model asks of the attention.
        visible: None for causal, or bool [batch or 1, kv_heads or 1, q_len, seq].

    Returns:
        [batch, heads, q_len, value_dim] in the query's dtype.
    """
    kernels = ops()
    if visible is None:
        visible = kernels.causal_mask(query.shape[2], cache.length, query.device)
    rows_query = layer.selector.query_rows(query)
    blocks = []
    for start in range(0, query.shape[2], _QUERY_BLOCK):
        block = slice(start, start + _QUERY_BLOCK)
        seen = visible[:, :, block]
        # No row behind the last visible one matters to this block; its queries are the last rows.
        end = cache.length - query.shape[2] + start + seen.shape[2]
        rows = cache.prefix(max(_last_visible(seen) + 1, end))
        seen = seen[..., : rows.length]
        asked = query[:, :, block]
        logits = layer.selector.score(asked, rows, call)
        scores, counts, forced = _settle(logits, asked, rows, layer, call, seen)
        mask = kernels.choose_mask(scores, counts, seen, forced)
        part = kernels.attend_masked(rows_query[:, :, block], rows.keys, rows.values, mask, call)
        out = part.output
        if logits is not None:
            read = Estimate(query=asked, cache=rows, call=call, logits=logits, visible=seen)
            out = layer.selector.finish(out, mask, read)
        blocks.append(out)
    return torch.cat(blocks, 2)


def _last_visible(visible: Tensor) -> int:
    """The last row that any query sees, 0 where none sees any."""
    seen = visible.flatten(0, 2).any(0)
    return int(seen.nonzero().max()) if bool(seen.any()) else 0
