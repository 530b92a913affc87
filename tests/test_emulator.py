"""The CUDA emulator itself: planted faults are caught, right kernels pass, instructions do what the PTX manual says."""

from __future__ import annotations

import ctypes
import itertools
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

import taut
from conftest import ROOT, emulated_impls
from emulator import build, golden
from emulator.emulated import ORDERS, SM_OF, Emulator, emulated, ops_library
from taut import _native

pytestmark = pytest.mark.skipif(build.unavailable() is not None, reason=str(build.unavailable()))

# What the checked mode says of each fault that selftest.cu plants.
FAULTS = {
    "barrier_not_reached_by_all": "barrier divergence.*__syncthreads at tests/emulator/selftest.cu:",
    "barrier_after_early_return": "barrier divergence.*__syncthreads at tests/emulator/selftest.cu:",
    "barriers_of_two_places": "barrier divergence: __syncthreads at .* while other threads wait at",
    "named_barrier_counts_differ": "barrier 1 has .* threads at .*, but|nobody can run: .*bar.sync at",
    "named_barrier_never_full": "nobody can run: .*bar.sync at .*returned",
    "shared_store_out_of_bounds": r"store: 4 bytes at dynamic shared memory \+512 \(of 512 bytes\) are not all in shared memory",
    "shared_load_out_of_bounds": r"load: 4 bytes at dynamic shared memory \+\d+ \(of 512 bytes\) are not all",
    "shared_load_uninitialised": "load reads uninitialised static shared memory",
    "shared_left_over_from_the_last_block": "load reads uninitialised static shared memory",
    "missing_syncwarp": "data race at static shared memory",
    "syncwarp_across_warps": "data race at static shared memory|uninitialised",
    "shuffle_does_not_order_memory": "data race at static shared memory|uninitialised",
    "overwritten_before_all_have_read": "data race at static shared memory",
    "half_words_race": "data race at static shared memory",
    "shared_flag": "data race at static shared memory",
    "local_memory_of_another_thread": "of thread 0's local memory",
    "cp_async_without_wait": "while an asynchronous copy by thread .* is in flight there",
    "cp_async_barrier_without_wait": "while an asynchronous copy by thread .* is in flight there",
    "cp_async_wait_without_barrier": "data race at dynamic shared memory|in flight there|uninitialised",
    "cp_async_overlapping": "data race at dynamic shared memory|in flight there",
    "cp_async_never_waited_for": "never waited for",
    "cp_async_misaligned": "cp.async at .*: a misaligned address",
    "cp_async_out_of_shared": "cp.async at .*: the destination, .*, is not in shared memory",
    "cp_async_out_of_global": r"cp.async at .* of 16 bytes outside every exposed buffer: in\[",
    "pipeline_without_second_barrier": "data race at dynamic shared memory|in flight there",
    "shuffle_without_all_lanes": "nobody can run: .*shuffle at",
    "shuffle_from_a_lane_outside_its_mask": "reads lane 20, which is not in its mask",
    "lane_not_in_its_own_mask": "the calling lane is not in its mask",
    "mma_in_a_divergent_branch": "warp divergence: mma.m16n8k16 at .* while other lanes .* are at mma.m16n8k16",
    "mma_sp_places_do_not_ascend": r"mma.sp: the places of row 3, k 12 to 15 must ascend, and are 2 and 1",
    "mma_sp_8bit_places_do_not_ascend": r"mma.sp: the places of row 11, k 48 to 51 must ascend, and are 2 and 1",
    "ldmatrix_misaligned": "ldmatrix: the row address of lane 1 is misaligned",
    "ldmatrix_out_of_bounds": "ldmatrix: 16 bytes at .* are not all in shared memory",
    "ldmatrix_before_barrier": "data race at dynamic shared memory .* ldmatrix|ldmatrix reads uninitialised",
    "global_load_out_of_bounds": r"load of 4 bytes outside every exposed buffer: in\[\+\d+ bytes\] \(1024 bytes long\)",
    "global_store_out_of_bounds": r"store of 4 bytes outside every exposed buffer: out\[\+1024 bytes\]",
    "global_store_to_an_input": r"store to a buffer that is only to be read: in\[",
    "global_vector_misaligned": "misaligned pointer for an access that must be 16-byte aligned",
    "global_nc_load_misaligned": "misaligned 16-byte load of in",
    "workspace_uninitialised": "load reads uninitialised workspace",
    "output_read_before_written": "load reads uninitialised out",
    "null_pointer": "outside every exposed buffer|memory fault",
    "atomic_misaligned": "a misaligned atomic of counter",
    "two_blocks_write_one_element": "data race between blocks at out",
    "two_threads_write_one_element": "data race at out",
    "a_block_reads_what_another_wrote": "data race between blocks at workspace|uninitialised workspace",
    "atomic_and_plain_write": "data race between blocks at counter",
    "last_block_without_fence": "data race between blocks at workspace",
    "a_block_waits_for_another": "the thread spins on counter",
    "too_much_shared_memory": "167936 bytes of shared memory were asked for; this device has 166912",
    "integer_division_by_zero": "integer division by zero",
}
FINE = (
    "fine_features", "fine_syncwarp", "fine_half_words", "fine_producers_and_consumers", "fine_pipeline", "fine_zero_fill",
    "fine_last_block", "fine_indices", "fine_partial_masks", "fine_atomics", "fine_vectors",
)  # fmt: skip
EVERY_ORDER = (("fifo", 0), ("lifo", 0), ("random", 1), ("random", 2), ("random", 3))
assert {order for order, _ in EVERY_ORDER} == set(ORDERS)


@pytest.fixture(scope="module")
def selftests() -> dict[str, Emulator]:
    emulators = {}
    for mode in build.MODES:
        emulators[mode] = Emulator(build.build_selftest(mode))
        library = emulators[mode].library
        library.taut_selftest_name.restype = library.taut_selftest_run.restype = ctypes.c_char_p
    return emulators


def names_of(emulator: Emulator) -> list[str]:
    names = []
    while name := emulator.library.taut_selftest_name(len(names)):
        names.append(name.decode())
    return names


def run_selftest(emulator: Emulator, name: str) -> str:
    return emulator.library.taut_selftest_run(names_of(emulator).index(name)).decode()


def test_every_selftest_has_its_expectation(selftests):
    assert sorted(names_of(selftests["checked"])) == sorted([*FAULTS, *FINE])


@pytest.mark.parametrize("order", EVERY_ORDER, ids=lambda order: f"{order[0]}{order[1]}")
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_caught(name, order, selftests):
    emulator = selftests["checked"]
    emulator.set_device(80)
    emulator.set_order(*order)
    message = run_selftest(emulator, name)
    assert message, f"{name} was not caught"
    assert re.search(FAULTS[name], message), message
    assert message.startswith(name), f"the message must begin with the kernel: {message}"
    if name != "too_much_shared_memory":  # no thread ran
        assert re.search(r"block \(\d+,\d+,\d+\) thread \(\d+,\d+,\d+\)", message), message
    if not re.search("never waited|nobody can run|too_much", message + name):
        assert re.search(r"selftest\.cu:\d+", message), f"the message must name the line: {message}"


@pytest.mark.parametrize("mode", build.MODES)
@pytest.mark.parametrize("order", EVERY_ORDER, ids=lambda order: f"{order[0]}{order[1]}")
@pytest.mark.parametrize("name", FINE)
def test_a_right_kernel_passes(name, order, mode, selftests):
    emulator = selftests[mode]
    emulator.set_device(80)
    emulator.set_order(*order)
    assert run_selftest(emulator, name) == ""


def test_a_fault_leaves_nothing_behind(selftests):
    """After a launch that failed in the middle of copies, barriers and collectives the next one is as if nothing had been."""
    for mode, emulator in selftests.items():
        emulator.set_order("fifo")
        for name in ("cp_async_never_waited_for", "named_barrier_never_full", "mma_in_a_divergent_branch", "integer_division_by_zero"):
            assert run_selftest(emulator, name)
            for fine in FINE:
                assert run_selftest(emulator, fine) == "", f"{fine} after {name}, {mode}"


def test_instructions_need_their_device(selftests):
    emulator = selftests["fast"]
    emulator.set_device(75)
    assert "cp.async at tests/emulator/selftest.cu" in (message := run_selftest(emulator, "fine_pipeline"))
    assert "needs sm_80; this device is sm_75" in message
    emulator.set_device(80)
    with pytest.raises(ValueError, match="no device sm_70"):
        emulator.set_device(70)


def test_signals_are_given_back(selftests):
    """A memory fault within a kernel is an error of that kernel; outside of it, it is the process's own affair."""
    caught = []
    before = signal.signal(signal.SIGFPE, lambda *_: caught.append(True))
    try:
        assert "integer division by zero" in run_selftest(selftests["fast"], "integer_division_by_zero")
        assert "memory fault" in run_selftest(selftests["fast"], "null_pointer")
        os.kill(os.getpid(), signal.SIGFPE)
        assert caught
    finally:
        signal.signal(signal.SIGFPE, before)


def test_statistics(selftests):
    emulator = selftests["fast"]
    emulator.statistics()
    assert run_selftest(emulator, "fine_features") == ""
    counts = emulator.statistics()
    assert counts["launches"] == 1 and counts["blocks"] == 2
    assert counts["collectives"] == 2 * 4 * 2  # a shuffle and a vote of 4 warps in 2 blocks
    assert counts["switches"] >= 2 * 128


# ---- Instructions, straight from the fragment tables of the PTX manual ----


def lanes(fragment, registers: int, elements: int, matrix: np.ndarray) -> np.ndarray:
    """``[32, registers]`` words of a matrix; fragment(lane, register, element) gives the row and column of an element."""
    words = np.zeros((32, registers, elements), matrix.dtype)
    for lane in range(32):
        for register in range(registers):
            for element in range(elements):
                words[lane, register, element] = matrix[fragment(lane, register, element)]
    return words.reshape(32, -1).view(np.uint32)


def a_16bit(lane: int, register: int, element: int) -> tuple[int, int]:
    return lane // 4 + 8 * (register % 2), lane % 4 * 2 + element + 8 * (register // 2)


def b_16bit(lane: int, register: int, element: int) -> tuple[int, int]:
    return lane % 4 * 2 + element + 8 * register, lane // 4


def a_8bit(lane: int, register: int, element: int) -> tuple[int, int]:
    return lane // 4 + 8 * (register % 2), lane % 4 * 4 + element + 16 * (register // 2)


def b_8bit(lane: int, register: int, element: int) -> tuple[int, int]:
    return lane % 4 * 4 + element + 16 * register, lane // 4


def accumulator(lane: int, register: int, element: int) -> tuple[int, int]:
    return lane // 4 + 8 * (register // 2), lane % 4 * 2 + register % 2


def run_mma(library, name: str, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    registers = a.shape[1] * a.itemsize // 4 * 16 // 32, b.shape[0] * b.itemsize // 4 * 8 // 32
    fragments = (a_16bit, b_16bit) if a.itemsize == 2 else (a_8bit, b_8bit)
    words = [
        lanes(fragments[0], registers[0], 4 // a.itemsize, a),
        lanes(fragments[1], registers[1], 4 // b.itemsize, b),
        lanes(accumulator, 4, 1, c),
    ]
    out = golden.run(library, name, np.concatenate(words, 1)[None], 4)[0].view(c.dtype)
    d = np.zeros((16, 8), c.dtype)
    for lane in range(32):
        for register in range(4):
            d[accumulator(lane, register, 0)] = out[lane, register]
    return d


FLOAT_MMAS = (
    ("mma_m16n8k16_f16", torch.float16, 16), ("mma_m16n8k16_bf16", torch.bfloat16, 16), ("mma_m16n8k8_f16", torch.float16, 8),
    ("mma_m16n8k32_e4m3", torch.float8_e4m3fn, 32),
)  # fmt: skip


@pytest.mark.parametrize("mode", build.MODES)
@pytest.mark.parametrize(("name", "dtype", "depth"), FLOAT_MMAS, ids=str)
def test_mma(name, dtype, depth, mode, selftests):
    selftests[mode].set_device(89)
    generator = torch.Generator().manual_seed(depth)
    bits = np.uint8 if dtype == torch.float8_e4m3fn else np.uint16
    a, b = (torch.randn(shape, generator=generator).to(dtype) for shape in ((16, depth), (depth, 8)))
    c = torch.randn(16, 8, generator=generator)
    d = run_mma(selftests[mode].library, name, *(t.view(torch.uint8).numpy().view(bits) for t in (a, b)), c.numpy())
    expected = (a.double() @ b.double() + c.double()).float()
    assert torch.equal(torch.from_numpy(d), expected), "the sum is exact in double, and rounded once"


@pytest.mark.parametrize("mode", build.MODES)
@pytest.mark.parametrize(("name", "dtype"), (("mma_sp_m16n8k32_f16", torch.float16), ("mma_sp_m16n8k32_bf16", torch.bfloat16)), ids=str)
def test_mma_sp(name, dtype, mode, selftests):
    """The fragments of a and b, and the metadata, as the tables and figures of the PTX manual have them."""
    selftests[mode].set_device(80)
    generator = torch.Generator().manual_seed(5)
    b, c = torch.randn(32, 8, generator=generator).to(dtype), torch.randn(16, 8, generator=generator)
    given = torch.randn(16, 16, generator=generator).to(dtype)
    places = torch.rand(2, 16, 8, 4, generator=generator).argsort(-1)[..., :2].sort(-1).values  # of each selector: [row][chunk of 4 k][2]
    words = [lanes(a_16bit, 4, 2, given.view(torch.int16).numpy()), lanes(b_16bit, 4, 2, b.view(torch.int16).numpy())]
    meta = np.zeros((32, 1), np.uint32)
    for lane, half, chunk in itertools.product(range(32), range(2), range(4)):
        first, second = places[lane % 4 // 2, lane // 4 + 8 * half, lane % 2 * 4 + chunk].tolist()
        meta[lane] |= np.uint32((first | second << 2) << (16 * half + 4 * chunk))
    words += [meta, lanes(accumulator, 4, 1, c.numpy())]
    out = golden.run(selftests[mode].library, name, np.concatenate(words, 1)[None], 8)[0].view(np.float32)
    for selector in range(2):
        a = torch.zeros(16, 8, 4, dtype=torch.float64).scatter_(2, places[selector], given.double().view(16, 8, 2)).view(16, 32)
        expected = (a @ b.double() + c.double()).float()
        for lane, register in itertools.product(range(32), range(4)):
            assert out[lane, 4 * selector + register] == expected[accumulator(lane, register, 0)], f"selector {selector}, lane {lane}"


SPARSE_8BIT = (
    ("mma_sp_m16n8k32_s8", torch.int8, 32), ("mma_sp_m16n8k64_s8", torch.int8, 64), ("mma_sp_m16n8k64_e4m3", torch.float8_e4m3fn, 64),
)  # fmt: skip


@pytest.mark.parametrize("mode", build.MODES)
@pytest.mark.parametrize(("name", "dtype", "depth"), SPARSE_8BIT, ids=str)
def test_mma_sp_of_8_bits(name, dtype, depth, mode, selftests):
    """Where 16-bit types have 16 k of two rows in a lane's metadata, these have 32 k of one."""
    selftests[mode].set_device(89)
    generator = torch.Generator().manual_seed(depth)

    def numbers(*shape: int) -> torch.Tensor:
        if dtype == torch.int8:
            return torch.randint(-128, 128, shape, generator=generator).to(dtype)
        return torch.randn(shape, generator=generator).to(dtype)

    given, b = numbers(16, depth // 2), numbers(depth, 8)
    c = torch.randint(-(2**20), 2**20, (16, 8), generator=generator)
    c[0, 0] = 2**31 - 1 if dtype == torch.int8 else 1  # wraps around
    c = c.to(torch.int32 if dtype == torch.int8 else torch.float32)
    selectors = 64 // depth
    # [selector][row][chunk of 4 k][2]
    places = torch.rand(selectors, 16, depth // 4, 4, generator=generator).argsort(-1)[..., :2].sort(-1).values
    a_words, b_words = (lanes(f, depth // 16, 4, m.view(torch.uint8).numpy()) for f, m in ((a_8bit, given), (b_8bit, b)))
    meta = np.zeros((32, 1), np.uint32)
    for lane, chunk in itertools.product(range(32), range(8)):
        pair, row = lane % 4 // 2, lane // 4 + 8 * (lane % 2)
        first, second = (places[pair, row, chunk] if depth == 32 else places[0, row, 8 * pair + chunk]).tolist()
        meta[lane] |= np.uint32((first | second << 2) << (4 * chunk))
    words = np.concatenate([a_words, b_words, meta, lanes(accumulator, 4, 1, c.numpy())], 1)
    out = golden.run(selftests[mode].library, name, words[None], 4 * selectors)[0].view(c.numpy().dtype)
    wide = torch.int64 if dtype == torch.int8 else torch.float64
    for selector in range(selectors):
        a = torch.zeros(16, depth // 4, 4, dtype=wide).scatter_(2, places[selector], given.to(wide).view(16, -1, 2)).view(16, depth)
        expected = (a @ b.to(wide) + c.to(wide)).to(c.dtype)
        for lane, register in itertools.product(range(32), range(4)):
            assert out[lane, 4 * selector + register] == expected[accumulator(lane, register, 0)], f"selector {selector}, lane {lane}"


@pytest.mark.parametrize("mode", build.MODES)
@pytest.mark.parametrize("kind", ("random", "all -128", "wraps around"))
def test_mma_of_int8(kind, mode, selftests):
    selftests[mode].set_device(80)
    draw = np.random.default_rng(0)
    a, b = draw.integers(-128, 128, (16, 32)).astype(np.int8), draw.integers(-128, 128, (32, 8)).astype(np.int8)
    c = draw.integers(-(2**20), 2**20, (16, 8)).astype(np.int32)
    if kind != "random":
        a, b = np.full_like(a, -128), np.full_like(b, -128)
    if kind == "wraps around":
        c = np.full_like(c, 2**31 - 1)
    expected = (a.astype(np.int64) @ b.astype(np.int64) + c).astype(np.uint64).astype(np.uint32).view(np.int32)
    assert np.array_equal(run_mma(selftests[mode].library, "mma_m16n8k32_s8", a, b, c), expected)


@pytest.mark.parametrize("mode", build.MODES)
@pytest.mark.parametrize(("name", "matrices"), (("ldmatrix_x4", 4), ("ldmatrix_x2", 2), ("ldmatrix_x4_trans", 4)))
def test_ldmatrix(name, matrices, mode, selftests):
    draw = np.random.default_rng(1)
    rows = draw.integers(0, 2**16, (32, 8)).astype(np.uint16)  # what lane l puts into row l
    order = draw.permutation(32)  # the row whose address lane l gives
    inputs = np.concatenate([rows.view(np.uint32), order[:, None].astype(np.uint32)], 1)
    out = golden.run(selftests[mode].library, name, inputs[None], matrices)[0].view(np.uint16).reshape(32, matrices, 2)
    for lane in range(32):
        for m in range(matrices):
            matrix = rows[order[8 * m : 8 * m + 8]]
            matrix = matrix.T if name.endswith("trans") else matrix
            assert np.array_equal(out[lane, m], matrix[lane // 4, lane % 4 * 2 : lane % 4 * 2 + 2]), f"lane {lane}, matrix {m}"


def words_of(values: np.ndarray, inputs: int) -> np.ndarray:
    """``[warps, 32, inputs]`` of a list of 32-bit words, the end filled with zeros."""
    size = -(-values.size // (32 * inputs)) * 32 * inputs
    return np.pad(values.ravel(), (0, size - values.size)).reshape(-1, 32, inputs)


def test_conversion_to_e4m3(selftests):
    """Every number that E4M3 has, what lies half way to the next, and what is a bit to either side of that; both signs."""
    codes = torch.arange(0, 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    halfway = (codes[1:] + codes[:-1]) / 2
    special = torch.tensor([448.0, 464.0, 465.0, 1e9, float("inf"), 1e-30, 2.0**-10, 2.0**-10 * 1.0001])
    values = torch.cat([codes, halfway, torch.nextafter(halfway, torch.tensor(0.0)), torch.nextafter(halfway, torch.tensor(1e9)), special])
    values = torch.cat([values, -values])
    inputs = words_of(values.numpy().view(np.uint32), 2)
    out = golden.run(selftests["fast"].library, "cvt_e4m3x2", inputs, 1).ravel()[: len(values) // 2]
    found = np.stack([out & 0xFF, out >> 8], 1).ravel().astype(np.uint8)
    expected = values.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    assert np.array_equal(found, expected)
    nan = golden.run(selftests["fast"].library, "cvt_e4m3x2", words_of(np.array([0x7FC00000] * 64, np.uint32), 2), 1)
    assert (nan & 0x7F7F == 0x7F7F).all()


@pytest.mark.parametrize(("name", "dtype"), (("arithmetic_f16", torch.float16), ("arithmetic_bf16", torch.bfloat16)))
def test_16bit_arithmetic_rounds_once(name, dtype, selftests):
    """fma, sub and mul of 16-bit floats of every size. Their exact results fit float64, which torch rounds once."""
    draw = np.random.default_rng(2)
    bits = draw.integers(0, 2**16, (20 * 32, 3, 2)).astype(np.uint16)
    exponents = 0x7C00 if dtype == torch.float16 else 0x7F80
    bits[(bits & exponents) == exponents] &= ~np.uint16(0x4000)
    if dtype == torch.bfloat16:  # exponents near each other: else float64 does not hold the sum
        bits = (bits & 0x87FF) | 0x3800
    bits[:64, 2] = 0x8000
    out = golden.run(selftests["fast"].library, name, bits.view(np.uint32).reshape(20, 32, 3), 3).view(np.uint16).reshape(-1, 3, 2)
    a, b, c = (torch.from_numpy(bits[:, i].copy()).view(dtype).double() for i in range(3))
    for i, expected in enumerate((a * b + c, a - b, a * b)):
        rounded = expected.to(dtype)
        assert torch.equal(torch.from_numpy(out[:, i].copy()).view(dtype), rounded), ("hfma2", "hsub2", "hmul2")[i]


def test_bits(selftests):
    draw = np.random.default_rng(3)
    a, b, c = draw.integers(0, 2**32, (3, 32), dtype=np.uint64).astype(np.uint32)
    inputs = np.stack([a, b, c], 1)[None]
    out = golden.run(selftests["fast"].library, "lop3", inputs, 3)[0]
    for i, table in enumerate((0xEA, 0x6A, 0x1B)):
        for bit in range(32):
            index = (a >> bit & 1) << 2 | (b >> bit & 1) << 1 | (c >> bit & 1)
            assert np.array_equal(out[:, i] >> bit & 1, np.uint32(table) >> index & 1)
    permuted = golden.run(selftests["fast"].library, "prmt", inputs, 1)[0, :, 0]
    for lane in range(32):
        source = (int(b[lane]) << 32 | int(a[lane])).to_bytes(8, "little")
        nibbles = [int(c[lane]) >> 4 * i & 15 for i in range(4)]
        expected = bytes(source[n & 7] if n < 8 else 0xFF * (source[n & 7] >> 7) for n in nibbles)
        assert int(permuted[lane]).to_bytes(4, "little") == expected


# ---- Golden vectors ----


def test_golden_vectors_are_recorded_and_replayed(selftests, tmp_path):
    """The recorder and the reader agree, with the emulator in the GPU's place; and a wrong answer is noticed."""
    for mode, sm in (("fast", 120), ("checked", 75)):
        library = selftests[mode].library
        library.taut_golden_record.restype = ctypes.c_char_p
        selftests[mode].set_device(sm)
        assert library.taut_golden_record(str(tmp_path).encode(), sm) == b""
    files = sorted(tmp_path.glob("*.golden"))
    probes = set(re.findall(r'^    \{"(\w+)", \d+, "', (build.HERE / "golden.cu").read_text(), re.M))
    assert {golden.read(path).name for path in files if path.name.startswith("sm120")} == probes
    assert {path.name for path in files if "sm75" in path.name and ("mma" in path.name or "cp_async" in path.name)} == {
        "sm75-mma_m16n8k8_f16.golden"
    }, "only what a device has is recorded on it"
    selftests["checked"].set_device(120)
    for path in files:
        vectors = golden.read(path)
        assert golden.differences(selftests["checked"].library, vectors) == []
        for warp, change in ((0, 1), (7, 0x40000000)):  # the least bit of an exact result; much of an inexact one
            damaged = vectors.outputs.copy()
            damaged[warp, 3, 0] ^= change
            assert golden.differences(
                selftests["checked"].library, golden.Golden(vectors.name, vectors.sm, vectors.kinds, vectors.inputs, damaged)
            )
    cut = tmp_path / "cut.golden"
    cut.write_bytes(files[0].read_bytes()[:-4])
    with pytest.raises(ValueError, match="cut off"):
        golden.read(cut)


@pytest.mark.parametrize("path", sorted(golden.FOLDER.glob("*.golden")), ids=lambda path: path.stem)
def test_the_emulator_answers_as_the_gpu_did(path, selftests):
    vectors = golden.read(path)
    selftests["checked"].set_device(vectors.sm)
    found = golden.differences(selftests["checked"].library, vectors)
    assert not found, f"{len(found)} words differ:\n" + "\n".join(found[:20])


# ---- The emulated ops ----


def test_the_tests_know_every_emulated_impl():
    for mode in build.MODES:
        ops_library(mode)
    listed = {(op, device, name) for op, device, names in taut._C.list_ops() if device.startswith("emulated") for name in names}
    parsed = {
        (op, f"emulated {mode}", name)
        for op in {op for op, _, _ in listed} | {path.parent.name for path in (ROOT / "csrc").glob("*/op_cuda.cpp")}
        for name, mode in (re.fullmatch(r"(\S+) \(emulated, (\w+)\)", impl).groups() for impl in emulated_impls(op))
    }
    assert parsed == listed
    assert {name.split(".")[0] for _, _, name in listed} <= set(SM_OF)
    assert not any(name.startswith("cuda") for names in taut.list_impls().values() for name in names) or torch.cuda.is_available()


def test_routing_ends_with_the_block():
    before = _native.ops_for, _native.layout_for
    with emulated("fast", sm=80):
        assert _native.layout_for("cpu") == _native.MMA_TILES
    assert (_native.ops_for, _native.layout_for) == before


def test_the_libraries_are_built_by_one_command():
    done = subprocess.run([sys.executable, str(build.HERE / "build.py")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [f"build/emulator/libtaut_emulated_{mode}.so" for mode in build.MODES]
