"""Arguments of the native calls: tensors checked, and laid out as structs of native/loki_attn.h.

Every field of those structs is 8 bytes wide, so a struct is one `struct.pack`.
"""

from struct import Struct
from typing import Final

import torch
from torch import Tensor

from loki_attn.kernels.backends import Unserved
from loki_attn.tiles import TILE_ROWS, Tiles
from loki_attn.types import GroupReduce

CALL: Final = Struct("=4q4q6q6q4q2d3q2q6q3q4q2q2qd3q2q8q")
CHOOSE: Final = Struct("=3q3q3q3qqdqqq")
COLUMNS: Final = Struct("=6q6q5q2dq4q3q2q")
HAMMING: Final = Struct("=6q4q4qq")
APPEND: Final = Struct("=4q3q6q6q6q6qqq6q3q3qq")

FLOATS: Final = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
KINDS: Final = {"fp32": 0, "bf16": 1, "int8": 3, "int4": 4}
REDUCES: Final[dict[GroupReduce, int]] = {"softmax_sum": 0, "max": 1, "none": 2}
RECENCY: Final = 0
TILES: Final = 1
ROWS: Final = 2
NOTHING: Final = (0, 0, 0, 0, 0, 0)
_MOST_DIM: Final = 1024

Fields = tuple[int, ...]


def fits(name: str, tensor: Tensor, *shape: int) -> None:
    """Check sizes that others depend on: the library would read and write beside the memory.

    Raises:
        Unserved: If the tensor has another shape.
    """
    if tensor.shape != shape:
        raise Unserved(f"{name} must have the shape {list(shape)}, got {list(tensor.shape)}")


def dtype_of(name: str, tensor: Tensor) -> int:
    """The code of a floating dtype.

    Raises:
        Unserved: If the tensor is not on the CPU, of another dtype, or part of a gradient.
    """
    code = FLOATS.get(tensor.dtype)
    if code is None or not tensor.is_cpu:
        raise Unserved(
            f"it serves float32, bfloat16 and float16 on the CPU, and {name} is {tensor.dtype} on "
            f"{tensor.device}"
        )
    if tensor.requires_grad and torch.is_grad_enabled():
        raise Unserved(f"it has no gradients, and {name} asks for one")
    return code


def rows_of(name: str, rows: Tensor) -> Fields:
    """loki_rows of [batch, kv_heads, T, dim]; strides may be anything, the last one 1.

    Raises:
        Unserved: If the dtype, the device, the size or the layout of a row is not served.
    """
    code, size = dtype_of(name, rows), rows.element_size()
    batch, head, row, element = rows.stride()
    dim = rows.shape[3]
    if (element != 1 and dim > 1) or min(batch, head, row) < 0:
        raise Unserved(f"rows must be contiguous, and {name} has strides {rows.stride()}")
    if dim > _MOST_DIM:
        raise Unserved(f"it serves rows of up to {_MOST_DIM} elements, and {name} has {dim}")
    return rows.data_ptr(), code, dim, batch * size, head * size, row * size


def query_of(name: str, query: Tensor) -> Fields:
    """Pointer, dtype and strides of [batch, heads, 1, dim].

    Raises:
        Unserved: As `rows_of`.
    """
    code, size = dtype_of(name, query), query.element_size()
    if query.stride(3) != 1 and query.shape[3] > 1:
        raise Unserved(f"{name} must be contiguous in its last dimension")
    return query.data_ptr(), code, query.stride(0) * size, query.stride(1) * size


def queries_of(name: str, query: Tensor) -> Fields:
    """Pointer, dtype and strides of [batch, heads, q_len, dim].

    Raises:
        Unserved: As `rows_of`.
    """
    return *query_of(name, query), query.stride(2) * query.element_size()


def codes_of(name: str, codes: Tensor) -> Fields:
    """Pointer and strides of int32 [batch, heads, rows, words].

    Raises:
        Unserved: If they are of another dtype or layout, or not on the CPU.
    """
    batch, head, row, word = codes.stride()
    if codes.dtype != torch.int32 or not codes.is_cpu or (word != 1 and codes.shape[3] > 1):
        raise Unserved(f"{name} must be contiguous words of int32 on the CPU, got {codes.dtype}")
    return codes.data_ptr(), batch * 4, head * 4, row * 4


def tiles_of(tiles: Tiles) -> Fields:
    """loki_rows of the lead plane, a row being a tile.

    Raises:
        Unserved: If the tiles are not on the CPU, their lines do not lie together, or they are too
            few for their rows.
    """
    data, size = tiles.data, tiles.data.element_size()
    batch, head, tile, *inner = data.stride()
    width = data.shape[5]
    if not data.is_cpu or inner != [16 * width, width, 1]:
        raise Unserved("the lines of a tile must lie together on the CPU")
    if data.shape[2] * TILE_ROWS < tiles.length:
        raise Unserved(f"{data.shape[2]} tiles cannot hold {tiles.length} rows")
    lines = data.shape[3]
    return data.data_ptr(), KINDS[tiles.kind], lines, batch * size, head * size, tile * size


def scales_of(scales: Tensor | None, batch: int, kv_heads: int, rows: int) -> Fields:
    """Pointer and strides of float16 [batch, kv_heads, rows].

    Raises:
        Unserved: If they are of another shape, dtype or layout, or not on the CPU.
    """
    if scales is None:
        return (0, 0, 0)
    fits("the scales", scales, batch, kv_heads, rows)
    apart = scales.stride(2) != 1 and rows > 1
    if scales.dtype != torch.float16 or apart or not scales.is_cpu:
        raise Unserved(f"scales are contiguous float16 on the CPU, got {scales.dtype}")
    return scales.data_ptr(), scales.stride(0) * 2, scales.stride(1) * 2


def visible_of(visible: Tensor | None, batch: int, seq: int) -> tuple[Tensor | None, Fields]:
    """A mask that is the same for all heads, as bytes: the tensor to keep alive, and its fields.

    Raises:
        Unserved: If it is no such mask.
    """
    if visible is None:
        return None, (0, 0)
    fits = visible.ndim == 4 and visible.shape[1:] == (1, 1, seq) and visible.dtype == torch.bool
    if not fits or visible.shape[0] not in (1, batch) or not visible.is_cpu:
        raise Unserved(
            f"a mask is bool [batch or 1, 1, 1, {seq}] on the CPU, got {visible.dtype} "
            f"{list(visible.shape)}"
        )
    kept = visible if visible.stride(3) == 1 or seq == 1 else visible.contiguous()
    return kept, (kept.data_ptr(), kept.stride(0) if kept.shape[0] > 1 else 0)


def matrix_mask_of(
    visible: Tensor | None, shape: tuple[int, int, int, int]
) -> tuple[Tensor | None, Fields]:
    """What each query sees, as bytes: the tensor to keep alive, and its fields.

    Args:
        visible: None, or bool [batch or 1, kv_heads or 1, q_len, seq].
        shape: Batch, KV heads, queries and rows.

    Raises:
        Unserved: If it is no such mask.
    """
    if visible is None:
        return None, (0, 0, 0, 0)
    alike = visible.ndim == 4 and all(
        size in fit
        for size, fit in zip(
            visible.shape, ((1, shape[0]), (1, shape[1]), shape[2:3], shape[3:]), strict=True
        )
    )
    if not alike or visible.dtype != torch.bool or not visible.is_cpu:
        raise Unserved(
            f"a mask is bool {list(shape)} on the CPU, or 1 of the first two, got {visible.dtype} "
            f"{list(visible.shape)}"
        )
    kept = visible if visible.stride(3) == 1 or shape[3] == 1 else visible.contiguous()
    return kept, (kept.data_ptr(), *kept.expand(shape).stride()[:3])


def bias_of(
    bias: Tensor | None, batch: int, kv_heads: int, seq: int
) -> tuple[Tensor | None, Fields]:
    """A number for each row as float32: the tensor to keep alive, its address and strides.

    Raises:
        Unserved: If there is not one for each row, or they are not on the CPU.
    """
    if bias is None:
        return None, (0, 0, 0)
    fits("the bias", bias, batch, kv_heads, seq)
    dtype_of("the bias", bias)
    kept = bias.detach().to(torch.float32)
    kept = kept if kept.stride(2) == 1 or seq == 1 else kept.contiguous()
    return kept, (kept.data_ptr(), kept.stride(0) * 4, kept.stride(1) * 4)


def sinks_of(sink_logits: Tensor | None, heads: int) -> tuple[Tensor | None, int]:
    """Sink logits as contiguous float32: the tensor to keep alive, and its address.

    Raises:
        Unserved: If there is not one for each query head, or they are not on the CPU.
    """
    if sink_logits is None:
        return None, 0
    fits("sink logits", sink_logits, heads)
    if not sink_logits.is_cpu:
        raise Unserved(f"it serves tensors on the CPU, and sink logits are on {sink_logits.device}")
    kept = sink_logits.detach().to(torch.float32).contiguous()
    return kept, kept.data_ptr()
