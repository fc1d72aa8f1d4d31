"""Storage of one layer that is all poison, in one piece or in pages; what plain torch writes."""

from dataclasses import dataclass, fields

import torch
from triton_scenes import BITS

from loki_attn import tiles
from loki_attn.pieces.lead_plane import map_keys, quantise_rows
from loki_attn.tiles import Tiles
from loki_attn.types import AppendRequest

POISON = 0x5A


def poisoned(shape, dtype):
    """Memory of which every byte is poison."""
    size = torch.empty(shape, dtype=dtype, device="meta").nbytes
    return torch.full((size,), POISON, dtype=torch.uint8).view(dtype).view(shape)


@dataclass(frozen=True)
class Store:
    """Rows, positions and lead of a layer; `kind` None for a layer without a lead."""

    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor
    data: torch.Tensor | None
    scales: torch.Tensor | None
    kind: str | None
    rank: int

    @classmethod
    def of(cls, batch, kv_heads, capacity, dims, dtype, kind, rank):
        """Empty storage; `capacity` fills whole tiles."""
        room = (batch, kv_heads, capacity)
        data = scales = None
        if kind:
            shape = tiles.tiles_shape(*room, kind, rank)
            data = poisoned(shape, tiles.tile_dtype(kind))
        if kind in BITS:
            scales = poisoned(room, torch.float16)
        rows = (poisoned((*room, dim), dtype) for dim in dims)
        return cls(*rows, poisoned(room, torch.int32), data, scales, kind, rank)

    def parts(self):
        """All memory by name."""
        named = ((f.name, getattr(self, f.name)) for f in fields(self))
        return {name: held for name, held in named if isinstance(held, torch.Tensor)}

    def request(self, key, value, key_map, start, first=0, *, positioned=True):
        """What an append is asked for; tensors of the request lie where those of the store do."""
        length = start + key.shape[2] if isinstance(start, int) else self.keys.shape[2]
        return AppendRequest(
            key=key, value=value, keys=self.keys, values=self.values,
            positions=self.positions if positioned else None, start=start, first_position=first,
            lead=Tiles(self.data, self.kind, self.rank, length) if self.kind else None,
            lead_scales=self.scales, key_map=key_map if self.kind else None,
        )  # fmt: skip

    def write_plainly(self, key, value, key_map, start, first=0, *, positioned=True):
        """What the cache does without a kernel."""
        now = slice(start, start + key.shape[2])
        self.keys[:, :, now], self.values[:, :, now] = key, value
        if positioned:
            self.positions[:, :, now] = torch.arange(first, first + key.shape[2])
        if not self.kind:
            return
        lead = map_keys(key, key_map)
        if self.kind in BITS:
            lead, self.scales[:, :, now] = quantise_rows(lead, BITS[self.kind])
        tiles.write_rows(Tiles(self.data, self.kind, self.rank, start), start, lead)

    def paged(self, page_rows, spare, seed=0):
        """The same rows in pages of a pool in any order, and the table of the pages.

        `spare` more pages than are needed hold poison, and so does the table behind its last
        page: each batch row has one entry more, that of a spare page.
        """
        batch, per = self.keys.shape[0], self.keys.shape[2] // page_rows
        count = batch * per
        order = torch.randperm(count + spare, generator=torch.Generator().manual_seed(seed))
        pools = {}
        for name, held in self.parts().items():
            inside = held.shape[2] // per
            cut = held.unflatten(2, (per, inside)).transpose(1, 2).flatten(0, 1)
            pools[name] = poisoned((count + spare, *cut.shape[1:]), held.dtype)
            pools[name][order[:count]] = cut
        table = order[:count].view(batch, per)
        stale = order[count:][:1].expand(batch, 1)
        rest = {"kind": self.kind, "rank": self.rank, "data": None, "scales": None}
        return Store(**{**rest, **pools}), torch.cat([table, stale], 1).to(torch.int32)

    def unpaged(self, table):
        """The rows of a pool that a table of pages [batch, pages] names, in one piece."""
        pieces = {}
        for name, pool in self.parts().items():
            pieces[name] = pool[table.long()].transpose(1, 2).flatten(2, 3)
        rest = {"kind": self.kind, "rank": self.rank, "data": None, "scales": None}
        return Store(**{**rest, **pieces})

    def assert_same_bytes(self, other):
        """Every byte is the same, in whatever memory."""
        for name, held in self.parts().items():
            mine, same = (
                t.cpu().contiguous().view(torch.uint8) for t in (held, other.parts()[name])
            )
            assert torch.equal(mine, same), name
