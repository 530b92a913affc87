"""x quantized on CUDA has the CPU's bits. Read through a weight that picks single numbers of x: int8 or fp8 codes of 0 and 1."""

from __future__ import annotations

import pytest
import torch

import taut
from emulator import build, emulated

N = 48
FORMATS = {1: 8, 2: 8, 3: 9}  # the weight's format, by the activations


def x_of(rows: int, k: int, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Rows of many magnitudes, not aligned, with NaN, infinity, zeros and a row that counts as zeros."""
    x = torch.randn(rows, k + 3, generator=generator) * torch.exp(3 * torch.randn(rows, k + 3, generator=generator))
    x = x.to(dtype)[:, :k]
    for row, special in enumerate((float("nan"), float("-inf"))):
        x[row, k // 2] = special
    x[2], x[3] = 0, 1e-38
    return x


@pytest.mark.parametrize("activations", FORMATS, ids=("int8", "int8_row", "fp8_row"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("k", (1, 33, 200, 1500, 8500))  # a warp, eight, or all 32 take a row
@pytest.mark.parametrize("mode", build.MODES)
def test_the_bits_of_the_cpu(mode, k, dtype, activations):
    if reason := build.unavailable():
        pytest.skip(reason)
    generator = torch.Generator().manual_seed(k)
    x = x_of(6, k, dtype, generator)
    picked = torch.randint(0, k, (N,), generator=generator)
    code_type = torch.int8 if FORMATS[activations] == 8 else torch.float8_e4m3fn
    codes = torch.zeros(N, k).index_put_((torch.arange(N), picked), torch.ones(N)).to(code_type)
    scales = torch.ones(N, 1, dtype=torch.float16)

    def product(ops, layout: int) -> torch.Tensor:
        packed = ops.pack_weight(codes, scales, None, k, FORMATS[activations], 0, layout)
        return ops.quant_linear(x, packed, None, N, FORMATS[activations], 0, False, activations)

    with taut.force_impl("quant_linear", "cpu_scalar"):
        expected = product(torch.ops.taut, 0)
    with emulated.emulated(mode, sm=75, order="random", seed=k), taut.force_impl("quant_linear", "cuda_sm75.simt"):
        found = product(getattr(torch.ops, f"taut_emulated_{mode}"), 1)
    assert torch.equal(torch.isnan(found), torch.isnan(expected)) and torch.isnan(expected[:2]).all()
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())
