"""From tensors to launches: what each stage of a step writes, and the kernels that write it."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from loki_attn.kernels.triton import device, tuning
from loki_attn.kernels.triton.jit_attend import attend_rows, merge
from loki_attn.kernels.triton.jit_choose import compact, find_edges, order_scores, refine
from loki_attn.kernels.triton.jit_query import map_query
from loki_attn.kernels.triton.jit_rows import BINS
from loki_attn.kernels.triton.jit_score import rank_rows, score_rows, sum_weights
from loki_attn.kernels.triton.request import Choosers, Held, LeadForm, power_of_two
from loki_attn.types import AttentionCall, Selection


@final
@dataclass(frozen=True)
class Asked:
    """The query in the coordinates of the lead: what `map_query` wrote.

    Attributes:
        words: int32 [rows, words, padded heads] of codes, or floats [rows, rank, padded heads].
        factors: float32 [rows, 2, padded heads].
        heads: Padded heads.
    """

    words: Tensor
    factors: Tensor
    heads: int


@final
@dataclass(frozen=True)
class Ranked:
    """Rows with the keys that they are sorted by, and where the best of them lie.

    Attributes:
        keys: int32 [rows, capacity].
        bins: int32 [rows, splits, 512].
        kind: What the bins divide.
        split_rows: Rows of a split.
    """

    keys: Tensor
    bins: Tensor
    kind: str
    split_rows: int


def map_queries(
    query: Tensor, query_map: Tensor | None, lead: LeadForm, who: Choosers, scaling: float
) -> Asked:
    """Map the query and round it as the plane is.

    Args:
        query: [batch, heads, 1, head_dim or rank].
        query_map: float32 [kv_heads, head_dim, rank], contiguous; None where the first coordinates
            of the query rank the rows.
        lead: The lead.
        who: Who chooses.
        scaling: Factor on products.
    """
    batch, _, _, dim = query.shape
    rows = batch * who.count
    plain = lead.kind == "rows"
    heads = max(power_of_two(who.heads), 16) if plain else power_of_two(who.heads)
    coded = lead.kind in ("int8", "int4")
    words = lead.lines * (2 if lead.kind == "int4" else 1)
    # An unmapped query meets plain rows of its own dtype in that dtype: the products are exact.
    exact = plain and query_map is None and query.dtype == lead.plane.dtype
    size, dtype = (words, torch.int32) if coded else (lead.rank, torch.float32)
    asked = query.new_empty((rows, size, heads), dtype=query.dtype if exact else dtype)
    factors = query.new_empty((rows, 2, heads), dtype=torch.float32)
    map_query[(rows,)](
        asked, factors, query, query.stride(0), query.stride(1),
        factors if query_map is None else query_map, scaling,
        CHOOSERS=who.count, SHARE=who.share, HEADS=who.heads, GP=heads, HP=max(heads, 16),
        DIM=dim, DP=power_of_two(max(dim, 16)), RANK=lead.rank, RP=lead.padded_rank,
        KIND=lead.kind, MAPPED=query_map is not None, WORDS=words,
        PRECISION=device.mapping_precision(), num_warps=4,
    )  # fmt: skip
    return Asked(asked, factors, heads)


@final
@dataclass(frozen=True, kw_only=True)
class Ranking:
    """A ranking of the rows of one step, in the kernels' terms.

    Attributes:
        held: The rows.
        lead: What ranks them.
        scales: float16 [batch or pages, kv_heads, rows], for codes; else None.
        who: Who chooses.
        asked: The mapped query.
        batch: Batch rows.
        mask: bool [batch or 1, capacity], None where all rows are visible.
        call: Scaling, soft-cap.
    """

    held: Held
    lead: LeadForm
    scales: Tensor | None
    who: Choosers
    asked: Asked
    batch: int
    mask: Tensor | None
    call: AttentionCall

    @property
    def rows(self) -> int:
        """Choosers of all batch rows."""
        return self.batch * self.who.count

    def cut(self) -> tuple[tuning.Cut, int, int]:
        """How the lead is cut: block, splits, rows of a split."""
        cut = tuning.score_cut(self.lead.kind, self.asked.heads)
        busy = device.programs_wanted(self.lead.plane.device)
        return cut, *tuning.splits_of(self.held.capacity, self.rows, cut.block, busy)

    def tensors(self) -> tuple[object, ...]:
        """The arguments that scoring kernels share: lead, scales, query."""
        scales = self.lead.plane if self.scales is None else self.scales
        strides = (0, 0) if self.scales is None else (scales.stride(0), scales.stride(1))
        return (
            self.lead.plane, *self.lead.strides, scales, *strides,
            self.asked.words, self.asked.factors,
        )  # fmt: skip

    def places(self) -> tuple[object, ...]:
        """The arguments that say which rows there are: pages, lengths, mask."""
        table, lengths, mask = self.held.pages, self.held.lengths, self.mask
        some = self.asked.factors  # stands for what is not there; never read
        return (
            some if table is None else table, 0 if table is None else table.stride(0),
            some if lengths is None else lengths,
            some if mask is None else mask, mask_stride(mask),
        )  # fmt: skip

    def constants(self, cut: tuning.Cut) -> dict[str, object]:
        """The constants that scoring kernels share."""
        who, lead = self.who, self.lead
        return {
            "CHOOSERS": who.count, "SHARE": who.share, "HEADS": who.heads, "GP": self.asked.heads,
            "KIND": lead.kind, "LINES": lead.lines, "RANK": lead.rank, "RP": lead.padded_rank,
            "BLOCK": cut.block, "PRECISION": device.mapping_precision(),
            "ASM": not device.interpreted(), "CAPPED": self.call.softcap is not None,
            "num_warps": cut.warps, "num_stages": cut.stages,
        }  # fmt: skip


def mask_stride(mask: Tensor | None) -> int:
    """From one batch row of a mask to the next; 0 where all share one."""
    return 0 if mask is None or mask.shape[0] == 1 else mask.stride(0)


def rank(
    ranking: Ranking, sinks: int, recents: int, sink_logits: Tensor | None, *, weights: bool
) -> Ranked:
    """Give every row a sort key.

    Args:
        ranking: What is ranked.
        sinks: First visible rows that come before all others.
        recents: Last visible rows that do.
        sink_logits: float32 [heads], in the denominator of the weights; or None.
        weights: Whether a row's score is the sum of the heads' soft-max weights, rather than the
            largest of their logits.
    """
    held, rows, mask = ranking.held, ranking.rows, ranking.mask
    cut, splits, split_rows = ranking.cut()
    like, capacity = ranking.asked.factors, held.capacity
    constants = ranking.constants(cut) | {
        "PAGE": held.page_rows, "MASKED": mask is not None, "RAGGED": held.lengths is not None,
    }  # fmt: skip
    edges = like.new_empty((ranking.batch, 2), dtype=torch.int32)
    if mask is not None:
        find_edges[(ranking.batch,)](
            edges, mask, mask_stride(mask), capacity, sinks, recents,
            BLOCK=tuning.EDGES.block, num_warps=tuning.EDGES.warps,
        )  # fmt: skip
    softcap = ranking.call.softcap or 1.0
    stats = like.new_empty((rows, splits, 2, ranking.asked.heads))
    if weights:
        sum_weights[(splits, rows)](
            stats, *ranking.tensors(), *ranking.places(), capacity, split_rows, softcap, **constants
        )
    keys = like.new_empty((rows, capacity), dtype=torch.int32)
    bins = like.new_empty((rows, splits, BINS.value), dtype=torch.int32)
    rank_rows[(splits, rows)](
        keys, bins, stats, edges, *ranking.tensors(), *ranking.places(),
        like if sink_logits is None else sink_logits, capacity, split_rows, sinks, recents, softcap,
        WEIGHTS=weights, SP=tuning.MOST_SPLITS, SINKS=sink_logits is not None, **constants,
    )  # fmt: skip
    return Ranked(keys, bins, "weights" if weights else "logits", split_rows)


def score(ranking: Ranking) -> Tensor:
    """The logits of every row, float32 [batch, heads, 1, capacity]."""
    cut, splits, split_rows = ranking.cut()
    heads = ranking.who.count * ranking.who.heads
    capacity = ranking.held.capacity
    out = ranking.asked.factors.new_empty((ranking.batch, heads, 1, capacity))
    score_rows[(splits, ranking.rows)](
        out, *ranking.tensors(), capacity, split_rows, ranking.call.softcap or 1.0,
        **ranking.constants(cut),
    )  # fmt: skip
    return out


def order(scores: Tensor, visible: Tensor, forced: Tensor) -> Ranked:
    """Give every row a sort key by scores that are there already.

    Args:
        scores: float [batch, choosers, 1, rows].
        visible: bool, expanded to the same shape.
        forced: bool, expanded to the same shape.
    """
    batch, choosers, _, capacity = scores.shape
    rows, cut = batch * choosers, tuning.CHOOSE
    busy = device.programs_wanted(scores.device)
    splits, split_rows = tuning.splits_of(capacity, rows, cut.block, busy)
    keys = scores.new_empty((rows, capacity), dtype=torch.int32)
    bins = scores.new_empty((rows, splits, BINS.value), dtype=torch.int32)
    order_scores[(splits, rows)](
        keys, bins, scores, *scores.stride()[:2], visible, *visible.stride()[:2],
        forced, *forced.stride()[:2], capacity, split_rows,
        CHOOSERS=choosers, BLOCK=cut.block, num_warps=cut.warps,
    )  # fmt: skip
    return Ranked(keys, bins, "exponent", split_rows)


def choose(
    ranked: Ranked, batch: int, counts: int | Tensor, most: int, lengths: Tensor | None = None
) -> Selection:
    """Take the best rows of each chooser.

    Args:
        ranked: The rows with their keys.
        batch: Batch rows.
        counts: How many: a number, or int64 [batch or 1, ...] on the device.
        most: A bound on them.
        lengths: int32 [batch], rows of each batch row; None where all count.
    """
    keys, bins = ranked.keys, ranked.bins
    rows, capacity = keys.shape
    choosers = rows // batch
    listed = keys.new_empty(rows)
    list_rows, list_keys = torch.empty_like(keys), torch.empty_like(keys)
    counted = isinstance(counts, Tensor)
    given = counts if isinstance(counts, Tensor) else keys
    stride = given.stride(0) if counted and given.shape[0] > 1 else 0
    wanted = 0 if isinstance(counts, Tensor) else counts
    compact[(bins.shape[1], rows)](
        list_rows, list_keys, listed, keys, bins, given, stride, wanted,
        keys if lengths is None else lengths, capacity, ranked.split_rows,
        CHOOSERS=choosers, KIND=ranked.kind, BLOCK=tuning.CHOOSE.block, COUNTED=counted,
        RAGGED=lengths is not None, num_warps=tuning.CHOOSE.warps,
    )  # fmt: skip
    indices = keys.new_empty((batch, choosers, most), dtype=torch.int64)
    found = keys.new_empty((batch, choosers), dtype=torch.int64)
    refine[(rows,)](
        indices, found, list_rows, list_keys, listed, given, stride, wanted, capacity, most,
        CHOOSERS=choosers, BLOCK=tuning.REFINE.block, COUNTED=counted,
        num_warps=tuning.REFINE.warps,
    )  # fmt: skip
    return Selection(indices, found)


def attend(
    query: Tensor, held: Held, selection: Selection, who: Choosers, call: AttentionCall,
    sink_logits: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attend to the rows that were chosen.

    Args:
        query: [batch, heads, 1, head_dim], in the space of the stored keys.
        held: The rows.
        selection: One index row per chooser.
        who: Who chose.
        call: Scaling and soft-cap.
        sink_logits: float32 [heads], or None.

    Returns:
        [batch, heads, 1, value_dim] in the query's dtype, float32 log-sum-exp [batch, heads, 1].
    """
    batch, heads, _, dim = query.shape
    keys, values, table = held.keys, held.values, held.pages
    value_dim, rows = values.shape[3], batch * who.count
    indices, found = selection.indices, selection.counts
    cut = tuning.attend_cut(max(dim, value_dim))
    busy = device.programs_wanted(query.device) // 2
    splits, split_rows = tuning.splits_of(indices.shape[2], rows, cut.block, busy)
    out = query.new_empty((batch, heads, 1, value_dim))
    log_sums = query.new_empty((batch, heads, 1), dtype=torch.float32)
    parts, sums = out, log_sums
    if splits > 1:
        parts = query.new_empty((batch * heads, splits, value_dim), dtype=torch.float32)
        sums = query.new_empty((batch * heads, splits), dtype=torch.float32)
    sink = log_sums if sink_logits is None else sink_logits
    padded = power_of_two(max(value_dim, 16))
    attend_rows[(splits, rows)](
        parts, sums, query, query.stride(0), query.stride(1), keys, *keys.stride()[:3],
        values, *values.stride()[:3], keys if table is None else table,
        0 if table is None else table.stride(0), indices, found, sink, indices.shape[2],
        split_rows, call.scaling, call.softcap or 1.0,
        CHOOSERS=who.count, SHARE=who.share, HEADS=who.heads,
        HP=max(power_of_two(who.heads), 16), DIM=dim, DP=power_of_two(max(dim, 16)),
        VALUE_DIM=value_dim, VP=padded, BLOCK=cut.block, PAGE=held.page_rows,
        PRECISION="ieee", CAPPED=call.softcap is not None, SINKS=sink_logits is not None,
        WHOLE=splits == 1, WIDE=device.interpreted(), num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip
    if splits > 1:
        merge[(batch * heads,)](
            out, log_sums, parts, sums, sink, splits, HEADS=heads, SP=tuning.MOST_SPLITS,
            VALUE_DIM=value_dim, VP=padded, SINKS=sink_logits is not None, num_warps=4,
        )  # fmt: skip
    return out, log_sums
