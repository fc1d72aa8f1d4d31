"""Pages: what a query may know of consecutive rows that are judged together."""

import torch
from torch import Tensor


def whole_pages(visible: Tensor, size: int) -> Tensor:
    """Count the pages that end at or before the last row that each query sees.

    The page behind them may be summarised with rows that the query must not see, so a method reads
    what the query sees of it, whatever its score is.

    Args:
        visible: bool [..., q_len, length].
        size: Rows per page.

    Returns:
        int64 [..., q_len, 1].
    """
    rows = torch.arange(1, visible.shape[-1] + 1, device=visible.device)
    return (rows * visible).amax(-1, keepdim=True) // size


def behind(pages: Tensor, size: int, length: int) -> Tensor:
    """Mark the rows behind the first `pages` pages, int64 [..., 1]: bool [..., length]."""
    return torch.arange(length, device=pages.device) >= pages * size


def to_rows(scores: Tensor, size: int, length: int) -> Tensor:
    """Give every row of a page its score: [..., pages] -> [..., length]."""
    return scores.repeat_interleave(size, -1)[..., :length]


def finite_rows(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Set rows with an element that is not finite to 0: padding may hold anything.

    Args:
        keys: [..., rows, head_dim].

    Returns:
        float32 or wider of the same shape, and bool [..., rows]: the rows that are finite.
    """
    real = keys.isfinite().all(-1)
    wide = keys.to(torch.promote_types(keys.dtype, torch.float32))
    return wide.masked_fill(~real[..., None], 0.0), real


def mean_row(rows: Tensor, real: Tensor) -> Tensor:
    """The mean of the real rows [..., rows, head_dim], bool [..., rows]: [..., head_dim]."""
    count = real.sum(-1, keepdim=True).clamp(min=1)
    return rows.sum(-2) / count
