"""Random decode steps for differential tests: odd sizes, odd layouts, poison beside the rows."""

import math
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from loki_attn import tiles
from loki_attn.kernels import native
from loki_attn.select.loki import quantise_rows
from loki_attn.tiles import Tiles
from loki_attn.types import AttentionCall

NAN = float("nan")
BITS = {"int8": 8, "int4": 4}
KINDS = ["int8", "int4", "bf16", "fp32"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DIMS = [1, 5, 16, 33, 40, 64, 80, 96, 128]
EDGES = [1, 2, 15, 16, 17, 31, 32, 33, 511, 512, 513, 1024, 1030]
LAYOUTS = ["plain", "view", "by token"]


@dataclass(frozen=True, repr=False)
class Scene:
    """One decode step. What a kernel gets may hold poison; the truth is made of what is clean."""

    query: Tensor
    keys: Tensor
    values: Tensor
    visible: Tensor | None
    call: AttentionCall
    clean_keys: Tensor
    clean_values: Tensor
    numbers: str

    def __repr__(self):
        sizes = [list(rows.shape) for rows in (self.query, self.keys, self.values)]
        masked = None if self.visible is None else int(self.visible.sum())
        return f"Scene({sizes}, {self.query.dtype}, {self.numbers}, {masked} visible, {self.call})"

    @property
    def seq(self):
        return self.keys.shape[2]

    @property
    def group(self):
        return self.query.shape[1] // self.keys.shape[1]

    @property
    def seen(self):
        """bool [batch, 1, 1, seq], whether a mask was given or not."""
        shape = (self.query.shape[0], 1, 1, self.seq)
        if self.visible is None:
            return torch.ones(shape, dtype=torch.bool)
        return self.visible.expand(shape)


@dataclass(frozen=True, repr=False)
class Plane:
    """A lead plane as a kernel gets it, and the same coordinates as plain numbers."""

    plane: Tiles
    scales: Tensor | None
    numbers: Tensor  # float64 [batch, kv_heads, seq, rank], codes times their scales

    def __repr__(self):
        return f"Plane({self.plane.kind}, {list(self.numbers.shape)})"


def each_isa():
    """Every instruction set in turn; what runs inside must have run on it."""
    for name in native.isas():
        with forced(name):
            yield name


@contextmanager
def forced(name):
    native.set_isa(name)
    yield
    assert native.last_isa() == name


@st.composite
def scenes(draw):
    """A decode step of random sizes, numbers, layouts, mask and soft-max."""
    seed = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    seq = draw(st.one_of(st.sampled_from(EDGES), st.integers(1, 140)))
    small = seq > 200
    numbers = draw(st.sampled_from(["normal"] * 4 + ["equal", "large", "tiny"]))
    batch = 4 if numbers == "large" else draw(st.integers(1, 2 if small else 5))
    kv_heads, group = draw(st.integers(1, 2 if small else 4)), draw(st.integers(1, 9))
    dim = draw(st.sampled_from(DIMS))
    value_dim = draw(st.one_of(st.just(dim), st.sampled_from(DIMS)))
    dtype = draw(st.sampled_from(DTYPES))
    query, keys, values = (
        torch.randn(size, generator=seed, dtype=torch.float64)
        for size in (
            (batch, kv_heads * group, 1, dim),
            (batch, kv_heads, seq, dim),
            (batch, kv_heads, seq, value_dim),
        )
    )
    if numbers == "equal":
        keys = keys[:, :, :1].expand_as(keys)
    factor = {"large": 30.0, "tiny": 1e-40}.get(numbers, 1.0)
    keys, values = keys * factor, values * (factor if numbers == "tiny" else 1.0)
    query, keys, values = (rows.to(dtype) for rows in (query, keys, values))
    visible = draw_mask(draw, seed, batch, seq)
    call = AttentionCall(
        scaling=dim**-0.5,
        softcap=draw(st.sampled_from([None, None, 3.0, 50.0])),
        sink_logits=torch.randn(kv_heads * group, generator=seed) if draw(st.booleans()) else None,
    )
    poison = draw(st.sampled_from([None, NAN, math.inf]))
    spoilt = [hide(rows, visible, poison) for rows in (keys, values)]
    laid = [laid_out(rows, draw(st.sampled_from(LAYOUTS))) for rows in spoilt]
    query = laid_out(query, draw(st.sampled_from(LAYOUTS[:2])))
    if draw(st.integers(0, 9)) == 0:  # one row of a batch, seen by all of it
        keys, values = laid = [rows[:1].expand_as(rows) for rows in (keys, values)]
    return Scene(query, *laid, visible, call, keys, values, numbers)


def draw_mask(draw, seed, batch, seq):
    """None, or bool [batch or 1, 1, 1, seq]; sometimes a batch row sees nothing."""
    if draw(st.booleans()):
        return None
    share = draw(st.sampled_from([0.05, 0.5, 0.95]))
    shape = (draw(st.sampled_from([1, batch])), 1, 1, seq)
    visible = torch.rand(shape, generator=seed) < share
    if draw(st.integers(0, 4)):
        visible[..., draw(st.integers(0, seq - 1))] = True
    return laid_out(visible, draw(st.sampled_from(["plain", "view"])))


def hide(rows, visible, poison):
    """Rows that nobody sees hold poison."""
    if visible is None or poison is None:
        return rows
    return rows.masked_fill(~visible[:, :, 0, :, None], poison)


def laid_out(rows, layout):
    """The same rows inside other memory, which holds poison (True in a mask)."""
    poison = True if rows.dtype == torch.bool else NAN
    batch, heads, seq, dim = rows.shape
    if layout == "view":
        around = rows.new_full((batch + 1, heads + 2, seq + 3, dim + 5), poison)
        inside = around[1:, 1 : heads + 1, 2 : seq + 2, 3 : dim + 3]
    elif layout == "by token":
        around = rows.new_full((batch, seq + 2, heads, dim), poison)
        inside = around[:, 1 : seq + 1].transpose(1, 2)
    else:
        return rows.contiguous()
    return inside.copy_(rows)


@st.composite
def planes(draw, batch, kv_heads, seq, visible=None, *, equal=False):
    """A lead plane of any kind, with poison in the columns and scales of no row."""
    seed = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rank = draw(st.one_of(st.integers(1, 40), st.sampled_from([64, 65])))
    kind = draw(st.sampled_from(KINDS))
    size = torch.rand(batch, kv_heads, seq, 1, generator=seed)
    size = size * draw(st.sampled_from([1.0, 1.0, 100.0, 1e-3]))
    rows = torch.randn(batch, kv_heads, seq, rank, generator=seed) * size
    if equal:
        rows = rows[:, :, :1].expand_as(rows)
    scales = None
    if kind in BITS:
        rows, scales = quantise_rows(rows, BITS[kind])
    held = tiles.pack(rows, kind)
    numbers = held.rows().double()
    spoil_columns(held, visible)
    if scales is not None:
        numbers = numbers * scales.double()[..., None]
        around = scales.new_full((batch + 1, kv_heads, seq + 7), NAN)
        hidden = torch.zeros(1, 1, seq) if visible is None else ~visible[:, :, 0]
        scales = around[1:, :, 3 : seq + 3].copy_(scales.masked_fill(hidden.bool(), NAN))
    return Plane(held, scales, numbers)


def spoil_columns(held, visible):
    """Set all bits of the columns that hold no visible row: NaN, where numbers have one."""
    room = held.data.shape[2] * 16
    unused = (torch.arange(room) >= held.length)[None]
    if visible is not None:
        unused = unused | functional.pad(~visible[:, 0, 0], (0, room - held.length))
    words = held.data.view(torch.int32)
    words.masked_fill_(unused.unflatten(1, (-1, 16))[:, None, :, None, :, None], -1)
