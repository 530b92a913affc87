"""WeightFormat: what is accepted, and what it says of shapes and bytes."""

from __future__ import annotations

import pytest
import torch

from cases import FORMATS
from taut.formats import WeightFormat, activation_code, resolve_activations


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("int5",), "unknown weight format 'int5'; accepted: int4, int8, fp8_e4m3"),
        (("",), "unknown weight format ''"),
        ((4,), "unknown weight format 4"),
        (("int4", 48), "group_size 48 does not fit; accepted: 32, 64, 128, or 0"),
        (("int4", -1), "group_size -1 does not fit"),
        (("int4", True), "group_size True does not fit"),
        (("int4", None), "group_size None does not fit"),
        (("int4", 32, "yes"), "zeros must be True or False, got 'yes'"),
        (("int8", 32, True), "zeros=True is for int4 only; int8 is symmetric"),
        (("fp8_e4m3", 32, True), "zeros=True is for int4 only; fp8_e4m3 is symmetric"),
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
    with pytest.raises(ValueError, match="unknown activations 'fp8'; accepted: auto, float, int8, int8_row, fp8_row"):
        activation_code("fp8", int8)


def test_what_auto_means():
    int4, fp8 = WeightFormat("int4"), WeightFormat("fp8_e4m3")
    assert [resolve_activations("auto", int4, device) for device in ("cpu", "meta", "cuda")] == ["int8", "int8", "float"]
    assert [resolve_activations("auto", fp8, device) for device in ("cpu", "cuda")] == ["float", "float"]
    assert resolve_activations("int8", int4, "cuda") == "int8"


@pytest.mark.parametrize(
    ("name", "accepted"), [("int4", "float, int8"), ("int8", "float, int8, int8_row"), ("fp8_e4m3", "float, fp8_row")], ids=str
)
def test_activations_a_format_takes(name, accepted):
    for activations in ("auto", "float", "int8", "int8_row", "fp8_row"):
        if activations in accepted.split(", ") or activations == "auto":
            activation_code(activations, WeightFormat(name))
        else:
            with pytest.raises(
                ValueError, match=f"{name} weights cannot be multiplied with '{activations}' .*; accepted: auto, {accepted}$"
            ):
                activation_code(activations, WeightFormat(name))


def test_names_are_distinct_and_readable():
    assert len({str(format) for format in FORMATS}) == len(FORMATS)
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
    assert format.layout_bytes(*shape, 1) == mma_tiles


def test_codes():
    formats = [WeightFormat(name) for name in ("int4", "int8", "fp8_e4m3")]
    assert [format.code for format in formats] == [4, 8, 9]
    assert [format.bits for format in formats] == [4, 8, 8]
    assert [format.codes_dtype for format in formats] == [torch.uint8, torch.int8, torch.float8_e4m3fn]
    assert all(WeightFormat.of_code(format.code, format.group_size, format.zeros) == format for format in FORMATS)
