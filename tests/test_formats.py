"""WeightFormat: what is accepted, and what it says of shapes and bytes."""

from __future__ import annotations

import pytest
import torch

from cases import ALL_FORMATS
from taut.formats import KINDS, WeightFormat, activation_code, resolve_activations


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("int5",), "unknown weight format 'int5'; accepted: ternary, int2, int3, int4, nf4, mxfp4, nvfp4, int8, fp8_e4m3, fp8_block$"),
        (("",), "unknown weight format ''"),
        ((4,), "unknown weight format 4"),
        (("int4", 48), "group_size 48 does not fit; accepted: 32, 64, 128, or 0"),
        (("int4", -1), "group_size -1 does not fit"),
        (("int4", True), "group_size True does not fit"),
        (("nf4", 16), "group_size 16 does not fit; accepted: 32, 64, 128, or 0"),
        (("mxfp4", 64), "group_size 64 does not fit; mxfp4 has groups of 32"),
        (("nvfp4", 32), "group_size 32 does not fit; nvfp4 has groups of 16"),
        (("fp8_block", 0), "group_size 0 does not fit; fp8_block has groups of 128"),
        (("int4", 32, "yes"), "zeros must be True or False, got 'yes'"),
        (("int8", 32, True), "zeros=True is for int2, int3 and int4 only; int8 is symmetric"),
        (("fp8_e4m3", 32, True), "zeros=True is for int2, int3 and int4 only; fp8_e4m3 is symmetric"),
        (("ternary", 32, True), "zeros=True is for int2, int3 and int4 only; ternary is symmetric"),
        (("nf4", 64, True), "zeros=True is for int2, int3 and int4 only; nf4 is symmetric"),
    ],
    ids=str,
)
def test_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        WeightFormat(*arguments)


def test_activation_modes():
    int8, fp8 = WeightFormat("int8"), WeightFormat("fp8_e4m3")
    assert [activation_code(name, int8) for name in ("float", "int8", "int8_row")] == [0, 1, 2]
    assert activation_code("fp8_row", fp8) == 3
    assert activation_code("int8_outliers", int8) == 4
    with pytest.raises(ValueError, match="unknown activations 'fp8'; accepted: auto, float, int8, int8_row, fp8_row"):
        activation_code("fp8", int8)


def test_what_auto_means():
    int4, fp8 = WeightFormat("int4"), WeightFormat("fp8_e4m3")
    assert [resolve_activations("auto", int4, device) for device in ("cpu", "meta", "cuda")] == ["int8", "int8", "float"]
    assert [resolve_activations("auto", fp8, device) for device in ("cpu", "cuda")] == ["float", "float"]
    assert resolve_activations("int8", int4, "cuda") == "int8"
    assert [resolve_activations("int8_outliers", int4, device) for device in ("cpu", "cuda")] == ["int8_outliers", "float"]
    auto = {name: resolve_activations("auto", WeightFormat(name), "cpu") for name in KINDS}
    assert auto == {name: "float" if name.startswith("fp8") else "int8" for name in KINDS}


def test_default_group_sizes():
    expected = {
        "ternary": 0,
        "int2": 32,
        "int3": 32,
        "int4": 32,
        "nf4": 64,
        "mxfp4": 32,
        "nvfp4": 16,
        "int8": 0,
        "fp8_e4m3": 0,
        "fp8_block": 128,
    }
    assert {name: WeightFormat(name).group_size for name in KINDS} == expected


def test_a_descriptor_defines_its_format():
    for name, kind in KINDS.items():
        assert kind.name == name
        assert "s" in kind.meaning and len(kind.meaning) > 20, f"{name} has no definition"
    for name, source in {
        "ternary": "2402.17764",
        "nf4": "2305.14314",
        "mxfp4": "OCP",
        "nvfp4": "NVIDIA",
        "fp8_block": "2412.19437",
    }.items():
        assert source in KINDS[name].meaning, f"{name} does not say where it is from"


def test_what_cuda_takes():
    for name in KINDS:
        if name in ("int4", "int8", "fp8_e4m3"):
            WeightFormat(name).check_cuda()
        else:
            with pytest.raises(ValueError, match=f"{name} weights are for the CPU only; on CUDA taut takes int4, int8, fp8_e4m3"):
                WeightFormat(name).check_cuda()
            with pytest.raises(ValueError, match="for the CPU only"):
                WeightFormat(name).layout_bytes(8, 32, 1)


@pytest.mark.parametrize(
    ("name", "accepted"),
    [
        *((name, "float, int8, int8_outliers") for name in ("ternary", "int2", "int3", "int4", "nf4", "mxfp4", "nvfp4")),
        ("int8", "float, int8, int8_row, int8_outliers"),
        ("fp8_e4m3", "float, fp8_row"),
        ("fp8_block", "float"),
    ],
    ids=str,
)
def test_activations_a_format_takes(name, accepted):
    for activations in ("auto", "float", "int8", "int8_row", "fp8_row", "int8_outliers"):
        if activations in accepted.split(", ") or activations == "auto":
            activation_code(activations, WeightFormat(name))
        else:
            with pytest.raises(
                ValueError, match=f"{name} weights cannot be multiplied with '{activations}' .*; accepted: auto, {accepted}$"
            ):
                activation_code(activations, WeightFormat(name))


def test_names_are_distinct_and_readable():
    assert len({str(format) for format in ALL_FORMATS}) == len(ALL_FORMATS) == len(set(ALL_FORMATS)) == 43
    assert str(WeightFormat("int4", 32, True)) == "int4 group 32 with zeros"
    assert str(WeightFormat("int8", 0)) == "int8 per row"


@pytest.mark.parametrize(
    ("format", "shape", "codes", "groups", "canonical", "rows8", "mma_tiles"),
    [
        # [3, 70]: 2 strips of padding at most; 3 k-blocks of 32; groups of 32 fit one superblock of 4
        (WeightFormat("int4", 32), (3, 70), (3, 35), 3, 3 * 35 + 3 * 3 * 2, 64 + 3 * 128, 2 * 2048 + 4 * 64 * 2),
        (WeightFormat("int4", 32, True), (3, 70), (3, 35), 3, 3 * 35 + 3 * 3 * 3, 96 + 3 * 128, 2 * 2048 + 4 * 64 * 3),
        (WeightFormat("int8", 64), (9, 70), (9, 70), 2, 9 * 70 + 9 * 2 * 2, 2 * (64 + 3 * 256), 2 * 4096 + 2 * 64 * 2),
        (WeightFormat("int8", 0), (9, 70), (9, 70), 1, 9 * 70 + 9 * 2, 2 * (64 + 3 * 256), 2 * 4096 + 64 * 2),
        (WeightFormat("fp8_e4m3", 128), (65, 129), (65, 129), 2, 65 * 129 + 65 * 2 * 2, 9 * (64 + 5 * 256), 2 * (3 * 4096 + 2 * 64 * 2)),
        # 4 groups of 32 are a superblock; codes of 2 bits take 64 B a k-block, of 3 bits 96 B
        (WeightFormat("int2", 32), (3, 70), (3, 18), 3, 3 * 18 + 3 * 3 * 2, 64 + 3 * 64, None),
        (WeightFormat("int3", 64, True), (9, 70), (9, 27), 2, 9 * 27 + 9 * 2 * 3, 2 * (96 + 3 * 96), None),
        (WeightFormat("ternary", 0), (9, 71), (9, 15), 1, 9 * 15 + 9 * 2, 2 * (64 + 3 * 64), None),
        (WeightFormat("nf4", 64), (8, 70), (8, 35), 2, 8 * 35 + 8 * 2 * 4, 128 + 3 * 128, None),
        (WeightFormat("mxfp4"), (8, 70), (8, 35), 3, 8 * 35 + 8 * 3, 32 + 3 * 128, None),
        (WeightFormat("nvfp4"), (8, 70), (8, 35), 5, 8 * 35 + 8 * 5 + 4, 64 + 3 * 128 + 64, None),
        (WeightFormat("fp8_block"), (130, 129), (130, 129), 2, 130 * 129 + 2 * 2 * 4, 17 * (128 + 5 * 256), None),
        # 130 k in groups of 32: 5 k-blocks, so a second superblock with its own header
        (WeightFormat("int4", 32), (1, 130), (1, 65), 5, 65 + 5 * 2, 2 * 64 + 5 * 128, 3 * 2048 + 6 * 64 * 2),
    ],
    ids=str,
)
def test_shapes_and_bytes(format, shape, codes, groups, canonical, rows8, mma_tiles):
    assert format.codes_shape(*shape) == codes
    assert format.num_groups(shape[1]) == groups
    assert format.canonical_bytes(*shape) == canonical
    assert format.layout_bytes(*shape) == rows8
    assert mma_tiles is None or format.layout_bytes(*shape, 1) == mma_tiles


def test_codes():
    assert {name: kind.code for name, kind in KINDS.items()} == {
        "ternary": 1, "int2": 2, "int3": 3, "int4": 4, "nf4": 5, "mxfp4": 6, "nvfp4": 7, "int8": 8, "fp8_e4m3": 9, "fp8_block": 10,
    }  # fmt: skip
    assert [WeightFormat(name).bits for name in KINDS] == [2, 2, 3, 4, 4, 4, 4, 8, 8, 8]
    dtypes = {"int8": torch.int8, "fp8_e4m3": torch.float8_e4m3fn, "fp8_block": torch.float8_e4m3fn}
    assert {name: WeightFormat(name).codes_dtype for name in KINDS} == {name: dtypes.get(name, torch.uint8) for name in KINDS}
    assert all(WeightFormat.of_code(format.code, format.group_size, format.zeros) == format for format in ALL_FORMATS)
