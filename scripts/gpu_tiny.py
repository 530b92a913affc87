"""Small ragged calls of every CUDA impl, checked against float64: what compute-sanitizer watches. ``--cpu``: the CPU's impls instead.

It ends with a line ``tiny: ...`` and exit code 0, or 1 if a result was wrong.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from bench import gpu_sparse
from bench.contenders import Skip
from bench.gpu_problem import TOLERANCES, Weight, max_error, own_layer, own_packed, rows_of_x

import taut
from taut import _native
from taut.formats import WeightFormat
from taut.formats.sparse import Pattern
from taut.ops.pack_sparse import pack_sparse
from taut.ops.sparse_linear import dequantize_sparse, sparse_linear

OP = "quant_linear"
# n, k, format, rows of x: ragged in every direction, with one pipeline of copies that wraps around, and one call of many blocks
CASES = (
    (65, 128, "int4_g32_z_{0}", (1, 9)),
    (130, 640, "int4_g128_{0}", (3, 33)),
    (67, 192, "int8_row_{0}", (5, 70)),
    (129, 256, "fp8_g64_{0}", (2, 17)),
    (70, 384, "int8_g64_a8row", (1, 40)),
    (66, 256, "fp8_row_f8row", (1, 40)),
    (257, 512, "int4_row_{0}", (130,)),
)
# weights, pattern, activations, rows of x: of [70, 1168], which 8 and 16 divide, and 128 does not
SPARSE_CASES = (
    (WeightFormat("int4", 32), "2:4", "float", (1, 13, 70)),
    (WeightFormat("int8", 128), "16:2:4", "float", (5, 40)),
    (WeightFormat("int4", 128), "4:8", "float", (1, 7)),
    (WeightFormat("int8", 0), "2:4", "int8_row", (1, 40, 70)),
    (WeightFormat("int8", 64), "8:2:4", "int8_row", (13, 70)),
    (WeightFormat("int4", 32), "2:4", "int8", (5, 40)),
    (WeightFormat("fp8_e4m3", 32), "2:4", "fp8_row", (3, 70)),
)


def sparse_calls(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, float, float]]:
    generator = torch.Generator(device).manual_seed(5)
    for weights, text, activations, rows in SPARSE_CASES:
        case = gpu_sparse.Case(70, 1168, weights, rows, activations)
        weight, format = gpu_sparse.random_sparse(case, Pattern.parse(text), generator)
        packed, numbers = pack_sparse(weight, case.k, format), dequantize_sparse(weight, case.k, format)
        for m in rows:
            x = torch.randn(m, case.k, generator=generator, device=device).to(dtype)
            for impl in gpu_sparse.impls(case, m, format.pattern, dtype, device.type):
                with taut.force_impl("sparse_linear", impl):
                    error = max_error(sparse_linear(x, packed, None, case.n, format, activations), x, numbers)
                yield f"sparse {impl} {case}_M{m} {text}", error, gpu_sparse.TOLERANCES[activations]


def calls(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, float, float]]:
    """Name, error and tolerance of each call."""
    for n, k, name, rows in CASES:
        try:
            weight = Weight(n, k, name.format("bf16" if dtype == torch.bfloat16 else "f16"), device, dtype)
            weight.sizes(1)
        except (Skip, ValueError) as reason:
            print(f"{name}: {reason}")
            continue
        packed = own_packed(weight, 0)
        for m in rows:
            sizes, x = weight.sizes(m), rows_of_x(weight, m)
            for impl, _, _ in _native._C.explain(OP, sizes, device.type):
                with taut.force_impl(OP, impl):
                    if not any(row[:2] == (impl, True) for row in _native._C.explain(OP, sizes, device.type)):
                        continue
                    error = max_error(own_layer(weight, packed, impl).call(x, 0), x, weight.dense)
                yield f"{impl} N{n}_K{k}_M{m} {weight.name}", error, TOLERANCES[weight.format.activations]


def main() -> int:
    device = torch.device("cpu" if "--cpu" in sys.argv[1:] else "cuda")
    bf16 = device.type == "cpu" or torch.cuda.get_device_capability() >= (8, 0)
    wrong = done = 0
    dtype = torch.bfloat16 if bf16 else torch.float16
    for name, error, tolerance in (*calls(device, dtype), *sparse_calls(device, dtype)):
        done += 1
        if not error <= tolerance:
            wrong += 1
            print(f"WRONG {name}: off by {error:.2g} of the largest result")
    print(f"tiny: {done} calls, {wrong} wrong")
    return 1 if wrong or not done else 0


if __name__ == "__main__":
    sys.exit(main())
