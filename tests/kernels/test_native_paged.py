"""Pages and ragged lengths of the C interface: the same bits as rows that lie in one piece."""

import pytest
import torch
from native_calls import DTYPES, OK, REDUCES, ROWS, TILES, pack, query, rows, scales, tiles
from native_scenes import each_isa

from loki_attn import tiles as tiling
from loki_attn.select.loki import quantise_rows

pytestmark = pytest.mark.usefixtures("native_library")

BATCH, KV_HEADS, GROUP, DIM, VALUE_DIM, RANK = 3, 2, 3, 24, 40, 13
LENGTHS = [[700, 700, 700], [1, 530, 16], [33, 0, 512]]


class Layer:
    """Rows, tiles and scales in one piece, and the same in pages of a pool in any order."""

    def __init__(self, seq, kind, dtype=torch.float32, page_size=32):
        draw = torch.Generator().manual_seed(seq)

        def normal(*size):
            return torch.randn(*size, generator=draw)

        self.seq, self.kind, self.page_size = seq, kind, page_size
        self.query = normal(BATCH, KV_HEADS * GROUP, 1, DIM).to(dtype)
        pages = -(-seq // page_size)
        room = pages * page_size
        self.keys = normal(BATCH, KV_HEADS, room, DIM).to(dtype)
        self.values = normal(BATCH, KV_HEADS, room, VALUE_DIM).to(dtype)
        self.map = normal(KV_HEADS, DIM, RANK)
        lead = self.keys.float() @ self.map
        self.scales = torch.ones(BATCH, KV_HEADS, room, dtype=torch.float16)
        if kind in {"int8", "int4"}:
            lead, self.scales = quantise_rows(lead, {"int8": 8, "int4": 4}[kind])
        self.tiles = tiling.pack(lead, kind).data
        order = torch.randperm(BATCH * pages + 2, generator=draw)[: BATCH * pages]
        self.table = torch.full((BATCH, pages + 3), -1, dtype=torch.int32)
        self.table[:, :pages] = order.view(BATCH, pages)
        self.pooled = {
            name: self.in_pages(getattr(self, name), order)
            for name in ("keys", "values", "scales", "tiles")
        }

    def in_pages(self, held, order):
        """[pages, kv_heads, rows of a page, ...]; pages of nobody hold NaN."""
        per_page = held.shape[2] * self.page_size // self.keys.shape[2]
        cut = held.unflatten(2, (-1, per_page)).transpose(1, 2).flatten(0, 1)
        pool = torch.full((len(order) + 2, *cut.shape[1:]), -1 if held.dtype.itemsize == 1 else 0)
        pool = pool.to(held.dtype)
        if held.dtype.is_floating_point:
            pool.fill_(float("nan"))
        pool[order.long()] = cut
        return pool

    def fields(self, *, paged, lengths=None, lead_kind=TILES):
        """Fields that every call has, and where its rows lie."""
        held = self.pooled if paged else {name: getattr(self, name) for name in self.pooled}
        fields = {
            "batch": BATCH, "kv_heads": KV_HEADS, "group": GROUP, "seq": self.seq,
            **rows("keys", held["keys"]), **rows("values", held["values"]),
            **query("query", self.query), "scaling": DIM**-0.5, "lead_kind": lead_kind,
            "lead_rank": RANK, **query("lead_query", self.query), "query_map": self.map,
        }  # fmt: skip
        if lead_kind == ROWS:
            fields |= rows("lead", held["keys"])
        else:
            fields |= tiles(held["tiles"], self.kind) | scales(held["scales"])
        if paged:
            fields |= {
                "block_table": self.table, "table_stride": self.table.shape[1],
                "page_size": self.page_size,
            }  # fmt: skip
        return fields if lengths is None else fields | {"lengths": lengths}


class Results:
    """Memory for all that a call returns, and the call."""

    def __init__(self, layer, choosers=KV_HEADS, width=20):
        heads = KV_HEADS * GROUP
        self.out = torch.full((BATCH, heads, VALUE_DIM), 7.0, dtype=layer.query.dtype)
        self.log_sum_exp = torch.full((BATCH, heads), 7.0)
        self.column_sums = torch.full((BATCH, KV_HEADS, layer.seq), 7.0)
        self.scores = torch.full((BATCH, heads, layer.seq), 7.0)
        self.indices = torch.full((BATCH, choosers, width), 7)
        self.counts = torch.full((BATCH, choosers), 7)

    def of(self, run, fields):
        mine = vars(self) | {"indices_width": self.indices.shape[2]}
        assert run(pack("loki_call", fields | mine)) == OK
        return self

    def assert_same_bits(self, other):
        for name, mine in vars(self).items():
            assert torch.equal(mine, vars(other)[name]), name


CHOICE = {"count": 20, "sinks": 1, "recents": 2}


@pytest.mark.parametrize("kind", ["int8", "int4", "bf16", "fp32"])
@pytest.mark.parametrize("seq", [1, 40, 513, 1100])
def test_a_step_over_pages(native_library, seq, kind):
    layer = Layer(seq, kind)
    for how, choosers in (("softmax_sum", KV_HEADS), ("max", KV_HEADS), ("none", KV_HEADS * GROUP)):
        choice = CHOICE | {"reduce": REDUCES[how]}
        for _ in each_isa():
            plain, paged = (
                Results(layer, choosers).of(
                    native_library.loki_step, layer.fields(paged=paged) | choice
                )
                for paged in (False, True)
            )
            paged.assert_same_bits(plain)
            assert bool((plain.counts == min(seq, 20)).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_size", [1, 7, 16, 512])
def test_every_reading_of_pages(native_library, page_size, dtype):
    """Without tiles, pages have any size; a prefix of the rows ranks them."""
    whole_tiles = page_size % 16 == 0
    layer = Layer(600, "fp32", dtype, page_size) if whole_tiles else odd_pages(dtype, page_size)
    for entry in ("loki_dense", "loki_score", "loki_step", "loki_attend"):
        run = getattr(native_library, entry)
        for _ in each_isa():
            plain, paged = (Results(layer) for _ in range(2))
            if entry == "loki_attend":
                for results in (plain, paged):
                    results.indices[:] = torch.arange(0, 600, 30)
                    results.counts.fill_(20)
            plain.of(run, layer.fields(paged=False, lead_kind=ROWS) | CHOICE)
            paged.of(run, layer.fields(paged=True, lead_kind=ROWS) | CHOICE)
            paged.assert_same_bits(plain)
            written = plain.scores if entry == "loki_score" else plain.out
            assert bool((written != 7).all())


def odd_pages(dtype, page_size):
    """Rows whose tiles are not in pages, because a page holds no whole tiles."""
    layer = Layer.__new__(Layer)
    whole = Layer(600, "fp32", dtype, 16)
    vars(layer).update(vars(whole), page_size=page_size)
    pages = -(-600 // page_size)
    for name in ("keys", "values"):
        setattr(layer, name, getattr(whole, name)[:, :, :600])
        missing = pages * page_size - 600
        held = torch.nn.functional.pad(getattr(layer, name), (0, 0, 0, missing))
        setattr(layer, name, held)
    order = torch.randperm(BATCH * pages, generator=torch.Generator().manual_seed(1))
    layer.table = order.view(BATCH, pages).int()
    layer.pooled = {n: layer.in_pages(getattr(layer, n), order) for n in ("keys", "values")}
    layer.pooled |= {"scales": layer.scales, "tiles": layer.tiles}
    return layer


@pytest.mark.parametrize("paged", [False, True], ids=["in one piece", "in pages"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_ragged_lengths(native_library, lengths, paged):
    """Each batch row as if it were alone with its own length; a row of length 0 gets zeros."""
    layer = Layer(700, "int8")
    held = torch.tensor(lengths)
    for _ in each_isa():
        for run in (native_library.loki_step, native_library.loki_dense):
            ragged = Results(layer).of(run, layer.fields(paged=paged, lengths=held) | CHOICE)
            for row, length in enumerate(lengths):
                check_row(run, layer, ragged, row, length)


def check_row(run, layer, ragged, row, length):
    """One batch row of a ragged call against the same call that has no longer rows."""
    step = run.__name__ == "loki_step"
    if length == 0:
        assert bool((ragged.out[row] == 0).all())
        assert not step or bool((ragged.indices[row] == -1).all() & (ragged.counts[row] == 0).all())
        return
    alone = Results(layer).of(run, layer.fields(paged=False) | CHOICE | {"seq": length})
    assert torch.equal(ragged.out[row], alone.out[row])
    if step:
        assert torch.equal(ragged.indices[row], alone.indices[row])
        assert torch.equal(ragged.counts[row], alone.counts[row])
        return
    assert torch.equal(ragged.log_sum_exp[row], alone.log_sum_exp[row])
    sums = alone.column_sums.view(-1)[: BATCH * KV_HEADS * length].view(BATCH, KV_HEADS, length)
    assert torch.equal(ragged.column_sums[row, :, :length], sums[row])
    assert bool((ragged.column_sums[row, :, length:] == 0).all())


@pytest.mark.parametrize("kind", ["int8", "int4", "bf16", "fp32"])
def test_append_to_pages(native_library, kind):
    """Every byte goes to its page, and to no other."""
    layer = Layer(80, kind)
    new = torch.randn(BATCH, KV_HEADS, 37, DIM)
    values = torch.randn(BATCH, KV_HEADS, 37, VALUE_DIM)
    for _ in each_isa():
        held = {name: getattr(layer, name).clone() for name in layer.pooled}
        pooled = {name: pool.clone() for name, pool in layer.pooled.items()}
        for store, table in ((held, None), (pooled, layer.table)):
            fields = {
                "batch": BATCH, "kv_heads": KV_HEADS, "tokens": 37, "start": 30,
                **rows("new_keys", new), **rows("new_values", values),
                **rows("keys", store["keys"]), **rows("values", store["values"]),
                "key_map": layer.map, "lead_rank": RANK, **tiles(store["tiles"], kind),
                **scales(store["scales"]),
            }  # fmt: skip
            if table is not None:
                fields |= {"block_table": table, "table_stride": table.shape[1], "page_size": 32}
            assert native_library.loki_append(pack("loki_append_call", fields)) == OK
        order = layer.table[:, :3].flatten()
        for name, pool in pooled.items():
            expected = layer.in_pages(held[name], order)
            assert torch.equal(pool.view(torch.uint8), expected.view(torch.uint8)), name
            assert not torch.equal(held[name], getattr(layer, name)) or (
                name == "scales" and kind in {"bf16", "fp32"}
            )
