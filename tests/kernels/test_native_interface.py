"""The C interface itself: structs as the header declares them, a status for every wrong call."""

import re

import pytest
import torch
from native_calls import (
    BAD_DTYPE,
    BAD_INDEX,
    BAD_SIZE,
    NULL_POINTER,
    OK,
    layout,
    letters,
    pack,
    query,
    rows,
)

from loki_attn import tiles
from loki_attn.kernels.native import packing

BATCH, KV_HEADS, HEADS, SEQ, DIM, VALUE_DIM, RANK = 2, 2, 4, 20, 8, 6, 3
QUERY, KEYS = torch.randn(BATCH, HEADS, 1, DIM), torch.randn(BATCH, KV_HEADS, SEQ, DIM)
VALUES, MAP = torch.randn(BATCH, KV_HEADS, SEQ, VALUE_DIM), torch.randn(KV_HEADS, DIM, RANK)
CODES = tiles.pack(torch.ones(BATCH, KV_HEADS, SEQ, RANK), "int8")
SCALES = torch.ones(BATCH, KV_HEADS, SEQ, dtype=torch.float16)
STRUCTS = {
    "loki_call": packing.CALL,
    "loki_choose_call": packing.CHOOSE,
    "loki_append_call": packing.APPEND,
    "loki_column_call": packing.COLUMNS,
    "loki_hamming_call": packing.HAMMING,
}
ENTRIES = {
    **dict.fromkeys(["score", "attend", "dense", "step"], packing.CALL),
    "choose": packing.CHOOSE,
    "append": packing.APPEND,
    "column_sums": packing.COLUMNS,
    "hamming": packing.HAMMING,
}


@pytest.mark.parametrize("name", STRUCTS)
def test_structs_are_packed_as_the_header_declares_them(name):
    """Field by field: 8 bytes each, and a double where there is one."""
    packed = re.sub(r"(\d+)([qd])", lambda m: m[2] * int(m[1]), STRUCTS[name].format)
    assert packed == "=" + letters(name)
    assert STRUCTS[name].size == 8 * len(layout(name))


@pytest.mark.parametrize("name", ENTRIES)
def test_null_and_empty_structs_have_a_status(native_library, name):
    run = getattr(native_library, f"loki_{name}")
    assert run(None) == NULL_POINTER
    assert run(bytes(ENTRIES[name].size)) in {NULL_POINTER, BAD_SIZE}


LENGTHS = torch.tensor([3, SEQ + 1])
TABLE = torch.zeros(BATCH, 4, dtype=torch.int32)
WRONG = [
    ("batch", 0, BAD_SIZE), ("batch", -1, BAD_SIZE), ("kv_heads", 0, BAD_SIZE),
    ("group", -3, BAD_SIZE), ("seq", 0, BAD_SIZE), ("seq", 2**31, BAD_SIZE),
    ("seq", 2**62, BAD_SIZE), ("lengths", LENGTHS, BAD_SIZE), ("block_table", TABLE, BAD_SIZE),
    ("keys.data", 0, NULL_POINTER), ("keys.dtype", 3, BAD_DTYPE), ("keys.dtype", -1, BAD_DTYPE),
    ("keys.dim", 0, BAD_SIZE), ("keys.dim", 1025, BAD_SIZE), ("values.data", 0, NULL_POINTER),
    ("values.dtype", 9, BAD_DTYPE), ("values.dim", -6, BAD_SIZE), ("query", 0, NULL_POINTER),
    ("query_dtype", 4, BAD_DTYPE), ("lead_kind", 3, BAD_DTYPE), ("lead_kind", -1, BAD_DTYPE),
    ("lead_rank", 0, BAD_SIZE), ("lead_rank", RANK + 2, BAD_SIZE), ("lead.data", 0, NULL_POINTER),
    ("lead.dtype", 2, BAD_DTYPE), ("lead.dtype", 7, BAD_DTYPE), ("lead.dim", 5, BAD_SIZE),
    ("lead.row_stride", 63, BAD_SIZE), ("scales", 0, NULL_POINTER), ("lead_query", 0, NULL_POINTER),
    ("lead_query_dtype", 5, BAD_DTYPE), ("reduce", 3, BAD_DTYPE), ("reduce", -1, BAD_DTYPE),
    ("count", 0, BAD_SIZE), ("count", -1, BAD_SIZE), ("wanted", torch.tensor([1, -1]), BAD_SIZE),
    ("sinks", -1, BAD_SIZE), ("recents", -1, BAD_SIZE), ("out", 0, NULL_POINTER),
    ("indices", 0, NULL_POINTER), ("indices_width", 0, BAD_SIZE), ("counts", 0, NULL_POINTER),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value", "status"), WRONG)
def test_a_wrong_field_has_a_status_and_writes_nothing(native_library, field, value, status):
    out = torch.full((BATCH, HEADS, VALUE_DIM), 7.0)
    indices, counts = torch.full((BATCH, KV_HEADS, 5), 7), torch.full((BATCH, KV_HEADS), 7)
    fields = {
        "batch": BATCH, "kv_heads": KV_HEADS, "group": HEADS // KV_HEADS, "seq": SEQ,
        **rows("keys", KEYS), **rows("values", VALUES), "scaling": 0.2,
        **query("query", QUERY), **query("lead_query", QUERY), "lead_kind": 1,
        "lead_rank": RANK, **rows("lead", CODES.data, dtype=3), "scales": SCALES,
        "scales_batch_stride": 80, "scales_head_stride": 40, "query_map": MAP, "count": 5,
        "out": out, "indices": indices, "indices_width": 5, "counts": counts,
    }  # fmt: skip
    results = (out, indices, counts)
    assert native_library.loki_step(pack("loki_call", fields | {field: value})) == status
    assert all(bool((held == 7).all()) for held in results)
    assert native_library.loki_step(pack("loki_call", fields)) == OK
    assert not any(bool((held == 7).all()) for held in results)


def test_an_index_outside_has_a_status(native_library):
    indices, counts = torch.full((BATCH, KV_HEADS, 1), SEQ), torch.ones(BATCH, KV_HEADS).long()
    fields = {
        "batch": BATCH, "kv_heads": KV_HEADS, "group": 2, "seq": SEQ, "out": torch.zeros(2, 4, 6),
        **rows("keys", KEYS), **rows("values", VALUES), "scaling": 0.2,
        **query("query", QUERY), "indices": indices, "indices_width": 1, "counts": counts,
    }  # fmt: skip
    assert native_library.loki_attend(pack("loki_call", fields)) == BAD_INDEX
    lengths = torch.tensor([SEQ, 4])
    indices.fill_(4)
    assert native_library.loki_attend(pack("loki_call", fields)) == OK
    ragged = pack("loki_call", fields | {"lengths": lengths})
    assert native_library.loki_attend(ragged) == BAD_INDEX
