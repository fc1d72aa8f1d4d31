"""Reuse: read the rows of an earlier choice again while the queries hardly turn.

Neighbouring queries ask for much the same rows (LouisKV, arXiv 2510.11292, section 4.1). Usable
with any selector: a step whose queries have a high enough mean cosine with those of the last choice
skips the scoring, and reads the rows of that choice and the ones that came since. Every batch row
decides for itself. What is remembered names rows by their index, so it ends when rows move.
"""

from dataclasses import dataclass
from typing import Final, final

import torch
from torch import Tensor
from torch.nn import functional

from loki_attn.cache import LayerCache
from loki_attn.kernels import ops
from loki_attn.types import Selection

_QUERY: Final = "reuse_query"
_ROWS: Final = "reuse_rows"


@final
@dataclass(frozen=True, eq=False)
class Again:
    """What batch rows may read again.

    Attributes:
        rows: bool [batch]: batch rows that read again; the others choose.
        marks: bool [batch, kv_heads or heads, length]: what they read; of no meaning for others.
    """

    rows: Tensor
    marks: Tensor

    @property
    def for_all(self) -> bool:
        """Whether no batch row chooses."""
        return bool(self.rows.all())

    @property
    def selection(self) -> Selection:
        """All of it as a selection."""
        return _selection(self.marks)

    def merged(self, chosen: Selection) -> Selection:
        """Return what is read where the batch rows that do not read again read `chosen`."""
        marks = _marks(chosen, self.marks.shape[2])
        return _selection(torch.where(self.rows[:, None, None], self.marks, marks))

    def kept(self, mine: Tensor, others: Tensor) -> Tensor:
        """Take the batch rows that read again from `mine`, the others from `others`."""
        return torch.where(self.rows.view(-1, *[1] * (mine.ndim - 1)), mine, others)


def last_choice(query: Tensor, cache: LayerCache, above: float, visible: Tensor) -> Again | None:
    """Return what may be read again, or None where every batch row must choose.

    Args:
        query: [batch, heads, 1, head_dim].
        cache: The rows; `cache.chosen` holds the last choice.
        above: Mean cosine over the heads that a batch row needs. Equal queries always have it, up
            to 1; above 1 nobody has.
        visible: bool [batch or 1, kv_heads or 1, 1, length].
    """
    held = cache.chosen.get(_QUERY)
    if held is None:
        return None
    now = query.reshape(held.shape)
    cosine = functional.cosine_similarity(now.float(), held.float(), dim=-1)
    same = (now == held).flatten(1).all(1)
    # A cosine of equal queries may miss 1 by rounding; that of NaN is not above anything.
    mean = cosine.flatten(1).mean(1).clamp(-1.0, 1.0).masked_fill(same, 1.0)
    rows = mean >= above
    if not bool(rows.any()):
        return None
    marks = cache.chosen[_ROWS]  # [batch, kv_heads, choosers per KV head, rows held then]
    new = marks.new_ones(*marks.shape[:3], cache.length - marks.shape[3])
    return Again(rows, (torch.cat([marks, new], 3) & visible).flatten(1, 2))


def remember(query: Tensor, cache: LayerCache, selection: Selection, again: Again | None) -> None:
    """Remember a choice and its queries, until the rows move.

    Args:
        query: [batch, heads, 1, head_dim].
        cache: The rows.
        selection: What the step reads.
        again: Which batch rows read an earlier choice again: they go on comparing with its queries.
    """
    kv_heads, length = cache.keys.shape[1], cache.length
    asked = query.reshape(query.shape[0], kv_heads, -1, *query.shape[2:]).clone()
    if again is not None:
        asked = torch.where(again.rows.view(-1, 1, 1, 1, 1), cache.chosen[_QUERY], asked)
    marks = _marks(selection, length)
    cache.chosen[_QUERY] = asked
    cache.chosen[_ROWS] = marks.reshape(marks.shape[0], kv_heads, -1, length)


def _marks(selection: Selection, length: int) -> Tensor:
    """A selection as bool [batch, choosers, length]."""
    indices = selection.indices
    marks = indices.new_zeros((*indices.shape[:2], length + 1), dtype=torch.bool)
    marks.scatter_(2, indices.masked_fill(indices < 0, length), value=True)
    return marks[..., :length]


def _selection(marks: Tensor) -> Selection:
    """The marked rows of bool [batch, choosers, length] as ascending indices."""
    every = marks[:, :, None]
    return ops().choose(every.float(), every.sum(-1), every, torch.zeros_like(every[:1, :1]))
