"""The bench on a device, with the processor in its place: rows, refusals, nothing that aborts."""

import json
from contextlib import contextmanager
from dataclasses import asdict, replace

import pytest
import torch

from loki_attn.bench import cuda_device, device_place
from loki_attn.bench.decode import DecodeBench, measure_decode
from loki_attn.bench.device_clock import Uncapturable
from loki_attn.bench.device_place import DevicePlace
from loki_attn.bench.gate import Gate, Verdict
from loki_attn.bench.shapes import Shape
from loki_attn.errors import InputError, LokiAttnError
from loki_attn.kernels import backends

SHAPE = Shape(name="small", num_heads=6, num_kv_heads=2, head_dim=32)
BENCH = DecodeBench(
    shape=SHAPE,
    contexts=(96,),
    amounts=("48",),
    planes=("int8", "bf16"),
    rank=8,
    batch=2,
    repeats=3,
    warm_up=1,
    device="cuda",
    command="loki-attn bench decode --device cuda",
)


class Pretended:
    """The processor under the name of a device; a step takes a nanosecond, a copy ten."""

    name = "cuda"
    torch_device = torch.device("cpu")
    cache_bytes = 10_000
    copied_bytes = 1000
    sample_bytes = 1

    def __init__(self, free=1 << 30, refuse=False):
        self.free, self.refuse = free, refuse
        self.now = self.began = 0
        self.ended = 0

    def free_bytes(self):
        return self.free

    def facts(self):
        return {"gpu": "Pretended 1", "gpu_sm_count": 2}

    def capture(self, work):
        if self.refuse:
            raise Uncapturable("it waits")
        self.now += 1
        result = work()

        def replay():
            self.now += 1000

        return replay, result

    def begin(self):
        self.began = self.now

    def elapsed_ns(self):
        self.now += 10
        return self.now - self.began

    def copy(self):
        self.now += 10
        return 400

    def end(self):
        self.ended += 1


@contextmanager
def silent(title, turns):
    del title, turns
    yield lambda done, name: None


@pytest.fixture(autouse=True)
def plain_backend(monkeypatch):
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "reference")


def measured(bench=BENCH, device=None, news=None):
    place = DevicePlace(device or Pretended())
    tell = (lambda line: None) if news is None else news.append
    return measure_decode(bench, tell, silent, place)


@pytest.fixture(scope="module")
def outcome():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(backends.ENVIRONMENT_VARIABLE, "reference")
        return measured(replace(BENCH, parts=True))


def test_everybody_has_a_row_or_a_reason(outcome):
    assert outcome.failures == {}
    names = {row.contender for row in outcome.rows}
    loki = {"loki int8 k=48", "loki bf16 k=48"}
    parts = {f"{name}: {part}" for name in loki for part in ("score", "choose", "attend")}
    dense = {"sdpa-hf", "sdpa-flash-hf", "sdpa-group-rows", "sdpa-flash-group-rows"}
    assert loki | parts | dense | {"eager-group-rows", "exact-topk k=48"} <= names
    assert outcome.left_out["dense-native"] == ("backend reference has no dense kernel of its own")
    libraries = {"flash-attn", "flash-attn-3", "flashinfer"}
    assert libraries <= names | set(outcome.left_out)


def test_rows_say_where_and_how_they_were_timed(outcome):
    for row in outcome.rows:
        assert (row.device, row.timed_by, row.backend) == ("cuda", "graph replay", "reference")
        assert row.read_by == "copy, read + written"
        assert row.provenance["device"] == "cuda"
        assert (row.provenance["gpu"], row.provenance["gpu_sm_count"]) == ("Pretended 1", 2)
        assert row.provenance["command"] == BENCH.command
        assert (row.eager_us is None) == (row.part is not None)
        assert row.gate["verdict"] == "passed"
        assert row.gate["pairs"] == [4, 4]
        assert row.last_level_cache_bytes == 10_000
        assert row.samples == 3
        json.dumps(asdict(row), allow_nan=False)


def test_figures_of_a_row_agree(outcome):
    medians = {row.contender: row.median_us for row in outcome.rows if row.part is None}
    for row in outcome.rows:
        # Copies of 400 bytes in 10 ns; the clock adds 10 to all four of them.
        assert row.read_gb_per_s == pytest.approx(4 * 400 / 50)
        assert row.gb_per_s == pytest.approx(row.bytes_touched / row.median_us / 1e3)
        if row.kind == "loki" and row.part is None:
            assert row.share_of_byte_limit == pytest.approx(row.gb_per_s / row.read_gb_per_s)
            dense = {r.contender for r in outcome.rows if r.kind in {"torch", "library", "dense"}}
            fastest = min(medians[name] for name in dense)
            assert row.best_dense in dense
            assert medians[row.best_dense] == fastest
            assert row.ratio_best_dense == pytest.approx(fastest / row.median_us)
            assert (
                row.ratio_best_torch <= row.ratio_best_dense * 1.0001 or "flash" in row.best_dense
            )
        else:
            assert row.ratio_best_dense is row.best_dense is None


def test_layers_keep_every_visit_cold(outcome):
    for row in outcome.rows:
        assert row.bytes_between_visits >= 4 * 10_000
        assert row.layers > 1


def test_what_no_graph_holds_is_timed_by_events():
    news = []
    outcome = measured(device=Pretended(refuse=True), news=news)
    assert outcome.rows
    said = "sdpa-hf at 96 tokens, batch 2 is timed by events, because no graph holds it: it waits"
    assert said in news
    assert {row.timed_by for row in outcome.rows} == {"events"}


def test_a_context_that_does_not_fit_is_left_out_and_the_others_are_measured():
    device = Pretended(free=2_000_000)
    outcome = measured(replace(BENCH, contexts=(100_000, 96)), device)
    assert {row.context for row in outcome.rows} == {96}
    assert outcome.failures == {}
    assert (
        "GB with what its steps need, more than the"
        in (outcome.left_out["100,000 tokens, batch 2"])
    )
    assert device.ended == 2


def test_memory_that_runs_out_leaves_out_who_needed_it_or_the_context(monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    own = torch.softmax
    monkeypatch.setattr(
        torch, "softmax", lambda rows, *a, **k: full() if "dtype" in k else own(rows, *a, **k)
    )
    outcome = measured()
    key = "eager-group-rows at 96 tokens, batch 2"
    assert outcome.left_out[key] == "it needs more memory than the device has free"
    assert "eager-group-rows" not in {row.contender for row in outcome.rows}
    assert outcome.rows
    monkeypatch.undo()
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "reference")
    monkeypatch.setattr(device_place, "draw_layers", full)
    outcome = measured()
    assert outcome.rows == []
    assert "CUDA out of memory" in outcome.left_out["96 tokens, batch 2"]


def breaking(monkeypatch, broken, error):
    """Make one contender's recording raise."""
    own = device_place.record

    def record(contender, layers, watch):
        if contender.name == broken:
            raise error
        return own(contender, layers, watch)

    monkeypatch.setattr(device_place, "record", record)


@pytest.mark.parametrize(
    ("broken", "error", "fails"),
    [
        ("sdpa-flash-hf", RuntimeError("\nNo available kernel. Aborting.\nmore"), False),
        ("loki int8 k=48", LokiAttnError("no int8 here"), False),
        ("loki int8 k=48", KeyError("a bug of ours"), True),
    ],
)
def test_who_breaks_has_no_row_and_the_others_have(monkeypatch, broken, error, fails):
    breaking(monkeypatch, broken, error)
    news = []
    outcome = measured(news=news)
    key = f"{broken} at 96 tokens, batch 2"
    said = (outcome.failures if fails else outcome.left_out)[key]
    assert said in {
        "RuntimeError: No available kernel. Aborting.", "no int8 here", "KeyError: 'a bug of ours'"
    }  # fmt: skip
    assert any("a bug of ours" in line for line in news) == fails
    names = {row.contender for row in outcome.rows}
    assert broken not in names
    assert {"sdpa-hf", "loki bf16 k=48"} <= names


def test_what_a_replay_wrote_is_judged(monkeypatch):
    seen = []
    own = Gate.judge

    def judge(self, contender, found=None):
        seen.append((contender.name, found is not None))
        if contender.name == "sdpa-hf":
            return Verdict(passed=False, largest_error=1.0, allowed=0.1, reason="it is off")
        return own(self, contender, found)

    monkeypatch.setattr(Gate, "judge", judge)
    outcome = measured()
    assert all(given for _, given in seen)
    assert outcome.failures == {"sdpa-hf at 96 tokens, batch 2": "it is off"}
    assert "sdpa-hf" not in {row.contender for row in outcome.rows}


def test_the_backend_is_the_one_of_the_device_unless_one_is_asked_for(monkeypatch):
    assert DevicePlace(Pretended()).backend == "reference"
    monkeypatch.delenv(backends.ENVIRONMENT_VARIABLE)
    asked = []

    def resolve(name, device):
        asked.append((name, device))
        return backends.Accepted("triton", backends)

    monkeypatch.setattr(backends, "resolve", resolve)
    assert DevicePlace(Pretended()).backend == "triton"
    assert asked == [(None, "cuda")]


def test_without_a_gpu_cuda_is_refused_in_words(monkeypatch):
    monkeypatch.setattr(cuda_device.torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        InputError, match=r"there is no CUDA device here: torch .* use device='cpu'"
    ):
        measure_decode(BENCH, print, silent)


@pytest.mark.gpu
def test_a_real_device_replays_what_is_right(monkeypatch):
    monkeypatch.delenv(backends.ENVIRONMENT_VARIABLE)
    bench = replace(BENCH, shape=Shape(name="s", num_heads=8, num_kv_heads=2, head_dim=64), rank=32)
    outcome = measure_decode(replace(bench, contexts=(1024,), layers=3), print, silent)
    assert outcome.failures == {}
    loki = [row for row in outcome.rows if row.kind == "loki"]
    assert {row.timed_by for row in loki} == {"graph replay"}
    assert all(row.provenance["gpu_sm_count"] > 0 for row in loki)
