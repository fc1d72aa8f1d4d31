"""LayerCache: the rows of one attention layer, growable, with row-aligned side planes."""

from collections.abc import Callable, Mapping
from copy import copy
from typing import Final, Self

import torch
from torch import Tensor

from loki_attn.errors import CacheError
from loki_attn.kernels import ops
from loki_attn.row_format import Mark, RowFormat
from loki_attn.storage import Rows, Storage, storage_for, take_rows
from loki_attn.summaries import Summaries
from loki_attn.tiles import TILE_ROWS, Tiles
from loki_attn.types import AppendRequest

KEY: Final = "key"
VALUE: Final = "value"
POSITION: Final = "position"
_GROWTH: Final = 1.5
# Of a cache that evicts: room for more than an eighth is given back, and grown by no more.
_SHRINK: Final = 1.125
_BLOCK_TOKENS: Final = 64


class LayerCache:
    """Keys, values, positions and planes of one layer, in preallocated storage that grows.

    Each of them is a `Storage`, rows singly or in tiles, and every operation treats all of them
    alike, so planes can never lose their rows. Rows stand in order of position. Slots beyond
    `length` are unwritten memory and are never read.

    Args:
        row_format: What a stored key looks like and which planes go with it.
        reserve_tokens: Rows to allocate at the first append; later growth is by half.
        marks: State that methods keep with every row, by name; read and written as `plane(name)`.

    Attributes:
        memory: What methods remember beside the rows, [batch, kv_heads, ...] by name; it follows
            the batch, and survives an eviction. Dropped when rows are truncated.
        chosen: The same for what names rows by their index; dropped when rows move.
    """

    def __init__(
        self,
        row_format: RowFormat | None = None,
        *,
        reserve_tokens: int = 0,
        marks: Mapping[str, Mark] | None = None,
    ) -> None:
        """Start empty; storage is allocated at the first append."""
        self.row_format = row_format or RowFormat()
        self.memory: dict[str, Tensor] = {}
        self.chosen: dict[str, Tensor] = {}
        self._reserve_tokens = reserve_tokens
        self._growth = _GROWTH
        self._marks = dict(marks or {})
        self._summaries = Summaries(self.row_format.page_rows(), self.row_format.summarise)
        self._storage: dict[str, Storage] = {}
        self._length = 0
        self._seen = 0

    @property
    def length(self) -> int:
        """Rows held, in tokens."""
        return self._length

    @property
    def seen(self) -> int:
        """Tokens appended so far and not truncated: the position of the next token."""
        return self._seen

    @property
    def capacity(self) -> int:
        """Rows that fit without growing, in tokens; fills whole tiles."""
        return self._storage[KEY].capacity if self._storage else 0

    @property
    def keys(self) -> Tensor:
        """Stored key rows [batch, kv_heads, length, head_dim], a view."""
        return self.plane(KEY)

    @property
    def values(self) -> Tensor:
        """Stored value rows [batch, kv_heads, length, value_dim], a view."""
        return self.plane(VALUE)

    @property
    def positions(self) -> Tensor:
        """True position of every row, int32 [batch, kv_heads, length], a view."""
        return self.plane(POSITION)

    def plane(self, name: str) -> Tensor:
        """Return the written rows of one plane [batch, kv_heads, length, ...].

        A view; of a plane in tiles a copy, which is for inspection: kernels read `tiles`.

        Raises:
            CacheError: If nothing was appended yet or no plane has this name.
        """
        return self._held(name).read(self._length)

    def tiles(self, name: str) -> Tiles:
        """Return one plane in tiles; shares this storage.

        Raises:
            CacheError: If nothing was appended yet, or no plane in tiles has this name.
        """
        found = self._held(name).as_tiles(self._length)
        if found is None:
            raise CacheError(f"The plane {name!r} is not kept in tiles; read plane({name!r}).")
        return found

    def summary(self, name: str) -> Tensor:
        """Return one page summary [batch, kv_heads, pages, ...] of the row format, a view.

        Raises:
            CacheError: If nothing was appended yet or no summary has this name.
        """
        return self._summaries.read(name, self.keys, self.values)

    def prefix(self, length: int) -> "LayerCache":
        """Return the first `length` rows as a cache that shares this storage; only to be read.

        Raises:
            CacheError: If `length` is negative or more than is held.
        """
        if not 0 <= length <= self._length:
            raise CacheError(f"A prefix of {length} rows was asked for; {self._length} are held.")
        view = copy(self)
        view._length = length
        return view

    def append(self, key: Tensor, value: Tensor, positions: Tensor | None = None) -> None:
        """Add rows at the end.

        Args:
            key: [batch, kv_heads, tokens, head_dim], after RoPE, as the model made it.
            value: [batch, kv_heads, tokens, value_dim].
            positions: int [batch, tokens]; by default the tokens follow the ones seen.

        Raises:
            CacheError: If the shapes or the dtype do not continue the rows held.
        """
        self._check_append(key, value, positions)
        tokens = key.shape[2]
        self._make_room(key, value)
        if positions is not None or not self._append_at_once(key, value):
            for name, rows in self._encode(key, value, positions).items():
                self._storage[name].write(self._length, rows)
        for name, mark in self._marks.items():
            self._storage[name].data.narrow(2, self._length, tokens).fill_(mark.fill)
        self._length += tokens
        self._seen += tokens

    def gather(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return the key and value rows at `indices` [batch, kv_heads, k], as copies."""
        return take_rows(self.keys, indices), take_rows(self.values, indices)

    def keep(self, indices: Tensor) -> None:
        """Keep only these rows, for good; planes and positions go with them.

        Args:
            indices: int64 [batch, kv_heads, kept], ascending and unique in the last dimension.

        Raises:
            CacheError: If indices have other heads, are out of range, or not strictly ascending.
        """
        held = self.keys.shape
        if indices.ndim != 3 or indices.shape[:2] != held[:2]:
            raise CacheError(
                f"keep needs rows per [batch={held[0]}, kv_heads={held[1]}], got indices "
                f"{list(indices.shape)}."
            )
        if indices.numel() and (int(indices.min()) < 0 or int(indices.max()) >= self._length):
            raise CacheError(f"keep needs rows in 0..{self._length - 1}, got others.")
        if bool((indices[..., 1:] <= indices[..., :-1]).any()):
            raise CacheError("keep needs strictly ascending rows; sort them and drop repeats.")
        room = _whole_tiles(indices.shape[2])
        if room * _SHRINK >= self.capacity:
            room = self.capacity  # a few rows went: the next ones find room without growing
        kept = {}
        for name, storage in self._storage.items():
            kept[name] = storage.empty(room, allocate)
            storage.copy_rows(indices, kept[name])
        self._storage, self._length = kept, indices.shape[2]
        self._growth = _SHRINK
        self.chosen.clear()
        self._summaries.reset()

    def truncate(self, length: int) -> None:
        """Drop rows from the end until `length` tokens remain.

        Raises:
            CacheError: If `length` is negative or more than is held.
        """
        if not 0 <= length <= self._length:
            raise CacheError(f"Cannot truncate {self._length} rows to {length}.")
        dropped, self._length = self._length - length, length
        self._seen -= dropped
        if dropped:
            self._forget()

    def see(self, seen: int) -> None:
        """Set the position of the next token, behind the last row held.

        Raises:
            CacheError: If a row has this position already, or a later one.
        """
        if self._length and int(self.positions[..., -1].max()) >= seen:
            raise CacheError(f"The next token cannot be {seen}: later rows are held.")
        if seen < self._seen:
            self._forget()
        self._seen = seen

    def emptied(self, row_format: RowFormat) -> "LayerCache":
        """Return an empty cache with the same marks."""
        return LayerCache(row_format, reserve_tokens=self._reserve_tokens, marks=self._marks)

    def select_batch(self, rows: Tensor) -> None:
        """Make the batch consist of these rows of it, int64 [new_batch]; also reorders beams."""
        self._change(lambda data: data.index_select(0, rows.to(data.device)))

    def repeat_batch(self, repeats: int) -> None:
        """Repeat every batch row `repeats` times, neighbours together."""
        self._change(lambda data: data.repeat_interleave(repeats, 0))

    def converted(
        self, row_format: RowFormat, marks: Mapping[str, Mark] | None = None
    ) -> "LayerCache":
        """Return a copy in another format; the rows held must be as the model made them."""
        other = LayerCache(row_format, reserve_tokens=self._reserve_tokens, marks=marks)
        if self._storage:
            other.append(self.keys, self.values)
            other.positions.copy_(self.positions)
            other._seen = self._seen
        return other

    def narrowed(self, batch: Tensor | None, heads: Tensor | None, row_format: RowFormat) -> Self:
        """Return a copy of some batch rows and KV heads.

        Args:
            batch: int64 batch rows, None for all.
            heads: int64 KV heads, None for all.
            row_format: The format of these heads' rows.
        """

        def pick(data: Tensor) -> Tensor:
            data = data if batch is None else data.index_select(0, batch.to(data.device))
            return data if heads is None else data.index_select(1, heads.to(data.device))

        other = copy(self)
        other.row_format = row_format
        other._summaries = Summaries(row_format.page_rows(), row_format.summarise)
        other._storage = {name: held.changed(pick) for name, held in self._storage.items()}
        other.memory = {name: pick(held) for name, held in self.memory.items()}
        other.chosen = {}
        return other

    def to(self, device: torch.device | str) -> None:
        """Move all rows to a device."""
        self._change(lambda data: data.to(device))

    def reset(self) -> None:
        """Forget all rows and give their memory back."""
        self._storage = {}
        self._length = self._seen = 0
        self._forget()
        self._summaries.reset()

    def nbytes(self) -> int:
        """Bytes really held: all storage with its unused capacity, and what methods remember."""
        beside = [held.nbytes for kept in (self.memory, self.chosen) for held in kept.values()]
        rows = sum(storage.nbytes for storage in self._storage.values())
        return rows + sum(beside) + self._summaries.nbytes

    def row_bytes(self, *names: str) -> int:
        """Bytes that one row of one KV head takes under these names (all of them by default)."""
        chosen = names or tuple(self._storage)
        return sum(self._storage[name].row_bytes for name in chosen)

    def _held(self, name: str) -> Storage:
        if name not in self._storage:
            held = ", ".join(self._storage) or "nothing: append first"
            raise CacheError(f"The cache holds no plane {name!r}; it holds {held}.")
        return self._storage[name]

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        self._storage = {name: held.changed(change) for name, held in self._storage.items()}
        self.memory = {name: change(held) for name, held in self.memory.items()}
        self.chosen = {name: change(held) for name, held in self.chosen.items()}
        self._summaries.change(change)

    def _forget(self) -> None:
        """Forget what methods remember of rows that are gone."""
        self.memory.clear()
        self.chosen.clear()
        self._summaries.truncate(self._length)

    def _check_append(self, key: Tensor, value: Tensor, positions: Tensor | None) -> None:
        if key.ndim != 4 or value.ndim != 4 or key.shape[:3] != value.shape[:3]:
            raise CacheError(
                "append needs key and value [batch, kv_heads, tokens, dim] with equal first three "
                f"sizes, got {tuple(key.shape)} and {tuple(value.shape)}."
            )
        fitting = {(1, key.shape[2]), (key.shape[0], key.shape[2])}
        if positions is not None and tuple(positions.shape) not in fitting:
            raise CacheError(
                f"append needs positions [batch or 1, tokens] = [{key.shape[0]} or 1, "
                f"{key.shape[2]}], got {list(positions.shape)}."
            )
        if not self._storage:
            return
        for name, new in ((KEY, key), (VALUE, value)):
            held = self._storage[name].data
            if new.shape[:2] != held.shape[:2] or new.shape[3] != held.shape[3]:
                raise CacheError(
                    f"The cache holds {name} rows [batch={held.shape[0]}, kv_heads="
                    f"{held.shape[1]}, dim={held.shape[3]}], but {tuple(new.shape)} came; "
                    "one cache serves one batch of one model: make a new one or reset it."
                )
            if new.dtype != held.dtype:
                raise CacheError(f"The cache holds {held.dtype} {name} rows, got {new.dtype}.")

    def _encode(self, key: Tensor, value: Tensor, positions: Tensor | None) -> dict[str, Tensor]:
        """The new rows of every name, as the format wants them."""
        if positions is None:
            positions = torch.arange(self._seen, self._seen + key.shape[2], device=key.device)[None]
        places = positions.to(torch.int32)[:, None].expand(key.shape[:3])
        planes = self.row_format.planes(key)
        return {KEY: self.row_format.rows(key), VALUE: value, **planes, POSITION: places}

    def _make_room(self, key: Tensor, value: Tensor) -> None:
        needed = self._length + key.shape[2]
        if self._storage and needed <= self.capacity:
            return
        held = self._storage or self._without_capacity(key, value)
        reserve = 0 if self._storage else self._reserve_tokens  # an eviction gives it back
        wanted = max(needed, reserve, int(self.capacity * self._growth))
        wanted = -(-wanted // _BLOCK_TOKENS) * _BLOCK_TOKENS
        self._storage = {n: s.grown(wanted, self._length, allocate) for n, s in held.items()}

    def _without_capacity(self, key: Tensor, value: Tensor) -> dict[str, Storage]:
        """Storage without room, of the shapes and dtypes that encoding no tokens shows."""
        samples = self._encode(key[:, :, :0], value[:, :, :0], None)
        tiled = self.row_format.tiled()
        found = {name: storage_for(rows, tiled.get(name)) for name, rows in samples.items()}
        none = key[:, :, :0, 0]
        for name, mark in self._marks.items():
            found[name] = Rows(none.new_empty((*none.shape, *mark.inner), dtype=mark.dtype))
        return found

    def _append_at_once(self, key: Tensor, value: Tensor) -> bool:
        """Let a kernel write all that follows from these rows; it says whether it did."""
        lead = self.row_format.lead_format(key.device)
        if not self.row_format.stores_only(lead):
            return False
        held = {name: storage.data for name, storage in self._storage.items()}
        request = AppendRequest(
            key=key,
            value=value,
            keys=held[KEY],
            values=held[VALUE],
            positions=held[POSITION],
            start=self._length,
            first_position=self._seen,
            lead=lead and self._storage[lead.plane].as_tiles(self._length + key.shape[2]),
            lead_scales=held[lead.scales] if lead and lead.scales else None,
            key_map=lead and lead.key_map,
        )
        return ops().append(request)


def allocate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return unwritten storage; tests replace this to poison it."""
    return torch.empty(shape, dtype=dtype, device=device)


def _whole_tiles(rows: int) -> int:
    return -(-rows // TILE_ROWS) * TILE_ROWS
