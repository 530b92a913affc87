"""One descriptor per low-bit format: what its codes and scales mean, what it is stored in, what it is multiplied with.

The canonical form is the only one on disk, row-major: codes ``[N, codes of a row]``, ``scales [N, ceil(K/G)]``, and with some
formats ``zeros [N, ceil(K/G)]`` or ``global_scale [1]``. ``csrc/common/formats.h`` says the same to kernels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# How x enters the product, and the integers kernels know that by: as it is; int8, one scale per row and 32 k; int8 or
# float8 E4M3, one scale per row; int8 but for outliers, which are multiplied in fp32.
ACTIVATIONS = {"float": 0, "int8": 1, "int8_row": 2, "fp8_row": 3, "int8_outliers": 4}
GROUP_SIZES = (32, 64, 128, 0)


@dataclass(frozen=True)
class Kind:
    """What every weight of a format has in common. A subclass is a format; its docstring is the format's definition."""

    name: str = ""
    code: int = 0  # the integer kernels know the format by
    bits: int = 4  # of a code in a kernel's layout
    codes_in: tuple[int, int] = (2, 1)  # so many codes of a row take so many bytes on disk
    codes_dtype: torch.dtype = torch.uint8
    scales_dtype: torch.dtype = torch.float16
    group_sizes: tuple[int, ...] = GROUP_SIZES
    default_group_size: int = 32
    takes_zeros: bool = False
    has_global_scale: bool = False
    activations: tuple[str, ...] = ("float", "int8", "int8_outliers")
    cuda: bool = False
    has_scales: bool = True
    block_rows: int = 1  # of the weight that share a scale
    largest: float = float("inf")  # magnitude of a weight for which its scale certainly fits

    @property
    def meaning(self) -> str:
        """The definition, as one line."""
        return " ".join((type(self).__doc__ or "").split())


@dataclass(frozen=True)
class Ternary(Kind):
    """``(q - 1) * s``, q in 0..2, s float16: weights -1, 0 and 1, as BitNet b1.58 has them (arXiv 2402.17764).

    On disk five codes are a byte in base 3, the first of them the lowest digit, 1 where a row ends within a byte.
    """

    name: str = "ternary"
    code: int = 1
    bits: int = 2
    codes_in: tuple[int, int] = (5, 1)
    default_group_size: int = 0
    largest: float = 65504.0


@dataclass(frozen=True)
class Int2(Kind):
    """``(q - z) * s``, q in 0..3, s float16, z = 2 or a zero point a group (0..3). On disk four codes a byte, lowest bits first."""

    name: str = "int2"
    code: int = 2
    bits: int = 2
    codes_in: tuple[int, int] = (4, 1)
    takes_zeros: bool = True
    largest: float = 65504.0


@dataclass(frozen=True)
class Int3(Kind):
    """``(q - z) * s``, q in 0..7, s float16, z = 4 or a zero point a group (0..7). On disk a row is a little-endian string of bits."""

    name: str = "int3"
    code: int = 3
    bits: int = 3
    codes_in: tuple[int, int] = (8, 3)
    takes_zeros: bool = True
    largest: float = 65504.0 * 3


@dataclass(frozen=True)
class Int4(Kind):
    """``(q - z) * s``, q in 0..15, s float16, z = 8 (as llama.cpp's Q4_0) or a zero point a group (0..15).

    On disk two codes a byte, the even k in the low nibble.
    """

    name: str = "int4"
    code: int = 4
    takes_zeros: bool = True
    cuda: bool = True
    largest: float = 65504.0 * 7


@dataclass(frozen=True)
class Nf4(Kind):
    """``NF4[q] * s``, NF4 the 16 numbers of QLoRA's appendix E (arXiv 2305.14314), s float32, the group's largest magnitude.

    On disk two codes a byte, the even k in the low nibble (bitsandbytes has it in the high one). Beside 8-bit activations
    the 16 numbers are taken as ``round(127 * NF4[q]) / 127``, an error of the size that rounding x to 8 bits makes;
    activations="float" uses the published ones.
    """

    name: str = "nf4"
    code: int = 5
    scales_dtype: torch.dtype = torch.float32
    default_group_size: int = 64


@dataclass(frozen=True)
class Mxfp4(Kind):
    """``E2M1[q] * 2^(s - 127)``: MXFP4 of the OCP Microscaling Formats 1.0 specification, 32 numbers to a scale.

    q is sign, two exponent bits, one mantissa bit: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives. s is a byte, E8M0; 255 (NaN)
    is refused. On disk two codes a byte, the even k in the low nibble, as gpt-oss has it.
    """

    name: str = "mxfp4"
    code: int = 6
    scales_dtype: torch.dtype = torch.uint8
    group_sizes: tuple[int, ...] = (32,)


@dataclass(frozen=True)
class Nvfp4(Kind):
    """``E2M1[q] * E4M3(s) * global_scale``: NVIDIA's NVFP4, 16 numbers to a scale, and one float32 scale for the weight.

    q as mxfp4; s is a byte, float8 E4M3. ``global_scale`` multiplies (compressed-tensors stores its inverse). On disk two codes
    a byte, the even k in the low nibble.
    """

    name: str = "nvfp4"
    code: int = 7
    scales_dtype: torch.dtype = torch.uint8
    group_sizes: tuple[int, ...] = (16,)
    default_group_size: int = 16
    has_global_scale: bool = True


@dataclass(frozen=True)
class Int8(Kind):
    """``q * s``, q in -128..127, s float16."""

    name: str = "int8"
    code: int = 8
    bits: int = 8
    codes_in: tuple[int, int] = (1, 1)
    codes_dtype: torch.dtype = torch.int8
    default_group_size: int = 0
    activations: tuple[str, ...] = ("float", "int8", "int8_row", "int8_outliers")
    cuda: bool = True
    largest: float = 65504.0 * 127


@dataclass(frozen=True)
class Fp8E4M3(Kind):
    """``q * s``, q an OCP 8-bit float E4M3 (arXiv 2209.05433: no infinities, largest 448), s float16."""

    name: str = "fp8_e4m3"
    code: int = 9
    bits: int = 8
    codes_in: tuple[int, int] = (1, 1)
    codes_dtype: torch.dtype = torch.float8_e4m3fn
    default_group_size: int = 0
    activations: tuple[str, ...] = ("float", "fp8_row")
    cuda: bool = True
    largest: float = 65504.0 * 448


@dataclass(frozen=True)
class Fp8Block(Kind):
    """``q * s``, q as fp8_e4m3, s float32, one for each block of 128 x 128 weights: DeepSeek-V3's (arXiv 2412.19437).

    ``scales`` are ``[ceil(N/128), ceil(K/128)]``, what its checkpoints call ``weight_scale_inv``.
    """

    name: str = "fp8_block"
    code: int = 10
    bits: int = 8
    codes_in: tuple[int, int] = (1, 1)
    codes_dtype: torch.dtype = torch.float8_e4m3fn
    scales_dtype: torch.dtype = torch.float32
    group_sizes: tuple[int, ...] = (128,)
    default_group_size: int = 128
    activations: tuple[str, ...] = ("float",)
    block_rows: int = 128


@dataclass(frozen=True)
class Fp16(Kind):
    """q itself, a float16 (IEEE 754 binary16): no s. For sparse weights alone, which are pruned and not rounded further."""

    name: str = "fp16"
    code: int = 11
    bits: int = 16
    codes_in: tuple[int, int] = (1, 1)
    codes_dtype: torch.dtype = torch.float16
    group_sizes: tuple[int, ...] = (0,)
    default_group_size: int = 0
    activations: tuple[str, ...] = ("float",)
    cuda: bool = True
    has_scales: bool = False
    largest: float = 65504.0


@dataclass(frozen=True)
class Bf16(Fp16):
    """q itself, a bfloat16 (the upper half of a float32): no s. For sparse weights alone, as fp16."""

    name: str = "bf16"
    code: int = 12
    codes_dtype: torch.dtype = torch.bfloat16
    largest: float = torch.finfo(torch.bfloat16).max


KINDS = {kind.name: kind for kind in (Ternary(), Int2(), Int3(), Int4(), Nf4(), Mxfp4(), Nvfp4(), Int8(), Fp8E4M3(), Fp8Block())}
# Of sparse weights alone.
SPARSE_KINDS: dict[str, Kind] = {kind.name: kind for kind in (Fp16(), Bf16())}
