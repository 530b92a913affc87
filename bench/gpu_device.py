"""The device a GPU benchmark runs on: CUDA, or a dry one that computes on the CPU and makes its times up from ``bench/model.py``."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch

from .model import GPUS, REACH, Gpu
from .timing import Sample

_GRAPH_SECONDS = 1.5e-3  # of launches in one graph, at least as many as there are copies of the weights
_MOST_LAUNCHES = 512
_PEAK_SIZE, _PEAK_TRIES = 8192, 12


def model_of(name: str) -> Gpu | None:
    """The device of ``bench/model.py`` that a name means as torch gives it (NVIDIA GeForce RTX 4090, NVIDIA A100-SXM4-80GB)."""
    words = name.upper().replace("-", " ")
    found = [gpu for gpu in GPUS.values() if f" {gpu.name.upper()} " in f" {words} "]
    return max(found, key=lambda gpu: len(gpu.name), default=None)


class CudaDevice:
    """The current CUDA device."""

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties(0)
        self.torch_device, self.impls = torch.device("cuda", 0), "cuda"
        self.name: str = properties.name
        self.sm = properties.major * 10 + properties.minor
        self.sm_count: int = properties.multi_processor_count
        self.l2_bytes: int = properties.L2_cache_size
        self.model = model_of(self.name)
        self.dtype = torch.bfloat16 if self.sm >= 80 else torch.float16
        self._stream = torch.cuda.Stream()  # one for all: a library keeps a workspace for each

    def new_pool(self) -> Any:
        """Memory that the graphs of one race share: they never run at the same time."""
        return torch.cuda.graph_pool_handle()

    def free_bytes(self) -> int:
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]

    def facts(self) -> dict[str, Any]:
        """What else a reader wants to know: driver, clocks and temperature now; empty where nvidia-smi does not answer."""
        names = ("driver_version", "clocks.sm", "clocks.mem", "temperature.gpu", "power.draw", "power.limit")
        command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader,nounits", "--id=0"]
        try:
            answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
        except (OSError, subprocess.SubprocessError):
            return {}
        return dict(zip(names, (part.strip() for part in answer.strip().split(",")), strict=False))

    def runner(self, call: Callable[[int], Any], copies: int, expected_us: float | None, pool: Any) -> GraphRunner:
        return GraphRunner(call, copies, self._stream, pool)

    def best_seconds(self, call: Callable[[], Any], tries: int) -> float:
        """The shortest of single calls, by events."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        best = float("inf")
        for index in range(tries + 2):
            start.record()
            call()
            end.record()
            end.synchronize()
            if index >= 2:
                best = min(best, start.elapsed_time(end) * 1e-3)
        return best

    def _memory(self, size: int) -> dict[str, float]:
        source = torch.randint(-(1 << 31), (1 << 31) - 1, (size // 4,), dtype=torch.int32, device=self.torch_device)
        target, floats = torch.empty_like(source), source.view(torch.float32)
        copied = self.best_seconds(lambda: target.copy_(source), 10)
        summed = min(self.best_seconds(lambda: torch.sum(floats), 10), self.best_seconds(lambda: torch.amax(source), 10))
        return {"copy_gb_s": 2 * size / copied / 1e9, "read_gb_s": size / summed / 1e9}

    def ceilings(self) -> dict[str, float]:
        """GB/s of a copy (bytes read and written) and of a sum (bytes read), TFLOP/s and TOP/s of large products of random numbers."""
        size = min(2 << 30, self.free_bytes() // 4) // 1024 * 1024
        found = self._memory(size)
        n = _PEAK_SIZE if self.free_bytes() > 2 << 30 else _PEAK_SIZE // 2
        a, b = (torch.randn(n, n, device=self.torch_device, dtype=self.dtype) for _ in range(2))
        found["dense_tflop_s"] = 2 * n**3 / self.best_seconds(lambda: a @ b.T, _PEAK_TRIES) / 1e12
        a, b = (torch.randint(-128, 128, (n, n), device=self.torch_device, dtype=torch.int8) for _ in range(2))
        self._try(found, "int8_top_s", lambda: 2 * n**3 / self.best_seconds(lambda: torch._int_mm(a, b.T), _PEAK_TRIES) / 1e12)
        if self.sm >= 89:
            x, w = (torch.randn(n, n, device=self.torch_device).to(torch.float8_e4m3fn) for _ in range(2))
            one = torch.ones((), device=self.torch_device)
            product = lambda: torch._scaled_mm(x, w.T, one, one, out_dtype=torch.bfloat16)  # noqa: E731
            self._try(found, "fp8_tflop_s", lambda: 2 * n**3 / self.best_seconds(product, _PEAK_TRIES) / 1e12)
        return found

    @staticmethod
    def _try(found: dict[str, float], name: str, measure: Callable[[], float]) -> None:
        try:
            found[name] = measure()
        except RuntimeError:  # this torch has no such product on this device: no share of its peak is shown
            return


class GraphRunner:
    """Launches of one contender in a CUDA graph, each on the next copy of the weights; samples are seconds for one launch.

    Where a contender cannot be captured, its launches come from Python one by one, and ``graph`` is False.
    """

    def __init__(self, call: Callable[[int], Any], copies: int, stream: torch.cuda.Stream, pool: Any) -> None:
        self._call, self._copies = call, copies
        self.samples: list[Sample] = []
        self.spent = 0.0
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call(0)
            self._start.record()
            for copy in range(3):
                call(copy % copies)
            self._end.record()
        self._end.synchronize()
        once = max(self._start.elapsed_time(self._end) * 1e-3 / 3, 1e-6)
        rounds = max(1, min(_MOST_LAUNCHES // copies, round(_GRAPH_SECONDS / once / copies)))
        self.launches = rounds * copies
        try:
            self._replay, self.graph = self._captured(stream, pool).replay, True
        except Exception:  # WHY any: whoever cannot be captured is timed all the same
            self._replay, self.graph = self._launch, False
        torch.cuda.synchronize()
        self._replay()
        torch.cuda.synchronize()

    def _captured(self, stream: torch.cuda.Stream, pool: Any) -> torch.cuda.CUDAGraph:
        # WHY not `with torch.cuda.graph(...)`: it gives all cached memory back first, which here costs more than the measurement
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            graph.capture_begin(pool)
            try:
                self._launch()
            finally:
                graph.capture_end()
        return graph

    def _launch(self) -> None:
        for index in range(self.launches):
            self._call(index % self._copies)

    def take_turn(self) -> None:
        begin = time.perf_counter()
        self._start.record()
        self._replay()
        self._end.record()
        self._end.synchronize()
        self.samples.append(Sample(self._start.elapsed_time(self._end) * 1e-3 / self.launches, False))
        self.spent += time.perf_counter() - begin


class DryDevice:
    """No device: tensors on the CPU, times that the model predicts. For the code of a benchmark, not for its numbers."""

    def __init__(self, gpu: Gpu, impls: str = "cpu") -> None:
        self.torch_device, self.impls = torch.device("cpu"), impls  # whose impls run: the CPU's, or those of an emulator
        self.name, self.sm, self.sm_count = f"dry {gpu.name}", gpu.sm, gpu.sm_count
        self.l2_bytes = 1024  # so that tiny weights have copies, too
        self.model: Gpu | None = gpu
        self.dtype = torch.bfloat16 if gpu.sm >= 80 else torch.float16

    def new_pool(self) -> None:
        return None

    def free_bytes(self) -> int:
        return 1 << 30

    def facts(self) -> dict[str, Any]:
        return {"dry_run": True}

    def runner(self, call: Callable[[int], Any], copies: int, expected_us: float | None, pool: None) -> DryRunner:
        return DryRunner(call, copies, expected_us or 1.0)

    def ceilings(self) -> dict[str, float]:
        gpu = self.model
        found = {"copy_gb_s": gpu.hbm_gb_s * REACH, "read_gb_s": gpu.hbm_gb_s * REACH, "dense_tflop_s": gpu.tflops_16 * gpu.dense_share}
        found["int8_top_s"] = gpu.tops_int8 * gpu.dense_share
        if gpu.tflops_fp8:
            found["fp8_tflop_s"] = gpu.tflops_fp8 * gpu.dense_share
        return found


class DryRunner:
    """Computes once with each copy, and says it took what was predicted."""

    def __init__(self, call: Callable[[int], Any], copies: int, expected_us: float) -> None:
        self.samples, self.spent, self.launches, self.graph = [], 0.0, copies, False
        self._seconds = expected_us * 1e-6
        for copy in range(copies):
            call(copy)

    def take_turn(self) -> None:
        share = 1.0 + 0.01 * (len(self.samples) % 3)
        self.samples.append(Sample(self._seconds * share, False))
        self.spent += self._seconds
