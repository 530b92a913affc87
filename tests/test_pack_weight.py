"""pack_weight, unpack_weight, dequantize_weight: bijection, the layout's own definition, exact numbers, refusals."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import taut
from cases import ALL_FORMATS, CUDA_FORMATS, DTYPES, EACH_FORMAT, FP8, INT4_ZEROS, INT8, encode, pack, random_weight
from checks import assert_same_bits
from emulator import build
from emulator.emulated import emulated
from on_gpu import on_gpu
from taut import _native
from taut.formats import WeightFormat
from taut.ops import quantize_weight as weight_op
from taut.ops.pack_weight import dequantize_weight, pack_weight, repack, unpack_weight

SHAPES = ((1, 1), (7, 31), (8, 32), (9, 33), (17, 127), (16, 512), (100, 75), (3, 1537), (1, 10944))
LAYOUTS = {"Rows8": 0, "MmaTiles": 1}
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


def in_each_layout(formats) -> pytest.MarkDecorator:
    pairs = [(format, layout) for format in formats for layout in LAYOUTS if layout == "Rows8" or format.kind.cuda]
    return pytest.mark.parametrize(("format", "layout"), pairs, ids=str)


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
    for what, a, b in zip(("codes", "scales", "zeros", "global_scale"), back, parts, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            assert_same_bits(a, b, f"{format} [{n}, {k}], seed {seed}: {what} packed and unpacked")
    for a, b in zip(before, (part for part in parts if part is not None), strict=True):
        assert_same_bits(a, b, "an input was written to")


@in_each_layout(ALL_FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_round_trip(format, shape, layout):
    assert_round_trip(*shape, format, layout, 0)


@settings(max_examples=300, deadline=None, print_blob=True)
@given(
    n=st.integers(0, 70),
    k=st.integers(1, 1200),
    format=st.sampled_from(ALL_FORMATS),
    layout=st.sampled_from(list(LAYOUTS)),
    seed=st.integers(0, 2**31),
)
def test_round_trip_fuzz(n, k, format, layout, seed):
    assert_round_trip(n, k, format, layout if format.kind.cuda else "Rows8", seed)


def codes_as_integers(codes: torch.Tensor, k: int, format: WeightFormat) -> torch.Tensor:
    """A canonical row's codes, one integer 0..255 each: the bits as they are stored."""
    found = torch.zeros(codes.shape[0], k, dtype=torch.int)
    for n, row in enumerate(codes.view(torch.uint8).tolist()):
        if format.name == "ternary":
            found[n] = torch.tensor([row[i // 5] // 3 ** (i % 5) % 3 for i in range(k)])
        else:  # a little-endian string of bits, whatever their number
            string = int.from_bytes(bytes(row), "little")
            found[n] = torch.tensor([string >> format.bits * i & 2**format.bits - 1 for i in range(k)])
    return found


def rows8(codes, scales, zeros, global_scale, n: int, k: int, format: WeightFormat) -> torch.Tensor:
    """Rows8 as the comment of csrc/common/formats.h describes it, written down byte by byte a second time."""
    group = max(format.group_size or 128, 32)
    halves = 2 if format.group_size == 16 else 1
    padded = torch.zeros(-(-n // 8) * 8, -(-k // 32) * 32, dtype=torch.int)
    padded[:n, :k] = codes_as_integers(codes, k, format)
    if format.name == "int8":
        padded ^= 128
    q = padded.tolist()
    stored = scales.contiguous().view(torch.uint8).unflatten(1, (scales.shape[1], -1)).tolist()
    out: list[int] = []
    for strip in range(0, n, 8):
        for superblock in range(0, padded.shape[1], 4 * group):
            for at in range(superblock, superblock + 4 * group, group // halves):
                for row in range(strip, strip + 8):
                    inside = row < n and at < k
                    scale_row = row // 128 if format.name == "fp8_block" else row
                    out += stored[scale_row][at // format.group_size if format.group_size else 0] if inside else [0] * scales.element_size()
            if format.zeros:
                for g in range(4):
                    for row in range(strip, strip + 8):
                        at = superblock + g * group
                        out.append(int(zeros[row, at // format.group_size if format.group_size else 0]) if row < n and at < k else 0)
            for block in range(superblock, min(superblock + 4 * group, padded.shape[1]), 32):
                # a byte of vector v holds chunks v, v + vectors, ... from its low bits up
                low_bits = {3: 2}.get(format.bits, format.bits)
                vectors = low_bits
                for vector in range(vectors):
                    for row in range(strip, strip + 8):
                        for i in range(4):
                            chunks = range(vector, 8, vectors)
                            held = [q[row][block + 4 * chunk + i] & 2**low_bits - 1 for chunk in chunks]
                            out.append(sum(code << low_bits * j for j, code in enumerate(held)))
                if format.bits == 3:
                    for row in range(strip, strip + 8):
                        out += [sum((q[row][block + 4 * chunk + i] >> 2) << chunk for chunk in range(8)) for i in range(4)]
    if global_scale is not None:
        out += [*global_scale.view(torch.uint8).tolist(), *[0] * 60]
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


def mma_tiles(codes, scales, zeros, _, n: int, k: int, format: WeightFormat) -> torch.Tensor:
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


@in_each_layout(ALL_FORMATS)
@pytest.mark.parametrize("shape", ((1, 1), (9, 33), (5, 300), (8, 544), (70, 130)), ids=str)
def test_bytes_are_where_the_layout_says(format, shape, layout):
    parts = make(*shape, format)
    with in_layout(layout):
        packed = pack(*parts, shape[1], format)
    assert_same_bits(packed, {"Rows8": rows8, "MmaTiles": mma_tiles}[layout](*parts, *shape, format), f"{format} {shape}")


@pytest.mark.parametrize("format", (INT8, FP8), ids=str)
def test_mma_tiles_are_8_bit_fragments_too(format):
    """Word r of a lane is register r of mma.m16n8k32, where slot 16j + 4t + i of x stands for k = 16j + (2t, 2t+8, 2t+1, 2t+9)[i]."""
    codes, *rest = make(64, 64, format)
    with in_layout("MmaTiles"):
        packed = pack(codes, *rest, 64, format)
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
@pytest.mark.parametrize("format", CUDA_FORMATS, ids=str)
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


def test_cuda_refuses_formats_of_the_cpu():
    """Through the Python contract, before any kernel; and by the op itself."""
    for format in (format for format in EACH_FORMAT if not format.kind.cuda):
        parts = make(9, 33, format)
        packed = pack(*parts, 33, format)
        message = f"{format.name} weights are for the CPU only; on CUDA taut takes int4, int8, fp8_e4m3"
        with pytest.raises(ValueError, match=message):
            repack(packed, 0, 9, 33, format, torch.device("cuda"))
        with pytest.raises(ValueError, match=message), in_layout("MmaTiles"):
            dequantize_weight(packed, 9, 33, format)
        codes, scales, zeros, global_scale = parts
        with pytest.raises(RuntimeError, match=r"MmaTiles, the layout of CUDA, takes 4 \(int4\), 8 \(int8\) and 9"):
            torch.ops.taut.pack_weight(codes, scales, zeros, 33, format.code, format.group_size, 1, global_scale)


@pytest.mark.parametrize("device", build.MODES)
def test_emulated_cuda_refuses_formats_of_the_cpu(device):
    parts = make(9, 33, WeightFormat("int3"))
    with cuda_device(device), pytest.raises(RuntimeError, match="this weight format is for the CPU"):
        pack(*parts, 33, WeightFormat("int3"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@in_each_layout(ALL_FORMATS)
def test_dequantize_is_exact(format, dtype, layout):
    """A code times its scale, rounded once to float32 (where an fp16 scale's product is exact), and from there to the dtype."""
    for n, k in ((1, 1), (17, 75), (9, 333)):
        parts = make(n, k, format)
        expected = weight_op.reference(*parts, k, format).float().to(dtype)
        expected = torch.where(expected == 0, torch.zeros_like(expected), expected)
        with in_layout(layout):
            found = dequantize_weight(pack(*parts, k, format), n, k, format, dtype)
        found = torch.where(found == 0, torch.zeros_like(found), found)  # 0 * -s is -0.0 in one and 0.0 in the other
        assert_same_bits(found, expected, f"{format} [{n}, {k}] to {dtype}")


@in_each_layout(EACH_FORMAT)
def test_dequantize_some_rows(format, layout):
    n, k = 129, 75
    with in_layout(layout):
        packed = pack(*make(n, k, format), k, format)
        whole = dequantize_weight(packed, n, k, format)
        for begin, end in ((0, 129), (0, 0), (129, 129), (3, 5), (7, 9), (8, 16), (15, 29), (63, 65), (64, 128), (100, 129)):
            part = dequantize_weight(packed, n, k, format, row_begin=begin, row_end=end)
            assert_same_bits(part, whole[begin:end], f"rows {begin} to {end}")


@in_each_layout(EACH_FORMAT)
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


@pytest.mark.parametrize("format", EACH_FORMAT, ids=str)
def test_strided_parts(format):
    codes, scales, zeros, global_scale = make(9, 75, format)
    expected = pack(codes, scales, zeros, global_scale, 75, format)

    def spread(t):
        return None if t is None else torch.stack([t, torch.zeros_like(t)], -1)[..., 0]

    assert not spread(codes).is_contiguous()
    assert_same_bits(pack(spread(codes), spread(scales), spread(zeros), global_scale, 75, format), expected, "every second element")


@in_each_layout(EACH_FORMAT)
def test_opcheck(format, layout):
    n, k = 9, 75
    parts = make(n, k, format)
    with in_layout(layout):
        packed = pack(*parts, k, format)
    tests = ("test_faketensor", "test_autograd_registration")
    if format.codes_dtype != torch.float8_e4m3fn:  # test_schema compares by arithmetic that torch does not have for float8
        tests += ("test_schema",)
    code, group, order = format.code, format.group_size, LAYOUTS[layout]
    pack_arguments = (*parts[:3], k, code, group, order, parts.global_scale)
    torch.library.opcheck(torch.ops.taut.pack_weight.default, pack_arguments, test_utils=tests)
    torch.library.opcheck(torch.ops.taut.unpack_weight.default, (packed, n, k, code, group, format.zeros, order), test_utils=tests)
    torch.library.opcheck(
        torch.ops.taut.dequantize_weight.default, (packed, n, k, code, group, format.zeros, order, 1, 7, torch.bfloat16), test_utils=tests
    )


# ---- Bad input ----


def good() -> dict:
    return make(3, 70, INT4_ZEROS)._asdict() | {"in_features": 70, "format": INT4_ZEROS}


def of(format: WeightFormat, **changes) -> dict:
    """A good weight of this format, with changes."""
    return make(3, 70, format)._asdict() | {"in_features": 70, "format": format} | changes


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
    "fp8_block NaN": (of(WeightFormat("fp8_block"), codes=torch.full((3, 70), float("nan")).to(torch.float8_e4m3fn)), "finite, got a NaN"),
    "fp8_block scales a row": (of(WeightFormat("fp8_block"), scales=torch.ones(3, 1)), r"scales must be torch.float32 \[1, 1\]"),
    "fp8_block scales inf": (of(WeightFormat("fp8_block"), scales=torch.full((1, 1), float("inf"))), "scales must be finite"),
    "nf4 scales float16": (of(WeightFormat("nf4"), scales=torch.ones(3, 2).half()), r"scales must be torch.float32 \[3, 2\]"),
    "nf4 scales NaN": (of(WeightFormat("nf4"), scales=torch.full((3, 2), float("nan"))), "scales must be finite"),
    "mxfp4 scales NaN": (of(WeightFormat("mxfp4"), scales=torch.full((3, 3), 255, dtype=torch.uint8)), "scales must be finite"),
    "nvfp4 scales NaN": (of(WeightFormat("nvfp4"), scales=torch.full((3, 5), 0xFF, dtype=torch.uint8)), "scales must be finite"),
    "nvfp4 global inf": (of(WeightFormat("nvfp4"), global_scale=torch.tensor([float("inf")])), "scales must be finite"),
    "nvfp4 no global": (of(WeightFormat("nvfp4"), global_scale=None), "nvfp4 group 16 needs global_scale"),
    "nvfp4 global shape": (of(WeightFormat("nvfp4"), global_scale=torch.tensor(1.0)), r"global_scale must be torch.float32 \[1\]"),
    "unwanted global": ({"global_scale": torch.ones(1)}, "has no global_scale"),
    "int3 zeros large": (of(WeightFormat("int3", 32, True), zeros=torch.full((3, 3), 8, dtype=torch.uint8)), r"zeros must be 0..7, got 8"),
    "int2 zeros large": (of(WeightFormat("int2", 32, True), zeros=torch.full((3, 3), 4, dtype=torch.uint8)), r"zeros must be 0..3, got 4"),
    "ternary byte": (of(WeightFormat("ternary"), codes=torch.full((3, 14), 243, dtype=torch.uint8)), "at most 242, got 243"),
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
    codes, scales, zeros, _ = make(3, 70, INT4_ZEROS)
    packed = pack(codes, scales, zeros, None, 70, INT4_ZEROS)
    nvfp4 = make(3, 70, WeightFormat("nvfp4"))
    ternary = make(3, 70, WeightFormat("ternary"))
    ops = torch.ops.taut
    bad = [
        (ops.pack_weight, (codes[0], scales, zeros, 70, 4, 64, 0), "codes must be 2-D"),
        (ops.pack_weight, (codes, scales, zeros, 80, 4, 64, 0), "codes must be"),
        (ops.pack_weight, (codes, scales, zeros, 0, 4, 64, 0), "K >= 1"),
        (ops.pack_weight, (codes, scales, zeros, 70, 11, 64, 0), "format must be"),
        (ops.pack_weight, (codes, scales, zeros, 70, 0, 64, 0), "format must be"),
        (ops.pack_weight, (codes, scales, zeros, 70, 2, 64, 0), "codes must be"),
        (ops.pack_weight, (codes, scales, zeros, 70, 5, 64, 0), "zeros are for int2, int3 and int4 only"),
        (ops.pack_weight, (codes, scales, None, 70, 5, 64, 0), "scales must be float32"),
        (ops.pack_weight, (codes, scales, None, 70, 6, 64, 0), "group_size must be 32 for mxfp4"),
        (ops.pack_weight, (*nvfp4[:3], 70, 7, 32, 0), "group_size must be 16 for nvfp4"),
        (ops.pack_weight, (*nvfp4[:3], 70, 7, 16, 0), "nvfp4 weights have a global_scale"),
        (ops.pack_weight, (*nvfp4[:3], 70, 7, 16, 0, torch.ones(2)), "global_scale must be float32"),
        (ops.pack_weight, (codes, scales, zeros, 70, 4, 64, 0, torch.ones(1)), "nvfp4 weights have a global_scale, others have none"),
        (ops.pack_weight, (ternary.codes.clone().fill_(255), ternary.scales, None, 70, 1, 0, 0), "at most 242, got 255"),
        (ops.unpack_weight, (packed, 3, 70, 10, 64, False, 0), "group_size must be 128 for fp8_block"),
        (ops.unpack_weight, (packed, 3, 70, 5, 64, False, 1), "this weight format is for the CPU"),
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


# ---- Scales at the edge, and codes that nothing quantizes to ----


def scale_bytes(format: WeightFormat) -> list[tuple[str, torch.Tensor, float]]:
    """Scales of each kind at the edge: their name, what is stored, and the number they stand for."""
    if format.name == "mxfp4":
        stored = [("2^-127, subnormal", 0, 2.0**-127), ("the largest", 254, 2.0**127), ("NaN", 255, float("nan"))]
        return [(name, torch.tensor(byte, dtype=torch.uint8), value) for name, byte, value in stored]
    numbers = [0.0, -0.0, float("inf"), float("nan")]
    numbers += {torch.float16: [2.0**-24, 65504.0], torch.float32: [2.0**-149, -(2.0**-130), 2.0**127]}.get(
        format.scales_dtype, [2.0**-9, -448.0]
    )
    dtype = torch.float8_e4m3fn if format.name == "nvfp4" else format.scales_dtype
    found = [(str(number), torch.tensor(number).to(dtype), number) for number in numbers]
    return [
        (name, stored.view(torch.uint8) if format.name == "nvfp4" else stored, float(stored.double())) for name, stored, _ in found
    ]  # fmt: skip


@pytest.mark.parametrize("format", EACH_FORMAT, ids=str)
def test_scales_at_the_edge(format):
    """Zero, subnormal (kept), infinite and NaN: what a scale stands for is what comes out; only finite ones pass the contract."""
    parts = make(9, 75, format)
    ones = parts._replace(scales=torch.full_like(parts.scales, {"mxfp4": 127, "nvfp4": 0x38}.get(format.name, 1)))
    numbers = weight_op.reference(*ones, 75, format)
    for name, stored, value in scale_bytes(format):
        changed = parts._replace(scales=stored.expand(parts.scales.shape).contiguous())
        found = dequantize_weight(pack(*changed, 75, format), 9, 75, format)
        torch.testing.assert_close(
            found, (numbers * value).float(), rtol=1e-6, atol=0, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}"
        )
        if value == value and abs(value) != float("inf"):
            pack_weight(*changed, 75, format)
        else:
            with pytest.raises(ValueError, match="scales must be finite"):
                pack_weight(*changed, 75, format)


def test_unused_bits_of_a_row_are_ignored():
    for name, unused in (("int4", 0xF0), ("nf4", 0xF0), ("int3", 0xC0), ("int2", 0xFC)):
        format = WeightFormat(name)
        parts = make(3, {"int2": 69, "int3": 74}.get(name, 75), format)
        k = {"int2": 69, "int3": 74}.get(name, 75)
        dirty = parts.codes.clone()
        dirty[:, -1] |= unused
        assert_same_bits(pack(dirty, *parts[1:], k, format), pack(*parts, k, format), name)


# ---- The same bytes as other libraries' ----


def test_ternary_digits_are_those_of_encode():
    q = torch.tensor([[0, 1, 2, 0, 1, 2, 2]])
    codes = encode(q, WeightFormat("ternary"))
    assert codes.tolist() == [[0 + 3 + 2 * 9 + 0 * 27 + 81, 2 + 2 * 3 + 9 + 27 + 81]], "what a row leaves over of its last byte is 1s"


@pytest.mark.parametrize("name", ("TQ1_0", "TQ2_0"))
def test_ternary_is_ggufs(name):
    """llama.cpp's ternary blocks of the same codes and scales dequantize to the same numbers."""
    gguf = pytest.importorskip("gguf")
    n, k = 4, 512
    generator = torch.Generator().manual_seed(3)
    q = torch.randint(0, 3, (n, k), generator=generator)
    scales = (torch.rand(n, 1, generator=generator) + 0.5).half()
    format = WeightFormat("ternary", 0)
    packed = pack_weight(encode(q, format), scales, None, None, k, format)
    values = ((q - 1).float() * scales.float()).numpy()
    kind = getattr(gguf.GGMLQuantizationType, name)
    theirs = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(values, kind), kind))
    assert_same_bits(theirs + 0.0, dequantize_weight(packed, n, k, format) + 0.0, name)


def test_mxfp4_numbers_are_ml_dtypes():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    import numpy as np

    format = WeightFormat("mxfp4")
    q = torch.arange(16).repeat(2)[None]
    for byte in (0, 1, 100, 127, 200, 254):
        packed = pack(encode(q, format), torch.tensor([[byte]], dtype=torch.uint8), None, None, 32, format)
        numbers = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float64)
        scale = np.uint8(byte).view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
        with np.errstate(over="ignore"):
            expected = torch.from_numpy(np.tile((numbers * scale).astype(np.float32), 2))
        assert_same_bits(dequantize_weight(packed, 1, 32, format)[0] + 0.0, expected + 0.0, f"scale byte {byte}")


def test_nvfp4_bytes_are_those_of_compressed_tensors():
    """Its packing, low nibble for even k, and its inverse global scale, as written in its checkpoints."""
    n, k = 3, 64
    generator = torch.Generator().manual_seed(4)
    q = torch.randint(0, 16, (n, k), generator=generator)
    scales = (torch.rand(n, k // 16, generator=generator) * 400).to(torch.float8_e4m3fn)
    weight_packed = (q[:, ::2] | q[:, 1::2] << 4).to(torch.uint8)
    weight_global_scale = torch.tensor([37.0])
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)
    expected = table[q] * (scales.double() / 37.0).repeat_interleave(16, 1)
    format = WeightFormat("nvfp4")
    packed = pack_weight(weight_packed, scales.view(torch.uint8), None, 1 / weight_global_scale, k, format)
    torch.testing.assert_close(dequantize_weight(packed, n, k, format).double(), expected, rtol=2e-7, atol=0)
