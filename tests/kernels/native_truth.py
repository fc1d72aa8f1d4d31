"""What a decode step must give, in float64, and by how much honest rounding may move it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from loki_attn.kernels import reference
from loki_attn.testing import assert_within_budget, plain_attention, plain_reference
from loki_attn.types import AttentionCall

EPS = torch.finfo(torch.float32).eps
TINY = torch.finfo(torch.float32).smallest_normal
SAMPLE = 512  # numbers from which on a float32 result is held to the budget


@dataclass(frozen=True)
class Estimate:
    """float64 numbers per row, and how far float32 may be from each."""

    value: Tensor
    margin: Tensor


def check_attention(out, scene, mask):
    """Hold an attention result to float64: each number to a bound, large samples to the budget."""
    rows = (scene.query, scene.clean_keys, scene.clean_values)
    query, keys, values = (r.double() for r in rows)
    truth = plain_attention(query, keys, values, mask, scene.call)
    assert out.dtype == scene.query.dtype
    limits = torch.finfo(out.dtype)
    # What float32 logits lack moves every weight, the least ones vanish, the result is rounded.
    sizes = plain_attention(query, keys, values.abs(), mask, scene.call)
    slack = torch.expm1(2 * logit_error(query, keys, mask, scene.call) + 16 * EPS)
    lost = TINY * (values.abs().sum(2, keepdim=True) + 1).repeat_interleave(scene.group, 1)
    bound = slack * sizes + lost + truth.abs() * limits.eps / 2 + limits.tiny * limits.eps
    assert bool(((out.double() - truth).abs() <= bound).all())
    # Few numbers, or few that large logits leave, are no sample of float32 rounding: see DESIGN.md.
    sample = out.shape[0] >= 4 and out.numel() >= SAMPLE and scene.numbers != "large"
    if out.dtype != torch.float32 or sample:
        assert_within_budget(out, plain_reference(*rows, mask, scene.call, truth), truth)


def logit_error(query, keys, mask, call):
    """The most that a float32 logit of each head may err, [batch, heads, 1, 1]."""
    largest = reference.score(query.abs(), keys.abs(), None, AttentionCall(scaling=call.scaling))
    if mask is not None:
        largest = largest.masked_fill(~mask, 0.0)
    return 8 * EPS * (largest.amax(-1, keepdim=True) + (call.softcap or 0.0))


def marked(indices, seq, heads):
    """The rows of a selection as bool [batch, heads, 1, seq]."""
    marks = torch.zeros(*indices.shape[:2], seq + 1, dtype=torch.bool)
    marks.scatter_(2, indices.masked_fill(indices < 0, seq), True)
    return marks[..., :seq].repeat_interleave(heads // indices.shape[1], 1)[:, :, None]


def lead_logits(query, query_map, numbers, kind, call):
    """Logits [batch, heads, seq] of leading coordinates by the definition of the op.

    Args:
        query: [batch, heads, 1, dim].
        query_map: float32 [kv_heads, dim, rank], or None for the first coordinates.
        numbers: float64 [batch, kv_heads, seq, rank].
        kind: Kind of the tiles, None for plain rows.
        call: Scaling and soft-cap.
    """
    batch, kv_heads, _, rank = numbers.shape
    rows = query.double().reshape(batch, kv_heads, -1, query.shape[3])
    if query_map is None:
        mapped, error = rows[..., :rank], torch.zeros(())
    else:
        mapped = rows @ query_map.double()
        error = 8 * EPS * (rows.abs() @ query_map.double().abs())
    peak = mapped.abs().amax(-1, keepdim=True)
    middle = rounded(mapped, peak, kind)
    # A coordinate within its error of a rounding boundary may fall on either side of it.
    reach = (rounded(mapped + error, peak, kind) - rounded(mapped - error, peak, kind)).abs()
    share = 8 * EPS + error.amax(-1, keepdim=True) / peak.clamp(min=TINY)
    columns = numbers.mT
    logits = (middle @ columns) * call.scaling
    margin = (reach @ columns.abs() + share * (middle.abs() @ columns.abs())) * call.scaling
    if call.softcap is not None:
        logits = call.softcap * torch.tanh(logits / call.softcap)
        margin = margin + 8 * EPS * call.softcap
    return Estimate(logits.flatten(1, 2), margin.flatten(1, 2))


def rounded(mapped, peak, kind):
    """A query as tiles of this kind meet it."""
    if kind in {"int8", "int4"}:
        step = (peak / 127).masked_fill(peak / 127 < TINY, 1.0)
        return torch.round(mapped / step) * step
    return mapped.to(torch.bfloat16).double() if kind == "bf16" else mapped


def agreed(logits, kv_heads, how, seen, call):
    """One score per row from those of a group, as an estimate [batch, choosers, seq]."""
    heads = logits.value.shape[1]
    if how == "none" or heads == kv_heads:
        return logits
    value, margin = (t.unflatten(1, (kv_heads, -1)) for t in (logits.value, logits.margin))
    if how == "max":
        return Estimate(value.amax(2), margin.amax(2))
    weights = shares(logits, seen, call)
    value, margin = (t.unflatten(1, (kv_heads, -1)) for t in (weights.value, weights.margin))
    return Estimate(value.sum(2), margin.sum(2) + heads * TINY * 8)


def shares(scores, seen, call):
    """Soft-max weights of the visible rows, sink logits included."""
    seen = seen[:, 0]
    weights = reference.estimated_weights(scores.value[:, :, None], seen[:, None], call)[:, :, 0]
    worst = scores.margin.masked_fill(~seen, 0.0).amax(-1, keepdim=True)
    slack = torch.expm1((2 * (scores.margin + worst) + 1e-5).clamp(max=50.0))
    return Estimate(weights, weights * slack)


def counts_by_mass(scores, how, group, budget, seen, forced, call):
    """Least and most rows that a mass budget may read, [batch, choosers]."""
    weights = scores
    if how != "softmax_sum" or group == 1:
        weights = shares(scores, seen, AttentionCall(scaling=1.0))
    value = weights.value.masked_fill(~seen[:, 0], 0.0)
    total = value.sum(-1, keepdim=True)
    slack = 1e-6 + weights.margin.masked_fill(~seen[:, 0], 0.0).sum(-1, keepdim=True) / total
    order = value.masked_fill(forced[:, 0], torch.inf)
    order = order.sort(dim=-1, descending=True, stable=True).indices
    reached = value.gather(-1, order).cumsum(-1) / total
    limits = []
    for goal in (budget.mass - slack, budget.mass + slack):
        amount = (reached < goal).sum(-1).clamp(max=value.shape[-1] - 1) + 1
        limits.append(budget.clamp(amount, seen.sum(-1)[:, 0]))
    return limits


def check_selection(selection, scores, seen, forced, *, ties_are_exact):
    """Sinks and recents are in, clearly better rows are in, clearly worse ones are out."""
    for b, chooser in torch.cartesian_prod(*map(torch.arange, selection.counts.shape)).tolist():
        count = int(selection.counts[b, chooser])
        picked, rest = selection.indices[b, chooser].split(
            [count, selection.indices.shape[2] - count]
        )
        assert bool((rest == -1).all())
        assert bool((picked.diff() > 0).all())
        shown, must = seen[b, 0, 0], forced[b, 0, 0]
        assert bool(shown[picked].all())
        chosen = torch.zeros_like(shown).index_fill_(0, picked, True)
        protected = must.nonzero()[:count, 0]
        assert bool(chosen[protected].all())
        free, left = chosen & ~must, shown & ~chosen & ~must
        if not bool(free.any()) or not bool(left.any()):
            continue
        value, margin = scores.value[b, chooser], scores.margin[b, chooser]
        assert float((value + margin)[free].min()) >= float((value - margin)[left].max())
        if ties_are_exact:
            assert int(free.nonzero().max()) < int(left.nonzero().min())
