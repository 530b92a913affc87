"""fused_linear: what it adds to quant_linear, in every impl of that op."""

from __future__ import annotations

import pytest
import torch

import taut
from cases import DTYPES, EACH_MODE, FP8, INT4, INT4_ZEROS, INT8, LinearCase, covering_set, pack
from checks import ROUNDING, assert_same_bits, rounds_weights
from taut.formats import activation_code
from taut.ops import fused_linear as op
from taut.ops.fused_linear import PROLOGUES, fused_linear
from taut.ops.quant_linear import quant_linear
from taut.ops.quantize_weight import reference as weight_reference
from taut.ops.rms_norm import rms_norm

OP = "quant_linear"
EPS = 1e-5
CASES = [
    (prologue, LinearCase(m, n, k, format, activations, dtype, bias), residual)
    for prologue, m, n, k, (activations, format), dtype, bias, residual in covering_set(
        (
            tuple(PROLOGUES), (0, 1, 3, 4, 7, 21), (7, 16, 100), (31, 64, 75, 576),
            (*EACH_MODE, ("float", INT8), ("float", FP8)), DTYPES, (False, True), (False, True),
        )
    )
]  # fmt: skip


def inputs_of(prologue: str, case: LinearCase, residual: bool):
    made = case.make()
    generator = torch.Generator().manual_seed(case.seed + 1)
    glu = prologue.endswith("glu")
    x = torch.cat((made.x, torch.randn(case.M, case.K, generator=generator).to(case.dtype)), 1) if glu else made.x
    extra = {
        "prologue": prologue, "norm_eps": EPS, "norm_offset": 1.0,
        "norm_weight": torch.randn(case.K, generator=generator) if prologue == "rms_norm" else None,
        "residual": torch.randn(case.M, case.N, generator=generator).to(case.dtype) if residual else None,
    }  # fmt: skip
    return made, x, extra


def run(case: LinearCase, made, x, **extra) -> torch.Tensor:
    return fused_linear(x, made.packed, made.bias, case.N, case.K, case.format, case.activations, **extra)


@pytest.mark.parametrize(("prologue", "case", "residual"), CASES, ids=str)
def test_matches_reference(impl, prologue, case, residual, forced):
    """The prologue against float64, with each element of the matmul's input off by a few roundings of fp32."""
    refuse_cuda(impl)
    forced(impl, **case.sizes())
    made, x, extra = inputs_of(prologue, case, residual)
    before = [t.clone() for t in (x, made.packed, extra["residual"]) if t is not None]
    block = torch.full((case.M, case.N), float("nan"), dtype=case.dtype)
    del block
    out = run(case, made, x, **extra)
    assert_same_bits(out, run(case, made, x, **extra), f"{impl} on {case}, twice")
    for old, new in zip(before, (t for t in (x, made.packed, extra["residual"]) if t is not None), strict=True):
        assert_same_bits(old, new, f"{impl}: an input was written to")
    w = weight_reference(*made.canonical, case.K, case.format, case.activations)
    values = op.prologue_reference(x, prologue, extra["norm_weight"], EPS, 1.0)
    expected = op.reference(x, w, made.bias, extra["residual"], case.activations, prologue, extra["norm_weight"], EPS, 1.0)
    magnitude = values.abs() @ w.abs().T
    # 8-bit roundings of x fall the other way here and there, where the prologue differs in its last bit: by one step each
    step = {"float": 2.0**-20, "int8": 2.0**-8, "int8_outliers": 2.0**-8, "int8_row": 2.0**-7, "fp8_row": 2.0**-4}[case.activations]
    if case.activations != "float":
        largest = values.abs().amax(1, keepdim=True) if case.M else values[:, :1]
        flips = step * largest * w.abs().amax(1)[None, :] if case.activations != "fp8_row" else step * values.abs() @ w.abs().T
    elif impl.startswith(("cpu_amx.float", "cpu_avx512bf16.float")):  # they round the prologue's result to bfloat16, and weights
        flips = ROUNDING[torch.bfloat16][0] * (2 if rounds_weights(impl, case) else 1) * magnitude
    else:
        flips = 0.0
    bound = 2.0**-20 * magnitude + flips + 2.0**-22 * expected.abs() + 1e-30
    relative, tiny = ROUNDING[case.dtype]
    bound = bound + (relative * (expected.abs() + bound)).clamp(min=tiny)
    assert out.dtype == case.dtype and out.shape == expected.shape
    assert bool(((out.double() - expected).abs() <= bound).all()), f"{impl} on {prologue} {case}, seed {case.seed}"


@pytest.mark.parametrize("rows", (1, 6, 33))
@pytest.mark.parametrize(("activations", "format"), EACH_MODE, ids=str)
def test_same_bits_as_the_ops_one_by_one(impl, activations, format, rows, forced):
    """In float32 the prologue rounds nothing that the ops by themselves would not: fused and unfused agree bit for bit."""
    refuse_cuda(impl)
    case = LinearCase(rows, 24, 96, format, activations, bias=True)
    forced(impl, **case.sizes())
    made, x, extra = inputs_of("rms_norm", case, False)
    alone = quant_linear(rms_norm(x, extra["norm_weight"], EPS, 1.0), made.packed, made.bias, case.N, case.format, activations)
    assert_same_bits(run(case, made, x, **extra), alone, f"{impl} on {case}")
    plain = run(case, made, made.x, prologue="none")
    assert_same_bits(plain, quant_linear(made.x, made.packed, made.bias, case.N, case.format, activations), f"{impl} on {case}")


@pytest.mark.parametrize("prologue", PROLOGUES)
def test_every_isa_gives_the_prologue_the_same_bits(prologue):
    """Seen through int8 activations of a weight that is a unit matrix: one code apart would be a visible step."""
    k = 96
    codes = torch.full((k, k // 2), 0x88, dtype=torch.uint8)
    for i in range(k):
        codes[i, i // 2] = 0x89 if i % 2 == 0 else 0x98
    scales = torch.ones(k, k // 32, dtype=torch.float16)
    packed = pack(codes, scales, None, None, k, INT4)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, k * (2 if prologue.endswith("glu") else 1), generator=generator) * 3
    weight = torch.randn(k, generator=generator) if prologue == "rms_norm" else None
    results = {}
    for impl in taut.list_impls("cpu")["quant_linear"]:
        with taut.force_impl("quant_linear", impl):
            if next(v for v in taut.explain("quant_linear", M=50, N=k, K=k, activations=1) if v.impl == impl).chosen:
                results[impl] = fused_linear(x, packed, None, k, k, INT4, "int8", prologue, weight, EPS)
    first = next(iter(results))
    for impl, result in results.items():
        # the sums have one term each, but the ISAs multiply unit, scale and multiple in different orders
        assert torch.allclose(result, results[first], rtol=4e-7, atol=0), f"{impl} and {first}"


@pytest.mark.parametrize("prologue", PROLOGUES)
def test_rows_and_threads_change_nothing(impl, prologue, forced, threads):
    refuse_cuda(impl)
    case = LinearCase(13, 100, 1536, INT4, "float" if "float" in impl else "int8", torch.bfloat16, bias=True)
    forced(impl, **case.sizes())
    made, x, extra = inputs_of(prologue, case, True)
    threads(1)
    whole = run(case, made, x, **extra)
    for count in (2, 3):
        threads(count)
        assert_same_bits(run(case, made, x, **extra), whole, f"{impl}: {count} threads")
    for begin, end in ((0, 1), (3, 7), (12, 13)):
        part = run(case, made, x[begin:end], **extra | {"residual": extra["residual"][begin:end]})
        assert_same_bits(part, whole[begin:end], f"{impl}: rows {begin} to {end}")


def test_strided_and_leading_dimensions(impl, forced):
    refuse_cuda(impl)
    case = LinearCase(6, 17, 75, INT4_ZEROS, "float" if "float" in impl else "int8", bias=True)
    forced(impl, **case.sizes())
    made, x, extra = inputs_of("silu_glu", case, True)
    expected = run(case, made, x, **extra)
    wide = torch.full((6, 400), float("nan"))
    wide[:, 40:190] = x
    spread = torch.full((12, 17), float("nan"))
    spread[::2] = extra["residual"]
    assert_same_bits(run(case, made, wide[:, 40:190], **extra | {"residual": spread[::2]}), expected, "strided")
    shaped = run(case, made, x.view(2, 3, 150), **extra | {"residual": extra["residual"].view(2, 3, 17)})
    assert_same_bits(shaped, expected.view(2, 3, 17), "3-D")


@pytest.mark.parametrize("value", (float("nan"), float("inf"), float("-inf"), 1e38, -1e38, 3e-42, 0.0, 90.0, -90.0))
@pytest.mark.parametrize("prologue", ("silu_glu", "gelu_tanh_glu", "gelu_glu"))
def test_gates_of_every_size(impl, prologue, value, forced):
    refuse_cuda(impl)
    case = LinearCase(2, 8, 32, INT4, "float")
    forced(impl, **case.sizes())
    made, x, extra = inputs_of(prologue, case, False)
    x[0, 5] = value
    out = run(case, made, x, **extra)
    w = weight_reference(*made.canonical, case.K, case.format, case.activations)
    expected = op.reference(x, w, None, None, "float", prologue).float()
    assert torch.equal(out.isnan(), expected.isnan())
    assert bool(out[1].isfinite().all())
    finite = expected.isfinite()
    assert torch.allclose(out[finite], expected[finite], rtol=1e-4, atol=1e-4)


def refuse_cuda(impl: str) -> None:
    if impl.startswith("cuda"):
        pytest.skip("fused_linear runs on the CPU only")


# ---- The op as torch sees it ----


def raw(prologue: str, residual: bool = True) -> tuple:
    case = LinearCase(3, 9, 40, INT4, "int8", bias=True)
    made, x, extra = inputs_of(prologue, case, residual)
    return (
        x, made.packed, made.bias, 9, 40, INT4.code, INT4.group_size, False, activation_code("int8", INT4),
        PROLOGUES[prologue], extra["norm_weight"], EPS, 1.0, extra["residual"],
    )  # fmt: skip


@pytest.mark.parametrize(("prologue", "residual"), [(prologue, residual) for prologue in PROLOGUES for residual in (False, True)])
def test_opcheck(prologue, residual):
    torch.library.opcheck(torch.ops.taut.fused_linear.default, raw(prologue, residual))


def test_compile_keeps_the_graph_whole():
    case = LinearCase(4, 9, 40, INT4, "int8", bias=True)
    made, x, extra = inputs_of("rms_norm", case, True)
    compiled = torch.compile(lambda x, r: run(case, made, x * 1.0, **extra | {"residual": r}) + 1.0, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_same_bits(compiled(x, extra["residual"]), run(case, made, x, **extra) + 1.0, "compiled")


def test_training_is_refused():
    arguments = raw("rms_norm")
    out = torch.ops.taut.fused_linear(arguments[0].requires_grad_(), *arguments[1:])
    with pytest.raises(NotImplementedError, match="fused_linear has no backward"):
        out.sum().backward()


def good_call() -> dict:
    case = LinearCase(3, 9, 40, INT4, "int8", bias=True)
    made, x, extra = inputs_of("rms_norm", case, True)
    return {"x": x, "packed": made.packed, "bias": made.bias, "out_features": 9, "in_features": 40, "format": INT4} | extra


BAD_CALLS = {
    "x is a scalar": ({"x": torch.tensor(1.0)}, "got a scalar"),
    "x is float64": ({"x": torch.zeros(3, 40, dtype=torch.float64)}, "x must be float32, bfloat16 or float16"),
    "x is elsewhere": ({"x": torch.zeros(3, 40, device="meta")}, "x is on meta"),
    "x is wide": ({"x": torch.zeros(3, 80)}, r"x must be \[..., 40\] for prologue 'rms_norm'"),
    "x of a glu is narrow": ({"prologue": "silu_glu", "norm_weight": None}, r"x must be \[..., 80\] for prologue 'silu_glu'"),
    "unknown prologue": ({"prologue": "swish"}, "unknown prologue 'swish'; accepted: none, rms_norm, silu_glu"),
    "packed is short": ({"packed": torch.zeros(100, dtype=torch.uint8)}, "packed must be uint8"),
    "bias is long": ({"bias": torch.zeros(10)}, "bias must be"),
    "no norm_weight": ({"norm_weight": None}, "'rms_norm' needs norm_weight"),
    "a norm_weight too many": ({"prologue": "none"}, "'none' takes no norm_weight"),
    "norm_weight is long": ({"norm_weight": torch.ones(41)}, r"norm_weight must be .* \[40\]"),
    "norm_weight is bfloat16": ({"norm_weight": torch.ones(40, dtype=torch.bfloat16)}, "norm_weight must be torch.float32 or float32"),
    "residual has another shape": ({"residual": torch.zeros(9)}, r"residual must be torch.float32 \[3, 9\]"),
    "residual is bfloat16": ({"residual": torch.zeros(3, 9, dtype=torch.bfloat16)}, "residual must be torch.float32"),
    "residual is elsewhere": ({"residual": torch.zeros(3, 9, device="meta")}, "residual on meta"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD_CALLS)
def test_bad_call_is_a_value_error(what):
    change, message = BAD_CALLS[what]
    with pytest.raises(ValueError, match=message):
        fused_linear(**good_call() | change)


RAW_BAD_CALLS = {
    "x is a scalar": ({0: torch.tensor(1.0)}, "got a scalar"),
    "x is wide": ({0: torch.zeros(3, 80)}, "x must be"),
    "K is 0": ({0: torch.zeros(3, 0), 4: 0}, "K >= 1"),
    "packed is short": ({1: torch.zeros(100, dtype=torch.uint8)}, "packed holds 100 bytes"),
    "bias is bfloat16": ({2: torch.zeros(9, dtype=torch.bfloat16)}, "bias must have the dtype of x"),
    "unknown prologue": ({9: 5}, "prologue must be 0"),
    "no norm_weight": ({10: None}, "needs norm_weight"),
    "a norm_weight too many": ({9: 0}, "goes with prologue 1"),
    "norm_weight is long": ({10: torch.ones(41)}, r"norm_weight must be \[40\]"),
    "norm_weight is float16": ({10: torch.ones(40, dtype=torch.float16)}, "norm_weight must have the dtype of x or be float32"),
    "residual has another shape": ({13: torch.zeros(1, 9)}, "residual must have the shape of the output"),
    "residual is float16": ({13: torch.zeros(3, 9, dtype=torch.float16)}, "residual must have the dtype of x"),
}  # fmt: skip


@pytest.mark.parametrize("what", RAW_BAD_CALLS)
def test_bad_raw_call_is_an_error_and_no_crash(what):
    change, message = RAW_BAD_CALLS[what]
    arguments = list(raw("rms_norm"))
    for index, value in change.items():
        arguments[index] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.taut.fused_linear(*arguments)


def test_cost_counts_what_a_call_moves():
    plain, glu = op.cost(4, 16, 64, INT4), op.cost(4, 16, 64, INT4, "silu_glu")
    assert plain["bytes"] + 4 * 64 * 4 == glu["bytes"] and glu["flops"] > plain["flops"] == 2 * 4 * 16 * 64
