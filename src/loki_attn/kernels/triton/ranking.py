"""Ranking: the query mapped, the lead read, and a sort key for every row."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from loki_attn.kernels.triton import device, tuning
from loki_attn.kernels.triton.choosing import Ranked, mask_stride, row_stride, visible_in_splits
from loki_attn.kernels.triton.jit_query import map_query
from loki_attn.kernels.triton.jit_rows import BINS
from loki_attn.kernels.triton.jit_score import rank_rows, score_rows, sum_weights
from loki_attn.kernels.triton.request import Choosers, Held, LeadForm, power_of_two
from loki_attn.types import AttentionCall, GroupReduce


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
        DIM=dim, RANK=lead.rank, RP=lead.padded_rank,
        KIND=lead.kind, MAPPED=query_map is not None, WORDS=words,
        PRECISION=device.mapping_precision(), STEP=tuning.map_block(lead.padded_rank),
        **tuning.MAP.launch,
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
        row_bytes = self.lead.padded_rank * max(self.lead.plane.itemsize, self.asked.words.itemsize)
        cut = tuning.score_cut(self.lead.kind, self.asked.heads, row_bytes)
        busy = device.programs_wanted(self.lead.plane.device)
        capacity = self.held.capacity
        splits = tuning.splits_of(capacity, self.rows, cut.block, busy, tuning.RANK_SPLITS)
        return cut, *splits

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
            some if lengths is None else lengths, 0 if lengths is None else row_stride(lengths),
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
            **cut.launch,
        }  # fmt: skip


def rank(
    ranking: Ranking, sinks: int, recents: int, sink_logits: Tensor | None, how: GroupReduce
) -> Ranked:
    """Give every row a sort key.

    Args:
        ranking: What is ranked.
        sinks: First visible rows that come before all others.
        recents: Last visible rows that do.
        sink_logits: float32 [heads], in the denominator of the weights; or None.
        how: What a row's score is made of.
    """
    # One head has nothing to agree on: its logits rank as its weights would.
    weights = how.startswith("softmax") and ranking.who.heads > 1
    held, rows, mask = ranking.held, ranking.rows, ranking.mask
    lengths = held.lengths
    cut, splits, split_rows = ranking.cut()
    like, capacity = ranking.asked.factors, held.capacity
    constants = ranking.constants(cut) | {
        "PAGE": held.page_rows, "MASKED": mask is not None, "RAGGED": lengths is not None,
    }  # fmt: skip
    seen = visible_in_splits(held, mask, ranking.batch, (splits, split_rows, cut.block), like)
    softcap = ranking.call.softcap or 1.0
    stats = like.new_empty((rows, splits, 2, ranking.asked.heads))
    if weights:
        sum_weights[(rows, splits)](
            stats, *ranking.tensors(), *ranking.places(), capacity, split_rows, softcap, **constants
        )
    keys = like.new_empty((rows, capacity), dtype=torch.int32)
    bins = like.new_empty((rows, splits, BINS.value), dtype=torch.int32)
    rank_rows[(rows, splits)](
        keys, bins, stats, seen, row_stride(seen), *ranking.tensors(), *ranking.places(),
        like if sink_logits is None else sink_logits, capacity, split_rows, sinks, recents, softcap,
        WEIGHTS=weights, LARGEST=not how.endswith("sum"), SP=tuning.RANK_SPLITS,
        SINKS=sink_logits is not None, **constants,
    )  # fmt: skip
    return Ranked(keys, bins, "weights" if weights else "logits", split_rows, cut.block)


def score(ranking: Ranking) -> Tensor:
    """The logits of every row, float32 [batch, heads, 1, capacity]."""
    cut, splits, split_rows = ranking.cut()
    heads = ranking.who.count * ranking.who.heads
    capacity = ranking.held.capacity
    out = ranking.asked.factors.new_empty((ranking.batch, heads, 1, capacity))
    score_rows[(ranking.rows, splits)](
        out, *ranking.tensors(), capacity, split_rows, ranking.call.softcap or 1.0,
        **ranking.constants(cut),
    )  # fmt: skip
    return out
