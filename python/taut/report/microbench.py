"""A small benchmark of this machine: taut's linear layer and torch's on a few shapes, interleaved."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..formats import WeightFormat
from ..ops.pack_weight import dequantize_weight, pack_weight
from ..ops.quant_linear import cost, quant_linear, reference
from ..ops.quantize_weight import quantize_weight

COLD_BYTES = 128 << 20  # of weights to rotate through, more than the last cache of most processors holds
CHECKED_ROWS = 64  # outputs checked before anything is timed
MIN_SAMPLES = 5


@dataclass(frozen=True)
class Shape:
    n: int
    k: int
    m: int


SHAPES = (Shape(2048, 2048, 1), Shape(8192, 2048, 1), Shape(4096, 4096, 1), Shape(4096, 4096, 32), Shape(2048, 2048, 512))


def run_shape(shape: Shape, seconds: float) -> list[dict[str, Any]]:
    """Times one shape, every contender in turn until ``seconds`` are over; cold weights: each call reads another copy.

    Rows of ``name, n, k, m, median_us, p10_us, p90_us, gb_s, gflop_s, samples, speed_up`` (against torch fp32).
    Raises ``RuntimeError`` where a result of taut is wrong: nothing is timed then.
    """
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(shape.n, shape.k, generator=generator) / shape.k**0.5
    x = torch.randn(shape.m, shape.k, generator=generator)
    contenders: list[tuple[str, int, Callable[[], Tensor]]] = [_torch("torch fp32", x, w), _torch("torch bf16", x.bfloat16(), w.bfloat16())]
    for format in (WeightFormat("int8", 0), WeightFormat("int4", 32)):
        packed = pack_weight(*quantize_weight(w, format), shape.k, format)
        _check(x, packed, shape, format)
        contenders.append(_taut(x, packed, shape, format))
    samples: list[list[float]] = [[] for _ in contenders]
    for _, _, call in contenders:
        call()
    deadline = time.perf_counter() + seconds
    while len(samples[0]) < MIN_SAMPLES or time.perf_counter() < deadline:
        for times, (_, _, call) in zip(samples, contenders, strict=True):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    flops = cost(shape.m, shape.n, shape.k, WeightFormat())["flops"]
    base = statistics.median(samples[0])
    rows = []
    for times, (name, nbytes, _) in zip(samples, contenders, strict=True):
        median = statistics.median(times)
        low, *_, high = statistics.quantiles(times, n=10)
        rows.append(
            {
                "name": name,
                "n": shape.n,
                "k": shape.k,
                "m": shape.m,
                "median_us": median * 1e6,
                "p10_us": low * 1e6,
                "p90_us": high * 1e6,
                "gb_s": nbytes / median / 1e9,
                "gflop_s": flops / median / 1e9,
                "samples": len(times),
                "speed_up": base / median,
            }
        )
    return rows


def _rotation(tensor: Tensor) -> Callable[[], Tensor]:
    """Copies of ``tensor`` that together are larger than a cache; gives the next one at each call."""
    copies = [tensor, *(tensor.clone() for _ in range(min(64, COLD_BYTES // max(tensor.nbytes, 1))))]
    state = {"next": 0}

    def take() -> Tensor:
        state["next"] = (state["next"] + 1) % len(copies)
        return copies[state["next"]]

    return take


def _torch(name: str, x: Tensor, w: Tensor) -> tuple[str, int, Callable[[], Tensor]]:
    take = _rotation(w)
    return name, w.nbytes + x.nbytes + x.shape[0] * w.shape[0] * x.element_size(), lambda: torch.nn.functional.linear(x, take())


def _taut(x: Tensor, packed: Tensor, shape: Shape, format: WeightFormat) -> tuple[str, int, Callable[[], Tensor]]:
    take = _rotation(packed)
    return f"taut {format}", cost(shape.m, shape.n, shape.k, format)["bytes"], lambda: quant_linear(x, take(), None, shape.n, format)


def _check(x: Tensor, packed: Tensor, shape: Shape, format: WeightFormat) -> None:
    rows = min(CHECKED_ROWS, shape.n)
    found = quant_linear(x, packed, None, shape.n, format)[:, :rows].double()
    expected = reference(x, dequantize_weight(packed, shape.n, shape.k, format, row_end=rows), None, "int8")
    error = float((found - expected).abs().max())
    if not error <= 1e-3:
        raise RuntimeError(f"taut {format} at N={shape.n} K={shape.k} M={shape.m} is off by {error:.2g}; nothing was timed")
