"""LayerCache: the rows of one attention layer, growable, with row-aligned side planes."""

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass
from typing import Final, final

import torch
from torch import Tensor

from loki_attn.errors import CacheError
from loki_attn.kernels import ops
from loki_attn.storage import Storage, storage_for, take_rows
from loki_attn.tiles import TILE_ROWS, Kind, Tiles
from loki_attn.types import AppendRequest

KEY: Final = "key"
VALUE: Final = "value"
POSITION: Final = "position"
_GROWTH: Final = 1.5
_BLOCK_TOKENS: Final = 64


@final
@dataclass(frozen=True)
class LeadFormat:
    """How `planes` computes the one lead plane of keys, so that a kernel can do the same.

    Attributes:
        plane: Name of the plane; it is kept in tiles.
        scales: Name of the plane with the scale of each row's codes; None without one.
        key_map: float32 [kv_heads, head_dim, rank], contiguous: keys to lead coordinates.
    """

    plane: str
    scales: str | None
    key_map: Tensor


class RowFormat:
    """What becomes of a key when it is stored. The default stores it as it is, without planes."""

    def rows(self, key: Tensor) -> Tensor:
        """Return the key rows to store, from keys [batch, kv_heads, tokens, head_dim]."""
        return key

    def planes(self, key: Tensor) -> dict[str, Tensor]:
        """Return the side planes of these keys by name, each [batch, kv_heads, tokens, ...]."""
        del key
        return {}

    def tiled(self) -> Mapping[str, Kind]:
        """Return which of the planes are kept in tiles, and as what."""
        return {}

    def lead_format(self, device: torch.device) -> LeadFormat | None:
        """Return what `planes` does, where all of it is one lead plane; None otherwise."""
        del device
        return None

    def stores_only(self, lead: LeadFormat | None) -> bool:
        """Return whether keys are stored untouched, with no planes but those of this lead."""
        own = type(self)
        return own.rows is RowFormat.rows and (lead is not None or own.planes is RowFormat.planes)


class LayerCache:
    """Keys, values, positions and planes of one layer, in preallocated storage that grows.

    Each of them is a `Storage`, rows singly or in tiles, and every operation treats all of them
    alike, so planes can never lose their rows. Rows stand in order of position. Slots beyond
    `length` are unwritten memory and are never read.

    Args:
        row_format: What a stored key looks like and which planes go with it.
        reserve_tokens: Rows to allocate at the first append; later growth is by half.
    """

    def __init__(self, row_format: RowFormat | None = None, *, reserve_tokens: int = 0) -> None:
        """Start empty; storage is allocated at the first append."""
        self.row_format = row_format or RowFormat()
        self._reserve_tokens = reserve_tokens
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
        kept = {}
        for name, storage in self._storage.items():
            kept[name] = storage.empty(_whole_tiles(indices.shape[2]), allocate)
            storage.copy_rows(indices, kept[name])
        self._storage, self._length = kept, indices.shape[2]

    def truncate(self, length: int) -> None:
        """Drop rows from the end until `length` tokens remain.

        Raises:
            CacheError: If `length` is negative or more than is held.
        """
        if not 0 <= length <= self._length:
            raise CacheError(f"Cannot truncate {self._length} rows to {length}.")
        self._seen -= self._length - length
        self._length = length

    def select_batch(self, rows: Tensor) -> None:
        """Make the batch consist of these rows of it, int64 [new_batch]; also reorders beams."""
        self._change(lambda data: data.index_select(0, rows.to(data.device)))

    def repeat_batch(self, repeats: int) -> None:
        """Repeat every batch row `repeats` times, neighbours together."""
        self._change(lambda data: data.repeat_interleave(repeats, 0))

    def converted(self, row_format: RowFormat) -> "LayerCache":
        """Return a copy in another format; the rows held must be as the model made them."""
        other = LayerCache(row_format, reserve_tokens=self._reserve_tokens)
        if self._storage:
            other.append(self.keys, self.values, self.positions[:, 0])
            other._seen = self._seen
        return other

    def to(self, device: torch.device | str) -> None:
        """Move all rows to a device."""
        self._change(lambda data: data.to(device))

    def reset(self) -> None:
        """Forget all rows and give their memory back."""
        self._storage = {}
        self._length = self._seen = 0

    def nbytes(self) -> int:
        """Bytes really held: all storage with its unused capacity."""
        return sum(storage.nbytes for storage in self._storage.values())

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
        wanted = max(needed, self._reserve_tokens, int(self.capacity * _GROWTH))
        wanted = -(-wanted // _BLOCK_TOKENS) * _BLOCK_TOKENS
        self._storage = {n: s.grown(wanted, self._length, allocate) for n, s in held.items()}

    def _without_capacity(self, key: Tensor, value: Tensor) -> dict[str, Storage]:
        """Storage without room, of the shapes and dtypes that encoding no tokens shows."""
        samples = self._encode(key[:, :, :0], value[:, :, :0], None)
        tiled = self.row_format.tiled()
        return {name: storage_for(rows, tiled.get(name)) for name, rows in samples.items()}

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
