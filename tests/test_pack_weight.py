"""pack_weight, unpack_weight, dequantize_weight: bijection, the layout's own definition, exact numbers, refusals."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import taut
from cases import DTYPES, FORMATS, pack, random_weight
from checks import assert_same_bits
from emulator import build
from emulator.emulated import emulated
from on_gpu import on_gpu
from taut import _native
from taut.formats import WeightFormat
from taut.ops import quantize_weight as weight_op
from taut.ops.pack_weight import dequantize_weight, pack_weight, unpack_weight

SHAPES = ((1, 1), (7, 31), (8, 32), (9, 33), (17, 127), (16, 512), (100, 75), (3, 1537), (1, 10944))
INT4, INT4_ZEROS, INT8, FP8 = (
    WeightFormat("int4", 32),
    WeightFormat("int4", 64, True),
    WeightFormat("int8", 0),
    WeightFormat("fp8_e4m3", 128),
)
KINDS = (INT4, INT4_ZEROS, INT8, FP8)
LAYOUTS = {"Rows8": 0, "MmaTiles": 1}
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


@contextmanager
def in_layout(name: str) -> Iterator[None]:
    """As if the CPU's kernels read this layout: the CPU ops compute every one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_native, "layout_for", lambda device_type: LAYOUTS[name])
        yield


def make(n: int, k: int, format: WeightFormat, seed: int = 0):
    return random_weight(n, k, format, torch.Generator().manual_seed(seed))


def assert_round_trip(n: int, k: int, format: WeightFormat, layout: str, seed: int) -> None:
    parts = make(n, k, format, seed)
    before = [part.clone() for part in parts if part is not None]
    with in_layout(layout):
        packed = pack(*parts, k, format)
        back = unpack_weight(packed, n, k, format)
    assert packed.dtype == torch.uint8 and packed.numel() == format.layout_bytes(n, k, LAYOUTS[layout])
    for what, a, b in zip(("codes", "scales", "zeros"), back, parts, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            assert_same_bits(a, b, f"{format} [{n}, {k}], seed {seed}: {what} packed and unpacked")
    for a, b in zip(before, (part for part in parts if part is not None), strict=True):
        assert_same_bits(a, b, "an input was written to")


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@each_layout
def test_round_trip(format, shape, layout):
    assert_round_trip(*shape, format, layout, 0)


@settings(max_examples=300, deadline=None, print_blob=True)
@given(
    n=st.integers(0, 70),
    k=st.integers(1, 1200),
    format=st.sampled_from(FORMATS),
    layout=st.sampled_from(list(LAYOUTS)),
    seed=st.integers(0, 2**31),
)
def test_round_trip_fuzz(n, k, format, layout, seed):
    assert_round_trip(n, k, format, layout, seed)


def codes_as_integers(codes: torch.Tensor, k: int, format: WeightFormat) -> torch.Tensor:
    """A canonical row's codes, one integer 0..255 each: the bits as they are stored."""
    if format.name == "int4":
        return torch.stack([codes & 15, codes >> 4], -1).flatten(1)[:, :k].int()
    return codes.view(torch.uint8).int()


def rows8(codes, scales, zeros, n: int, k: int, format: WeightFormat) -> torch.Tensor:
    """Rows8 as the comment of csrc/common/formats.h describes it, written down byte by byte a second time."""
    group, int4 = format.group_size or 128, format.name == "int4"
    padded = torch.zeros(-(-n // 8) * 8, -(-k // 32) * 32, dtype=torch.int)
    padded[:n, :k] = codes_as_integers(codes, k, format)
    if format.name == "int8":
        padded ^= 128
    out: list[int] = []
    for strip in range(0, n, 8):
        for superblock in range(0, padded.shape[1], 4 * group):
            for g in range(4):
                for row in range(strip, strip + 8):
                    at = superblock + g * group
                    inside = row < n and at < k
                    value = scales[row, at // format.group_size if format.group_size else 0] if inside else torch.tensor(0.0).half()
                    out += value.reshape(1).view(torch.uint8).tolist()
            if format.zeros:
                for g in range(4):
                    for row in range(strip, strip + 8):
                        at = superblock + g * group
                        out.append(int(zeros[row, at // format.group_size if format.group_size else 0]) if row < n and at < k else 0)
            for block in range(superblock, min(superblock + 4 * group, padded.shape[1]), 32):
                for vector in range(4 if int4 else 8):
                    for row in range(strip, strip + 8):
                        for i in range(4):
                            at = block + 4 * vector + i
                            out.append(int(padded[row, at] | padded[row, at + 16] << 4 if int4 else padded[row, at]))
    return torch.tensor(out, dtype=torch.uint8)


def fragment_16(lane: int, i: int) -> tuple[int, int]:
    """Row and k of element i (0..7) that a lane holds of the 16 x 16 A operand of mma.m16n8k16, from the PTX ISA's tables.
    Register r holds elements 2r and 2r + 1, in its low and its high half."""
    group, thread = lane // 4, lane % 4
    return group + (0 if i % 4 < 2 else 8), thread * 2 + i % 2 + (0 if i < 4 else 8)


def fragment_32(lane: int, i: int) -> tuple[int, int]:
    """The same for element i (0..15) of the 16 x 32 A operand of mma.m16n8k32; register r holds elements 4r to 4r + 3."""
    group, thread = lane // 4, lane % 4
    return group + (0 if i % 8 < 4 else 8), thread * 4 + i % 4 + (0 if i < 8 else 16)


def mma_tiles(codes, scales, zeros, n: int, k: int, format: WeightFormat) -> torch.Tensor:
    """MmaTiles, from the same comment and the fragments of mma.m16n8k16."""
    padded = torch.zeros(-(-n // 64) * 64, -(-k // 64) * 64, dtype=torch.int)
    padded[:n, :k] = codes_as_integers(codes, k, format)
    q = padded.tolist()
    out: list[int] = []
    for n0 in range(0, len(q), 64):
        for k0 in range(0, len(q[0]), 64):
            for strip in range(n0, n0 + 64, 16):
                for half in range(k0, k0 + 64, 64 if format.name == "int4" else 32):
                    for lane in range(32):
                        for step in range(half, half + (64 if format.name == "int4" else 32), 16):
                            held = [q[strip + row][step + column] for row, column in (fragment_16(lane, i) for i in range(8))]
                            if format.name == "int4":  # the low halves of registers 0 to 3 are nibbles 0 to 3, the high ones 4 to 7
                                nibbles = held[::2] + held[1::2]
                                out += [nibbles[i] | nibbles[i + 1] << 4 for i in range(0, 8, 2)]
                            else:  # a word is registers h and h + 2: bytes 0 and 2 the one, 1 and 3 the other
                                for h in (0, 1):
                                    out += [held[2 * h], held[2 * (h + 2)], held[2 * h + 1], held[2 * (h + 2) + 1]]
    group = format.group_size or len(q[0])
    order = [(n0 + i % 8 * 8 + i // 8, k0) for n0 in range(0, len(q), 64) for k0 in range(0, len(q[0]), group) for i in range(64)]
    inside = [(row, k0 // group) if row < n and k0 < k else None for row, k0 in order]
    section = torch.stack([torch.zeros((), dtype=torch.float16) if at is None else scales[at] for at in inside])
    points = [0 if at is None else int(zeros[at]) for at in inside] if format.zeros else []
    return torch.cat([torch.tensor(out, dtype=torch.uint8), section.view(torch.uint8), torch.tensor(points, dtype=torch.uint8)])


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("shape", ((1, 1), (9, 33), (5, 300), (8, 544), (70, 130)), ids=str)
@each_layout
def test_bytes_are_where_the_layout_says(format, shape, layout):
    parts = make(*shape, format)
    with in_layout(layout):
        packed = pack(*parts, shape[1], format)
    assert_same_bits(packed, {"Rows8": rows8, "MmaTiles": mma_tiles}[layout](*parts, *shape, format), f"{format} {shape}")


@pytest.mark.parametrize("format", (INT8, FP8), ids=str)
def test_mma_tiles_are_8_bit_fragments_too(format):
    """Word r of a lane is register r of mma.m16n8k32, where slot 16j + 4t + i of x stands for k = 16j + (2t, 2t+8, 2t+1, 2t+9)[i]."""
    codes, scales, _ = make(64, 64, format)
    with in_layout("MmaTiles"):
        packed = pack(codes, scales, None, 64, format)
    q = codes_as_integers(codes, 64, format)
    slot_k = [16 * j + (2 * t, 2 * t + 8, 2 * t + 1, 2 * t + 9)[i] for j in range(2) for t in range(4) for i in range(4)]
    fragments = packed[: 64 * 64].view(4, 2, 32, 16)  # strips, halves of 32 k, lanes, bytes
    for strip in range(4):
        for half in range(2):
            for lane in range(32):
                for i in range(16):
                    row, slot = fragment_32(lane, i)
                    assert fragments[strip, half, lane, i] == q[16 * strip + row, 32 * half + slot_k[slot]]


def cuda_device(name: str) -> AbstractContextManager:
    """Within it, ops on CPU tensors run on a CUDA device: the emulated one, or a real one where there is."""
    if name == "cuda":
        return on_gpu()
    if reason := build.unavailable():
        pytest.skip(reason)
    return emulated(name, sm=75)


@pytest.mark.parametrize("device", [*build.MODES, *(["cuda"] if taut.list_impls("cuda") else [])])
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_cuda_packs_what_the_cpu_packs(format, device):
    for n, k in ((1, 1), (9, 33), (70, 130), (129, 321)):
        parts = make(n, k, format)
        with in_layout("MmaTiles"):
            packed = pack(*parts, k, format)
            numbers = {dtype: dequantize_weight(packed, n, k, format, dtype, n // 3, n) for dtype in DTYPES}
        with cuda_device(device):
            assert_same_bits(pack(*parts, k, format), packed, f"{format} [{n}, {k}] packed")
            for a, b in zip(unpack_weight(packed, n, k, format), parts, strict=True):
                assert a is b is None or assert_same_bits(a, b, f"{format} [{n}, {k}] unpacked") is None
            for dtype, expected in numbers.items():
                found = dequantize_weight(packed, n, k, format, dtype, n // 3, n)
                assert_same_bits(found + 0.0, expected + 0.0, f"{format} [{n}, {k}] to {dtype}")  # -0.0 + 0.0 is 0.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", FORMATS, ids=str)
@each_layout
def test_dequantize_is_exact(format, dtype, layout):
    """A code times an fp16 scale fits float32; one rounding to the dtype remains."""
    for n, k in ((1, 1), (17, 75), (9, 333)):
        parts = make(n, k, format)
        expected = weight_op.reference(*parts, k, format).to(dtype)
        expected = torch.where(expected == 0, torch.zeros_like(expected), expected)
        with in_layout(layout):
            found = dequantize_weight(pack(*parts, k, format), n, k, format, dtype)
        found = torch.where(found == 0, torch.zeros_like(found), found)  # 0 * -s is -0.0 in one and 0.0 in the other
        assert_same_bits(found, expected, f"{format} [{n}, {k}] to {dtype}")


@pytest.mark.parametrize("format", KINDS, ids=str)
@each_layout
def test_dequantize_some_rows(format, layout):
    n, k = 129, 75
    with in_layout(layout):
        packed = pack(*make(n, k, format), k, format)
        whole = dequantize_weight(packed, n, k, format)
        for begin, end in ((0, 129), (0, 0), (129, 129), (3, 5), (7, 9), (8, 16), (15, 29), (63, 65), (64, 128), (100, 129)):
            part = dequantize_weight(packed, n, k, format, row_begin=begin, row_end=end)
            assert_same_bits(part, whole[begin:end], f"rows {begin} to {end}")


@pytest.mark.parametrize("format", FORMATS, ids=str)
@each_layout
def test_threads_change_nothing(format, threads, layout):
    parts = make(150, 300, format)
    results = []
    for count in (1, 2, 3):
        threads(count)
        with in_layout(layout):
            packed = pack(*parts, 300, format)
            results.append((packed, unpack_weight(packed, 150, 300, format)[0], dequantize_weight(packed, 150, 300, format)))
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            assert_same_bits(a, b, "another number of threads")


@pytest.mark.parametrize("format", KINDS, ids=str)
def test_strided_parts(format):
    codes, scales, zeros = make(9, 75, format)
    expected = pack(codes, scales, zeros, 75, format)

    def spread(t):
        return None if t is None else torch.stack([t, torch.zeros_like(t)], -1)[..., 0]

    assert not spread(codes).is_contiguous()
    assert_same_bits(pack(spread(codes), spread(scales), spread(zeros), 75, format), expected, "every second element")


@pytest.mark.parametrize("format", KINDS, ids=str)
@each_layout
def test_opcheck(format, layout):
    n, k = 9, 75
    parts = make(n, k, format)
    with in_layout(layout):
        packed = pack(*parts, k, format)
    tests = ("test_faketensor", "test_autograd_registration")
    if format != FP8:  # test_schema compares by arithmetic that torch does not have for float8
        tests += ("test_schema",)
    code, group, order = format.code, format.group_size, LAYOUTS[layout]
    torch.library.opcheck(torch.ops.taut.pack_weight.default, (*parts, k, code, group, order), test_utils=tests)
    torch.library.opcheck(torch.ops.taut.unpack_weight.default, (packed, n, k, code, group, format.zeros, order), test_utils=tests)
    torch.library.opcheck(
        torch.ops.taut.dequantize_weight.default, (packed, n, k, code, group, format.zeros, order, 1, 7, torch.bfloat16), test_utils=tests
    )


# ---- Bad input ----


def good() -> dict:
    codes, scales, zeros = make(3, 70, INT4_ZEROS)
    return {"codes": codes, "scales": scales, "zeros": zeros, "in_features": 70, "format": INT4_ZEROS}


BAD_PARTS = {
    "codes 1-D": ({"codes": torch.zeros(35, dtype=torch.uint8)}, r"with zeros weight with K=70 must be torch.uint8 \[N, 35\]"),
    "codes wide": ({"codes": torch.zeros(3, 36, dtype=torch.uint8)}, r"got torch.uint8 \[3, 36\]"),
    "codes int8": ({"codes": torch.zeros(3, 35, dtype=torch.int8)}, "got torch.int8"),
    "another K": ({"in_features": 80}, "K=80"),
    "scales shape": ({"scales": torch.ones(3, 3).half()}, r"scales must be torch.float16 \[3, 2\]"),
    "scales dtype": ({"scales": torch.ones(3, 2)}, r"scales must be torch.float16"),
    "scales NaN": ({"scales": torch.full((3, 2), float("nan")).half()}, "scales must be finite"),
    "scales inf": ({"scales": torch.full((3, 2), float("inf")).half()}, "scales must be finite"),
    "no zeros": ({"zeros": None}, "needs zeros"),
    "unwanted zeros": ({"format": WeightFormat("int4", 64)}, "has no zeros"),
    "zeros shape": ({"zeros": torch.zeros(2, 3, dtype=torch.uint8)}, r"zeros must be torch.uint8 \[3, 2\]"),
    "zeros dtype": ({"zeros": torch.zeros(3, 2)}, "zeros must be torch.uint8"),
    "zeros large": ({"zeros": torch.full((3, 2), 16, dtype=torch.uint8)}, "zeros must be 0..15, got 16"),
    "fp8 NaN": (
        {"codes": torch.full((3, 70), -float("nan")).to(torch.float8_e4m3fn), "zeros": None, "format": WeightFormat("fp8_e4m3", 64)},
        "codes of an fp8_e4m3 weight must be finite, got a NaN",
    ),
    "elsewhere": ({"codes": torch.zeros(3, 35, dtype=torch.uint8, device="meta")}, "codes is on meta, scales on cpu"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD_PARTS)
def test_bad_part_is_a_value_error(what):
    change, message = BAD_PARTS[what]
    with pytest.raises(ValueError, match=message):
        pack_weight(**good() | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"packed": torch.zeros(10, dtype=torch.uint8)}, r"packed must be uint8 \[\d+\] for .* got torch.uint8 \[10\]"),
        ({"packed": torch.zeros(10)}, "packed must be uint8"),
        ({"out_features": 9}, "packed must be uint8"),
        ({"in_features": 1000}, "packed must be uint8"),
        ({"format": INT8}, "packed must be uint8"),
    ],
    ids=("short", "float", "N", "K", "format"),
)
def test_bad_packed_is_a_value_error(change, message):
    call = {"packed": pack_weight(**good()), "out_features": 3, "in_features": 70, "format": INT4_ZEROS} | change
    for op in (unpack_weight, dequantize_weight):
        with pytest.raises(ValueError, match=message):
            op(**call)


@pytest.mark.parametrize("rows", ((-1, 2), (2, 1), (0, 4), (5, 5)), ids=str)
def test_bad_rows_are_a_value_error(rows):
    with pytest.raises(ValueError, match="rows must satisfy 0 <= row_begin <= row_end <= 3"):
        dequantize_weight(pack_weight(**good()), 3, 70, INT4_ZEROS, row_begin=rows[0], row_end=rows[1])


def test_bad_dtype_is_a_value_error():
    with pytest.raises(ValueError, match="dtype must be float32, bfloat16 or float16, got torch.float64"):
        dequantize_weight(pack_weight(**good()), 3, 70, INT4_ZEROS, torch.float64)


def test_bad_raw_calls_are_errors_and_no_crash():
    codes, scales, zeros = make(3, 70, INT4_ZEROS)
    packed = pack(codes, scales, zeros, 70, INT4_ZEROS)
    ops = torch.ops.taut
    bad = [
        (ops.pack_weight, (codes[0], scales, zeros, 70, 4, 64, 0), "codes must be 2-D"),
        (ops.pack_weight, (codes, scales, zeros, 80, 4, 64, 0), "codes must be"),
        (ops.pack_weight, (codes, scales, zeros, 0, 4, 64, 0), "K >= 1"),
        (ops.pack_weight, (codes, scales, zeros, 70, 2, 64, 0), "format must be"),
        (ops.pack_weight, (codes, scales, zeros, 70, 4, 16, 0), "group_size must be"),
        (ops.pack_weight, (codes.to(torch.int8), scales, zeros, 70, 4, 64, 0), "codes must be uint8"),
        (ops.pack_weight, (codes, scales.float(), zeros, 70, 4, 64, 0), "scales must be float16"),
        (ops.pack_weight, (codes, scales[:, :1], zeros, 70, 4, 64, 0), r"scales must be \[3, 2\]"),
        (ops.pack_weight, (codes, scales, zeros + 16, 70, 4, 64, 0), "zeros must be 0..15"),
        (ops.pack_weight, (codes, scales, zeros.int(), 70, 4, 64, 0), "zeros must be uint8"),
        (ops.pack_weight, (codes, scales, zeros, 70, 4, 64, 2), "layout must be 0"),
        (ops.pack_weight, (codes, scales, None, 35, 9, 32, 0), "codes must be"),
        (ops.unpack_weight, (packed, 3, 70, 4, 64, True, 1), "packed must be"),
        (ops.unpack_weight, (packed, 3, 70, 4, 64, True, -1), "layout must be 0"),
        (ops.unpack_weight, (packed[:-1], 3, 70, 4, 64, True, 0), "packed must be"),
        (ops.unpack_weight, (packed, 3, 70, 4, 64, False, 0), "packed must be"),
        (ops.unpack_weight, (packed, -3, 70, 4, 64, True, 0), "N >= 0"),
        (ops.dequantize_weight, (packed, 3, 70, 4, 64, True, 0, 0, 4, torch.float32), "rows must satisfy"),
        (ops.dequantize_weight, (packed, 3, 70, 4, 64, True, 0, -1, 2, torch.float32), "rows must satisfy"),
        (ops.dequantize_weight, (packed, 3, 70, 4, 64, True, 0, 0, 3, torch.int32), "dtype must be"),
    ]
    for op, args, message in bad:
        with pytest.raises(RuntimeError, match=message):
            op(*args)
