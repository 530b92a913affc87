"""bench/gpu_device.py with torch.cuda played by stand-ins: what is launched, captured and divided by what."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import gpu_device
from bench.gpu_device import CudaDevice, GraphRunner


class FakeCuda:
    """A device on which every launch takes 10 us, whether it comes from Python or from a graph."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_us = 0.0
        self.capturing: list[int] | None = None
        self.launched: list[int] = []
        self.pools: list[object] = []
        fake = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                assert fake.capturing is None
                self.at = fake.now_us

            def synchronize(self) -> None:
                pass

            def elapsed_time(self, end: Event) -> float:
                return (end.at - self.at) / 1e3

        class Graph:
            def capture_begin(self, pool: object) -> None:
                fake.pools.append(pool)
                fake.capturing = []

            def capture_end(self) -> None:
                self.launches, fake.capturing = fake.capturing, None

            def replay(self) -> None:
                for copy in self.launches:
                    fake.launch(copy)

        properties = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, L2_cache_size=60 << 20)
        stands_in = {
            "Event": Event, "CUDAGraph": Graph, "Stream": lambda: SimpleNamespace(wait_stream=lambda other: None),
            "stream": lambda stream: contextlib.nullcontext(), "current_stream": lambda: None, "synchronize": lambda: None,
            "empty_cache": lambda: None, "mem_get_info": lambda: (1 << 23, 1 << 24), "graph_pool_handle": lambda: (0, 1),
            "get_device_properties": lambda index: properties,
        }  # fmt: skip
        for name, value in stands_in.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def launch(self, copy: int) -> None:
        if self.capturing is not None:
            self.capturing.append(copy)
        else:
            self.launched.append(copy)
            self.now_us += 10.0


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return FakeCuda(monkeypatch)


@pytest.mark.parametrize(("copies", "launches"), [(1, 150), (7, 147), (40, 160), (600, 600)])
def test_a_graph_holds_whole_rounds_of_the_copies(cuda: FakeCuda, copies: int, launches: int) -> None:
    runner = GraphRunner(cuda.launch, copies, torch.cuda.Stream(), "pool")
    assert runner.graph
    assert runner.launches == launches
    assert cuda.pools == ["pool"]
    del cuda.launched[:]
    runner.take_turn()
    assert cuda.launched == [index % copies for index in range(launches)]
    assert runner.samples[-1].seconds == pytest.approx(10e-6)


def test_who_cannot_be_captured_is_launched_one_by_one(cuda: FakeCuda) -> None:
    def call(copy: int) -> None:
        if cuda.capturing is not None:
            raise ValueError("not while a stream is captured")
        cuda.launch(copy)

    runner = GraphRunner(call, 3, torch.cuda.Stream(), None)
    assert not runner.graph
    assert cuda.capturing is None
    runner.take_turn()
    assert runner.samples[-1].seconds == pytest.approx(10e-6)


def test_the_device_is_asked_once(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    device = CudaDevice()
    assert (device.sm, device.sm_count, device.l2_bytes, device.impls) == (90, 132, 60 << 20, "cuda")
    assert device.model is gpu_device.GPUS["H200"]
    assert device.dtype == torch.bfloat16
    monkeypatch.setenv("PATH", "")  # no nvidia-smi
    assert device.facts() == {}
    assert device.runner(cuda.launch, 2, None, device.new_pool()).launches == 150


def test_facts_are_what_nvidia_smi_says(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho '580.1, 1980, 3201, 41, 120.5, 700.0'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    facts = CudaDevice().facts()
    assert facts["driver_version"] == "580.1"
    assert facts["clocks.sm"] == "1980"
    assert facts["power.limit"] == "700.0"


def test_ceilings_count_bytes_and_operations(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the CPU doing the work, and every call taking 10 us."""
    monkeypatch.setattr(gpu_device, "_PEAK_SIZE", 128)
    device = CudaDevice()
    device.torch_device = torch.device("cpu")
    seconds = []
    best = device.best_seconds

    def timed(call, tries: int) -> float:
        seconds.append(best(lambda: (call(), cuda.launch(0)), 1))
        return seconds[-1]

    monkeypatch.setattr(device, "best_seconds", timed)
    found = device.ceilings()
    assert all(second == pytest.approx(10e-6) for second in seconds)
    size = (1 << 23) // 4
    assert found["copy_gb_s"] == pytest.approx(2 * size / 10e-6 / 1e9)
    assert found["read_gb_s"] == pytest.approx(size / 10e-6 / 1e9)
    side = 64  # half the size, where little memory is free
    assert found["dense_tflop_s"] == found["int8_top_s"] == pytest.approx(2 * side**3 / 10e-6 / 1e12)
