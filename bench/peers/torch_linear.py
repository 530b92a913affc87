"""torch.nn.functional.linear in fp32 and bf16, on the numbers that taut's int4 weights stand for."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from taut.formats import WeightFormat

from ..contenders import Prepared, copies_for, rotation
from ..problem import Problem
from .common import prepared


@dataclass(frozen=True)
class TorchLinear:
    name: str
    format: str
    dtype: torch.dtype

    def available(self) -> str | None:
        return None

    def prepare(self, problem: Problem, cold_bytes: int) -> Prepared:
        format = WeightFormat("int4", 32)
        x, w = problem.x.to(self.dtype), problem.dense(format).to(self.dtype)
        take = rotation([w, *(w.clone() for _ in range(copies_for(w.nbytes, cold_bytes) - 1))])

        def call() -> torch.Tensor:
            return torch.nn.functional.linear(x, take())

        return prepared(problem, format, "f32" if self.dtype == torch.float32 else "bf16", w.nbytes, call, call())


PEERS = [TorchLinear("torch_fp32", "fp32", torch.float32), TorchLinear("torch_bf16", "bf16", torch.bfloat16)]
