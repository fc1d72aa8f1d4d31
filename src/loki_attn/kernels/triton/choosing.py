"""Choosing: from sort keys to the rows that are read."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from loki_attn.kernels.triton import device, tuning
from loki_attn.kernels.triton.jit_choose import (
    compact,
    count_visible,
    mark_recent,
    order_scores,
    refine,
)
from loki_attn.kernels.triton.jit_rows import BINS
from loki_attn.kernels.triton.request import Held
from loki_attn.types import Selection


@final
@dataclass(frozen=True)
class Ranked:
    """Rows with the keys that they are sorted by, and where the best of them lie.

    Attributes:
        keys: int32 [rows, capacity].
        bins: int32 [rows, splits, 512].
        kind: What the bins divide.
        split_rows: Rows of a split of full storage.
        unit: Rows that splits are made of.
    """

    keys: Tensor
    bins: Tensor
    kind: str
    split_rows: int
    unit: int


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
    splits, split_rows = tuning.splits_of(capacity, rows, cut.block, busy, tuning.RANK_SPLITS)
    keys = scores.new_empty((rows, capacity), dtype=torch.int32)
    bins = scores.new_empty((rows, splits, BINS.value), dtype=torch.int32)
    order_scores[(rows, splits)](
        keys, bins, scores, *scores.stride()[:2], visible, *visible.stride()[:2],
        forced, *forced.stride()[:2], capacity, split_rows,
        CHOOSERS=choosers, BLOCK=cut.block, **cut.launch,
    )  # fmt: skip
    return Ranked(keys, bins, "exponent", split_rows, cut.block)


def rank_by_recency(
    held: Held, mask: Tensor | None, batch: int, choosers: int, counts: int | Tensor, sinks: int
) -> Ranked:
    """Mark sinks and the last rows, `counts` in all; nothing is read but the mask.

    Args:
        held: The rows.
        mask: bool [batch or 1, capacity], None where all rows are visible.
        batch: Batch rows.
        choosers: Choosers of a batch row, who all read the same.
        counts: How many rows: a number, or int64 [batch or 1] on the device.
        sinks: First visible rows among them.
    """
    rows, capacity, lengths = batch * choosers, held.capacity, held.lengths
    cut, like = tuning.CHOOSE, held.keys
    busy = device.programs_wanted(like.device)
    splits, split_rows = tuning.splits_of(capacity, rows, cut.block, busy, tuning.RANK_SPLITS)
    counted = isinstance(counts, Tensor)
    given, wanted = (counts, 0) if isinstance(counts, Tensor) else (like, counts)
    seen = visible_in_splits(held, mask, batch, (splits, split_rows, cut.block), like)
    keys = like.new_empty((rows, capacity), dtype=torch.int32)
    bins = like.new_empty((rows, splits, BINS.value), dtype=torch.int32)
    mark_recent[(rows, splits)](
        keys, bins, seen, row_stride(seen), given, row_stride(given),
        like if lengths is None else lengths, 0 if lengths is None else row_stride(lengths),
        like if mask is None else mask, mask_stride(mask),
        capacity, split_rows, sinks, wanted,
        CHOOSERS=choosers, BLOCK=cut.block, SP=tuning.RANK_SPLITS, MASKED=mask is not None,
        RAGGED=lengths is not None, COUNTED=counted, **cut.launch,
    )  # fmt: skip
    return Ranked(keys, bins, "exponent", split_rows, cut.block)


def choose(
    ranked: Ranked, batch: int, counts: int | Tensor, most: int, lengths: Tensor | None = None
) -> Selection:
    """Take the best rows of each chooser.

    Args:
        ranked: The rows with their keys.
        batch: Batch rows.
        counts: How many: a number, or int64 [batch or 1, ...] on the device.
        most: A bound on them.
        lengths: int [batch or 1], rows of each batch row; None where all count.
    """
    keys, bins = ranked.keys, ranked.bins
    rows, capacity = keys.shape
    choosers = rows // batch
    listed = keys.new_empty(rows)
    list_rows, list_keys = torch.empty_like(keys), torch.empty_like(keys)
    counted = isinstance(counts, Tensor)
    given = counts if isinstance(counts, Tensor) else keys
    stride = row_stride(given)
    wanted = 0 if isinstance(counts, Tensor) else counts
    compact[(rows, bins.shape[1])](
        list_rows, list_keys, listed, keys, bins, given, stride, wanted,
        keys if lengths is None else lengths, 0 if lengths is None else row_stride(lengths),
        capacity, ranked.split_rows,
        CHOOSERS=choosers, KIND=ranked.kind, BLOCK=tuning.CHOOSE.block, UNIT=ranked.unit,
        COUNTED=counted, RAGGED=lengths is not None, **tuning.CHOOSE.launch,
    )  # fmt: skip
    indices = keys.new_empty((batch, choosers, most), dtype=torch.int64)
    found = keys.new_empty((batch, choosers), dtype=torch.int64)
    refine[(rows,)](
        indices, found, list_rows, list_keys, listed, given, stride, wanted, capacity, most,
        CHOOSERS=choosers, BLOCK=tuning.REFINE.block, COUNTED=counted,
        **tuning.REFINE.launch,
    )  # fmt: skip
    return Selection(indices, found)


def visible_in_splits(
    held: Held, mask: Tensor | None, batch: int, cut: tuple[int, int, int], like: Tensor
) -> Tensor:
    """How many rows of each split are visible: int32 [batch or 1, splits].

    Args:
        held: The rows.
        mask: bool [batch or 1, capacity]; where there is none nobody reads the counts, and `like`
            stands for them.
        batch: Batch rows.
        cut: Splits, rows of one of full storage, and rows that they are made of.
        like: On the device.
    """
    if mask is None:
        return like
    lengths, (splits, split_rows, unit) = held.lengths, cut
    shared = mask.shape[0] == 1 and (lengths is None or lengths.shape[0] == 1)
    masks = 1 if shared else batch
    seen = mask.new_empty((masks, splits), dtype=torch.int32)
    count_visible[(masks, splits)](
        seen, mask, mask_stride(mask), seen if lengths is None else lengths,
        0 if lengths is None else row_stride(lengths), held.capacity, split_rows,
        BLOCK=tuning.CHOOSE.block, UNIT=unit, RAGGED=lengths is not None,
        **tuning.CHOOSE.launch,
    )  # fmt: skip
    return seen


def mask_stride(mask: Tensor | None) -> int:
    """From one batch row of a mask to the next; 0 where all share one."""
    return 0 if mask is None or mask.shape[0] == 1 else mask.stride(0)


def row_stride(tensor: Tensor) -> int:
    """From one batch row to the next; 0 where all share one."""
    return 0 if tensor.shape[0] == 1 else tensor.stride(0)
