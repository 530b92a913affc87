"""sparse_linear, every impl and every case, against the float64 reference."""

from __future__ import annotations

import itertools

import pytest
import torch

import taut
from checks import assert_linear, assert_same_bits
from emulator import build, emulated
from sparse_cases import NUMBERS, SPECIAL, SparseCase, cuda_8bit_cases, cuda_cases, sparse_cases
from taut.formats import Canonical, NumberFormat, WeightFormat
from taut.formats.sparse import Pattern, SparseFormat
from taut.ops import sparse_linear as sparse_op
from taut.ops.pack_weight import pack_weight
from taut.ops.quant_linear import quant_linear
from taut.ops.sparse_linear import dequantize_sparse, sparse_linear

OP = "sparse_linear"
INT8 = SparseFormat(WeightFormat("int8", 32), Pattern(2, 4))
BF16 = SparseFormat(NumberFormat("bf16"), Pattern(2, 4))
PATTERNS = (Pattern(2, 4), Pattern(2, 4, 16), Pattern(4, 8, 8))


def kernel_of(impl: str, case: SparseCase) -> str:
    """Whose roundings are to be expected: of the dense kernel that multiplies in the end."""
    if impl.startswith("cuda") or not impl.endswith("dense"):
        return impl
    return next(row.impl for row in taut.explain("quant_linear", **case.dense.sizes()) if row.chosen)


def check(impl: str, case: SparseCase) -> None:
    inputs, packed = case.make()
    before = [tensor.clone() for tensor in (inputs.x, packed)]
    block = torch.full((case.M, case.N), float("nan"), dtype=case.dtype)
    del block
    out = sparse_linear(inputs.x, packed, inputs.bias, case.N, case.format, case.activations)
    again = sparse_linear(inputs.x, packed, inputs.bias, case.N, case.format, case.activations)
    assert_linear(out, inputs.x, inputs, case.dense, impl=kernel_of(impl, case))
    assert_same_bits(out, again, f"{impl} on {case}, run twice")
    for old, new in zip(before, (inputs.x, packed), strict=True):
        assert_same_bits(old, new, f"{impl} on {case}: an input was written to")


@pytest.mark.parametrize("case", tuple(dict.fromkeys(sparse_cases() + SPECIAL + cuda_cases() + cuda_8bit_cases())), ids=str)
def test_matches_reference(impl, case, forced):
    forced(impl, **case.sizes())
    check(impl, case)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_rows_and_threads_change_nothing(impl, pattern, forced, threads):
    case = SparseCase(7, 200, 1040, SparseFormat(WeightFormat("int8", 64), pattern))
    forced(impl, **case.sizes())
    inputs, packed = case.make()
    threads(1)
    expected = sparse_linear(inputs.x, packed, None, case.N, case.format, "int8")
    for count in (2, 3):
        threads(count)
        found = sparse_linear(inputs.x, packed, None, case.N, case.format, "int8")
        assert_same_bits(found, expected, f"{impl}: {count} threads")
    if not impl.endswith("dense"):  # it may pick another dense kernel
        for m in range(7):
            row = sparse_linear(inputs.x[m : m + 1], packed, None, case.N, case.format, "int8")
            assert_same_bits(row, expected[m : m + 1], f"{impl}: row {m} alone")


CHOSEN = (
    # weights, group, pattern, activations, sm; the impl, and what a better one lacked
    ("int8", 0, Pattern(2, 4), "int8_row", 80, "cuda_sm80.int8", {}),
    ("int4", 32, Pattern(2, 4, 16), "int8", 120, "cuda_sm80.int8", {}),
    ("int8", 32, Pattern(2, 4), "int8", 75, "cuda_sm75.simt", {"cuda_sm80.int8": "SM 80"}),
    ("int8", 0, Pattern(1, 4), "int8_row", 90, "cuda_sm75.simt", {"cuda_sm80.int8": "2:4 alone", "cuda_sm75.dense": "float activations"}),
    ("fp8_e4m3", 0, Pattern(2, 4), "fp8_row", 89, "cuda_sm89.fp8", {"cuda_sm80.int8": "int8 and int4 weights"}),
    ("fp8_e4m3", 0, Pattern(2, 4), "fp8_row", 90, "cuda_sm75.simt", {"cuda_sm89.fp8": "SM 90 and 100 have no fp8 in mma.sp"}),
    ("int8", 0, Pattern(2, 4), "float", 80, "cuda_sm80.mma", {"cuda_sm80.int8": "int8 activations", "cuda_sm89.fp8": "SM 89"}),
)  # fmt: skip


@pytest.mark.parametrize(("name", "group", "pattern", "activations", "sm", "chosen", "reasons"), CHOSEN, ids=str)
def test_who_multiplies_on_cuda(name, group, pattern, activations, sm, chosen, reasons):
    if reason := build.unavailable():
        pytest.skip(reason)
    case = SparseCase(4, 64, 256, SparseFormat(WeightFormat(name, group), pattern), activations, torch.float16)
    with emulated.emulated("fast", sm):
        verdicts = {row[0]: row[1:] for row in taut._C.explain(OP, case.sizes(), "emulated fast")}
    assert verdicts[chosen][0]
    for other, why in reasons.items():
        assert not verdicts[other][0] and why in verdicts[other][1]


DENSE_BITS = tuple(
    SparseCase(m, n, k, SparseFormat(WeightFormat("int8", group), Pattern(2, 4, v)), activations, dtype, n % 2 == 0)
    for m, n, k, group, v, activations, dtype in (
        (1, 72, 1032, 0, 1, "int8_row", torch.float16), (7, 24, 4096, 64, 8, "int8_row", torch.bfloat16),
        (8, 24, 4096, 0, 1, "int8", torch.float16), (13, 136, 524, 32, 1, "int8_row", torch.float16),
        (30, 65, 1668, 128, 16, "int8", torch.bfloat16), (50, 72, 1032, 0, 1, "int8_row", torch.float16),
        (50, 72, 1032, 128, 1, "int8", torch.float16), (33, 385, 468, 0, 1, "int8_row", torch.float16),
        (33, 385, 468, 64, 1, "int8_row", torch.bfloat16), (33, 385, 468, 0, 8, "int8", torch.float32),
    )
) + tuple(
    SparseCase(m, n, k, SparseFormat(WeightFormat("int4", group), pattern), "int8", torch.float32, True)
    for (m, n, k), group, pattern in zip(
        ((3, 72, 1032), (13, 24, 4096), (40, 9, 96), (530, 33, 520)), (32, 64, 0, 128),
        (Pattern(2, 4), Pattern(1, 4, 16), Pattern(2, 8), Pattern(4, 8)), strict=True
    )
)  # fmt: skip


@pytest.mark.parametrize("case", DENSE_BITS, ids=str)
def test_the_bits_of_the_dense_kernel(impl, case, forced):
    """Of w with its zeros written out, and x in the same codes: integers are added to fp32 sums in the same order."""
    if not impl.startswith("cuda_sm80.int8") and not impl.endswith(".int8_tile"):
        pytest.skip("cuda_sm80.int8 and the tiles promise it")
    if impl.startswith("cuda") and case.format.weights.name != "int8":
        pytest.skip("the dense kernel takes int8 weights alone")
    forced(impl, **case.sizes())
    inputs, packed = case.make()
    found = sparse_linear(inputs.x, packed, inputs.bias, case.N, case.format, case.activations)
    weights = case.format.weights
    dense = pack_weight(*Canonical(inputs.codes, inputs.scales), case.K, weights)
    with taut.force_impl("quant_linear", "cuda_sm80.int8" if impl.startswith("cuda") else impl):
        expected = quant_linear(inputs.x, dense, inputs.bias, case.N, weights, case.activations)
    assert_same_bits(found, expected, f"{impl} on {case}")


@pytest.mark.parametrize("pattern", (*PATTERNS, Pattern(1, 4), Pattern(2, 8), Pattern(4, 8)), ids=str)
@pytest.mark.parametrize("name", ("fp16", "bf16"))
def test_rows_and_threads_change_nothing_beside_numbers(impl, name, pattern, forced, threads):
    case = SparseCase(23, 200, 1040, SparseFormat(NumberFormat(name), pattern), "float")
    if impl.startswith("cuda"):
        pytest.skip("test_a_row_does_not_depend_on_its_batch is CUDA's")
    forced(impl, **case.sizes())
    inputs, packed = case.make()
    threads(1)
    expected = sparse_linear(inputs.x, packed, None, case.N, case.format)
    for count in (2, 3):
        threads(count)
        assert_same_bits(sparse_linear(inputs.x, packed, None, case.N, case.format), expected, f"{impl}: {count} threads")
    for first, last in [(m, m + 1) for m in range(9)] + [(0, 2), (1, 4), (3, 8), (0, 8), (2, 19)]:
        part = sparse_linear(inputs.x[first:last], packed, None, case.N, case.format)
        assert_same_bits(part, expected[first:last], f"{impl}: rows {first} to {last} alone")


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize(
    ("weights", "activations"),
    [*itertools.product((WeightFormat("int4", 128), WeightFormat("int8", 32)), ("float", "int8")), *((w, "float") for w in NUMBERS)],
    ids=str,
)
def test_a_row_does_not_depend_on_its_batch(impl, weights, activations, dtype, forced):
    """CPU kernels promise it always (above), CUDA kernels in ``taut.batch_invariant()``."""
    if not impl.startswith("cuda"):
        pytest.skip("test_rows_and_threads_change_nothing is the CPU's")
    case = SparseCase(140, 24, 1668, SparseFormat(weights, Pattern(2, 4)), activations, dtype, True)
    with taut.batch_invariant():
        forced(impl, **case.sizes())
        inputs, packed = case.make()
        whole = sparse_linear(inputs.x, packed, inputs.bias, case.N, case.format, activations)
        assert_linear(whole, inputs.x, inputs, case.dense, impl=impl)
        for rows in (1, 9, 20, 40, 64, 65):
            for start in (0, 8):
                part = sparse_linear(inputs.x[start : start + rows], packed, inputs.bias, case.N, case.format, activations)
                assert_same_bits(part, whole[start : start + rows], f"{impl} on {case}: rows {start} to {start + rows} alone")


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("weights", (WeightFormat("int8", 32), WeightFormat("int4", 32), *NUMBERS), ids=str)
def test_sums_that_fit(impl, pattern, weights, forced):
    """Small integers whose sums 16-bit floats hold: every bit is right."""
    case = SparseCase(21, 72, 328, SparseFormat(weights, pattern), "float", torch.float16)
    forced(impl, **case.sizes())
    weight = case.weight()
    generator = torch.Generator().manual_seed(3)
    if weights.name == "int4":
        weight = weight._replace(codes=torch.randint(6, 10, weight.codes.shape, generator=generator, dtype=torch.uint8) * 17)
    else:
        weight = weight._replace(codes=torch.randint(-3, 4, weight.codes.shape, generator=generator).to(weights.codes_dtype))
    if weights.has_scales:
        weight = weight._replace(scales=torch.full_like(weight.scales, 1.0))
    _, packed = case.make(weight)
    x = torch.randint(-2, 3, (21, 328), generator=generator).half()
    w = dequantize_sparse(weight, 328, case.format, torch.float64)
    expected = x.double() @ w.T
    assert expected.abs().max() <= 2048
    assert_same_bits(sparse_linear(x, packed, None, 72, case.format, "float"), expected.half(), f"{impl} on small integers")


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("weights", (WeightFormat("int8", 32), NUMBERS[0]), ids=str)
def test_views_of_x_on_cuda(impl, weights, pattern, forced):
    case = SparseCase(6, 24, 72, SparseFormat(weights, pattern), "float", torch.float16, True)
    forced(impl, **case.sizes())
    inputs, packed = case.make()

    def product(x: torch.Tensor) -> torch.Tensor:
        return sparse_linear(x, packed, inputs.bias, 24, case.format, "float")

    expected = product(inputs.x)
    wide, columns = (torch.full((6, width), float("nan"), dtype=torch.float16) for width in (101, 144))
    wide[:, 21:93], columns[:, ::2] = inputs.x, inputs.x
    assert_same_bits(product(wide[:, 21:93]), expected, "part of wider rows, nowhere aligned")
    assert_same_bits(product(columns[:, ::2]), expected, "every second column")
    assert_same_bits(product(inputs.x.view(2, 3, 72)), expected.view(2, 3, 24), "two leading dimensions")
    assert product(inputs.x[:0]).shape == (0, 24)
    none = SparseCase(3, 0, 72, case.format, "float", torch.float16)
    assert sparse_linear(inputs.x[:3], none.make()[1], None, 0, case.format, "float").shape == (3, 0)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("name", ("int8", "int4"))
def test_codes_that_need_no_rounding(impl, pattern, name, forced):
    """x that int8 activations hold exactly: what is left are a few roundings of sums."""
    case = SparseCase(5, 48, 256, SparseFormat(WeightFormat(name, 32), pattern))
    forced(impl, **case.sizes())
    weight = case.weight()
    weight = weight._replace(scales=torch.full_like(weight.scales, 0.5))
    _, packed = case.make(weight)
    x = torch.randint(-127, 128, (5, 256), generator=torch.Generator().manual_seed(2)).float()
    x.view(5, 8, 32)[:, :, 0] = 127  # of every 32 the largest: then int8 activations round nothing
    w = dequantize_sparse(weight, 256, case.format, torch.float64)
    found = sparse_linear(x, packed, None, 48, case.format, "int8")
    assert bool(((found - x.double() @ w.T).abs() <= 5e-7 * (x.double().abs() @ w.T.abs())).all())


@pytest.mark.parametrize("value", (float("nan"), float("inf")))
def test_a_row_that_is_no_number_gives_nan(impl, value, forced):
    case = SparseCase(3, 24, 96, INT8)
    forced(impl, **case.sizes())
    inputs, packed = case.make()
    x = inputs.x.clone()
    x[1, 5] = value
    out = sparse_linear(x, packed, None, 24, INT8, "int8")
    assert bool(out[1].isnan().all() and out[[0, 2]].isfinite().all())


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_what_is_no_number_stays_in_its_row_and_shows(impl, pattern, forced):
    case = SparseCase(3, 24, 96, SparseFormat(NUMBERS[0], pattern), "float", torch.float16)
    forced(impl, **case.sizes())
    weight = case.weight()
    weight = weight._replace(codes=weight.codes.abs() + 1)
    inputs, packed = case.make(weight)
    x = inputs.x.clone()
    x[1, 5] = float("nan")
    out = sparse_linear(x, packed, None, 24, case.format)
    kept = dequantize_sparse(weight, 96, case.format)[:, 5] != 0  # the others may be NaN or not
    assert bool(kept.any() and out[1][kept].isnan().all() and out[[0, 2]].isfinite().all())


@pytest.mark.parametrize("format", (INT8, BF16), ids=str)
def test_strided_x_and_leading_dimensions(impl, format, forced):
    case = SparseCase(6, 24, 64, format, "int8" if format.has_scales else "float")
    forced(impl, **case.sizes())
    inputs, packed = case.make()
    expected = sparse_linear(inputs.x, packed, None, 24, format)
    wide = torch.full((6, 100), float("nan"))
    wide[:, 20:84] = inputs.x
    assert_same_bits(sparse_linear(wide[:, 20:84], packed, None, 24, format), expected, "part of wider rows")
    assert_same_bits(sparse_linear(inputs.x.view(2, 3, 64), packed, None, 24, format).view(6, 24), expected, "two leading dimensions")
    assert sparse_linear(inputs.x[:0], packed, None, 24, format).shape == (0, 24)


@pytest.mark.parametrize("format", (INT8, BF16), ids=str)
def test_gradients(format):
    case = SparseCase(5, 24, 64, format, "float")
    inputs, packed = case.make()
    x, bias = inputs.x.clone().requires_grad_(), torch.randn(24, requires_grad=True)
    out = sparse_linear(x, packed, bias, 24, format, "float")
    grad = torch.randn_like(out)
    out.backward(grad)
    w = dequantize_sparse(case.weight(), 64, format)
    assert torch.allclose(x.grad, grad @ w, atol=1e-4) and torch.allclose(bias.grad, grad.sum(0), atol=1e-5)


@pytest.mark.parametrize("format", (INT8, BF16), ids=str)
def test_opcheck_and_compile(format):
    case = SparseCase(5, 24, 64, format, "int8" if format.has_scales else "float")
    inputs, packed = case.make()
    arguments = (24, format.weights.code, format.group_size, 2, 4, 1, int(format.has_scales))
    torch.library.opcheck(torch.ops.taut.sparse_linear.default, (inputs.x, packed, None, *arguments))
    compiled = torch.compile(lambda x: sparse_linear(x * 1.0, packed, None, 24, format) + 1.0, fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(inputs.x), sparse_linear(inputs.x, packed, None, 24, format) + 1.0, "compiled")


def test_bad_calls():
    case = SparseCase(5, 24, 64, INT8)
    inputs, packed = case.make()
    with pytest.raises(ValueError, match=r"packed must be uint8 \[\d+\] for a 2:4 int8 group 32 weight \[24, 32\] on cpu"):
        sparse_linear(inputs.x[:, :32], packed, None, 24, INT8)
    with pytest.raises(ValueError, match=r"bias must be torch.float32 \[24\]"):
        sparse_linear(inputs.x, packed, torch.zeros(23), 24, INT8)
    with pytest.raises(ValueError, match="cannot be multiplied with 'fp8_row'"):
        sparse_linear(inputs.x, packed, None, 24, INT8, "fp8_row")
    with pytest.raises(ValueError, match="'int8_outliers' activations; accepted: auto, float, int8, int8_row$"):
        sparse_linear(inputs.x, packed, None, 24, INT8, "int8_outliers")
    with pytest.raises(RuntimeError, match="are for dense weights"):
        torch.ops.taut.sparse_linear(inputs.x, packed, None, 24, 8, 32, 2, 4, 1, 4)
    with pytest.raises(ValueError, match="x must be float32"):
        sparse_linear(inputs.x.double(), packed, None, 24, INT8)
    with pytest.raises(ValueError, match="bf16 weights cannot be multiplied with 'int8' activations; accepted: auto, float"):
        sparse_linear(inputs.x, packed, None, 24, BF16, "int8")
    with pytest.raises(RuntimeError, match="fp16 and bf16 weights take activations 0"):
        torch.ops.taut.sparse_linear(inputs.x, torch.zeros(BF16.layout_bytes(24, 64), dtype=torch.uint8), None, 24, 12, 0, 2, 4, 1, 1)
    with pytest.raises(RuntimeError, match="n:m must be"):
        torch.ops.taut.sparse_linear(inputs.x, packed, None, 24, 8, 32, 3, 4, 1, 1)


def test_cost_counts_what_is_kept():
    dense = 2 * 7 * 64 * 4096
    assert sparse_op.cost(7, 64, 4096, INT8)["flops"] * 2 == dense


@pytest.mark.parametrize("format", (NumberFormat("fp16"), NumberFormat("bf16")), ids=str)
def test_explain_takes_16_bit_weights_without_a_group_size(format):
    rows = taut.explain("sparse_linear", M=1, N=64, K=64, format=format.code, activations=0)
    assert sum(row.chosen for row in rows) == 1
