"""torch's own 4-bit linear for the CPU, ``torch.ops.aten._weight_int4pack_mm_for_cpu``: group 32, float arithmetic."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from taut.formats import WeightFormat

from ..contenders import Prepared, Skip, copies_for, rotation
from ..problem import Problem
from .common import prepared

_SLOWEST_SECONDS = 2.0  # a call longer than this is not worth timing: without AVX-512 this op is scalar


@dataclass(frozen=True)
class Int4Pack:
    name: str
    format: str
    dtype: torch.dtype

    def available(self) -> str | None:
        return None if hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu") else "this torch has no _weight_int4pack_mm_for_cpu"

    def prepare(self, problem: Problem, cold_bytes: int) -> Prepared:
        case, format = problem.case, WeightFormat("int4", 32)
        if case.k % 32 or case.n % 16:
            raise Skip("it takes K in multiples of 32 and N of 16")
        codes, scales, *_ = problem.canonical(format)
        both = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(1).to(torch.int32)
        # its value is (q - 8) * scale + zero
        scale_zero = torch.stack([scales.T, torch.zeros_like(scales.T)], dim=-1).to(self.dtype).contiguous()
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(both, 1)
        x, op = problem.x.to(self.dtype), torch.ops.aten._weight_int4pack_mm_for_cpu
        seconds = self._seconds_of_a_row(x, packed, scale_zero) * case.m
        if seconds > _SLOWEST_SECONDS:
            raise Skip(f"one call would take about {seconds:.0f} s")
        take = rotation([packed, *(packed.clone() for _ in range(copies_for(packed.nbytes, cold_bytes) - 1))])

        def call() -> torch.Tensor:
            return op(x, take(), 32, scale_zero)

        return prepared(problem, format, "f32" if self.dtype == torch.float32 else "bf16", packed.nbytes + scale_zero.nbytes, call, call())

    @staticmethod
    def _seconds_of_a_row(x: torch.Tensor, packed: torch.Tensor, scale_zero: torch.Tensor) -> float:
        best = float("inf")
        for _ in range(2):
            start = time.perf_counter()
            torch.ops.aten._weight_int4pack_mm_for_cpu(x[:1], packed, 32, scale_zero)
            best = min(best, time.perf_counter() - start)
        return best


PEERS = [Int4Pack("torch_int4pack_f32", "int4_g32_f32", torch.float32), Int4Pack("torch_int4pack_bf16", "int4_g32_bf16", torch.bfloat16)]
