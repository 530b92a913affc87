"""quant_linear, every impl and every case, against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, assume, given, note, settings
from hypothesis import strategies as st

import taut
from cases import (
    ACTIVATIONS,
    CUDA_FORMATS,
    DTYPES,
    EACH_FORMAT,
    EACH_KIND,
    EACH_MODE,
    FORMATS,
    INT4,
    INT8,
    PAIRS,
    LinearCase,
    LinearInputs,
    encode,
    linear_cases,
    pack,
    random_weight,
)  # fmt: skip
from checks import assert_linear, assert_same_bits
from taut.formats import Canonical, WeightFormat, activation_code
from taut.ops import quant_linear as linear_op
from taut.ops.quant_linear import quant_linear

OP = "quant_linear"
each_mode = pytest.mark.parametrize(("activations", "format"), EACH_MODE, ids=str)
each_kind = pytest.mark.parametrize(("activations", "format"), EACH_KIND, ids=str)


def dtype_of(impl: str) -> torch.dtype:
    """float32, or the one dtype of x that an impl of the CPU takes."""
    return torch.bfloat16 if impl.startswith("cpu_avx512bf16.float") else torch.float32


def run(case: LinearCase, inputs: LinearInputs, x: torch.Tensor | None = None) -> torch.Tensor:
    return quant_linear(inputs.x if x is None else x, inputs.packed, inputs.bias, case.N, case.format, case.activations)


def weight_of(parts: Canonical, k: int, format: WeightFormat, x: torch.Tensor, bias=None) -> LinearInputs:
    return LinearInputs(x, pack(*parts, k, format), bias, *parts)


def weight_numbers(inputs: LinearInputs, case: LinearCase) -> torch.Tensor:
    return taut.ops.quantize_weight.reference(*inputs.canonical, case.K, case.format, case.activations)


def scales_of(values: torch.Tensor, format: WeightFormat) -> torch.Tensor:
    """These scales (powers of two, for mxfp4) as the format stores them."""
    if format.name == "mxfp4":
        return (torch.log2(values) + 127).to(torch.uint8)
    return values.to(torch.float8_e4m3fn).view(torch.uint8) if format.name == "nvfp4" else values.to(format.scales_dtype)


def poison_next_output(case: LinearCase, rows: int) -> None:
    """Leaves NaN in the memory that the allocator is about to hand out for the output (the sanitizer run does it for certain)."""
    block = torch.full((rows, case.N), float("nan"), dtype=case.dtype)
    del block


@pytest.mark.parametrize("case", [case for activations in ACTIVATIONS for case in linear_cases(activations)], ids=str)
def test_matches_reference(impl, case, forced):
    forced(impl, **case.sizes())
    inputs = case.make()
    before = [tensor.clone() for tensor in (inputs.x, inputs.packed, *([inputs.bias] if case.bias else []))]
    poison_next_output(case, case.M)
    out = run(case, inputs)
    again = run(case, inputs)
    assert_linear(out, inputs.x, inputs, case, impl=impl)
    assert_same_bits(out, again, f"{impl} on {case}, run twice")
    for old, new in zip(before, (inputs.x, inputs.packed, inputs.bias), strict=False):
        assert_same_bits(old, new, f"{impl} on {case}: an input was written to")


@each_mode
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_x(impl, activations, format, dtype, forced):
    case = LinearCase(6, 17, 75, format, activations, dtype, bias=True)
    forced(impl, **case.sizes())
    inputs = case.make()
    expected = run(case, inputs)
    wide = torch.full((6, 200), float("nan"), dtype=dtype)
    wide[:, 40:115] = inputs.x
    spread = torch.full((12, 75), float("nan"), dtype=dtype)
    spread[::2] = inputs.x
    columns = torch.full((6, 150), float("nan"), dtype=dtype)
    columns[:, ::2] = inputs.x
    views = {
        "part of wider rows": wide[:, 40:115],
        "every second row": spread[::2],
        "every second column": columns[:, ::2],
        "transposed": inputs.x.t().contiguous().t(),
    }
    for name, view in views.items():
        assert not view.is_contiguous()
        assert_same_bits(run(case, inputs, view), expected, f"{impl} on {case}, {name}")
    same_row = run(case, inputs, inputs.x[2:3].expand(6, 75))
    assert_same_bits(same_row, run(case, inputs, inputs.x[2:3].repeat(6, 1)), f"{impl} on {case}, expanded")


@each_mode
def test_leading_dimensions(impl, activations, format, forced):
    case = LinearCase(12, 9, 40, format, activations, dtype_of(impl), bias=True)
    forced(impl, **case.sizes())
    inputs = case.make()
    expected = run(case, inputs)
    assert_same_bits(run(case, inputs, inputs.x.view(3, 4, 40)), expected.view(3, 4, 9), "3-D")
    assert_same_bits(run(case, inputs, inputs.x.view(2, 3, 2, 40)), expected.view(2, 3, 2, 9), "4-D")
    swapped = inputs.x.view(3, 4, 40).transpose(0, 1)
    assert_same_bits(run(case, inputs, swapped), expected.view(3, 4, 9).transpose(0, 1).contiguous(), "3-D, transposed")
    assert_same_bits(run(case, inputs, inputs.x[0]), run(case, inputs, inputs.x[:1])[0], "1-D")
    assert run(case, inputs, inputs.x.view(3, 4, 40)[:0]).shape == (0, 4, 9)
    assert run(case, inputs, inputs.x.view(3, 4, 40)[:, :0]).shape == (3, 0, 9)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_no_outputs(impl, format, forced):
    case = LinearCase(3, 0, 33, format, "float", dtype_of(impl), bias=True)
    forced(impl, **LinearCase(3, 8, 33, format, "float", dtype_of(impl)).sizes())
    inputs = case.make()
    assert run(case, inputs).shape == (3, 0)


@each_kind
def test_a_row_does_not_depend_on_its_batch(impl, format, activations, forced):
    """CPU kernels promise it always, CUDA kernels in ``taut.batch_invariant()``."""
    cuda = impl.startswith("cuda")
    whole_rows, counts = (150, (1, 9, 20, 40, 64, 65, 100)) if cuda else (29, (1, 2, 3, 4, 5, 6, 7, 12, 21))
    case = LinearCase(whole_rows, 23, 350, format, activations, torch.float16 if cuda else dtype_of(impl), bias=True)
    with taut.batch_invariant():
        forced(impl, **case.sizes())
        inputs = case.make()
        whole = run(case, inputs)
        for rows in counts:
            for start in (0, 8):
                part = run(case, inputs, inputs.x[start : start + rows])
                context = f"{impl} on {case}: rows {start} to {start + rows} alone and in the batch"
                assert_same_bits(part, whole[start : start + rows], context)


@pytest.mark.parametrize("rows", (1, 3, 70))
@each_kind
def test_threads_change_nothing(impl, rows, activations, format, forced, threads):
    if impl.startswith("cuda"):
        pytest.skip("no thread of the CPU computes here, unless in torch's own matmul")
    case = LinearCase(rows, 100, 4500 if rows == 1 else 1536, format, activations, dtype_of(impl), bias=True)
    forced(impl, **case.sizes())
    inputs = case.make()
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(run(case, inputs))
    for count, result in enumerate(results[1:], 2):
        assert_same_bits(results[0], result, f"{impl} on {case}: 1 thread and {count}")


@each_mode
def test_more_rows_than_a_chunk(impl, activations, format, forced):
    """Kernels take rows of x in chunks of a few hundred; the seams must not show."""
    case = LinearCase(1100, 9, 40, format, activations, dtype_of(impl))
    forced(impl, **case.sizes())
    inputs = case.make()
    out = run(case, inputs)
    assert_linear(out, inputs.x, inputs, case, impl=impl)
    if impl.startswith("cuda_sm75.dense") and "emulated" not in impl:
        return  # cuBLAS picks its kernel by the number of rows
    assert_same_bits(out[500:530], run(case, inputs, inputs.x[500:530]), f"{impl} on {case}: rows 500 to 530")


# ---- Exact mode: sums that fp32 can represent have no excuse ----


def exact_weight(case: LinearCase, generator: torch.Generator) -> Canonical:
    """Numbers whose sums fp32 can represent. nf4 has them beside 8-bit x only: 127ths, here with scales of 127 / 2^i."""
    parts = random_weight(case.N, case.K, case.format, generator)
    codes = parts.codes
    if codes.dtype == torch.float8_e4m3fn:  # small integers: sums over the whole range of E4M3 do not fit fp32
        codes = torch.randint(-16, 17, codes.shape, generator=generator).float().to(codes.dtype)
    scales = 2.0 ** torch.randint(-3, 1, parts.scales.shape, generator=generator)
    if case.format.name != "mxfp4":
        scales *= torch.where(torch.rand(scales.shape, generator=generator) < 0.25, -1.0, 1.0)
    if case.format.name == "nf4":
        scales *= 127
    global_scale = torch.tensor([0.5]) if case.format.has_global_scale else None
    return Canonical(codes, scales_of(scales, case.format), parts.zeros, global_scale)


def positive_zero(t: torch.Tensor) -> torch.Tensor:
    return torch.where(t == 0, torch.zeros_like(t), t)


def exact_activations(rows: int, k: int, generator: torch.Generator) -> torch.Tensor:
    """x that int8 quantization keeps as it is, every 32 k at another scale.

    A row's first element is 127 * 32767, so that the row's unit is 1; the rest of its block is zero. Every other block
    holds integers up to 127 in size, 127 among them, times a power of two.
    """
    x = torch.randint(-127, 128, (rows, k), generator=generator).float()
    x[:, 32::32] = 127.0 * torch.where(torch.rand(rows, len(range(32, k, 32)), generator=generator) < 0.5, -1.0, 1.0)
    x *= (2.0 ** torch.randint(0, 3, (rows, -(-k // 32)), generator=generator)).repeat_interleave(32, 1)[:, :k]
    x[:, 0], x[:, 1:32] = 127.0 * 32767.0, 0
    assert torch.equal(linear_op.quantize_activations(x), x.double())
    return x


def with_zero_first(parts: Canonical, k: int, format: WeightFormat) -> torch.Tensor:
    """The codes, but that what meets the large first element of x is a zero."""
    zero = 1 if parts.zeros is not None else {"ternary": 1, "int2": 2, "int3": 4, "int4": 8, "nf4": 7}.get(format.name, 0)
    codes = parts.codes.clone()
    if format.name == "ternary":
        codes[:, 0] = codes[:, 0] - codes[:, 0] % 3 + zero
    elif format.bits == 8:
        codes[:, 0] = zero
    else:  # the first code is the lowest bits of the first byte
        codes[:, 0] = codes[:, 0] & ~(2**format.bits - 1) & 0xFF | zero
    return codes


@pytest.mark.parametrize("format", PAIRS["int8"], ids=str)
@pytest.mark.parametrize("rows", (1, 2, 4, 6, 33))
def test_exact_with_int8_activations(impl, format, rows, forced):
    case = LinearCase(rows, 19, 300, format, "int8", bias=True)
    forced(impl, **case.sizes())
    generator = torch.Generator().manual_seed(case.seed)
    parts = exact_weight(case, generator)
    if parts.zeros is not None:
        parts.zeros[:, 0] = 1
    parts = parts._replace(codes=with_zero_first(parts, case.K, format))
    x = exact_activations(rows, case.K, generator)
    bias = torch.randint(-64, 65, (case.N,), generator=generator).float()
    inputs = weight_of(parts, case.K, format, x, bias)
    out, w = run(case, inputs), weight_numbers(inputs, case)
    assert_same_bits(out, positive_zero((x.double() @ w.T + bias.double()).float()), f"{impl} on {case}, seed {case.seed}")


# ---- Extremes ----


def extreme_codes(format: WeightFormat, n: int, k: int) -> list[tuple[str, torch.Tensor, torch.Tensor | None]]:
    """Every code the largest there is, the smallest, or both in turn, with zero points at either end."""
    if format.codes_dtype == torch.float8_e4m3fn:
        low, high = 0xFE, 0x7E  # -448, 448
    elif format.name in ("mxfp4", "nvfp4"):
        low, high = 15, 7  # -6, 6
    elif format.name == "int8":
        low, high = 0x80, 0x7F
    else:
        low, high = 0, 2 if format.name == "ternary" else 2**format.bits - 1
    even = torch.arange(k) % 2 == 0
    patterns = {
        "all high": torch.full((k,), high),
        "all low": torch.full((k,), low),
        "low and high": torch.where(even, low, high),
        "high and low": torch.where(even, high, low),
    }
    zeros = [torch.full((n, format.num_groups(k)), z, dtype=torch.uint8) for z in (0, format.largest_zero)] if format.zeros else [None]
    return [
        (f"{name}, zero point {None if zero is None else int(zero[0, 0])}", encode(pattern.repeat(n, 1), format), zero)
        for name, pattern in patterns.items()
        for zero in zeros
    ]


@pytest.mark.parametrize(("activations", "format"), [(mode, format) for mode in PAIRS for format in PAIRS[mode]], ids=str)
@pytest.mark.parametrize("rows", (1, 3, 4, 22))
def test_no_integer_overflows(impl, format, rows, activations, forced):
    """Every product as large as it can be, with signs that add up, cancel, or do both in turn."""
    case = LinearCase(rows, 17, 330, format, activations, dtype_of(impl))
    forced(impl, **case.sizes())
    k = torch.arange(case.K)
    signs = {
        "all +": torch.ones(case.K),
        "all -": -torch.ones(case.K),
        "alternating": 1.0 - 2 * (k % 2),
        "pairs": 1.0 - 2 * (k // 2 % 2),
        "fours": 1.0 - 2 * (k // 4 % 2),
        "halves of a block": 1.0 - 2 * (k // 16 % 2),
        "blocks": 1.0 - 2 * (k // 32 % 2),
    }
    scales = scales_of(torch.ones(format.scales_shape(case.N, case.K)), format)
    global_scale = torch.ones(1) if format.has_global_scale else None
    for what, codes, zeros in extreme_codes(format, case.N, case.K):
        for pattern, sign in signs.items():
            x = (sign * 127).repeat(rows, 1).to(case.dtype)
            inputs = weight_of(Canonical(codes, scales, zeros, global_scale), case.K, format, x)
            assert_linear(run(case, inputs), x, inputs, case, impl=f"{impl} ({what}; x {pattern})", independent=False)


SPECIAL_ROWS = 7


def special_x(kind: str, k: int, generator: torch.Generator) -> torch.Tensor:
    x = torch.randn(SPECIAL_ROWS, k, generator=generator)
    if kind == "zero rows":
        x[::2] = 0
    elif kind == "negative zero rows":
        x[::2] = -0.0
    elif kind == "NaN":
        x[2, k // 2], x[5, 0], x[6, k - 1] = float("nan"), float("nan"), float("nan")
    elif kind == "infinity":
        x[2, k // 2], x[5, 0], x[6, k - 1] = float("inf"), float("-inf"), float("inf")
    elif kind == "outliers":
        x[:, 3] *= 1e4
        x[1, 50] = 1e6
    elif kind == "one element":
        x *= 0
        x[torch.arange(SPECIAL_ROWS), torch.arange(SPECIAL_ROWS) * 11 % k] = torch.tensor([1.0, -1, 3, 1e-3, 7e4, 127, 1e-9])
    elif kind == "rows of every size":
        x *= torch.tensor([1e30, 1e-30, 1e20, 1e-20, 1e10, 1.0, 1e-38])[:, None]
    elif kind == "subnormal":
        x *= 1e-41
    elif kind == "the threshold of zero rows":  # int8 activations: a row under 2^-100 counts as zeros
        x = x.clamp(-1, 1) * (2.0 ** torch.tensor([-99.0, -100, -101, -102, -110, -126, -140]))[:, None]
        x[:, 0] = 2.0 ** torch.tensor([-99.0, -100, -101, -102, -110, -126, -140])
    elif kind == "ties":  # products with the inverse scale that end in .5
        x = (torch.randint(-254, 255, (SPECIAL_ROWS, k), generator=generator) / 2).clamp(-127, 127)
        x[:, ::32] = 127
    return x


SPECIALS = (
    "zero rows", "negative zero rows", "NaN", "infinity", "outliers", "one element", "rows of every size", "subnormal",
    "the threshold of zero rows", "ties",
)  # fmt: skip


@pytest.mark.parametrize("kind", SPECIALS)
@each_kind
def test_special_values(impl, kind, format, activations, forced):
    case = LinearCase(SPECIAL_ROWS, 20, 107, format, activations, dtype_of(impl))
    forced(impl, **case.sizes())
    inputs = case.make()
    x = special_x(kind, case.K, torch.Generator().manual_seed(case.seed)).to(case.dtype)
    out = run(case, inputs, x)
    if activations != "float" and kind in ("NaN", "infinity"):
        assert bool(out[[2, 5, 6]].isnan().all()), f"{impl}: a row of x that holds a {kind} must give a row of NaN"
        assert bool(out[[0, 1, 3, 4]].isfinite().all()), f"{impl}: a {kind} leaked into another row"
    if activations == "float" and kind == "infinity":
        w = weight_numbers(inputs, case)
        assert_same_nonfinite(out, x.double() @ w.T, f"{impl} on {case}")
        out, x = out[[0, 1, 3, 4]], x[[0, 1, 3, 4]]
    assert_linear(out, x, inputs, case, impl=f"{impl} ({kind})")


def assert_same_nonfinite(out: torch.Tensor, reference: torch.Tensor, context: str) -> None:
    assert torch.equal(out.isnan(), reference.isnan()), f"{context}: NaN in the wrong place"
    assert torch.equal(out.isinf(), reference.isinf()), f"{context}: infinity in the wrong place"
    assert torch.equal(out[out.isinf()] > 0, reference[reference.isinf()] > 0), f"{context}: infinity of the wrong sign"


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("activations", ("float", "int8"))
def test_results_too_large_for_the_dtype(impl, dtype, activations, forced):
    case = LinearCase(5, 9, 64, INT4, activations, dtype)
    forced(impl, **case.sizes())
    inputs = case.make()
    largest = torch.finfo(dtype).max
    if impl.startswith(("cuda_sm80.mma", "cpu_amx.float")) and dtype == torch.bfloat16:
        largest = 2.0**111  # it sums before it scales: larger x overflow fp32 on the way (documented in quant_linear)
    x = torch.full((5, 64), largest / 2, dtype=dtype)
    codes = torch.full_like(inputs.codes, 0xFF)
    codes[4:] = 0
    scales = torch.full_like(inputs.scales, 0.5 if dtype == torch.float16 else 0.001)
    inputs = weight_of(Canonical(codes, scales), 64, INT4, x)
    out = run(case, inputs)
    if dtype == torch.float16:
        assert bool((out[:, :4] == float("inf")).all() and (out[:, 4:] == float("-inf")).all())
    assert_linear(out, x, inputs, case, impl=impl)


@each_kind
def test_extreme_scales(impl, activations, format, forced):
    """Scales that are zero, subnormal (they count), or the largest there is."""
    case = LinearCase(5, 12, 100, format, activations, dtype_of(impl))
    forced(impl, **case.sizes())
    inputs = case.make()
    for scale in extreme_scales(format):
        changed = inputs.canonical._replace(scales=torch.full_like(inputs.scales, scale))
        # for scales next to the end of fp32: x brings the result back to where fp32 has all its bits
        x = inputs.x * 2.0**60 if format.scales_dtype == torch.float32 or format.name == "mxfp4" else inputs.x
        changed = weight_of(changed, case.K, format, x)
        assert_linear(run(case, changed, x), x, changed, case, impl=f"{impl} (scale {scale})")


def extreme_scales(format: WeightFormat) -> tuple[float, ...]:
    if format.name == "mxfp4":
        return (0, 1, 60, 170)  # bytes: 2^-127, which fp32 holds as a subnormal, 2^-126, ...
    if format.name == "nvfp4":
        return (0, 0x80, 1, 0x87, 0x7E, 0xFE)  # bytes: 0, -0, 2^-9, -7 * 2^-9, 448, -448
    if format.scales_dtype == torch.float32:
        return (0.0, 2.0**-100, -(2.0**-118) if format.name == "nf4" else -(2.0**-130), 1e15)
    return (0.0, 2.0**-24, -(2.0**-15), 65504.0)


@each_kind
def test_a_scale_that_is_no_number_stays_in_its_column(impl, activations, format, forced):
    """pack_weight's contract refuses them; what kernels make of one that slipped through is no number either, there alone."""
    rows = format.kind.block_rows
    case = LinearCase(5, 140 if rows > 1 else 20, 100, format, activations, dtype_of(impl))
    forced(impl, **case.sizes())
    inputs = case.make()
    expected = run(case, inputs)
    bad = torch.arange(case.N) // rows == (case.N - 1) // rows
    for value in {"mxfp4": [255], "nvfp4": [0x7F, 0xFF]}.get(format.name, [float("nan"), float("inf"), float("-inf")]):
        scales = inputs.scales.clone()
        scales[-1, 0] = value
        out = run(case, weight_of(inputs.canonical._replace(scales=scales), case.K, format, inputs.x))
        assert not bool(out[:, bad].isfinite().any()), f"{impl} on {case}: a scale of {value} gave a number"
        assert_same_bits(out[:, ~bad], expected[:, ~bad], f"{impl} on {case}: a scale of {value} in the last row")


# ---- Outliers ----

OUTLIER_ROWS = {
    "one number and zeros": {"scale": 0.0, "spikes": {3: 5.0}},
    "a spike 2^20 times the rest": {"scale": 2.0**-20, "spikes": {40: -1.0}},
    "a spike a block": {"scale": 1.0, "spikes": {5: 90.0, 37: -90.0, 64: 90.0, 127: 90.0, 139: -90.0}},
    "two equal": {"scale": 1.0, "spikes": {5: 90.0, 6: -90.0}},
    "close to the largest float": {"scale": 2.0**100, "spikes": {70: 2.0**126}},
    "close to the smallest row that has any": {"scale": 2.0**-100, "spikes": {70: 2.0**-80}},
    "too small to have any": {"scale": 2.0**-100, "spikes": {70: 2.0**-81}},
    "too small to count": {"scale": 2.0**-120, "spikes": {70: 2.0**-101}},
    "a NaN beside a spike": {"scale": 1.0, "spikes": {5: 90.0, 6: float("nan")}},
    "an infinity": {"scale": 1.0, "spikes": {5: float("inf")}},
}


@pytest.mark.parametrize("format", (WeightFormat("int4", 32, True), INT8, WeightFormat("nvfp4")), ids=str)
@pytest.mark.parametrize("rows", (1, 33))
def test_outliers(impl, format, rows, forced):
    case = LinearCase(rows, 19, 140, format, "int8_outliers")
    forced(impl, **case.sizes())
    generator = torch.Generator().manual_seed(case.seed)
    inputs = case.make()
    for name, row in OUTLIER_ROWS.items():
        x = torch.randn(rows, case.K, generator=generator)
        x[-1] *= row["scale"]
        for k, value in row["spikes"].items():
            x[-1, k] = value
        assert_linear(run(case, inputs, x), x, inputs, case, impl=f"{impl}, {name}")


def test_outliers_mend_what_int8_loses():
    """With spikes in a few blocks of k: an error of the size that int8 makes without them."""
    case = LinearCase(16, 64, 512, INT8)
    generator = torch.Generator().manual_seed(1)
    inputs = case.make()
    x = torch.randn(case.M, case.K, generator=generator)
    spiky = x.clone()
    spiky[:, ::128] *= 50
    w = weight_numbers(inputs, case)

    def error(x: torch.Tensor, activations: str) -> float:
        return float((quant_linear(x, inputs.packed, None, case.N, case.format, activations).double() - x.double() @ w.T).norm())

    assert error(spiky, "int8") > 5 * error(x, "int8")
    assert error(spiky, "int8_outliers") < min(2 * error(x, "int8"), error(spiky, "int8") / 5)


# ---- Fuzz ----


def fuzz_cases(activations: str, formats: list[WeightFormat]):
    return st.builds(
        LinearCase,
        M=st.integers(0, 40),
        N=st.integers(1, 60),
        K=st.one_of(st.integers(1, 300), st.integers(1, 2500)),
        format=st.sampled_from(formats),
        activations=st.just(activations),
        dtype=st.sampled_from(DTYPES),
        bias=st.booleans(),
    )


@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_fuzz(impl, activations, forced):
    formats = [format for format in PAIRS[activations] if format in CUDA_FORMATS or not impl.startswith("cuda")]
    dtype = torch.float16 if dtype_of(impl) == torch.float32 else dtype_of(impl)
    runs = forced(impl, **LinearCase(1, 8, 32, formats[-1], activations, dtype).sizes())  # the pair that most impls take

    # WHY no health check: what an impl refuses (float32, a K that is no multiple of 8) is most of some impls' cases.
    @settings(
        max_examples=15 if "emulated" in impl else 60, deadline=None, print_blob=True, suppress_health_check=[HealthCheck.filter_too_much]
    )  # fmt: skip
    @given(case=fuzz_cases(activations, formats))
    def fuzz(case: LinearCase) -> None:
        note(f"seed {case.seed}")
        assume(runs(**case.sizes()))
        inputs = case.make()
        out = run(case, inputs)
        assert_linear(out, inputs.x, inputs, case, impl=impl)

    fuzz()


# ---- The op as torch sees it ----


@each_mode
@pytest.mark.parametrize("shape", ((3, 40), (40,), (2, 3, 40), (0, 40)), ids=str)
@pytest.mark.parametrize("bias", (False, True))
def test_opcheck(activations, format, shape, bias):
    case = LinearCase(6, 9, 40, format, activations, bias=bias)
    inputs = case.make()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    b = inputs.bias.requires_grad_() if bias else None
    args = (x, inputs.packed, b, case.N, format.code, format.group_size, format.zeros, activation_code(activations, format))
    torch.library.opcheck(torch.ops.taut.quant_linear.default, args)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", EACH_FORMAT, ids=str)
def test_backward(dtype, format):
    case = LinearCase(6, 1050, 40, format, "float", dtype, bias=True)  # more rows of w than one step of the backward takes
    inputs = case.make()
    x, bias = inputs.x.clone().requires_grad_(), inputs.bias.clone().requires_grad_()
    out = quant_linear(x.view(2, 3, 40), inputs.packed, bias, case.N, format, "float")
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    out.backward(grad)
    w = weight_numbers(inputs, case)
    expected = grad.view(6, -1).double() @ w
    magnitude = grad.view(6, -1).double().abs() @ w.abs()
    unit = torch.finfo(dtype).eps / 2
    assert x.grad.dtype == dtype and bias.grad.dtype == dtype
    # w rounds to dtype, the product of each of two steps does, and so does their sum: four roundings of the magnitude
    assert bool(((x.grad.double() - expected).abs() <= 4 * unit * magnitude + 1e-5 * magnitude).all())
    assert bool(((bias.grad.double() - grad.view(6, -1).double().sum(0)).abs() <= 6 * unit * grad.view(6, -1).double().abs().sum(0)).all())


def test_backward_reaches_x_alone():
    case = LinearCase(3, 9, 40, INT4, "int8")
    inputs = case.make()
    x = inputs.x.clone().requires_grad_()
    run(case, inputs, x).sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape


@pytest.mark.parametrize(("activations", "format"), [*EACH_MODE, ("int8", WeightFormat("nvfp4")), ("float", WeightFormat("int3"))], ids=str)
def test_compile_keeps_the_graph_whole(activations, format):
    case = LinearCase(4, 9, 40, format, activations, bias=True)
    inputs = case.make()
    compiled = torch.compile(lambda x: run(case, inputs, x * 1.0) + 1.0, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (4, 2, 3):
        assert_same_bits(compiled(inputs.x[:rows]), run(case, inputs, inputs.x[:rows]) + 1.0, f"{rows} rows, compiled")


# ---- Bad input ----


def good_call() -> dict:
    case = LinearCase(3, 9, 40, INT4, "int8", bias=True)
    inputs = case.make()
    return {"x": inputs.x, "packed": inputs.packed, "bias": inputs.bias, "out_features": 9, "format": INT4, "activations": "int8"}


BAD_CALLS = {
    "x is a scalar": ({"x": torch.tensor(1.0)}, "got a scalar"),
    "x is float64": ({"x": torch.zeros(3, 40, dtype=torch.float64)}, "x must be float32, bfloat16 or float16, got torch.float64"),
    "x is int8": ({"x": torch.zeros(3, 40, dtype=torch.int8)}, "x must be float32"),
    "x is elsewhere": ({"x": torch.zeros(3, 40, device="meta")}, "x is on meta, packed on cpu"),
    "x has another K": ({"x": torch.zeros(3, 72)}, r"packed must be uint8 \["),
    "packed is short": ({"packed": torch.zeros(100, dtype=torch.uint8)}, r"packed must be uint8 \[.*got torch.uint8 \[100\]"),
    "packed is float": ({"packed": torch.zeros(384)}, "packed must be uint8"),
    "packed is elsewhere": ({"packed": torch.zeros(384, dtype=torch.uint8, device="meta")}, "x is on cpu, packed on meta"),
    "N is another": ({"out_features": 17}, "packed must be uint8"),
    "bias is long": ({"bias": torch.zeros(10)}, r"bias must be torch.float32 \[9\]"),
    "bias is 2-D": ({"bias": torch.zeros(1, 9)}, "bias must be"),
    "bias is bfloat16": ({"bias": torch.zeros(9, dtype=torch.bfloat16)}, "bias must be torch.float32"),
    "bias is elsewhere": ({"bias": torch.zeros(9, device="meta")}, "x is on cpu, bias on meta"),
    "unknown activations": ({"activations": "int4"}, "unknown activations 'int4'; accepted: auto, float, int8, int8_row, fp8_row"),
    "activations of another format": ({"activations": "fp8_row"}, "int4 weights cannot be multiplied with 'fp8_row' activations"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD_CALLS)
def test_bad_call_is_a_value_error(what):
    change, message = BAD_CALLS[what]
    with pytest.raises(ValueError, match=message):
        quant_linear(**good_call() | change)


INT8_CALL = {"format": 8, "group_size": 0, "packed": torch.zeros(INT8.layout_bytes(9, 40), dtype=torch.uint8)}
RAW_BAD_CALLS = {
    "x is a scalar": ({"x": torch.tensor(1.0)}, "got a scalar"),
    "x is float64": ({"x": torch.zeros(3, 40, dtype=torch.float64)}, "x must be float32, bfloat16 or float16"),
    "x has another K": ({"x": torch.zeros(3, 72)}, "is x's last dimension"),
    "K is 0": ({"x": torch.zeros(3, 0)}, "K >= 1"),
    "packed is short": ({"packed": torch.zeros(100, dtype=torch.uint8)}, "packed holds 100 bytes"),
    "packed is float": ({"packed": torch.zeros(384)}, "packed must be a contiguous 1-D uint8"),
    "packed is 2-D": ({"packed": torch.zeros(2, 192, dtype=torch.uint8)}, "packed must be a contiguous 1-D uint8"),
    "packed has gaps": ({"packed": torch.zeros(1000, dtype=torch.uint8)[::2]}, "packed must be a contiguous 1-D uint8"),
    "N is negative": ({"out_features": -9}, "N >= 0"),
    "N is huge": ({"out_features": 1 << 40}, "under 2\\^31"),
    "bias is long": ({"bias": torch.zeros(10)}, r"bias must be \[9\]"),
    "bias is bfloat16": ({"bias": torch.zeros(9, dtype=torch.bfloat16)}, "bias must have the dtype of x"),
    "unknown format": ({"format": 11}, "format must be 1"),
    "unknown group": ({"group_size": 48}, "group_size must be 32, 64, 128 or 0"),
    "group of nvfp4": ({"format": 7}, "group_size must be 16 for nvfp4"),
    "int8 with zeros": ({"format": 8, "zeros": True}, "zeros are for int2, int3 and int4 only"),
    "unknown activations": ({"activations": 5}, "weights of up to 4 bits take activations 0"),
    "int8_outliers with fp8": (INT8_CALL | {"format": 9, "activations": 4}, "fp8_e4m3 weights take activations 0"),
    "int8_row with int4": ({"activations": 2}, "weights of up to 4 bits take activations 0"),
    "int8 with fp8_block": (
        {"format": 10, "group_size": 128, "packed": torch.zeros(WeightFormat("fp8_block").layout_bytes(9, 40), dtype=torch.uint8)},
        "fp8_block weights take activations 0",
    ),
    "fp8_row with int8": (INT8_CALL | {"activations": 3}, "int8 weights take activations 0"),
    "int8 with fp8": (INT8_CALL | {"format": 9}, "fp8_e4m3 weights take activations 0"),
}  # fmt: skip


@pytest.mark.parametrize("what", RAW_BAD_CALLS)
def test_bad_raw_call_is_an_error_and_no_crash(what):
    change, message = RAW_BAD_CALLS[what]
    call = good_call() | {"format": 4, "group_size": 32, "zeros": False, "activations": 1} | change
    with pytest.raises(RuntimeError, match=message):
        torch.ops.taut.quant_linear(*(call[key] for key in RAW_ORDER))


RAW_ORDER = ("x", "packed", "bias", "out_features", "format", "group_size", "zeros", "activations")


def test_cost_counts_what_a_call_moves():
    found = linear_op.cost(4, 16, 64, INT4, element_bytes=2)
    assert found == {"flops": 2 * 4 * 16 * 64, "bytes": INT4.layout_bytes(16, 64) + 4 * (64 + 16) * 2}
