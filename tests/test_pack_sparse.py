"""Sparse weights: canonical form, packing and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import taut
from checks import assert_same_bits
from emulator import build
from emulator.emulated import emulated
from on_gpu import on_gpu
from sparse_cases import PATTERNS, WEIGHTS, random_sparse
from taut import _native
from taut.formats import NumberFormat, WeightFormat
from taut.formats.sparse import Pattern, SparseCanonical, SparseFormat, densify, sparsify
from taut.ops.pack_sparse import pack_sparse, repack_sparse, unpack_sparse
from taut.ops.quantize_weight import quantize_weight

OP = "pack_sparse"
INT8_2_4 = SparseFormat(WeightFormat("int8", 0), Pattern(2, 4))
BF16_2_4 = SparseFormat(NumberFormat("bf16"), Pattern(2, 4))


def assert_same_parts(found: SparseCanonical, expected: SparseCanonical, what: str) -> None:
    for name, new, old in zip(SparseCanonical._fields, found, expected, strict=True):
        assert (new is None) == (old is None), f"{what}: {name} is there in one of them"
        if old is not None:
            assert_same_bits(new, old, f"{what}: {name}")


def assert_round_trip(n: int, k: int, format: SparseFormat, seed: int) -> None:
    weight = random_sparse(n, k, format, torch.Generator().manual_seed(seed))
    before = SparseCanonical(*(None if part is None else part.clone() for part in weight))
    packed = pack_sparse(weight, k, format)
    assert packed.numel() == format.layout_bytes(n, k)
    assert_same_parts(weight, before, "written to")
    assert_same_parts(unpack_sparse(packed, n, k, format), before, f"{format} [{n}, {k}], seed {seed}, packed and unpacked")
    codes, mask = densify(weight, k, format)
    assert format.pattern.holds(mask) and mask.sum() == n * format.kept(k)
    again = sparsify(codes, weight.scales, mask, format)
    assert_same_parts(again, weight, f"{format} [{n}, {k}], seed {seed}, dense and back")


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_round_trip(weights, pattern):
    for n, k in ((1, 8), (8, 32), (17, 136), (33, 520), (16, 1032)):
        assert_round_trip(n, k, SparseFormat(weights, pattern), n + k)


@settings(max_examples=150, deadline=None, print_blob=True)
@given(
    n=st.integers(0, 50), blocks=st.integers(1, 90), weights=st.sampled_from(WEIGHTS), pattern=st.sampled_from(PATTERNS),
    seed=st.integers(0, 2**31),
)  # fmt: skip
def test_round_trip_fuzz(n, blocks, weights, pattern, seed):
    assert_round_trip(n, blocks * pattern.m, SparseFormat(weights, pattern), seed)


@contextmanager
def in_layout(layout: int) -> Iterator[None]:
    """As if the CPU's kernels read this layout: the CPU ops compute every one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_native, "layout_for", lambda device_type: layout)
        yield


def cuda_device(name: str) -> AbstractContextManager:
    """Within it, ops on CPU tensors run on a CUDA device: the emulated one, or a real one where there is."""
    if name == "cuda":
        return on_gpu()
    if reason := build.unavailable():
        pytest.skip(reason)
    return emulated(name, sm=75)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_round_trip_in_the_layout_of_cuda(weights, pattern):
    format = SparseFormat(weights, pattern)
    with in_layout(1):
        for n, k in ((1, 8), (8, 32), (17, 136), (70, 520), (16, 1032)):
            weight = random_sparse(n, k, format, torch.Generator().manual_seed(n + k))
            packed = pack_sparse(weight, k, format)
            assert packed.numel() == format.layout_bytes(n, k, 1)
            assert_same_parts(unpack_sparse(packed, n, k, format), weight, f"{format} [{n}, {k}], packed and unpacked")


DEVICES = (*build.MODES, *(["cuda"] if taut.list_impls("cuda") else []))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("weights", (*WEIGHTS[::2], WEIGHTS[-1]), ids=str)
def test_cuda_packs_what_the_cpu_packs(weights, pattern, device):
    format = SparseFormat(weights, pattern)
    for n, k in ((1, 8), (17, 136), (70, 392), (129, 32), (0, 8)):
        weight = random_sparse(n, k, format, torch.Generator().manual_seed(n + k))
        rows8 = pack_sparse(weight, k, format)
        with in_layout(1):
            packed = pack_sparse(weight, k, format)
        with cuda_device(device):
            assert_same_bits(pack_sparse(weight, k, format), packed, f"{format} [{n}, {k}] packed")
            assert_same_parts(unpack_sparse(packed, n, k, format), weight, f"{format} [{n}, {k}], unpacked")
            assert_same_bits(repack_sparse(rows8, 0, n, k, format, torch.device("cpu")), packed, "moved as it was, packed again")
        assert_same_bits(repack_sparse(packed, 1, n, k, format, torch.device("cpu")), rows8, "and back")


def test_places_are_where_sparse_tensor_cores_want_them():
    """The metadata of mma.sp.m16n8k32, by the definition of its fragment: bit by bit."""
    n, k, format = 70, 200, SparseFormat(WeightFormat("int4", 64), Pattern(2, 4))
    weight = random_sparse(n, k, format, torch.Generator().manual_seed(4))
    with in_layout(1):
        packed = pack_sparse(weight, k, format)
    words = packed[-2 * 2 * 1024 :].view(torch.int32).view(2, 2, 2, 32, 4)  # [64 n][128 k][2 strips][lane][step]
    nibbles = torch.stack([weight.meta & 15, weight.meta >> 4], -1).flatten(1)  # [n][block of 4 k]
    for row in range(128):
        for block in range(64):
            expected = int(nibbles[row, block]) if row < n and block < k // 4 else 4
            lane = row % 8 * 4 + row // 16 % 2 * 2 + block // 4 % 2
            word = int(words[row // 64, block // 32, row % 64 // 32, lane, block % 32 // 8])
            assert word >> (row // 8 % 2 * 16 + block % 4 * 4) & 15 == expected, (row, block)


@pytest.mark.parametrize("device", DEVICES)
def test_cuda_refuses_places_that_do_not_ascend(device):
    for pattern in (Pattern(2, 4), Pattern(4, 8, 16), Pattern(2, 4, 8)):
        format = SparseFormat(WeightFormat("int8", 0), pattern)
        weight = random_sparse(40, 32, format, torch.Generator().manual_seed(5))
        row = 3 if pattern.v == 1 else 2
        weight.meta[row, 1] = 0
        with cuda_device(device), pytest.raises(ValueError, match=f"must ascend; those of row {row} do not"):
            pack_sparse(weight, 32, format)
        weight.meta[row, 1] = 255
        with cuda_device(device), pytest.raises(RuntimeError, match="on CUDA layout must be 1"):
            _native.ops_for("cpu").pack_sparse(*weight, 32, 8, 0, pattern.n, pattern.m, pattern.v, 0)


def test_a_weight_that_is_2_4_already_loses_nothing():
    """Import: a dense weight with zeros in the right places, found and packed, gives the same numbers."""
    w = torch.randn(24, 64, generator=torch.Generator().manual_seed(3))
    w *= Pattern(2, 4).mask(w.abs())
    assert Pattern(2, 4).holds(w) and not Pattern(1, 4).holds(w)
    parts = quantize_weight(w, INT8_2_4.weights)
    weight = sparsify(parts.codes, parts.scales, w != 0, INT8_2_4)
    codes, _ = densify(weight, 64, INT8_2_4)
    assert_same_bits(codes, parts.codes, "the codes")


@pytest.mark.parametrize(
    ("format", "bits"),
    [
        (SparseFormat(WeightFormat("int8", 0), Pattern(2, 4)), 5.0),
        (SparseFormat(WeightFormat("int4", 0), Pattern(2, 4)), 3.0),
        (SparseFormat(WeightFormat("int4", 32), Pattern(2, 4)), 3.5),
        (SparseFormat(WeightFormat("int4", 0), Pattern(2, 4, 16)), 2.0625),
        (SparseFormat(WeightFormat("int8", 0), Pattern(4, 8)), 5.5),
        (SparseFormat(WeightFormat("int8", 0), Pattern(1, 4)), 2.5),
        (BF16_2_4, 9.0),
        (SparseFormat(NumberFormat("fp16"), Pattern(2, 4, 16)), 8.0625),
    ],
    ids=str,
)
def test_bits_are_counted_honestly(format, bits):
    scales = 0 if format.weights.group_size or not format.has_scales else 16 / 4096  # of a row
    assert format.bits_per_weight(64, 4096) == pytest.approx(bits + scales)
    packed = random_sparse(64, 4096, format, torch.Generator().manual_seed(1))
    assert format.canonical_bytes(64, 4096) == sum(part.nbytes for part in packed if part is not None)


def test_places_that_do_not_ascend_are_refused():
    weight = random_sparse(8, 32, INT8_2_4, torch.Generator().manual_seed(5))
    meta = weight.meta.clone()
    meta[3, 1] = 0b01_10  # the places 2 and 1
    with pytest.raises(ValueError, match="must ascend; row 3 has 1 after 2"):
        pack_sparse(weight._replace(meta=meta), 32, INT8_2_4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w._replace(codes=w.codes[:, :-1]), r"codes of a 2:4 int8 per row weight \[8, 32\] must be torch.int8 \[8, 16\]"),
        (lambda w: w._replace(meta=w.meta.int()), "meta .* must be torch.uint8"),
        (lambda w: w._replace(scales=w.scales.float()), "scales .* must be torch.float16"),
        (lambda w: w._replace(scales=w.scales * float("inf")), "scales must be finite"),
    ],
)
def test_bad_parts_are_refused(change, words):
    weight = random_sparse(8, 32, INT8_2_4, torch.Generator().manual_seed(5))
    with pytest.raises(ValueError, match=words):
        pack_sparse(change(weight), 32, INT8_2_4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w._replace(codes=w.codes.half()), r"codes of a 2:4 bf16 weight \[8, 32\] must be torch.bfloat16 \[8, 16\]"),
        (lambda w: w._replace(scales=torch.ones(8, 1).half()), "scales of a 2:4 bf16 weight must be None"),
        (lambda w: w._replace(codes=w.codes / 0), "codes of a 2:4 bf16 weight must be finite"),
        (lambda w: w._replace(meta=w.meta * 0), "must ascend; row 0 has 0 after 0"),
    ],
)
def test_bad_parts_of_numbers_are_refused(change, words):
    weight = random_sparse(8, 32, BF16_2_4, torch.Generator().manual_seed(5))
    with pytest.raises(ValueError, match=words):
        pack_sparse(change(weight), 32, BF16_2_4)


def test_fragments_of_numbers_are_where_tensor_cores_want_them():
    """The A operand of mma.m16n8k16, whose 16 k are what is kept of 32, by the definition of its registers."""
    n, k = 70, 200
    weight = random_sparse(n, k, BF16_2_4, torch.Generator().manual_seed(4))
    with in_layout(1):
        packed = pack_sparse(weight, k, BF16_2_4)
    halves = packed[: 2 * 2 * 8192].view(torch.bfloat16).view(2, 2, 4, 4, 32, 4, 2)  # [64 n][64 k][strip][step][lane][register][half]
    for row in range(128):
        for j in range(128):
            expected = weight.codes[row, j] if row < n and j < k // 2 else 0.0
            lane, register = row % 8 * 4 + j % 8 // 2, row % 16 // 8 + j % 16 // 8 * 2
            assert halves[row // 64, j // 64, row % 64 // 16, j % 64 // 16, lane, register, j % 2] == expected, (row, j)


def test_what_no_format_is():
    with pytest.raises(ValueError, match="without zero points"):
        SparseFormat(WeightFormat("int4", 32, True), Pattern())
    with pytest.raises(ValueError, match="int8, int4, fp8_e4m3, fp16, bf16, without zero points"):
        SparseFormat(WeightFormat("nf4", 64), Pattern())
    with pytest.raises(ValueError, match="bf16 weights are for sparse layers alone: give a sparsity, such as 2:4"):
        WeightFormat("bf16")
    with pytest.raises(ValueError, match="group_size 32 does not fit; bf16 weights have no scales"):
        NumberFormat("bf16", 32)
    with pytest.raises(ValueError, match="unknown weight format 'int8'; accepted: fp16, bf16"):
        NumberFormat("int8")
    with pytest.raises(ValueError, match="stored as fp16 must be finite and at most 65504"):
        NumberFormat("fp16").codes_of(torch.tensor([1e6]))
    with pytest.raises(ValueError, match="bf16 weights are numbers as they are, and are not quantized"):
        quantize_weight(torch.ones(2, 4), NumberFormat("bf16"))
    with pytest.raises(ValueError, match="K is 30, which blocks of 4"):
        INT8_2_4.codes_shape(8, 30)
    with pytest.raises(ValueError, match="keeps more than 2:4 allows"):
        sparsify(torch.zeros(1, 4, dtype=torch.int8), torch.ones(1, 1).half(), torch.ones(1, 4, dtype=torch.bool), INT8_2_4)


@pytest.mark.parametrize("name", ("fp16", "bf16"))
def test_every_finite_number_survives(name):
    """All 16-bit patterns that are finite, subnormal ones and both zeros among them, packed and unpacked in both layouts."""
    format = SparseFormat(NumberFormat(name), Pattern(2, 4))
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    codes = bits.view(format.weights.codes_dtype)
    codes = codes[codes.isfinite()]
    codes = codes[: len(codes) // 512 * 512].view(-1, 256)
    meta = torch.full((codes.shape[0], 64), 0b1110_0100, dtype=torch.uint8)
    weight = SparseCanonical(codes, None, meta)
    for layout in (0, 1):
        with in_layout(layout):
            back = unpack_sparse(pack_sparse(weight, 512, format), codes.shape[0], 512, format)
        assert_same_parts(back, weight, f"{name}, layout {layout}")


def test_numbers_are_never_given_groups():
    weight = random_sparse(9, 32, BF16_2_4, torch.Generator().manual_seed(5))
    with pytest.raises(RuntimeError, match="group_size must be 0 for fp16 and bf16, which have no scales, got 32"):
        torch.ops.taut.pack_sparse(weight.codes, torch.empty(9, 0).half(), weight.meta, 32, 12, 32, 2, 4, 1)
    with pytest.raises(RuntimeError, match="format must be 1 .* got 12"):
        torch.ops.taut.pack_weight(weight.codes, torch.empty(9, 0).half(), None, 16, 12, 0, 0)


def test_opcheck():
    weight = random_sparse(9, 32, INT8_2_4, torch.Generator().manual_seed(5))
    arguments = (32, INT8_2_4.weights.code, 0, 2, 4, 1)
    torch.library.opcheck(torch.ops.taut.pack_sparse.default, (*weight, *arguments))
    packed = pack_sparse(weight, 32, INT8_2_4)
    torch.library.opcheck(torch.ops.taut.unpack_sparse.default, (packed, 9, *arguments))
