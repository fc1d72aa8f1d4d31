"""GUI-KV: SnapKV for prompts with screenshots, of which the last one matters most.

Paper: GUI-KV: Efficient GUI Agents via KV Cache with Spatio-Temporal Awareness
arXiv: 2510.00536
What it does: scores rows as SnapKV does with a window of 8; adds to rows of the last screenshot a
    soft-max of their standardised norms; puts the rows of older screenshots behind all others whose
    keys lie closest to the subspace of the last screenshot's keys, for they show the same again.
What we do differently: the subspace is that of the leading principal directions (the unpivoted QR
    of the reference takes the first `rank` tokens instead), of no more dimensions than the keys
    really have. Hidden states are not at hand: the norm is that of a token's values over all KV
    heads, or of its keys. The share of older rows that count as redundant is a field; its default
    is ours. Keys are as stored, after RoPE. Rows that are not in a screenshot keep SnapKV's score;
    without spans the method is SnapKV.
Bytes read per decode step: per KV head, capacity * (head_dim + value_dim) * b.
State per token: none; the last `window` queries of a layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Final, Literal, final, get_args

import torch
from torch import Tensor

from loki_attn.cache import LayerCache
from loki_attn.errors import PolicyError, unknown_name
from loki_attn.evict.base import Attended, Evict, Evictor, Needs, Place
from loki_attn.pieces.packing import real_rows, without_padding
from loki_attn.pieces.prefix_scores import prefix_scores
from loki_attn.pieces.queries import remember_queries
from loki_attn.pieces.reduction import Reduction
from loki_attn.types import AttentionCall

Norm = Literal["value", "key"]
"""What stands for the hidden state of a token: all its values, or all its keys."""

PRESETS: Final = {
    "gui-kv": {
        "select": {"method": "dense"},
        "evict": {"method": "gui_kv"},
        "keep": {"capacity": 2048},
    }
}
_START: Final = "prompt_start"
# Directions whose squared length is this far below the longest one's are rounding.
_RANK_TOLERANCE: Final = 1e-10
_BEHIND_ALL: Final = -1.0


@final
@dataclass(frozen=True, kw_only=True)
class GuiKV(Evict):
    """Score by the last queries' attention, and by what the last screenshot shows.

    Attributes:
        spans: Screenshots as (start, end) positions of tokens in the prompt, padding not counted,
            ascending and disjoint; the end is not included.
        window: Last queries that judge, whose rows stay.
        kernel: Neighbours that are pooled, an odd number; 1 pools nothing.
        pooling: "avg" or "max".
        reduce: How the query heads of a group agree: "mean", "max" or "sum".
        alpha: Weight of the norms on the last screenshot.
        temperature: Of their soft-max.
        norm: Whose norm it is.
        rank: Dimensions of the last screenshot's subspace.
        redundant: Share of the older screenshots' rows that counts as seen again, in [0, 1].
    """

    method: ClassVar[str] = "gui_kv"
    needs: ClassVar[Needs] = "attention of the last queries"
    spans: tuple[tuple[int, int], ...] = ()
    window: int = 8
    kernel: int = 5
    pooling: Literal["avg", "max"] = "avg"
    reduce: Reduction = "mean"
    alpha: float = 2.0
    temperature: float = 3.5
    norm: Norm = "value"
    rank: int = 32
    redundant: float = 0.5

    def __post_init__(self) -> None:
        """Refuse spans that are none, and settings that mean nothing."""
        _check_spans(self.spans)
        if self.window < 1:
            raise PolicyError(f"GUI-KV needs a window of at least one query, got {self.window}.")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise PolicyError(f"GUI-KV pools over an odd number of rows, got {self.kernel}.")
        if self.temperature <= 0:
            raise PolicyError(f"temperature divides norms, got {self.temperature}; give more.")
        if self.alpha < 0:
            raise PolicyError(f"alpha weighs norms, got {self.alpha}; give 0 or more.")
        if self.norm not in get_args(Norm):
            raise unknown_name("norm", self.norm, get_args(Norm))
        if self.rank < 1:
            raise PolicyError(f"rank counts directions from 1, got {self.rank}.")
        if not 0 <= self.redundant <= 1:
            raise PolicyError(f"redundant is a share in [0, 1], got {self.redundant}.")

    def bind(self, place: Place) -> Evictor:
        """Bind to a layer; nothing about it matters."""
        del place
        return _GuiKV(self)


@final
class _GuiKV(Evictor):
    def __init__(self, spec: GuiKV) -> None:
        self._spec = spec

    def observe(self, cache: LayerCache, seen: Attended) -> None:
        """Remember the last queries, and where every prompt starts."""
        remember_queries(cache, seen, self._spec.window)
        if self._spec.spans and _START not in cache.memory:
            cache.memory[_START] = _first_position(cache, seen.valid)

    def scores(self, cache: LayerCache, call: AttentionCall, valid: Tensor | None) -> Tensor:
        """SnapKV's score, with norms on the last screenshot and without what it repeats."""
        spec = self._spec
        scores = prefix_scores(
            cache,
            call,
            valid,
            window=spec.window,
            kernel=spec.kernel,
            pooling=spec.pooling,
            reduce=spec.reduce,
        )
        if not spec.spans:
            return scores
        newest, older = self._screenshots(cache, valid)
        scores = scores + spec.alpha * self._saliency(cache, newest)
        return scores.masked_fill(self._repeated(cache, newest, older), _BEHIND_ALL)

    def _screenshots(self, cache: LayerCache, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        """Rows of the last screenshot that is held, and of older ones."""
        places = cache.positions.long() - cache.memory[_START][..., None]
        starts, ends = torch.tensor(self._spec.spans, device=places.device).T.contiguous()
        number = torch.bucketize(places, starts, right=True) - 1
        inside = (number >= 0) & (places < ends[number.clamp(min=0)])
        inside = inside & real_rows(valid, places.shape, places.device)
        last = number.masked_fill(~inside, -1).amax(-1, keepdim=True)
        return inside & (number == last), inside & (number < last)

    def _saliency(self, cache: LayerCache, newest: Tensor) -> Tensor:
        """Soft-max of the standardised norms over the last screenshot; 0 elsewhere."""
        rows = cache.values if self._spec.norm == "value" else cache.keys
        norms: Tensor = torch.linalg.vector_norm(rows, dim=(1, 3), dtype=torch.float32)[:, None]
        norms = torch.where(newest, norms, 0.0)
        count = newest.sum(-1, keepdim=True).clamp(min=1)
        apart = torch.where(newest, norms - norms.sum(-1, keepdim=True) / count, 0.0)
        spread = (apart.square().sum(-1, keepdim=True) / count).sqrt()
        standard = apart / spread.clamp(min=torch.finfo(spread.dtype).tiny)
        logits = (standard / self._spec.temperature).masked_fill(~newest, float("-inf"))
        # A prompt without a screenshot has nothing to share out.
        shares: Tensor = logits.softmax(-1).masked_fill(~newest, 0.0)
        return shares

    def _repeated(self, cache: LayerCache, newest: Tensor, older: Tensor) -> Tensor:
        """The share of older screenshots' rows that lies closest to the last one's subspace."""
        if self._spec.redundant == 0 or not bool(older.any()):
            return torch.zeros_like(older)
        basis = _leading_directions(without_padding(cache.keys, newest), self._spec.rank)
        keys = without_padding(cache.keys, older)
        rest = torch.linalg.vector_norm(keys - (keys @ basis) @ basis.mT, dim=-1)
        order = rest.masked_fill(~older, float("inf")).argsort(dim=-1, stable=True)
        amount = (older.sum(-1, keepdim=True) * self._spec.redundant).long()
        first = torch.arange(older.shape[-1], device=older.device) < amount
        return torch.empty_like(older).scatter_(-1, order, first.expand_as(older)) & older


def _leading_directions(rows: Tensor, rank: int) -> Tensor:
    """Principal directions of rows [..., n, dim] as columns [..., dim, up to rank].

    Columns beyond the rank of the rows are 0: the eigenvectors there could be any.
    """
    wide = rows.double()
    lengths, directions = torch.linalg.eigh(wide.mT @ wide)
    lengths, directions = lengths[..., -rank:], directions[..., -rank:]
    real = lengths > _RANK_TOLERANCE * lengths[..., -1:]
    columns: Tensor = directions * real[..., None, :]
    return columns.to(rows.dtype)


def _first_position(cache: LayerCache, valid: Tensor | None) -> Tensor:
    """Position of the first token that is no padding, int64 [batch, kv_heads]."""
    places = cache.positions.long()
    real = real_rows(valid, places.shape, places.device)
    first = places.masked_fill(~real, torch.iinfo(places.dtype).max).amin(-1)
    # Rows that went before (a truncated cache): the prompt starts at 0 where nothing is padded.
    return first if valid is not None else torch.zeros_like(first)


def _check_spans(spans: Sequence[Sequence[int]]) -> None:
    end = 0
    for span in spans:
        if len(span) != 2 or not end <= span[0] < span[1]:
            raise PolicyError(
                "spans are (start, end) positions with start < end, ascending and disjoint, "
                f"((0, 64), (80, 144)) say; got {spans!r}."
            )
        end = span[1]
