"""Cutting what is too long for a model: the middle goes, as the benchmark has it."""

from collections.abc import Sequence

from loki_attn.errors import InputError


def cut_middle(context_ids: Sequence[int], limit: int) -> list[int]:
    """Keep the first and the last half of a context that is too long.

    Args:
        context_ids: Its tokens.
        limit: How many may stay, in tokens; of an odd number, the end gets the larger half.

    Returns:
        The tokens that stay, in order; all of them where they fit.

    Raises:
        InputError: If nothing may stay.

    Source: arXiv 2308.14508; unlike there, only the context is cut, never the question.
    """
    if limit < 1:
        raise InputError(
            f"No room for a context: {limit} tokens are left for it after the question and the "
            "answer; take a model with a longer context."
        )
    ids = list(context_ids)
    if len(ids) <= limit:
        return ids
    head = limit // 2
    return ids[:head] + ids[len(ids) - (limit - head) :]
