"""quantize_weight: the same bits from every impl, never worse than rounding to nearest, and honest refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import taut
from cases import ALL_FORMATS, DTYPES, EACH_FORMAT, FORMATS
from checks import assert_same_bits
from taut.formats import WeightFormat
from taut.ops import quantize_weight as weight_op
from taut.ops.quantize_weight import quantize_weight

OP = "quantize_weight"
INT4 = [format for format in FORMATS if format.name == "int4"]
INT8 = [format for format in FORMATS if format.name == "int8"]
FP8 = [format for format in FORMATS if format.name == "fp8_e4m3"]
FEW_BITS = [format for format in ALL_FORMATS if format.name in ("int2", "int3")]
TERNARY = [format for format in ALL_FORMATS if format.name == "ternary"]
PARTS = ("codes", "scales", "zeros", "global_scale")
SHAPES = ((1, 1), (3, 31), (9, 33), (5, 128), (7, 300), (2, 1537))


def weight(n: int, k: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(n, k, generator=generator) * 0.05
    w[torch.rand(n, k, generator=generator) < 0.01] *= 10
    return w.to(dtype)


def codes_of(codes: torch.Tensor, k: int, format: WeightFormat) -> torch.Tensor:
    """A canonical weight's codes, one float64 each: numbers are compared without their scales."""
    ones = torch.ones(format.scales_shape(len(codes), k))
    zeros = torch.zeros(len(codes), format.num_groups(k), dtype=torch.uint8) if format.zeros else None
    return weight_op.reference(codes, ones, zeros, None, k, format)


def groups_of(w: torch.Tensor, format: WeightFormat) -> list[torch.Tensor]:
    return list(w.split(format.group_size or w.shape[1], dim=1))


def nearest(group: torch.Tensor, format: WeightFormat) -> torch.Tensor:
    """Plain round-to-nearest of one group a row, ``float64 [N, G]``: what the search has to beat.

    The usual one with zeros: minimum and maximum (and 0) go to 0 and 15 (7, 3). Without: the largest magnitude goes to -8 (-4, -2).
    """
    x = group.double()
    top, middle = 2**format.bits - 1, 2 ** (format.bits - 1)
    low, high = x.amin(1, keepdim=True).clamp(max=0), x.amax(1, keepdim=True).clamp(min=0)
    if format.zeros:
        scale = ((high - low) / top).half().double()
        safe = torch.where(scale > 0, scale, 1)
        zero = torch.round(-low / safe).clamp(0, top)
    else:
        extreme = torch.where(-low > high, low, high)
        scale = (extreme / -middle).half().double()
        safe = torch.where(scale != 0, scale, 1)
        zero = torch.full_like(scale, middle)
    codes = (torch.round(x / safe) + zero).clamp(0, top)
    return (codes - zero) * scale


@pytest.mark.parametrize("shape", (*SHAPES, (130, 150)), ids=str)
@pytest.mark.parametrize("format", ALL_FORMATS, ids=str)
def test_every_impl_gives_the_same_bits(impl, format, shape, forced):
    for dtype in DTYPES:
        w = weight(*shape, dtype)
        with taut.force_impl(OP, "cpu_scalar"):
            expected = quantize_weight(w, format)
        before = w.clone()
        forced(impl)
        for what, a, b in zip(PARTS, quantize_weight(w, format), expected, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                assert_same_bits(a, b, f"{impl} and cpu_scalar on {format} {shape} {dtype}: {what}")
        assert_same_bits(w, before, "w was written to")


@pytest.mark.parametrize("format", ALL_FORMATS, ids=str)
def test_result_is_canonical(impl, format, forced):
    forced(impl)
    for n, k in SHAPES:
        parts = quantize_weight(weight(n, k), format)
        taut.ops.pack_weight.check_canonical(*parts, k, format)
        # as the definition writes it, what is left over of a row's last byte too
        again = taut.ops.pack_weight.unpack_weight(taut.ops.pack_weight.pack_weight(*parts, k, format), n, k, format)
        for what, a, b in zip(PARTS, parts, again, strict=True):
            assert a is b is None or assert_same_bits(a, b, what) is None
        if format.name == "int4" and k % 2:
            assert not bool((parts.codes[:, -1] >> 4).any()), "the unused nibble must be zero"
        if format.name == "int8":
            assert int(parts.codes.min()) >= -127


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", INT4 + FEW_BITS, ids=str)
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
    for format in FEW_BITS:  # with few levels clipping pays much more
        found = weight_op.reference(*quantize_weight(w, format), 1024, format)
        plain = torch.cat([nearest(group, format) for group in groups_of(w, format)], 1)
        assert float(((found - w) ** 2).sum()) < {0: 0.77, 32: 0.92}.get(format.group_size, 0.89) * float(((plain - w) ** 2).sum()), format


@pytest.mark.parametrize("format", INT8, ids=str)
def test_int8_is_what_numpy_computes(impl, format, forced):
    """Scales that map the largest magnitude to 127, 126, ... 112, the one of the least squared error, and the nearest codes."""
    forced(impl)
    k = 333
    w = torch.cat([weight(11, k), torch.round(weight(5, k) * 120) / 120])  # the last rows lie on a coarse grid
    codes, scales, *_ = quantize_weight(w, format)
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
    codes, scales, *_ = quantize_weight(w, format)
    ends = torch.arange(0x7E, 0x6E, -1, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    assert (float(ends[0]), float(ends[-1])) == (448, 120)
    values = weight_op.reference(codes, scales, None, None, k, format)
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


@pytest.mark.parametrize("format", INT4 + INT8 + FEW_BITS + TERNARY, ids=str)
def test_error_is_under_the_step(impl, format, forced):
    """No element is further from its value than the format's grid allows: half a step, or the clipping the search chose."""
    forced(impl)
    w = weight(16, 260)
    parts = quantize_weight(w, format)
    found = weight_op.reference(*parts, 260, format)
    step = parts.scales.double().abs()[:, torch.arange(260) // (format.group_size or 260)]
    inside = (found - w.double()).abs() <= 0.5 * step * (1 + 1e-3)
    q = codes_of(parts.codes, 260, format)
    if format.name == "int8":
        low, high = -127, 127
    else:  # codes_of takes the middle away where there are no zero points
        low, high = (0, 2**format.bits - 1) if format.zeros else (-(2 ** (format.bits - 1)), 2 ** (format.bits - 1) - 1)
    if format.name == "ternary":
        low, high = -1, 1
    assert bool((inside | (q == low) | (q == high)).all())


@pytest.mark.parametrize("format", TERNARY, ids=str)
def test_ternary_is_what_numpy_computes(impl, format, forced):
    """The better of two dozen least-squares scales on a fine grid of thresholds is hardly better than ours; BitNet's scale is worse."""
    forced(impl)
    k = 333
    w = weight(16, k)
    parts = quantize_weight(w, format)
    found = weight_op.reference(*parts, k, format)
    for group, ours in zip(groups_of(w, format), groups_of(found, format), strict=True):
        x = group.double().numpy()
        mean = np.abs(x).mean(1, keepdims=True)
        best = np.full(len(x), np.inf)
        for factor in np.geomspace(0.5, 40, 100):
            kept = np.abs(x) > mean * factor / 2
            scale = np.where(kept, np.abs(x), 0).sum(1, keepdims=True) / np.maximum(kept.sum(1, keepdims=True), 1)
            best = np.minimum(best, ((np.where(kept, np.sign(x) * scale, 0) - x) ** 2).sum(1))
        error = ((ours.numpy() - x) ** 2).sum(1)
        absmean = ((np.clip(np.rint(x / mean), -1, 1) * mean - x) ** 2).sum(1)
        assert (error <= absmean * (1 + 1e-5)).all()
        assert error.sum() <= 1.03 * best.sum()


@pytest.mark.parametrize("name", ("ternary", "int2", "int3"))
def test_ternary_weights_stay_exact(impl, name, forced):
    """Weights that are -s, 0, s with an fp16 scale, as a BitNet model has them."""
    forced(impl)
    generator = torch.Generator().manual_seed(2)
    w = (
        (torch.randint(-1, 2, (12, 300), generator=generator) * (torch.rand(12, 1, generator=generator).half().float() + 0.01))
        .half()
        .float()
    )
    for format in (format for format in ALL_FORMATS if format.name == name and not format.zeros):
        found = weight_op.reference(*quantize_weight(w, format), 300, format)
        # int3 has 4/3 and 3 as divisors of its range, whose quotient rounds once more
        torch.testing.assert_close(found.float(), w, rtol=0 if name != "int3" else 1e-3, atol=0)


@pytest.mark.parametrize("group", (32, 64, 128))
def test_nf4_is_bitsandbytes(impl, group, forced):
    """Codes and scales bit for bit, the numbers too."""
    functional = pytest.importorskip("bitsandbytes.functional")
    forced(impl)
    format = WeightFormat("nf4", group)
    for dtype in DTYPES:
        w = weight(24, 512, dtype)
        w[3, :128] = 0
        codes, scales, *_ = quantize_weight(w, format)
        theirs, state = functional.quantize_4bit(w, blocksize=group, quant_type="nf4")
        swapped = theirs.reshape(24, 256) >> 4 | theirs.reshape(24, 256) << 4  # their first k is in the high nibble
        assert_same_bits(scales, state.absmax.reshape(24, -1), f"{dtype}: scales")
        kept = torch.ones_like(codes, dtype=torch.bool)
        kept[3, :64] = False  # what the codes of a group of zeros are does not matter
        assert_same_bits(codes * kept, swapped * kept, f"{dtype}: codes")
        numbers = functional.dequantize_4bit(theirs, state).float()
        torch.testing.assert_close(
            weight_op.reference(codes, scales, None, None, 512, format).to(dtype).float(), numbers, rtol=2e-2, atol=0
        )
        if dtype == torch.float32:
            assert_same_bits(weight_op.reference(codes, scales, None, None, 512, format).float() + 0.0, numbers + 0.0, "numbers")


def e2m1(x: torch.Tensor) -> torch.Tensor:
    """Codes of the nearest E2M1 numbers, by ml_dtypes."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    return torch.from_numpy(x.clamp(-6, 6).numpy().astype(ml_dtypes.float4_e2m1fn).view(np.uint8)) & 15


def nibbles(codes: torch.Tensor, k: int) -> torch.Tensor:
    return torch.stack([codes & 15, codes >> 4], -1).flatten(1)[:, :k]


# Where E2M1's rounding can go wrong: every number, every tie, what lies beside them, and what is past the end.
E2M1_EDGES = torch.tensor([0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5, 6, 7])


@pytest.mark.parametrize("k", (32, 333))
def test_mxfp4_is_the_specification(impl, k, forced):
    """The shared scale of OCP Microscaling 1.0 or the next, whichever is closer, and ml_dtypes' codes."""
    forced(impl)
    edges = torch.cat([E2M1_EDGES, -E2M1_EDGES]) * 2.0**-3
    beside = torch.nextafter(edges, torch.tensor(9.0))
    rows = [edges, beside, edges * 2.0**-120, -beside * 2.0**60, edges * 2.0**-140]
    rows = torch.stack(rows) if k == 32 else torch.cat([weight(40, k), weight(3, k) * 1e30, weight(3, k) * 1e-36])
    codes, scales, *_ = quantize_weight(rows, WeightFormat("mxfp4"))
    seen = set()
    for g, group in enumerate(groups_of(rows, WeightFormat("mxfp4"))):
        largest = group.abs().amax(1).double()
        plain = (torch.floor(torch.log2(largest)) - 2 + 127).clamp(0, 254)
        chosen, errors = scales[:, g].double(), []
        assert bool(((chosen == plain) | (chosen == plain + 1)).all())
        seen |= set((chosen - plain).tolist())
        q = nibbles(codes, k)[:, 32 * g : 32 * g + group.shape[1]]
        assert torch.equal(q, e2m1((group.double() * 2.0 ** (127 - chosen)[:, None]).float()))
        table = torch.tensor(weight_op._E2M1, dtype=torch.float64)
        for step in (0, 1):
            scale = 2.0 ** (plain + step - 127)[:, None]
            errors.append(((table[e2m1((group.double() / scale).float()).int()] * scale - group) ** 2).sum(1))
        better = torch.where(errors[1] < errors[0], 1, 0)
        close = (errors[0] - errors[1]).abs() <= 1e-5 * torch.maximum(*errors)
        assert bool(((chosen - plain == better) | close | (largest < 2.0**-60)).all())
    assert k == 32 or seen == {0, 1}, "the search is never of use, or always"


def test_mxfp4_is_torchaos(impl, forced):
    """Where the specification's scale is the closer one, torchao gives the same bytes."""
    formats = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    forced(impl)
    w = weight(16, 256)
    scales, data = formats.to_mx(w, torch.float4_e2m1fn_x2, 32)
    codes, ours, *_ = quantize_weight(w, WeightFormat("mxfp4"))
    same = ours == scales.view(torch.uint8).reshape(ours.shape)
    assert int(same.sum()) > same.numel() // 3
    assert bool((ours[~same] == scales.view(torch.uint8).reshape(ours.shape)[~same] + 1).all())
    theirs = data.view(torch.uint8).reshape(codes.shape)
    assert bool(((codes == theirs) | ~same.repeat_interleave(16, 1)).all())


@pytest.mark.parametrize("k", (16, 333))
def test_nvfp4_is_what_torch_computes(impl, k, forced):
    forced(impl)
    w = weight(40, k)
    w[3] = 0
    w[5, :5] *= 1e-6
    codes, scales, _, global_scale = quantize_weight(w, WeightFormat("nvfp4"))
    assert float(global_scale) == float(w.abs().max() / torch.tensor(448.0 * 6))
    for g, group in enumerate(groups_of(w, WeightFormat("nvfp4"))):
        scale = (group.abs().amax(1) / 6 / global_scale).clamp(max=448).to(torch.float8_e4m3fn)
        assert_same_bits(scales[:, g].contiguous(), scale.view(torch.uint8), "scales")
        total = scale.float() * global_scale
        q = torch.where(total[:, None] > 0, e2m1(group / total[:, None]), 0)
        assert torch.equal(nibbles(codes, k)[:, 16 * g : 16 * g + group.shape[1]], q)
    zeros = quantize_weight(torch.zeros(2, 20), WeightFormat("nvfp4"))
    assert not zeros.codes.any() and not zeros.scales.any() and float(zeros.global_scale) == 1


@pytest.mark.parametrize("shape", ((1, 1), (128, 128), (130, 300), (257, 129)), ids=str)
def test_fp8_block_is_what_torch_computes(impl, shape, forced):
    """DeepSeek's: a block's largest magnitude to 448, torch's rounding."""
    forced(impl)
    n, k = shape
    w = weight(n, k)
    w[:3, :3] = 0
    codes, scales, *_ = quantize_weight(w, WeightFormat("fp8_block"))
    for i in range(0, n, 128):
        for j in range(0, k, 128):
            block = w[i : i + 128, j : j + 128]
            scale = block.abs().max() / torch.tensor(448.0)
            assert float(scales[i // 128, j // 128]) == float(scale)
            expected = (block / scale).clamp(-448, 448) if scale > 0 else torch.zeros_like(block)
            assert_same_bits(codes[i : i + 128, j : j + 128].contiguous(), expected.to(torch.float8_e4m3fn), f"block {i}, {j}")


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_and_constant_rows(impl, format, dtype, forced):
    forced(impl)
    values = torch.tensor([0.0, -0.0, 0.75, -0.75, 1e-3, 3e4 if dtype != torch.bfloat16 else 2.0**14])
    w = values[:, None].repeat(1, 150).to(dtype)
    found = weight_op.reference(*quantize_weight(w, format), 150, format)
    assert not bool(found[:2].any()), "a row of zeros must stay one"
    relative, absolute = {"mxfp4": (0.2, 0), "nvfp4": (0.07, 3e4 / 448 * 2.0**-10), "fp8_block": (2.0**-4, 3e4 / 448 * 2.0**-10)}.get(
        format.name, (2.0**-8, 1e-6)
    )  # E2M1's steps; a scale that rows of other sizes share
    assert bool(((found - w.double()).abs() <= w.double().abs() * relative + absolute).all())


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_tiny_weights_do_not_blow_up(impl, format, forced):
    """Scales below what float16 holds round to zero or to its smallest step: the result must be no larger than that."""
    forced(impl)
    for size in (1e-6, 1e-8, 1e-12, 1e-38, 1e-42):
        w = weight(3, 70) * 20 * size
        found = weight_op.reference(*quantize_weight(w, format), 70, format)
        assert bool(found.isfinite().all())
        assert float((found - w.double()).abs().max()) <= float(w.double().abs().max()) + 2.0**-24


FP16_SCALES = [format for format in FORMATS if format.scales_dtype == torch.float16]


@pytest.mark.parametrize("format", [format for format in FP16_SCALES if format.name != "ternary"], ids=str)
def test_the_largest_weight_a_scale_can_hold(impl, format, forced):
    forced(impl)
    levels = {"int8": 127, "fp8_e4m3": 448}.get(format.name, format.largest_zero if format.zeros else 2 ** (format.bits - 1))
    w = weight(3, 70).clamp(-0.2, 0.2) * 5
    w = w.clamp(min=0) if format.zeros else w
    w[:, 40] = 1
    for part in groups_of(w, format):
        part[:, 0] = 1
    largest = 65504.0 * levels
    parts = quantize_weight(w * (largest * 0.999), format)
    assert bool(parts.scales.isfinite().all())
    found = weight_op.reference(*parts, 70, format)
    allowed = {"int2": 0.7 * levels, "int3": 0.5 * levels, "int4": 0.5 + 0.2 * levels, "int8": 0.7, "fp8_e4m3": 17}[format.name]
    assert float((found - w.double() * largest).abs().max()) <= 65504 * allowed
    assert largest >= format.kind.largest or format.zeros, "swap would let through what cannot be quantized"
    with pytest.raises(ValueError, match="too large for a float16 scale"):
        quantize_weight(w * (largest * 1.001), format)


@pytest.mark.parametrize("format", TERNARY, ids=str)
def test_the_largest_ternary_weight(impl, format, forced):
    forced(impl)
    assert bool((weight_op.reference(*quantize_weight(torch.full((2, 70), -65504.0), format), 70, format) == -65504).all())
    with pytest.raises(ValueError, match="too large for a float16 scale"):
        quantize_weight(torch.full((2, 70), 65520.0), format)


@pytest.mark.parametrize("format", [format for format in FORMATS if format not in FP16_SCALES], ids=str)
def test_any_finite_weight_has_another_scale(impl, format, forced):
    forced(impl)
    for size in (3e38, 1e-30):
        w = torch.nn.functional.normalize(weight(5, 70), p=torch.inf, dim=None) * size
        parts = quantize_weight(w, format)
        taut.ops.pack_weight.check_canonical(*parts, 70, format)
        found = weight_op.reference(*parts, 70, format)
        assert float((found - w).norm()) <= 0.15 * float(w.double().norm())
        assert bool(found.float().isfinite().all())
    for value in (float("nan"), float("inf")):
        w[2, 60] = value
        with pytest.raises(ValueError, match="row 2 of w holds a NaN, an infinity"):
            quantize_weight(w, format)


@pytest.mark.parametrize("value", (float("nan"), float("inf"), float("-inf"), 1e9))
@pytest.mark.parametrize("format", FP16_SCALES, ids=str)
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
    codes, scales, zeros, global_scale = quantize_weight(w[:0], format)
    assert codes.shape[0] == scales.shape[0] == 0 and (zeros is None or zeros.shape[0] == 0)
    assert global_scale is None or float(global_scale) == 1


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
    found: dict = {}
    for impl in taut.list_impls()[OP]:
        with taut.force_impl(OP, impl):
            if any(verdict.chosen for verdict in taut.explain(OP)):
                found[impl] = quantize_weight(w, format)
    expected = found["cpu_scalar"]
    for impl, result in found.items():
        for what, a, b in zip(PARTS, result, expected, strict=True):
            if a is not None:
                assert_same_bits(a, b, f"{impl} and cpu_scalar: {what}")
    if format.name in ("int2", "int3", "int4"):
        values = weight_op.reference(*expected, k, format)
        for group, ours in zip(groups_of(w, format), groups_of(values, format), strict=True):
            x = group.double()
            plain = ((nearest(group, format) - x) ** 2).sum(1)
            # half a code's tie, and fp32 sums in the search: as good as rounding, up to their rounding error
            assert bool((((ours - x) ** 2).sum(1) <= plain * (1 + 1e-4) + 1e-5 * (x**2).sum(1)).all())


@pytest.mark.parametrize("format", EACH_FORMAT, ids=str)
def test_opcheck(format):
    tests = ("test_faketensor", "test_autograd_registration")
    if format.codes_dtype != torch.float8_e4m3fn:  # test_schema compares by arithmetic that torch does not have for float8
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
        ((torch.zeros(3, 4), 11, 32, False), "format must be 1"),
        ((torch.zeros(3, 4), 4, 33, False), "group_size must be"),
        ((torch.zeros(3, 4), 8, 32, True), "zeros are for int2, int3 and int4 only"),
        ((torch.zeros(3, 4), 7, 32, False), "group_size must be 16 for nvfp4"),
    ],
    ids=("1-D", "no columns", "float64", "format", "group", "int8 with zeros", "nvfp4 group"),
)
def test_bad_raw_call_is_an_error_and_no_crash(args, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.taut.quantize_weight(*args)


def test_cost_counts_what_a_call_moves():
    format = WeightFormat("int4", 32)
    assert weight_op.cost(8, 64, format, 2) == {"flops": 8 * 64 * 56, "bytes": 8 * 64 * 2 + format.canonical_bytes(8, 64)}
