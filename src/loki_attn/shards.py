"""LayerRows: the rows of a layer whose KV heads may hold different numbers of them.

As long as all heads hold as many rows, there is one `LayerCache`. An eviction that leaves more to
one head than to another splits it: every shard is a cache of its own for some batch rows and KV
heads, of exactly the rows they hold, so memory really shrinks, and attention runs shard by shard.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from loki_attn.cache import LayerCache
from loki_attn.errors import CacheError
from loki_attn.row_format import Mark, RowFormat
from loki_attn.types import KeepSet

Narrow = Callable[[Tensor], RowFormat]
"""From KV heads, int64 [n], to the format of their rows."""


@final
@dataclass(frozen=True, eq=False)
class Shard:
    """Rows of some batch rows and KV heads.

    Attributes:
        cache: The rows.
        batch: int64 [n]: its batch rows, ascending; None for all.
        heads: int64 [n]: its KV heads, ascending; None for all.
    """

    cache: LayerCache
    batch: Tensor | None = None
    heads: Tensor | None = None

    def of_rows(self, rows: Tensor) -> Tensor:
        """This shard's part of a tensor [batch or 1, kv_heads or 1, ...]."""
        if self.batch is not None and rows.shape[0] > 1:
            rows = rows.index_select(0, self.batch.to(rows.device))
        if self.heads is not None and rows.shape[1] > 1:
            rows = rows.index_select(1, self.heads.to(rows.device))
        return rows

    def of_queries(self, query: Tensor, num_kv_heads: int) -> Tensor:
        """This shard's part of a tensor [batch, heads, ...] of query heads."""
        if self.batch is None and self.heads is None:
            return query
        return self.of_rows(_by_kv_head(query, num_kv_heads)).flatten(1, 2)

    def into_queries(self, part: Tensor, whole: Tensor, num_kv_heads: int) -> None:
        """Write this shard's part of a tensor [batch, heads, ...] into the whole."""
        grouped = _by_kv_head(whole, num_kv_heads)
        mine = _by_kv_head(part, part.shape[1] // grouped.shape[2])
        batch = torch.arange(whole.shape[0]) if self.batch is None else self.batch
        heads = torch.arange(num_kv_heads) if self.heads is None else self.heads
        grouped[batch.to(whole.device)[:, None], heads.to(whole.device)[None]] = mine


@final
class LayerRows:
    """The shards of one layer.

    Args:
        cache: The rows of all heads.
        narrow: Gives the row format of some of the heads.
        parts: KV heads, int64 [n] each, that lie apart from the start, all of them together; the
            cache must be empty then. () for one shard.
    """

    def __init__(
        self, cache: LayerCache, narrow: Narrow | None = None, parts: Sequence[Tensor] = ()
    ) -> None:
        """Start with one shard, or one per part."""
        self.row_format = cache.row_format
        self._narrow: Narrow = narrow or (lambda heads: cache.row_format)
        self._parts = tuple(parts)
        self.shards: tuple[Shard, ...] = self._begin(cache)

    def __iter__(self) -> Iterator[Shard]:
        """The shards."""
        return iter(self.shards)

    @property
    def whole(self) -> LayerCache | None:
        """The one cache of all heads, None where heads hold different numbers of rows."""
        return self.shards[0].cache if len(self.shards) == 1 else None

    @property
    def batch(self) -> int:
        """Batch rows."""
        return max(
            s.cache.positions.shape[0] if s.batch is None else int(s.batch.max()) + 1 for s in self
        )

    @property
    def num_kv_heads(self) -> int:
        """KV heads."""
        return max(
            s.cache.positions.shape[1] if s.heads is None else int(s.heads.max()) + 1 for s in self
        )

    @property
    def seen(self) -> int:
        """Tokens appended so far and not truncated."""
        return self.shards[0].cache.seen

    @property
    def longest(self) -> int:
        """Rows of the head that holds most."""
        return max(shard.cache.length for shard in self.shards)

    @property
    def evicted(self) -> bool:
        """Whether any head holds fewer rows than tokens were seen."""
        return any(shard.cache.length < shard.cache.seen for shard in self.shards)

    def together(self, parts: Sequence[Tensor], fill: float) -> Tensor:
        """Put the shards' parts [batch, kv_heads, ...] of a whole together.

        Args:
            parts: One per shard, in their order; a third dimension may differ in size.
            fill: What stands behind the shorter ones.

        Returns:
            [batch, kv_heads, ...] of all.
        """
        if len(self.shards) == 1:
            return parts[0]
        inner = [max(part.shape[i] for part in parts) for i in range(2, parts[0].ndim)]
        whole = parts[0].new_full((self.batch, self.num_kv_heads, *inner), fill)
        for shard, part in zip(self.shards, parts, strict=True):
            batch = torch.arange(whole.shape[0]) if shard.batch is None else shard.batch
            heads = torch.arange(whole.shape[1]) if shard.heads is None else shard.heads
            # Indexing by whole dimensions and a slice keeps the order of dimensions.
            place = batch[:, None].to(whole.device), heads[None].to(whole.device)
            whole[(*place, slice(part.shape[2])) if inner else place] = part
        return whole

    def append(self, key: Tensor, value: Tensor) -> None:
        """Add rows [batch, kv_heads, tokens, dim] at the end of every head."""
        if len(self.shards) == 1:
            self.shards[0].cache.append(key, value)
            return
        for shard in self.shards:
            shard.cache.append(shard.of_rows(key), shard.of_rows(value))

    def keep(self, sets: KeepSet) -> None:
        """Keep only these rows, for good; heads may keep different numbers of them.

        Raises:
            CacheError: If rows are out of range, not ascending, or a head keeps none.
        """
        if int(sets.counts.min()) < 1:
            raise CacheError("An eviction must leave every KV head a row; got a head with none.")
        shards: list[Shard] = []
        for shard in self.shards:
            indices, counts = shard.of_rows(sets.indices), shard.of_rows(sets.counts)
            if int(counts.min()) == shard.cache.length:
                shards.append(shard)
                continue
            shards += self._kept(shard, indices, counts)
        self._take(shards)

    def truncate(self, seen: int) -> None:
        """Forget the tokens from position `seen` on.

        Raises:
            CacheError: If there are not that many tokens, or a head would be left without rows.
        """
        if not 0 <= seen <= self.seen:
            raise CacheError(f"Cannot truncate {self.seen} tokens to {seen}.")
        if seen == 0:
            self.reset()
            return
        left = []
        for shard in self.shards:
            counts = (shard.cache.positions < seen).sum(-1)
            if int(counts.min()) < 1:
                raise CacheError(
                    f"Cannot truncate {self.seen} tokens to {seen}: the rows of the first {seen} "
                    "were evicted from a head; start a new cache."
                )
            left.append(counts)
        shards: list[Shard] = []
        for shard, counts in zip(self.shards, left, strict=True):
            most = int(counts.max())
            if int(counts.min()) == most:
                shard.cache.truncate(most)
                shards.append(shard)
            else:
                rows = torch.arange(most, device=counts.device).expand(*counts.shape, -1)
                shards += self._kept(shard, rows.masked_fill(rows >= counts[..., None], -1), counts)
        for shard in shards:
            shard.cache.see(seen)
        self._take(shards)

    def select_batch(self, rows: Tensor) -> None:
        """Make the batch consist of these rows of it, int64 [new_batch]; also reorders beams."""
        if len(self.shards) == 1:
            self.shards[0].cache.select_batch(rows)
            return
        shards: list[Shard] = []
        for shard in self.shards:
            if shard.batch is None:
                shard.cache.select_batch(rows)
                shards.append(shard)
                continue
            places = {int(b): i for i, b in enumerate(shard.batch)}
            taken = [(new, places[int(old)]) for new, old in enumerate(rows) if int(old) in places]
            if taken:
                shard.cache.select_batch(torch.tensor([old for _, old in taken]))
                batch = torch.tensor([new for new, _ in taken])
                shards.append(replace(shard, batch=batch))
        self._take(shards)

    def repeat_batch(self, repeats: int) -> None:
        """Repeat every batch row `repeats` times, neighbours together."""
        shards = []
        for shard in self.shards:
            shard.cache.repeat_batch(repeats)
            batch = shard.batch
            if batch is not None:
                places = batch[:, None] * repeats + torch.arange(repeats)
                batch = places.flatten()
            shards.append(replace(shard, batch=batch))
        self.shards = tuple(shards)

    def converted(
        self,
        row_format: RowFormat,
        narrow: Narrow | None,
        marks: Mapping[str, Mark],
        parts: Sequence[Tensor] = (),
    ) -> "LayerRows":
        """Return a copy in another format; the rows held must be as the model made them."""
        other = LayerRows(LayerCache(row_format), narrow, parts)
        other.shards = tuple(
            replace(
                shard,
                cache=shard.cache.converted(
                    row_format if shard.heads is None else other._narrow(shard.heads), marks
                ),
            )
            for whole in self.shards
            for shard in other._cut(whole)
        )
        return other

    def to(self, device: torch.device | str) -> None:
        """Move all rows to a device."""
        for shard in self.shards:
            shard.cache.to(device)

    def reset(self) -> None:
        """Forget all rows and give their memory back."""
        self.shards = self._begin(self.shards[0].cache.emptied(self.row_format))

    def nbytes(self) -> int:
        """Bytes really held."""
        return sum(shard.cache.nbytes() for shard in self.shards)

    def _begin(self, empty: LayerCache) -> tuple[Shard, ...]:
        if not self._parts:
            return (Shard(empty),)
        return tuple(Shard(empty.emptied(self._narrow(part)), None, part) for part in self._parts)

    def _cut(self, shard: Shard) -> Iterator[Shard]:
        """A shard of other rows as these lie: no shard has heads of two parts."""
        if not self._parts:
            yield shard
            return
        heads = torch.cat(self._parts).sort().values if shard.heads is None else shard.heads
        for part in self._parts:
            inside = torch.isin(heads, part).nonzero()[:, 0]
            if inside.numel():
                cache = shard.cache.narrowed(None, inside, shard.cache.row_format)
                yield Shard(cache, shard.batch, heads[inside])

    def _take(self, shards: list[Shard]) -> None:
        # One that is left alone holds everything, whichever parts it once was of.
        self.shards = tuple(shards) if len(shards) > 1 else (Shard(shards[0].cache),)

    def _kept(self, shard: Shard, indices: Tensor, counts: Tensor) -> list[Shard]:
        """The shards that a shard becomes when its heads keep these rows."""
        if int(counts.min()) == int(counts.max()):
            shard.cache.keep(indices[..., : int(counts.max())])
            return [shard]
        alike = bool((counts == counts[:1]).all())
        found = []
        for batch in range(1) if alike else range(counts.shape[0]):
            rows = None if alike else torch.tensor([batch])
            for size in sorted(set(counts[batch].tolist())):
                heads = (counts[batch] == size).nonzero()[:, 0].cpu()
                found.append(self._part(shard, rows, heads, indices, size))
        return found

    def _part(
        self, shard: Shard, batch: Tensor | None, heads: Tensor, indices: Tensor, size: int
    ) -> Shard:
        """A shard of some batch rows and heads of another, which keep `size` rows each."""
        own_heads = heads if shard.heads is None else shard.heads[heads]
        own_batch = shard.batch if batch is None else batch
        if batch is not None and shard.batch is not None:
            own_batch = shard.batch[batch]
        cache = shard.cache.narrowed(batch, heads, self._narrow(own_heads))
        picked = Shard(cache, batch, heads).of_rows(indices)
        cache.keep(picked[..., :size])
        return Shard(cache, own_batch, own_heads)


def _by_kv_head(rows: Tensor, num_kv_heads: int) -> Tensor:
    """View [batch, heads, ...] as [batch, kv_heads, group, ...]."""
    return rows.view(rows.shape[0], num_kv_heads, -1, *rows.shape[2:])
