"""quantize_weight: the same bits from every impl, never worse than rounding to nearest, and honest refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import taut
from cases import DTYPES, FORMATS
from checks import assert_same_bits
from taut.formats import WeightFormat
from taut.ops import quantize_weight as weight_op
from taut.ops.quantize_weight import quantize_weight

OP = "quantize_weight"
INT4 = [format for format in FORMATS if format.name == "int4"]
INT8 = [format for format in FORMATS if format.name == "int8"]
FP8 = [format for format in FORMATS if format.name == "fp8_e4m3"]
SHAPES = ((1, 1), (3, 31), (9, 33), (5, 128), (7, 300), (2, 1537))


def weight(n: int, k: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(n, k, generator=generator) * 0.05
    w[torch.rand(n, k, generator=generator) < 0.01] *= 10
    return w.to(dtype)


def groups_of(w: torch.Tensor, format: WeightFormat) -> list[torch.Tensor]:
    return list(w.split(format.group_size or w.shape[1], dim=1))


def nearest(group: torch.Tensor, format: WeightFormat) -> torch.Tensor:
    """Plain round-to-nearest of one group a row, ``float64 [N, G]``: what the search has to beat.

    The usual one with zeros: minimum and maximum (and 0) go to 0 and 15. Without: the largest magnitude goes to -8.
    """
    x = group.double()
    low, high = x.amin(1, keepdim=True).clamp(max=0), x.amax(1, keepdim=True).clamp(min=0)
    if format.zeros:
        scale = ((high - low) / 15).half().double()
        safe = torch.where(scale > 0, scale, 1)
        zero = torch.round(-low / safe).clamp(0, 15)
    else:
        extreme = torch.where(-low > high, low, high)
        scale = (extreme / -8).half().double()
        safe = torch.where(scale != 0, scale, 1)
        zero = torch.full_like(scale, 8)
    codes = (torch.round(x / safe) + zero).clamp(0, 15)
    return (codes - zero) * scale


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_every_impl_gives_the_same_bits(impl, format, shape, forced):
    for dtype in DTYPES:
        w = weight(*shape, dtype)
        with taut.force_impl(OP, "cpu_scalar"):
            expected = quantize_weight(w, format)
        before = w.clone()
        forced(impl)
        for what, a, b in zip(("codes", "scales", "zeros"), quantize_weight(w, format), expected, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                assert_same_bits(a, b, f"{impl} and cpu_scalar on {format} {shape} {dtype}: {what}")
        assert_same_bits(w, before, "w was written to")


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_result_is_canonical(impl, format, forced):
    forced(impl)
    for n, k in SHAPES:
        codes, scales, zeros = quantize_weight(weight(n, k), format)
        assert codes.dtype == format.codes_dtype and tuple(codes.shape) == format.codes_shape(n, k)
        assert scales.dtype == torch.float16 and tuple(scales.shape) == (n, format.num_groups(k))
        assert (zeros is not None) == format.zeros
        if format.name == "int4" and k % 2:
            assert not bool((codes[:, -1] >> 4).any()), "the unused nibble must be zero"
        if format.name == "int8":
            assert int(codes.min()) >= -127
        if zeros is not None:
            assert zeros.dtype == torch.uint8 and int(zeros.max()) <= 15
        taut.ops.pack_weight.check_canonical(codes, scales, zeros, k, format)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", INT4, ids=str)
def test_no_worse_than_rounding_to_nearest(impl, format, dtype, forced):
    forced(impl)
    w = torch.cat([weight(8, 300, dtype), weight(4, 300, dtype).abs(), -weight(4, 300, dtype).abs()])
    found = weight_op.reference(*quantize_weight(w, format), 300, format)
    for g, (group, values) in enumerate(zip(groups_of(w, format), groups_of(found, format), strict=True)):
        ours = ((values - group.double()) ** 2).sum(1)
        plain = ((nearest(group, format) - group.double()) ** 2).sum(1)
        worse = ours > plain * (1 + 1e-5)
        assert not bool(worse.any()), (
            f"group {g}, row {int(worse.nonzero()[0])}: squared error {ours[worse][0]} where rounding gives {plain[worse][0]}"
        )


def test_the_search_pays():
    w = weight(64, 1024)
    for format in (WeightFormat("int4", 32), WeightFormat("int4", 128, True)):
        found = weight_op.reference(*quantize_weight(w, format), 1024, format)
        plain = torch.cat([nearest(group, format) for group in groups_of(w, format)], 1)
        assert float(((found - w) ** 2).sum()) < 0.97 * float(((plain - w) ** 2).sum())


@pytest.mark.parametrize("format", INT8, ids=str)
def test_int8_is_what_numpy_computes(impl, format, forced):
    """Scales that map the largest magnitude to 127, 126, ... 112, the one of the least squared error, and the nearest codes."""
    forced(impl)
    k = 333
    w = torch.cat([weight(11, k), torch.round(weight(5, k) * 120) / 120])  # the last rows lie on a coarse grid
    codes, scales, _ = quantize_weight(w, format)
    x, size = w.numpy(), format.group_size or k
    plain_won = searched_won = 0
    for g in range(format.num_groups(k)):
        part = x[:, g * size : (g + 1) * size]
        plain = np.abs(part).max(1) / np.float32(127)
        errors, candidates = [], []
        for end in range(127, 111, -1):
            scale = (plain * (np.float32(127) / np.float32(end))).astype(np.float16)
            found = np.clip(np.rint(part * (np.float32(1) / scale.astype(np.float32))[:, None]), -127, 127)
            candidates.append(scale)
            errors.append(((found * scale.astype(np.float64)[:, None] - part) ** 2).sum(1))
        chosen = scales[:, g].numpy()
        expected = np.clip(np.rint(part * (np.float32(1) / chosen.astype(np.float32))[:, None]), -127, 127).astype(np.int8)
        np.testing.assert_array_equal(codes[:, g * size : (g + 1) * size].numpy(), expected)
        at = [next(i for i, scale in enumerate(candidates) if scale[row] == chosen[row]) for row in range(len(x))]
        error = np.array([errors[i][row] for row, i in enumerate(at)])
        assert (error <= np.min(errors, 0) * (1 + 1e-5)).all(), f"group {g}: another scale is better"
        plain_won, searched_won = plain_won + at.count(0), searched_won + len(at) - at.count(0)
    assert plain_won
    assert searched_won


@pytest.mark.parametrize("format", FP8, ids=str)
def test_fp8_is_what_torch_computes(impl, format, forced):
    """Scales that map the largest magnitude to one of the sixteen largest codes, the one of the least squared error, and torch's
    own rounding to float8."""
    forced(impl)
    k = 333
    grid = (weight(5, k) * 20).to(torch.float8_e4m3fn).float()  # as of a checkpoint that was in float8 once
    w = torch.cat([weight(11, k), grid * 2.0**-9])
    codes, scales, _ = quantize_weight(w, format)
    ends = torch.arange(0x7E, 0x6E, -1, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    assert (float(ends[0]), float(ends[-1])) == (448, 120)
    values = weight_op.reference(codes, scales, None, k, format)
    for group, q, chosen, ours in zip(groups_of(w, format), groups_of(codes, format), scales.T, groups_of(values, format), strict=True):
        candidates = (group.abs().amax(1)[:, None] / ends).half()
        assert bool((candidates == chosen[:, None]).any(1).all())

        def rounded(scale: torch.Tensor, group: torch.Tensor = group) -> torch.Tensor:
            return (group * (1 / scale.float())[:, None]).clamp(-448, 448).to(torch.float8_e4m3fn)

        assert_same_bits(q.contiguous(), rounded(chosen), f"{impl} on {format}")
        errors = [
            ((rounded(scale).double() * scale.double()[:, None] - group) ** 2).sum(1) for scale in candidates.T
        ]  # fmt: skip
        assert bool((((ours - group) ** 2).sum(1) <= torch.stack(errors).amin(0) * (1 + 1e-5)).all()), "another scale is better"
    assert_same_bits(values[11:].float(), w[11:], "weights that lie on the grid stay as they are")


@pytest.mark.parametrize("format", INT4 + INT8, ids=str)
def test_error_is_under_the_step(impl, format, forced):
    """No element is further from its value than the format's grid allows: half a step, or the clipping the search chose."""
    forced(impl)
    w = weight(16, 260)
    codes, scales, zeros = quantize_weight(w, format)
    found = weight_op.reference(codes, scales, zeros, 260, format)
    step = scales.double().abs()[:, torch.arange(260) // (format.group_size or 260)]
    inside = (found - w.double()).abs() <= 0.5 * step * (1 + 1e-3)
    low, high = (-127, 127) if format.name == "int8" else (0, 15)
    q = codes.double() if format.name == "int8" else torch.stack([codes & 15, codes >> 4], -1).flatten(1)[:, :260].double()
    assert bool((inside | (q == low) | (q == high)).all())


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_and_constant_rows(impl, format, dtype, forced):
    forced(impl)
    values = torch.tensor([0.0, -0.0, 0.75, -0.75, 1e-3, 3e4 if dtype != torch.bfloat16 else 2.0**14])
    w = values[:, None].repeat(1, 150).to(dtype)
    found = weight_op.reference(*quantize_weight(w, format), 150, format)
    assert not bool(found[:2].any()), "a row of zeros must stay one"
    assert bool(((found - w.double()).abs() <= w.double().abs() * 2.0**-8 + 1e-6).all())


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_tiny_weights_do_not_blow_up(impl, format, forced):
    """Scales below what float16 holds round to zero or to its smallest step: the result must be no larger than that."""
    forced(impl)
    for size in (1e-6, 1e-8, 1e-12, 1e-38, 1e-42):
        w = weight(3, 70) * 20 * size
        found = weight_op.reference(*quantize_weight(w, format), 70, format)
        assert bool(found.isfinite().all())
        assert float((found - w.double()).abs().max()) <= float(w.double().abs().max()) + 2.0**-24


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_the_largest_weight_a_scale_can_hold(impl, format, forced):
    forced(impl)
    levels = {"int8": 127, "int4": 15 if format.zeros else 8, "fp8_e4m3": 448}[format.name]
    w = weight(3, 70).clamp(-0.2, 0.2) * 5
    w = w.clamp(min=0) if format.zeros else w
    w[:, 40] = 1
    for part in groups_of(w, format):
        part[:, 0] = 1
    largest = 65504.0 * levels
    codes, scales, zeros = quantize_weight(w * (largest * 0.999), format)
    assert bool(scales.isfinite().all())
    found = weight_op.reference(codes, scales, zeros, 70, format)
    assert (
        float((found - w.double() * largest).abs().max()) <= 65504 * {"int4": 0.5 + 0.2 * levels, "int8": 0.7, "fp8_e4m3": 17}[format.name]
    )
    with pytest.raises(ValueError, match="too large for a float16 scale"):
        quantize_weight(w * (largest * 1.001), format)


@pytest.mark.parametrize("value", (float("nan"), float("inf"), float("-inf"), 1e9))
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_a_row_that_cannot_be_held_is_refused(impl, format, value, forced):
    forced(impl)
    w = weight(6, 77)
    for row, column in ((0, 0), (5, 76), (3, 40)):
        bad = w.clone()
        bad[row, column] = value
        with pytest.raises(ValueError, match=f"row {row} of w holds a NaN, an infinity, or a number too large for a float16 scale"):
            quantize_weight(bad, format)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_strided_and_empty(impl, format, forced):
    forced(impl)
    w = weight(6, 75)
    expected = quantize_weight(w, format)
    wide = torch.full((12, 200), float("nan"))
    wide[::2, 40:115] = w
    for view in (wide[::2, 40:115], w.t().contiguous().t()):
        for a, b in zip(quantize_weight(view, format), expected, strict=True):
            assert a is b is None or torch.equal(a, b)
    codes, scales, zeros = quantize_weight(w[:0], format)
    assert codes.shape[0] == scales.shape[0] == 0 and (zeros is None or zeros.shape[0] == 0)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_threads_change_nothing(impl, format, forced, threads):
    forced(impl)
    w = weight(40, 300)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(quantize_weight(w, format))
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            assert a is b is None or torch.equal(a, b)


@settings(max_examples=150, deadline=None, print_blob=True)
@given(
    n=st.integers(1, 12),
    k=st.integers(1, 400),
    format=st.sampled_from(FORMATS),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
    exponent=st.integers(-12, 3),
)
def test_fuzz(n, k, format, dtype, seed, exponent):
    w = (weight(n, k, seed=seed) * 10.0**exponent).to(dtype)
    found = {}
    for impl in taut.list_impls()[OP]:
        with taut.force_impl(OP, impl):
            if any(verdict.chosen for verdict in taut.explain(OP)):
                found[impl] = quantize_weight(w, format)
    expected = found["cpu_scalar"]
    for impl, result in found.items():
        for what, a, b in zip(("codes", "scales", "zeros"), result, expected, strict=True):
            if a is not None:
                assert_same_bits(a, b, f"{impl} and cpu_scalar: {what}")
    if format.name == "int4":
        values = weight_op.reference(*expected, k, format)
        for group, ours in zip(groups_of(w, format), groups_of(values, format), strict=True):
            x = group.double()
            plain = ((nearest(group, format) - x) ** 2).sum(1)
            # half a code's tie, and fp32 sums in the search: as good as rounding, up to their rounding error
            assert bool((((ours - x) ** 2).sum(1) <= plain * (1 + 1e-4) + 1e-5 * (x**2).sum(1)).all())


@pytest.mark.parametrize("format", (WeightFormat("int4", 32), WeightFormat("int4", 0, True), WeightFormat("int8", 64), FP8[0]), ids=str)
def test_opcheck(format):
    tests = ("test_faketensor", "test_autograd_registration")
    if format.name != "fp8_e4m3":  # test_schema compares by arithmetic that torch does not have for float8
        tests += ("test_schema",)
    torch.library.opcheck(
        torch.ops.taut.quantize_weight.default,
        (weight(5, 75), format.code, format.group_size, format.zeros),
        test_utils=tests,
    )


@pytest.mark.parametrize(
    ("w", "message"),
    [
        (torch.zeros(4), r"w must be \[N, K\]"),
        (torch.zeros(2, 3, 4), r"w must be \[N, K\]"),
        (torch.zeros(3, 0), "K >= 1"),
        (torch.zeros(3, 4, dtype=torch.float64), "w must be float32, bfloat16 or float16, got torch.float64"),
        (torch.zeros(3, 4, dtype=torch.int8), "w must be float32"),
        (torch.zeros(3, 4, device="meta"), "w must be on the CPU"),
    ],
    ids=("1-D", "3-D", "no columns", "float64", "int8", "meta"),
)
def test_bad_weight_is_a_value_error(w, message):
    with pytest.raises(ValueError, match=message):
        quantize_weight(w, WeightFormat())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((torch.zeros(4), 4, 32, False), "w must be 2-D"),
        ((torch.zeros(3, 0), 4, 32, False), "K >= 1"),
        ((torch.zeros(3, 4, dtype=torch.float64), 4, 32, False), "w must be float32"),
        ((torch.zeros(3, 4), 3, 32, False), "format must be 4"),
        ((torch.zeros(3, 4), 4, 33, False), "group_size must be"),
        ((torch.zeros(3, 4), 8, 32, True), "zeros are for int4 only"),
    ],
    ids=("1-D", "no columns", "float64", "format", "group", "int8 with zeros"),
)
def test_bad_raw_call_is_an_error_and_no_crash(args, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.taut.quantize_weight(*args)


def test_cost_counts_what_a_call_moves():
    format = WeightFormat("int4", 32)
    assert weight_op.cost(8, 64, format, 2) == {"flops": 8 * 64 * 56, "bytes": 8 * 64 * 2 + format.canonical_bytes(8, 64)}
