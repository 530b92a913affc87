"""The emulator's mbarrier, TMA and wgmma: right results for a right kernel, and every planted fault caught."""

from __future__ import annotations

import ctypes
import re

import pytest
import torch

import taut
from cases import LinearCase
from checks import assert_linear
from emulator import build, golden
from emulator.emulated import emulated
from taut.formats import WeightFormat
from taut.ops.quant_linear import quant_linear

ORDERS = ("fifo", "lifo", "random")
SOURCE = build.HERE / "hopper_selftest.cu"
WGMMA_FORMATS = [
    WeightFormat(name, group, zeros)
    for group in (32, 64, 128, 0)
    for name, zeros in (("int4", False), ("int4", True), ("int8", False), ("fp8_e4m3", False))
]
# What the checked mode says of each fault: in every thread order one of these. The order is that of the enum in SOURCE.
FAULTS = {
    "NoEmptyWait": "more than 1 arrivals|in flight there|data race|nobody can run",
    "TooFewBytes": "in flight there|data race|nobody can run",
    "TooManyBytes": "nobody can run.*mbarrier.try_wait",
    "NoFullWait": "in flight there|uninitialised|data race",
    "NoWgmmaWait": "never waited for|uninitialised",
    "AOverwritten": "registers of a changed .* before wgmma.wait_group",
    "AccumulatorsWritten": "accumulators of thread .* were written before wgmma.wait_group",
    "NoWgmmaFence": "registers of a were written after the latest wgmma.fence",
    "EarlyRelease": "in flight there|data race",
    "ReleaseWithoutSync": "data race",
    "NoProxyFence": "written by thread .* without fence.proxy.async",
    "UnfencedBarriers": "initialised by thread 0 without fence.proxy.async",
    "WrongArrivals": "more than 1 arrivals|in flight there|data race|nobody can run",
    "MisalignedCopy": "not 16-byte aligned",
    "CopyOutOfBounds": "outside every exposed buffer",
    "OneWarpLess": "different numbers of",
    "DescriptorOutside": "outside of it",
    "BarrierOverwritten": "was overwritten|data race",
}
# Seen without instrumentation too.
ALSO_FAST = {
    "TooManyBytes", "NoWgmmaWait", "AOverwritten", "AccumulatorsWritten", "NoWgmmaFence", "MisalignedCopy", "OneWarpLess",
    "DescriptorOutside",
}  # fmt: skip
pytestmark = pytest.mark.skipif(build.unavailable() is not None, reason=str(build.unavailable()))


def faults_of_source() -> list[str]:
    body = re.search(r"enum Fault : int \{(.*?)\};", SOURCE.read_text(), re.S).group(1)
    return re.findall(r"^\s*k(\w+),", body, re.M)


@pytest.fixture(scope="module", params=build.MODES)
def library(request) -> ctypes.CDLL:
    library = ctypes.CDLL(str(build.build_library("taut_hopper_selftest", request.param, [SOURCE])))
    library.mode = request.param
    for name in ("taut_hopper_gemm", "taut_hopper_wrappers"):
        getattr(library, name).restype = ctypes.c_char_p
    assert library.taut_emulator_set_device(90, 4) == 0
    return library


def aligned(t: torch.Tensor) -> torch.Tensor:
    """A copy whose data begins at a multiple of 256 bytes."""
    store = torch.empty(t.numel() + 256, dtype=t.dtype)
    begin = -store.data_ptr() % 256 // t.element_size()
    return store[begin : begin + t.numel()].view(t.shape).copy_(t)


def gemm(library, order: str, fault: str = "None", dtype=torch.float16, n=64, k=5 * 64, rows=None, row_elems=None, seed=0):
    """``(message, out [64, n], expected)``."""
    generator = torch.Generator().manual_seed(seed)
    steps, rows, row_elems = -(-k // 64), rows or n, row_elems or k
    a = aligned(torch.randn(64, steps * 64, generator=generator).to(dtype))
    scales = aligned((2.0 ** torch.randint(-1, 2, (steps, 64), generator=generator)).to(dtype))
    x = aligned(torch.randn(rows, row_elems, generator=generator).to(dtype))
    out = aligned(torch.full((64, n), torch.nan))
    library.taut_emulator_set_order(ORDERS.index(order), ctypes.c_uint64(seed + 1))
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (a, scales, x, out)]
    code = faults_of_source().index(fault)
    message = library.taut_hopper_gemm(code, dtype == torch.bfloat16, n, k, rows, *pointers[:3], row_elems * 2, pointers[3]).decode()
    weights = a.double() * scales.double().T.repeat_interleave(64, 1)
    expected = torch.zeros(64, n, dtype=torch.float64)
    expected[:, :rows] = weights[:, :k] @ x[:, :k].double().T
    return message, out, expected


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
@pytest.mark.parametrize("n", (8, 24, 64, 136, 256))
def test_a_right_kernel_is_right(library, order, dtype, n):
    message, out, expected = gemm(library, order, dtype=dtype, n=n)
    assert message == ""
    torch.testing.assert_close(out.double(), expected, rtol=2e-6, atol=2e-5)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("n", "k", "rows", "row_elems"), ((64, 200, 50, 200), (64, 8, 1, 8), (128, 321, 127, 328), (16, 448, 3, 512)))
def test_tma_fills_with_zeros_beyond_the_matrix(library, order, n, k, rows, row_elems):
    message, out, expected = gemm(library, order, n=n, k=k, rows=rows, row_elems=row_elems)
    assert message == ""
    torch.testing.assert_close(out.double(), expected, rtol=2e-6, atol=2e-5)


@pytest.mark.parametrize("order", ORDERS)
def test_ordinary_stores_that_are_fenced_are_fine(library, order):
    message, out, expected = gemm(library, order, fault="ProxyFence")
    assert message == ""
    torch.testing.assert_close(out.double(), expected, rtol=2e-6, atol=2e-5)


def test_every_fault_has_its_message():
    assert [fault for fault in faults_of_source() if fault not in ("None", "ProxyFence")] == list(FAULTS)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_caught(library, order, fault):
    message, _, _ = gemm(library, order, fault=fault)
    if library.mode == "fast" and fault not in ALSO_FAST:
        return  # it went through, and that is all the fast mode promises
    assert re.search(FAULTS[fault], message), message or "it passed"
    assert "hopper_gemm" in message


def test_stmatrix_and_e4m3(library):
    words = aligned(torch.arange(256, dtype=torch.int16).view(torch.int32))  # registers of lane l: words 4l to 4l + 3
    out = aligned(torch.zeros(256 + 128, dtype=torch.int32))
    assert library.taut_hopper_wrappers(ctypes.c_void_p(words.data_ptr()), ctypes.c_void_p(out.data_ptr())) == b""

    codes = torch.arange(256, dtype=torch.int16)
    expected = torch.stack((codes, codes ^ 0x81), 1).to(torch.uint8).view(torch.float8_e4m3fn).to(torch.float16)
    torch.testing.assert_close(out[:256].view(torch.float16).view(256, 2), expected, rtol=0, atol=0, equal_nan=True)

    registers = words.view(torch.int16).view(32, 4, 2)
    stored = out[256:].view(torch.int16).view(4, 8, 8)  # matrix, row, element
    for lane in range(32):
        for matrix in range(4):
            for half in range(2):
                assert stored[matrix, 2 * (lane % 4) + half, lane // 4] == registers[lane, matrix, half]


@pytest.mark.parametrize(("sm", "message"), ((80, "needs sm_90; this device is sm_80"), (89, "needs sm_90"), (120, "only sm_90 has it")))
def test_other_devices_have_no_wgmma(library, sm, message):
    library.taut_emulator_set_device(sm, 4)
    try:
        assert message in gemm(library, "fifo", n=8)[0]
    finally:
        library.taut_emulator_set_device(90, 4)


def test_golden_vectors_of_hopper(tmp_path):
    """Recorded with the emulator in the GPU's place and replayed: what scripts/gpu records on a real one is replayed likewise."""
    library = ctypes.CDLL(str(build.build_selftest("checked")))
    library.taut_golden_record.restype = ctypes.c_char_p
    assert library.taut_emulator_set_device(90, 4) == 0
    assert library.taut_golden_record(str(tmp_path).encode(), 90) == b""
    names = ("stmatrix_x4_trans", "cvt_f16x2_e4m3x2", "wgmma_m64n64k16_f16", "wgmma_m64n64k16_bf16")
    for name in names:
        vectors = golden.read(tmp_path / f"sm90-{name}.golden")
        assert golden.differences(library, vectors) == []
        damaged = vectors.outputs.copy()
        damaged[0, 3, 0] ^= 1
        assert golden.differences(library, golden.Golden(name, 90, vectors.kinds, vectors.inputs, damaged))


# Sizes at which cuda_sm90a.wgmma takes each of its tile heights and splits of K, with more steps than its pipeline has stages.
PLANS = {
    "256 tokens": (256, 130, 712, 1),
    "128 tokens": (100, 60, 712, 1),
    "64 tokens": (33, 65, 712, 1),
    "64 tokens, several tiles a block": (60, 450, 200, 2),
    "more than a sweep of tokens": (1100, 60, 136, 3),
    "splits": (20, 70, 3000, 6),
    "splits of 128 tokens": (128, 60, 6000, 3),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("mode", build.MODES)
def test_wgmma_in_every_plan(mode, plan, dtype, order):
    m, n, k, sm_count = PLANS[plan]
    which = ORDERS.index(order) + 3 * (dtype == torch.bfloat16) + list(PLANS).index(plan)
    case = LinearCase(m, n, k, WGMMA_FORMATS[which % len(WGMMA_FORMATS)], "float", dtype, bias=which % 2 == 0)
    with emulated(mode, 90, sm_count, order, seed=which) as emulator, taut.force_impl("quant_linear", "cuda_sm90a.wgmma"):
        inputs = case.make()
        emulator.statistics()
        out = quant_linear(inputs.x, inputs.packed, inputs.bias, case.N, case.format, case.activations)
        launches = emulator.statistics()["launches"]
    assert launches == (2 if "splits" in plan else 1)
    assert_linear(out, inputs.x, inputs, case, impl="cuda_sm90a.wgmma")
