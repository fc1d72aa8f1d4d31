"""Compile every kernel of a step for a GPU that is not here; run as a program, prints JSON.

    python triton_offline.py ARCHITECTURE [also-rare] [few-but-largest]

A driver that only names its target takes the place of the one of the machine, and every launch
stops after compiling. What ptxas says of a kernel, it says once for each variant that is compiled.
Exit status 3, with the reason, where this Triton cannot be led so.
"""

import contextlib
import io
import json
import re
import sys

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from loki_attn.kernels import triton as kernels
from loki_attn.kernels.triton import device
from loki_attn.tiles import Tiles, tile_dtype, tiles_shape
from loki_attn.types import AppendRequest, AttentionCall, Lead, Reading

HEADS, DIM, RANK, DTYPE = 32, 128, 32, torch.bfloat16
RARE = "also-rare"  # ragged rows in pages, masks, recency, sums over queries
LARGEST = "few-but-largest"  # two kinds of lead, and rows and ranks of 256 float32
PAGE_ROWS = 64
NOT_HERE = 3
KINDS = ("int8", "rows") if LARGEST in sys.argv else ("int8", "int4", "bf16", "rows")
GROUPS = (4,) if LARGEST in sys.argv else (4, 1)


class Target:
    """A device of which only the name is known."""

    def __init__(self, architecture):
        self.target = GPUTarget("cuda", architecture, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, _device=None):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")

    def set_current_device(self, _device):
        """There is only one."""


def compile_only(shared):
    """Let every launch end when its kernel is compiled; `shared` gets the bytes it shares."""
    run = JITFunction.run

    def compiled(self, *args, grid, warmup, **kwargs):
        del warmup
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        shared[self.__name__] = max(shared.get(self.__name__, 0), kernel.metadata.shared)
        return kernel

    JITFunction.run = compiled
    device.device_types = lambda: ("cpu",)
    device.programs_wanted = lambda _: 132 * 8


class Layer:
    """Storage as a cache keeps it: room for whole blocks of rows, of which `seq` are held."""

    def __init__(self, kind, group, seq, *, pages=0, batch=1):
        kv_heads, room = HEADS // group, -(-seq // PAGE_ROWS) * PAGE_ROWS
        first = (pages, kv_heads, PAGE_ROWS) if pages else (batch, kv_heads, room)
        self.room = torch.zeros(*first, DIM, dtype=DTYPE)
        self.rows = self.room if pages else self.room[:, :, :seq]
        self.query = torch.zeros(batch, HEADS, 1, DIM, dtype=DTYPE)
        self.map = torch.zeros(kv_heads, DIM, RANK)
        self.tiles = self.scales = None
        plane = {"rows": self.rows[..., :RANK], "recency": None}.get(kind)
        if kind not in ("rows", "recency"):
            data = torch.zeros(tiles_shape(*first, kind, RANK), dtype=tile_dtype(kind))
            plane = self.tiles = Tiles(data, kind, RANK, self.rows.shape[2])
        if kind in ("int8", "int4"):
            self.scales = torch.zeros(first, dtype=torch.float16)
        held = None if self.scales is None else self.scales[:, :, : self.rows.shape[2]]
        self.lead = Lead(plane, held, self.map)

    def step(self, count, *, masked=False):
        counts, visible, how = count, None, "softmax_sum"
        if masked:
            batch, seq = self.rows.shape[0], self.rows.shape[2]
            counts = torch.ones(batch, dtype=torch.int64)
            visible = torch.ones(batch, 1, 1, seq, dtype=torch.bool)
        reading = Reading(counts=counts, sinks=4, recents=64, most=count)
        call, rows = (
            AttentionCall(scaling=DIM**-0.5),
            (self.query, self.query, self.rows, self.rows),
        )
        kernels.step(*rows, self.lead, reading, how, call, visible)

    def step_over_pages(self, count, pages):
        table = torch.zeros(1, pages, dtype=torch.int32)
        held = kernels.Held(
            keys=self.rows, values=self.rows, pages=table, lengths=torch.ones(1, dtype=torch.int32)
        )
        counts = torch.ones(1, dtype=torch.int64)
        reading = Reading(counts=counts, sinks=4, recents=64, most=count)
        call = AttentionCall(scaling=DIM**-0.5)
        kernels.step_over(held, self.query, self.query, self.lead, reading, "softmax_sum", call)

    def append(self):
        new, tiled = self.rows[:, :, :1].contiguous(), self.tiles is not None
        start = torch.zeros(1, dtype=torch.int64)
        request = AppendRequest(
            key=new, value=new, keys=self.room, values=self.room, positions=None, start=start,
            first_position=0, lead=self.tiles, lead_scales=self.scales,
            key_map=self.map if tiled else None,
        )  # fmt: skip
        kernels.append(request)


def compile_steps(*, also_rare):
    """Every kind of lead, with groups and without; appending; and what is rare."""
    for kind in KINDS:
        for group in GROUPS:
            Layer(kind, group, 2049).step(512)
        Layer(kind, 4, 2049).append()
    if also_rare:
        Layer("int8", 4, 0, pages=40).step_over_pages(512, 33)
        Layer("int8", 4, 2049, batch=2).step(512, masked=True)
        Layer("recency", 4, 2049).step(512)
        compile_sums(2049)


def compile_sums(seq):
    """What evictions and hashed codes ask for, of storage as a cache keeps it."""
    room = -(-seq // PAGE_ROWS) * PAGE_ROWS
    query = torch.zeros(1, HEADS, 64, DIM, dtype=DTYPE)
    keys = torch.zeros(1, HEADS // 4, room, DIM, dtype=DTYPE)[:, :, :seq]
    kernels.column_sums(query, keys, None, AttentionCall(scaling=DIM**-0.5), window=32)
    codes = torch.zeros(1, HEADS, 1, 4, dtype=torch.int32)
    held = torch.zeros(1, HEADS // 4, room, 4, dtype=torch.int32)[:, :, :seq]
    kernels.hamming(codes, held)


def grow(*, also_rare):
    """The same layers with more rows held and more of them read."""
    for kind in KINDS:
        for seq, count in ((4096, 512), (33333, 2047)):
            layer = Layer(kind, 4, seq)
            layer.step(count)
            layer.append()
    if also_rare:
        Layer("int8", 4, 0, pages=600).step_over_pages(2047, 544)
        Layer("int8", 4, 4096, batch=2).step(2047, masked=True)
        Layer("recency", 4, 4096).step(2047)
        compile_sums(4096)


def compile_largest():
    """The longest rows and ranks that are served, which take the most shared memory."""
    global DIM, RANK, DTYPE
    DIM, RANK, DTYPE = 256, 256, torch.float32
    for kind in ("int8", "rows"):
        layer = Layer(kind, 4, 2049)
        layer.step(512)
        layer.append()


def said(log):
    """What ptxas said: name, registers, spilled bytes of each kernel that it compiled."""
    kernels_said = re.split(r"Compiling entry function '", log.getvalue())[1:]
    log.seek(0)
    log.truncate()
    found = []
    for text in kernels_said:
        spilled = sum(map(int, re.findall(r"(\d+) bytes spill", text)))
        registers = re.search(r"Used (\d+) registers", text)
        found.append((text.split("'")[0], int(registers.group(1)), spilled))
    return found


def main(architecture, *, also_rare):
    target, shared, log = Target(architecture), {}, io.StringIO()
    driver.set_active(target)
    compile_only(shared)
    try:
        with contextlib.redirect_stdout(log):
            compile_steps(also_rare=also_rare)
            compiled = said(log)
            grow(also_rare=also_rare)
            grown = said(log)
            if LARGEST in sys.argv:
                compile_largest()
    except AttributeError as error:
        if error.obj is not target:
            raise
        print(f"this Triton asks its driver for {error.name!r}")  # noqa: T201
        return NOT_HERE
    print(json.dumps({"compiled": compiled, "grown": grown, "shared": shared}))  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), also_rare=RARE in sys.argv))
