"""Attending: exact attention to the rows that were chosen."""

import torch
from torch import Tensor

from loki_attn.kernels.triton import device, tuning
from loki_attn.kernels.triton.jit_attend import attend_rows, merge
from loki_attn.kernels.triton.request import Choosers, Held, power_of_two
from loki_attn.types import AttentionCall, Selection


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
    cut = tuning.attend_cut(max(dim, value_dim) * query.itemsize)
    busy = device.programs_wanted(query.device) // 2
    splits, split_rows = tuning.splits_of(
        indices.shape[2], rows, cut.block, busy, tuning.MERGED_SPLITS
    )
    out = query.new_empty((batch, heads, 1, value_dim))
    log_sums = query.new_empty((batch, heads, 1), dtype=torch.float32)
    parts, sums = out, log_sums
    if splits > 1:
        parts = query.new_empty((batch * heads, splits, value_dim), dtype=torch.float32)
        sums = query.new_empty((batch * heads, splits), dtype=torch.float32)
    sink = log_sums if sink_logits is None else sink_logits
    padded = power_of_two(max(value_dim, 16))
    attend_rows[(rows, splits)](
        parts, sums, query, query.stride(0), query.stride(1), keys, *keys.stride()[:3],
        values, *values.stride()[:3], keys if table is None else table,
        0 if table is None else table.stride(0), indices, found, sink, indices.shape[2],
        split_rows, call.scaling, call.softcap or 1.0,
        CHOOSERS=who.count, SHARE=who.share, HEADS=who.heads,
        HP=max(power_of_two(who.heads), 16), DIM=dim, DP=power_of_two(max(dim, 16)),
        VALUE_DIM=value_dim, VP=padded, BLOCK=cut.block, PAGE=held.page_rows,
        PRECISION="ieee", CAPPED=call.softcap is not None, SINKS=sink_logits is not None,
        WHOLE=splits == 1, WIDE=device.interpreted(), **cut.launch,
    )  # fmt: skip
    if splits > 1:
        merge[(batch * heads,)](
            out, log_sums, parts, sums, sink, splits, HEADS=heads, SP=tuning.MERGED_SPLITS,
            VALUE_DIM=value_dim, VP=padded, SINKS=sink_logits is not None, **tuning.MERGE.launch,
        )  # fmt: skip
    return out, log_sums
