"""The ops in Triton for NVIDIA GPUs, and in Triton's interpreter for tests without one.

A decode step is up to eight kernels with nothing to wait for between them: visible rows counted,
the query mapped, a pass over the lead for the soft-max sums of its heads, one for the scores, two
for the choice, one or two for the attention. Rows are only gathered once they are chosen; scores
leave the chip as 4 bytes a row. What is not served is refused with `Unserved` before anything is
done.
"""

import torch
from torch import Tensor

from loki_attn.kernels.backends import Unserved
from loki_attn.kernels.triton import attending, choosing, ranking
from loki_attn.kernels.triton.appending import append
from loki_attn.kernels.triton.columns import column_sums, hamming
from loki_attn.kernels.triton.device import device_types, interpreted, on, why_not, within_means
from loki_attn.kernels.triton.ranking import Ranking
from loki_attn.kernels.triton.request import (
    Choosers,
    Held,
    batch_of,
    check_lead,
    lead_form,
    mask_of,
    same_dtype,
    served,
    sink_logits_of,
)
from loki_attn.tiles import Tiles
from loki_attn.types import (
    AttentionCall,
    AttentionOutput,
    GroupReduce,
    Lead,
    Reading,
    Selection,
)

__all__ = [
    "Held", "append", "attend", "choose", "column_sums", "device_types", "hamming", "interpreted",
    "score", "step", "step_over", "why_not",
]  # fmt: skip


@within_means
def score(
    query: Tensor, plane: Tensor | Tiles, scales: Tensor | None, call: AttentionCall
) -> Tensor:
    """Logits of every row from its leading coordinates; see `reference.score`."""
    served(query)
    if scales is not None and not isinstance(plane, Tiles):
        raise Unserved("it knows scales of tiles only, and plain rows came with some")
    lead = lead_form(Lead(plane, scales))
    batch, heads, q_len, rank = query.shape
    kv_heads, seq = (
        lead.plane.shape[1],
        plane.length if isinstance(plane, Tiles) else plane.shape[2],
    )
    if q_len != 1 or rank != lead.rank or kv_heads == 0 or heads % kv_heads or seq == 0:
        raise Unserved(f"queries {list(query.shape)} do not fit {kv_heads} KV heads of {seq} rows")
    who = Choosers.of(heads, kv_heads, "max")
    # Scoring reads no rows but the lead's: these only say how many there are.
    rows = lead.plane.new_empty((1,)).expand(batch, kv_heads, seq, 1)
    with on(query):
        asked = ranking.map_queries(query, None, lead, who, call.scaling)
        return ranking.score(
            Ranking(
                held=Held(keys=rows, values=rows), lead=lead, scales=scales, who=who,
                asked=asked, batch=batch, mask=None, call=call,
            )
        )  # fmt: skip


@within_means
def choose(scores: Tensor, counts: Tensor, visible: Tensor, forced: Tensor) -> Selection:
    """The best rows as ascending indices; see `reference.choose`."""
    served(scores)
    shape = scores.shape
    wanted = counts.to(torch.int64).expand(shape[:3]).reshape(-1).contiguous()
    seen, first = visible.expand(shape), forced.expand(shape)
    if seen.stride(3) not in (0, 1) or first.stride(3) not in (0, 1) or 0 in (*shape,):
        raise Unserved("the marks of rows do not lie side by side")
    seen, first = (marks if marks.stride(3) else marks.contiguous() for marks in (seen, first))
    most = max(int(wanted.max()), 1)
    with on(scores):
        ranked = choosing.order(scores, seen, first)
        chosen = choosing.choose(ranked, shape[0] * shape[1], wanted, most)
    return Selection(chosen.indices.view(*shape[:2], most), chosen.counts.view(shape[:2]))


@within_means
def attend(
    query: Tensor, keys: Tensor, values: Tensor, selection: Selection, call: AttentionCall
) -> AttentionOutput:
    """Exact attention to the selected rows; see `reference.attend`."""
    served(query, keys, values)
    same_dtype(query, keys, values)
    held = Held(keys=keys, values=values)
    batch_of(query, held)
    indices = selection.indices.to(torch.int64).contiguous()
    counts = selection.counts.to(torch.int64).contiguous()
    heads, kv_heads = query.shape[1], keys.shape[1]
    who = Choosers.of(heads, kv_heads, "max" if indices.shape[1] == kv_heads else "none")
    if indices.shape[1] != who.count or counts.shape != indices.shape[:2]:
        raise Unserved(f"indices {list(indices.shape)} are not one row for each head")
    sink_logits = sink_logits_of(call, heads, query)
    chosen = Selection(indices, counts)
    with on(query):
        out, log_sums = attending.attend(query, held, chosen, who, call, sink_logits)
    return AttentionOutput(out, log_sums)


def step(  # noqa: PLR0913 - what its three parts take together
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
    """Score, choose and attend without waiting; see `reference.step` and `attention.decode`."""
    mask = None if visible is None else visible[:, 0, 0]
    held = Held(keys=keys, values=values, lengths=reading.held)
    return step_over(held, query, rows_query, lead, reading, how, call, mask)


@within_means
def step_over(
    held: Held,
    query: Tensor,
    rows_query: Tensor,
    lead: Lead,
    reading: Reading,
    how: GroupReduce,
    call: AttentionCall,
    mask: Tensor | None = None,
) -> tuple[Tensor, Selection] | None:
    """The same over rows that may lie in pages and differ in number between batch rows.

    Nothing waits for the device where `reading.counts` is a number or comes with `reading.most`;
    shapes of results and launches depend on capacities only, so a graph can be captured once and
    replayed as the batch rows grow.

    Args:
        held: The rows; `lead` lies in the same pages.
        query: [batch, heads, 1, head_dim], as the model made it.
        rows_query: The same in the space of the stored keys.
        lead: What ranks the rows.
        reading: How much is read; counts are at most the rows held.
        how: How the query heads of a group agree.
        call: Scaling, soft-cap, sink logits.
        mask: bool [batch or 1, capacity]; None where all rows held are visible.

    Returns:
        [batch, heads, 1, value_dim] in the query's dtype and what was read; None where there is no
        fused form.
    """
    if reading.counts is None:
        return None
    keys, values = held.keys, held.values
    served(query, rows_query, keys, values)
    same_dtype(rows_query, keys, values)
    batch = batch_of(rows_query, held)
    if held.capacity == 0:
        raise Unserved("there are no rows")
    check_lead(lead, keys.device)
    mask = mask_of(mask, batch, held)
    # By recency all query heads of a group read the same rows.
    rule: GroupReduce = "max" if lead.plane is None else how
    who = Choosers.of(query.shape[1], keys.shape[1], rule)
    sink_logits = sink_logits_of(call, query.shape[1], query)
    counts, most = reading.counts, reading.most
    if most is None:
        most = int(counts.max()) if isinstance(counts, Tensor) else counts
    with on(keys):
        ranked = _ranked(held, query, lead, reading, how, who, call, mask, sink_logits)
        chosen = choosing.choose(ranked, batch, counts, max(most, 1), held.lengths)
        out, _ = attending.attend(rows_query, held, chosen, who, call, sink_logits)
    return out, chosen


def _ranked(  # noqa: PLR0913 - all that a ranking follows from
    held: Held,
    query: Tensor,
    lead: Lead,
    reading: Reading,
    how: GroupReduce,
    who: Choosers,
    call: AttentionCall,
    mask: Tensor | None,
    sink_logits: Tensor | None,
) -> choosing.Ranked:
    """Give every row a sort key, by its lead or by its age."""
    batch, counts = query.shape[0], reading.counts
    if lead.plane is None and counts is not None:
        return choosing.rank_by_recency(held, mask, batch, who.count, counts, reading.sinks)
    form = lead_form(lead)
    asked = ranking.map_queries(query, lead.query_map, form, who, call.scaling)
    wanted = Ranking(
        held=held, lead=form, scales=lead.scales, who=who, asked=asked, batch=batch, mask=mask,
        call=call,
    )  # fmt: skip
    return ranking.rank(wanted, reading.sinks, reading.recents, sink_logits, how)
