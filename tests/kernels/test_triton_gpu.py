"""The Triton kernels on a GPU: shapes of real models against float64, graphs, and no waiting."""

from dataclasses import replace

import pytest
import torch
from native_truth import Estimate, agreed, check_selection, lead_logits, marked
from triton_scenes import check_attended, kernels, lead_of, normal

from loki_attn.kernels import reference
from loki_attn.types import AttentionCall, Reading

pytestmark = pytest.mark.gpu

# Query heads, KV heads, head_dim.
LLAMA_3_1_8B = (32, 8, 128)
LLAMA_2_7B = (32, 32, 128)
BATCH, RANK = 2, 32
LENGTHS = [8192, 32 * 1024 + 5]


@pytest.fixture(autouse=True)
def hardware():
    """These laws are about the device: in the interpreter they would say nothing."""
    if kernels.interpreted():
        pytest.skip("TRITON_INTERPRET is set: these kernels would run in the interpreter")


class Model:
    """One layer of a model, made on the device, with a lead plane of its keys."""

    def __init__(self, heads, kv_heads, dim, seq, kind, batch=BATCH):
        draw = torch.Generator("cuda").manual_seed(seq)

        def drawn(*size):
            return torch.randn(size, generator=draw, device="cuda", dtype=torch.bfloat16)

        self.query = drawn(batch, heads, 1, dim)
        self.keys, self.values = (drawn(batch, kv_heads, seq, dim) for _ in range(2))
        self.map = torch.linalg.qr(normal(kv_heads, dim, dim)).Q[..., :RANK].contiguous().cuda()
        plane = self.keys[..., :RANK] if kind == "rows" else self.keys.float() @ self.map
        self.lead, self.numbers = lead_of(plane, kind, self.map)
        self.call = AttentionCall(scaling=dim**-0.5)

    def step(self, reading, how, visible=None):
        rows = (self.query, self.query, self.keys, self.values)
        return kernels.step(*rows, self.lead, reading, how, self.call, visible)


@pytest.mark.parametrize("seq", LENGTHS)
@pytest.mark.parametrize("heads", [LLAMA_3_1_8B, LLAMA_2_7B], ids=["llama-3.1-8b", "llama-2-7b"])
@pytest.mark.parametrize(
    ("kind", "how", "count"),
    [
        ("int8", "softmax_sum", 2048),
        ("int4", "softmax_sum", 512),
        ("bf16", "max", 1024),
        ("fp32", "none", 700),
        ("rows", "softmax_sum", 4097),
    ],
)
def test_steps_of_real_models(heads, seq, kind, how, count):
    """The whole choice of a sample of KV heads, and their output, against float64."""
    model = Model(*heads, seq, kind)
    group = heads[0] // heads[1]
    reading = Reading(counts=count, sinks=4, recents=64, most=count)
    out, selection = model.step(reading, how)
    must = reference.protect(torch.ones(BATCH, 1, 1, seq, dtype=torch.bool), 4, 64)
    shown = torch.ones_like(must)
    for kv in (0, heads[1] - 1):
        query, keys, values = (
            rows[:, part].cpu()
            for rows, part in (
                (model.query, slice(kv * group, (kv + 1) * group)),
                (model.keys, slice(kv, kv + 1)),
                (model.values, slice(kv, kv + 1)),
            )
        )
        mine = slice(kv * group, (kv + 1) * group) if how == "none" else slice(kv, kv + 1)
        chosen = replace(
            selection,
            indices=selection.indices[:, mine].cpu(),
            counts=selection.counts[:, mine].cpu(),
        )
        numbers = model.numbers[:, kv : kv + 1].cpu()
        tiles = None if kind == "rows" else kind
        logits = lead_logits(query, model.map[kv : kv + 1].cpu(), numbers, tiles, model.call)
        scores = agreed(logits, 1, how, shown, model.call)
        check_selection(
            chosen, Estimate(scores.value, scores.margin), shown, must, ties_are_exact=False
        )
        mask = marked(chosen.indices, seq, group)
        mine = out[:, kv * group : (kv + 1) * group].cpu()
        check_attended(mine, query, keys, values, mask, model.call)


@pytest.mark.parametrize("kind", ["int8", "rows"])
def test_a_step_over_more_rows_than_32_bits_count_in_bytes(kind):
    """Offsets of the last head of the last batch row lie beyond 2**31 elements."""
    heads, kv_heads, dim, seq = 32, 32, 128, 300_000
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GiB of device memory")
    keys = torch.zeros(BATCH, kv_heads, seq, dim, dtype=torch.bfloat16, device="cuda")
    keys[-1, -1, 123_456] = 1.0
    query = torch.ones(BATCH, heads, 1, dim, dtype=torch.bfloat16, device="cuda")
    model = Model(heads, kv_heads, dim, 16, kind)
    coordinates = keys[..., :RANK]
    lead, _ = lead_of(coordinates if kind == "rows" else coordinates.float(), kind)
    lead = replace(
        lead, query_map=torch.eye(dim)[:, :RANK].expand(kv_heads, -1, -1).contiguous().cuda()
    )
    reading = Reading(counts=1, most=1)
    out, selection = kernels.step(query, query, keys, keys, lead, reading, "max", model.call, None)
    assert int(selection.indices[-1, -1, 0]) == 123_456
    assert bool((out[-1, -1] == 1).all())


class Graph:
    """A step over pages, captured: what grows is read from the device at each replay."""

    def __init__(self, model, held, most):
        self.model, self.held = model, held
        self.reading = Reading(
            counts=torch.full((BATCH,), most, device="cuda"), sinks=4, recents=64, most=most
        )

    def run(self):
        args = (self.model.query, self.model.query, self.model.lead, self.reading, "softmax_sum")
        return kernels.step_over(self.held, *args, self.model.call)

    def captured(self):
        """The graph, and the tensors that a replay fills."""
        self.run()  # compiles
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out, selection = self.run()
        return graph, out, selection


def test_a_captured_step_follows_growing_rows():
    """Replays equal eager steps bit by bit as rows are appended within the same graph."""
    capacity, most = 4096, 512
    model = Model(*LLAMA_3_1_8B, capacity, "int8")
    lengths = torch.full((BATCH,), 700, dtype=torch.int32, device="cuda")
    held = kernels.Held(keys=model.keys, values=model.values, lengths=lengths)
    work = Graph(model, held, most)
    graph, out, selection = work.captured()
    for length in ([700, 1], [701, 513], [2050, 600], [4096, 4095]):
        lengths.copy_(torch.tensor(length))
        work.reading.counts.copy_(lengths.clamp(max=most))
        model.query.copy_(torch.randn_like(model.query))
        graph.replay()
        wanted, chosen = work.run()
        assert torch.equal(out, wanted)
        assert torch.equal(selection.indices, chosen.indices)
        assert selection.counts.tolist() == [[min(n, most)] * 8 for n in length]


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_nothing_waits_for_the_device():
    """With counts on the device and a bound on them a step asks nobody for a number."""
    model = Model(*LLAMA_3_1_8B, 2048, "int8")
    visible = torch.ones(BATCH, 1, 1, 2048, dtype=torch.bool, device="cuda")
    counts = torch.full((BATCH,), 300, device="cuda")
    reading = Reading(counts=counts, sinks=4, recents=64, most=512)
    model.step(reading, "softmax_sum", visible)
    torch.cuda.set_sync_debug_mode("error")
    try:
        out, selection = model.step(reading, "softmax_sum", visible)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert selection.indices.shape == (BATCH, 8, 512)
    assert bool(torch.isfinite(out).all())


def test_runs_repeat_bit_by_bit():
    """No result depends on which program comes first."""
    model = Model(*LLAMA_2_7B, 8192, "int8")
    reading = Reading(counts=1000, sinks=4, recents=64, most=1000)
    first = model.step(reading, "softmax_sum")
    for _ in range(5):
        again = model.step(reading, "softmax_sum")
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1].indices, again[1].indices)
