"""Calls of the C interface by the names of their fields, as native/loki_attn.h declares them."""

import re
from functools import cache
from pathlib import Path
from struct import Struct

import torch

HEADER = Path(__file__).parents[2] / "native" / "loki_attn.h"
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
KINDS = {"fp32": 0, "bf16": 1, "int8": 3, "int4": 4}
RECENCY, TILES, ROWS = 0, 1, 2
REDUCES = {"softmax_sum": 0, "max": 1, "none": 2}
(OK, NULL_POINTER, BAD_SIZE, BAD_DTYPE, BAD_INDEX) = range(5)


@cache
def layout(name):
    """Names and format letters of the fields of a struct; every one of them is 8 bytes wide."""
    text = re.sub(r"//[^\n]*", "", HEADER.read_text(encoding="utf-8"))
    (body,) = re.findall(rf"typedef struct \{{([^}}]*)\}} {name};", text)
    fields = []
    for declaration in filter(None, (part.strip() for part in body.split(";"))):
        kind, names = re.fullmatch(r"(?:const )?(\w+\b\s*\**)\s*(.*)", declaration).groups()
        for field in re.split(r",\s*", names):
            if kind.strip() == "loki_rows":
                fields += [(f"{field}.{inner}", letter) for inner, letter in layout("loki_rows")]
            else:
                assert "*" in kind or kind.strip() in {"int64_t", "double"}, declaration
                fields.append((field, "d" if kind.strip() == "double" else "q"))
    return tuple(fields)


def letters(name):
    """The format of a struct, a letter per field."""
    return "".join(letter for _, letter in layout(name))


def pack(name, fields):
    """The bytes of a struct; fields that are not named are 0, tensors become their address."""
    known = dict(layout(name))
    assert fields.keys() <= known.keys(), fields.keys() - known.keys()
    values = [fields.get(field, 0) for field in known]
    plain = [v.data_ptr() if isinstance(v, torch.Tensor) else v for v in values]
    return Struct("=" + letters(name)).pack(*plain)


def rows(name, tensor, **more):
    """Fields of a loki_rows from [batch or pages, heads, rows, dim]; `more` replaces some."""
    size = tensor.element_size()
    batch, head, row = (step * size for step in tensor.stride()[:3])
    fields = {
        "data": tensor, "dtype": DTYPES.get(tensor.dtype), "dim": tensor.shape[3],
        "batch_stride": batch, "head_stride": head, "row_stride": row, **more,
    }  # fmt: skip
    return {f"{name}.{field}": value for field, value in fields.items()}


def tiles(data, kind):
    """Fields of a lead of tiles from [batch or pages, heads, tiles, lines, 16, width]."""
    return rows("lead", data, dtype=KINDS[kind])


def query(name, tensor):
    """Fields of a query [batch, heads, 1, dim]."""
    size = tensor.element_size()
    return {
        name: tensor,
        f"{name}_dtype": DTYPES[tensor.dtype],
        f"{name}_batch_stride": tensor.stride(0) * size,
        f"{name}_head_stride": tensor.stride(1) * size,
    }


def scales(tensor):
    """Fields of float16 scales [batch or pages, heads, rows]."""
    return {
        "scales": tensor,
        "scales_batch_stride": tensor.stride(0) * 2,
        "scales_head_stride": tensor.stride(1) * 2,
    }
