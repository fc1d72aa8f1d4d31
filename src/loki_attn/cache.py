"""LayerCache: the rows of one attention layer, growable, with row-aligned side planes."""

from copy import copy
from typing import Final

import torch
from torch import Tensor

from loki_attn.errors import CacheError

KEY: Final = "key"
VALUE: Final = "value"
POSITION: Final = "position"
_GROWTH: Final = 1.5
_BLOCK_TOKENS: Final = 64


class RowFormat:
    """What becomes of a key when it is stored. The default stores it as it is, without planes."""

    def rows(self, key: Tensor) -> Tensor:
        """Return the key rows to store, from keys [batch, kv_heads, tokens, head_dim]."""
        return key

    def planes(self, key: Tensor) -> dict[str, Tensor]:
        """Return the side planes of these keys by name, each [batch, kv_heads, tokens, ...]."""
        del key
        return {}


class LayerCache:
    """Keys, values, positions and planes of one layer, in preallocated storage that grows.

    All of them are row tensors [batch, kv_heads, capacity, ...] that every operation treats alike,
    so planes can never lose their rows. Rows stand in order of position. Slots beyond `length` are
    unwritten memory and are never read.

    Args:
        row_format: What a stored key looks like and which planes go with it.
        reserve_tokens: Rows to allocate at the first append; later growth is by half.
    """

    def __init__(self, row_format: RowFormat | None = None, *, reserve_tokens: int = 0) -> None:
        """Start empty; storage is allocated at the first append."""
        self.row_format = row_format or RowFormat()
        self._reserve_tokens = reserve_tokens
        self._storage: dict[str, Tensor] = {}
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
        """Rows that fit without growing, in tokens."""
        return self._storage[KEY].shape[2] if self._storage else 0

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
        """Return the written rows of one row tensor [batch, kv_heads, length, ...], a view.

        Raises:
            CacheError: If nothing was appended yet or no plane has this name.
        """
        if name not in self._storage:
            held = ", ".join(self._storage) or "nothing: append first"
            raise CacheError(f"The cache holds no plane {name!r}; it holds {held}.")
        return self._storage[name].narrow(2, 0, self._length)

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
        rows = {KEY: self.row_format.rows(key), VALUE: value, **self.row_format.planes(key)}
        if positions is None:
            tokens = key.shape[2]
            positions = torch.arange(self._seen, self._seen + tokens, device=key.device)[None]
        rows[POSITION] = positions.to(torch.int32)[:, None].expand(key.shape[:3])
        self._make_room(rows, key.shape[2])
        for name, new in rows.items():
            self._storage[name].narrow(2, self._length, key.shape[2]).copy_(new)
        self._length += key.shape[2]
        self._seen += key.shape[2]

    def gather(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return the key and value rows at `indices` [batch, kv_heads, k], as copies."""
        return _take_rows(self.keys, indices), _take_rows(self.values, indices)

    def keep(self, indices: Tensor) -> None:
        """Keep only these rows, for good; planes and positions go with them.

        Args:
            indices: int64 [batch, kv_heads, kept], ascending and unique in the last dimension.

        Raises:
            CacheError: If indices have other heads, are out of range, or not strictly ascending.
        """
        held = self.plane(KEY).shape
        if indices.ndim != 3 or indices.shape[:2] != held[:2]:
            raise CacheError(
                f"keep needs rows per [batch={held[0]}, kv_heads={held[1]}], got indices "
                f"{list(indices.shape)}."
            )
        if indices.numel() and (int(indices.min()) < 0 or int(indices.max()) >= self._length):
            raise CacheError(f"keep needs rows in 0..{self._length - 1}, got others.")
        if bool((indices[..., 1:] <= indices[..., :-1]).any()):
            raise CacheError("keep needs strictly ascending rows; sort them and drop repeats.")
        self._storage = {n: _take_rows(self.plane(n), indices) for n in self._storage}
        self._length = indices.shape[2]

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
        self._storage = {n: t.index_select(0, rows.to(t.device)) for n, t in self._storage.items()}

    def repeat_batch(self, repeats: int) -> None:
        """Repeat every batch row `repeats` times, neighbours together."""
        self._storage = {n: t.repeat_interleave(repeats, 0) for n, t in self._storage.items()}

    def converted(self, row_format: RowFormat) -> "LayerCache":
        """Return a copy in another format; the rows held must be as the model made them."""
        other = LayerCache(row_format, reserve_tokens=self._reserve_tokens)
        if self._storage:
            other.append(self.keys, self.values, self.positions[:, 0])
            other._seen = self._seen
        return other

    def to(self, device: torch.device | str) -> None:
        """Move all row tensors to a device."""
        self._storage = {n: t.to(device) for n, t in self._storage.items()}

    def reset(self) -> None:
        """Forget all rows and give their memory back."""
        self._storage = {}
        self._length = self._seen = 0

    def nbytes(self) -> int:
        """Bytes really held: every row tensor with its unused capacity."""
        return sum(t.nbytes for t in self._storage.values())

    def row_bytes(self, *names: str) -> int:
        """Bytes that one row of one KV head takes in these row tensors (all of them by default)."""
        chosen = names or tuple(self._storage)
        return sum(self._storage[n][0, 0, :1].nbytes for n in chosen)

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
            held = self._storage[name]
            if new.shape[:2] != held.shape[:2] or new.shape[3] != held.shape[3]:
                raise CacheError(
                    f"The cache holds {name} rows [batch={held.shape[0]}, kv_heads="
                    f"{held.shape[1]}, dim={held.shape[3]}], but {tuple(new.shape)} came; "
                    "one cache serves one batch of one model: make a new one or reset it."
                )
            if new.dtype != held.dtype:
                raise CacheError(f"The cache holds {held.dtype} {name} rows, got {new.dtype}.")

    def _make_room(self, rows: dict[str, Tensor], tokens: int) -> None:
        needed = self._length + tokens
        if self._storage and needed <= self.capacity:
            return
        wanted = max(needed, self._reserve_tokens, int(self.capacity * _GROWTH))
        wanted = -(-wanted // _BLOCK_TOKENS) * _BLOCK_TOKENS
        grown = {}
        for name, new in rows.items():
            shape = (*new.shape[:2], wanted, *new.shape[3:])
            grown[name] = allocate(shape, new.dtype, new.device)
            if self._storage:
                grown[name].narrow(2, 0, self._length).copy_(self.plane(name))
        self._storage = grown


def allocate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return unwritten storage; tests replace this to poison it."""
    return torch.empty(shape, dtype=dtype, device=device)


def _take_rows(rows: Tensor, indices: Tensor) -> Tensor:
    index = indices.to(rows.device)
    if rows.ndim == 4:
        index = index[..., None].expand(*index.shape, rows.shape[3])
    return rows.gather(2, index)
