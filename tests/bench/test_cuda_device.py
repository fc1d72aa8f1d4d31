"""What the bench asks of torch.cuda, with a torch.cuda that is made up: no GPU is needed."""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from loki_attn.bench import cuda_device
from loki_attn.bench.cuda_device import CudaDevice
from loki_attn.bench.device_clock import Uncapturable


class Event:
    """Events half a millisecond apart."""

    def __init__(self, *, enable_timing):
        assert enable_timing

    def record(self):
        self.recorded = True

    def synchronize(self):
        assert self.recorded

    def elapsed_time(self, other):
        assert self.recorded
        assert other.recorded
        return 0.5


class MadeUp:
    """Notes streams, recordings and modes; `recording` may raise when a recording ends."""

    def __init__(self):
        self.current, self.mode, self.pools, self.log = "own", 0, 0, []
        self.at_the_end = None

    def stands_for(self, monkeypatch):
        wait = SimpleNamespace(wait_stream=lambda other: None)
        members = {
            "is_available": lambda: True,
            "current_device": lambda: 0,
            "get_device_properties": lambda device: SimpleNamespace(
                name="Made Up 9", multi_processor_count=3, major=9, minor=0, total_memory=100,
                L2_cache_size=7,
            ),
            "graph_pool_handle": self.pool,
            "Event": Event,
            "Stream": lambda device: SimpleNamespace(wait_stream=lambda other: None),
            "stream": lambda stream: nullcontext(),
            "current_stream": lambda: wait,
            "set_stream": lambda stream: self.log.append(("stream", stream is wait)),
            "synchronize": lambda: self.log.append("synchronize"),
            "empty_cache": lambda: self.log.append("empty"),
            "mem_get_info": lambda device: (40, 100),
            "CUDAGraph": lambda: SimpleNamespace(replay=lambda: self.log.append("replay")),
            "graph": self.recording,
            "get_sync_debug_mode": lambda: self.mode,
            "set_sync_debug_mode": self.set_mode,
        }  # fmt: skip
        for name, member in members.items():
            monkeypatch.setattr(cuda_device.torch.cuda, name, member)
        return self

    def pool(self):
        self.pools += 1
        return self.pools

    def set_mode(self, mode):
        self.mode = mode

    @contextmanager
    def recording(self, graph, pool):
        self.log.append(("recording", pool))
        yield
        if self.at_the_end is not None:
            raise self.at_the_end


@pytest.fixture
def made_up(monkeypatch):
    return MadeUp().stands_for(monkeypatch)


def test_the_device_is_described(made_up, monkeypatch):
    monkeypatch.setattr(cuda_device, "_driver", lambda: "580.1")
    device = CudaDevice()
    assert (device.cache_bytes, device.free_bytes()) == (7, 40)
    facts = device.facts()
    assert (facts["gpu"], facts["gpu_sm_count"], facts["gpu_capability"]) == ("Made Up 9", 3, "9.0")
    assert (facts["gpu_driver"], facts["gpu_l2_bytes"]) == ("580.1", 7)
    assert "empty" in made_up.log


def test_a_driver_that_nobody_tells_is_unknown(monkeypatch):
    monkeypatch.setattr(cuda_device, "_DRIVER", ("no-such-command-here",))
    assert cuda_device._driver() is None
    monkeypatch.setattr(cuda_device, "_DRIVER", ("echo", "580.1\n580.1"))
    assert cuda_device._driver() == "580.1"


def test_work_is_warmed_up_and_recorded(made_up):
    modes = []

    def work():
        modes.append(made_up.mode)
        return "result"

    replay, result = CudaDevice().capture(work)
    # Once as it is, once where waiting is an error, once recorded.
    assert (modes, made_up.mode, result) == ([0, "error", 0], 0, "result")
    replay()
    assert made_up.log[-1] == "replay"


def test_work_that_waits_is_never_recorded(made_up):
    def work():
        if made_up.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    with pytest.raises(Uncapturable, match="it waits for the device"):
        CudaDevice().capture(work)
    assert made_up.mode == 0
    assert not any(line[0] == "recording" for line in made_up.log)


def test_what_breaks_while_it_is_warmed_up_is_its_own_error(made_up):
    def work():
        if made_up.mode == "error":
            raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        CudaDevice().capture(work)
    assert made_up.mode == 0


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (RuntimeError("\noperation not permitted when stream is capturing\n"), Uncapturable),
        (torch.OutOfMemoryError("none left"), torch.OutOfMemoryError),
        (KeyError("a bug"), KeyError),
    ],
)
def test_a_recording_that_breaks_off_is_cleared_up(made_up, error, raised):
    made_up.at_the_end = error
    device = CudaDevice()
    with pytest.raises(raised) as told:
        device.capture(lambda: None)
    if raised is Uncapturable:
        assert str(told.value) == "operation not permitted when stream is capturing"
    assert ("stream", True) in made_up.log
    made_up.at_the_end = None
    device.capture(lambda: None)
    pools = [line[1] for line in made_up.log if line[0] == "recording"]
    assert len(set(pools)) == 2


def test_time_is_that_between_two_events(made_up):
    device = CudaDevice()
    device.begin()
    assert device.elapsed_ns() == 500_000


def test_a_copy_counts_what_it_reads_and_writes(made_up, monkeypatch):
    monkeypatch.setattr(cuda_device, "_COPY_BYTES", 1 << 10)
    device = CudaDevice()
    device.torch_device = torch.device("cpu")
    assert device.copy() == device.copy() == 2 << 10
    source, target = device._copies
    assert torch.equal(source, target)
    device.end()
    assert device._copies is None
    assert made_up.pools == 2
