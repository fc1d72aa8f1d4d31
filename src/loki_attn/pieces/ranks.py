"""Ranks: how many coordinates of a key rank its row, as a number or as a share of them."""

from loki_attn.errors import PolicyError


def require_rank(rank: object) -> None:
    """Refuse what is neither a number of coordinates nor a share of head_dim.

    Raises:
        PolicyError: If it is not.
    """
    if type(rank) is int and rank >= 1:
        return
    if not isinstance(rank, float) or not 0 < rank < 1:
        raise PolicyError(
            "rank must be a whole number of coordinates >= 1, or a share of head_dim between 0 "
            f"and 1 as a float, got {rank!r}."
        )


def coordinates(rank: int | float, head_dim: int) -> int:
    """Return a rank in coordinates, at least 1.

    Args:
        rank: A number of coordinates, or a share of `head_dim` as a float.
        head_dim: Elements of a key.

    Raises:
        PolicyError: If a key has fewer.
    """
    found = max(1, round(rank * head_dim)) if isinstance(rank, float) else rank
    if found > head_dim:
        raise PolicyError(f"rank={found} is above head_dim={head_dim}; lower it.")
    return found
