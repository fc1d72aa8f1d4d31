"""Recents: a share of what stays is for the last rows, whatever their scores are."""

from torch import Tensor


def with_recents(protected: Tensor, counts: Tensor, valid: Tensor, share: float) -> Tensor:
    """Protect the last rows besides: a share of those that stay, rounded down.

    Args:
        protected: bool [batch, kv_heads, length]; they take their room first.
        counts: int64 [batch, kv_heads]: how many rows stay, protected ones included.
        valid: bool [batch, kv_heads, length]: rows that are no padding.
        share: In [0, 1]; 0 protects no row more.

    Returns:
        bool [batch, kv_heads, length].
    """
    room = counts - (protected & valid).sum(-1)
    recents = (counts.double() * share).long().minimum(room)
    from_end = valid.flip(-1).cumsum(-1).flip(-1)
    return protected | (valid & (from_end <= recents[..., None]))
