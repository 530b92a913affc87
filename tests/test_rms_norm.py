"""rms_norm, every impl, against the float64 reference."""

from __future__ import annotations

import pytest
import torch

from cases import DTYPES
from checks import ROUNDING, assert_same_bits
from taut.ops import rms_norm as op
from taut.ops.rms_norm import rms_norm

OP = "rms_norm"
SHAPES = ((1, 1), (3, 7), (5, 8), (2, 33), (4, 576), (0, 16), (70, 1000), (2, 3, 40), (101,))


def make(shape, dtype, weight_dtype=torch.float32):
    generator = torch.Generator().manual_seed(len(shape) * 1000 + shape[-1])
    x, weight, added = (torch.randn(size, generator=generator) for size in (shape, shape[-1:], shape))
    return (x * 3).to(dtype), weight.to(weight_dtype), added.to(dtype)


def assert_close(out, expected, size, dtype, context):
    assert out.dtype == dtype and out.shape == expected.shape
    relative, tiny = ROUNDING[dtype]
    # the sum's error halves under the root; then the root, the quotient, two products, offset, residual: half an ulp each
    bound = 2.0**-21 * size
    bound = bound + (relative * (expected.abs() + bound)).clamp(min=tiny)
    assert bool(((out.double() - expected).abs() <= bound).all()), context


@pytest.mark.parametrize("residual", (False, True))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(impl, shape, dtype, residual, forced):
    forced(impl)
    for weight_dtype, offset in ((torch.float32, 0.0), (dtype, 1.0)):
        x, weight, added = make(shape, dtype, weight_dtype)
        added = added if residual else None
        before = x.clone()
        block = torch.full(shape, float("nan"), dtype=dtype)
        del block
        out = rms_norm(x, weight, 1e-5, offset, added)
        assert_same_bits(out, rms_norm(x, weight, 1e-5, offset, added), f"{impl}, twice")
        assert_same_bits(x, before, f"{impl}: x was written to")
        normed = op.reference(x, weight, 1e-5, offset)
        size = normed.abs() + (added.double().abs() if residual else 0.0) + 1e-30
        assert_close(out, normed if added is None else normed + added.double(), size, dtype, f"{impl} {shape} {dtype} {weight_dtype}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_impls_agree_bit_for_bit(impl, dtype, forced):
    x, weight, added = make((9, 345), dtype)
    expected = rms_norm(x, weight, 1e-6, 0.0, added)
    forced(impl)
    assert_same_bits(rms_norm(x, weight, 1e-6, 0.0, added), expected, impl)


def test_strided(impl, forced):
    forced(impl)
    x, weight, added = make((6, 40), torch.float32)
    expected = rms_norm(x, weight, 1e-6, 0.0, added)
    wide, columns = torch.full((6, 100), float("nan")), torch.full((6, 80), float("nan"))
    wide[:, 30:70], columns[:, ::2] = x, x
    gaps = torch.full((80,), float("nan"))
    gaps[::2] = weight
    for view in (wide[:, 30:70], columns[:, ::2], x.t().contiguous().t()):
        assert_same_bits(rms_norm(view, gaps[::2], 1e-6, 0.0, added.t().contiguous().t()), expected, impl)


def test_rows_and_threads_change_nothing(impl, forced, threads):
    forced(impl)
    x, weight, added = make((300, 1000), torch.bfloat16)
    threads(1)
    whole = rms_norm(x, weight, 1e-6, 0.0, added)
    for count in (2, 3):
        threads(count)
        assert_same_bits(rms_norm(x, weight, 1e-6, 0.0, added), whole, f"{impl}: {count} threads")
    assert_same_bits(rms_norm(x[7:9], weight, 1e-6, 0.0, added[7:9]), whole[7:9], f"{impl}: two rows")


def test_special_values(impl, forced):
    forced(impl)
    x, weight, _ = make((6, 40), torch.float32)
    x[0], x[1, 3], x[2, 39], x[3] = 0, float("nan"), float("inf"), 1e-30
    x[4] *= 1e25  # the sum of squares overflows, as in torch
    out = rms_norm(x, weight, 1e-6)
    assert bool((out[0] == 0).all() and out[1].isnan().all() and out[3].isfinite().all() and (out[4] == 0).all())
    assert bool(out[2, 39].isnan() and (out[2, :39] == 0).all())
    assert bool(out[5].isfinite().all())


@pytest.mark.parametrize("residual", (False, True))
def test_opcheck(residual):
    x, weight, added = make((3, 40), torch.float32)
    torch.library.opcheck(torch.ops.taut.rms_norm.default, (x, weight, 1e-6, 0.0, added if residual else None))


def test_compile_keeps_the_graph_whole():
    x, weight, added = make((3, 40), torch.float32)
    compiled = torch.compile(lambda x: rms_norm(x * 1.0, weight, 1e-6, 0.0, added) + 1.0, fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(x), rms_norm(x, weight, 1e-6, 0.0, added) + 1.0, "compiled")


def test_training_is_refused():
    x, weight, _ = make((3, 40), torch.float32)
    with pytest.raises(NotImplementedError, match="rms_norm has no backward"):
        rms_norm(x.requires_grad_(), weight).sum().backward()


BAD_CALLS = {
    "x is a scalar": ({"x": torch.tensor(1.0)}, "got a scalar"),
    "x is int": ({"x": torch.zeros(3, 40, dtype=torch.int32)}, "x must be float32, bfloat16 or float16"),
    "x is elsewhere": ({"x": torch.zeros(3, 40, device="meta")}, "x is on meta"),
    "weight is short": ({"weight": torch.ones(39)}, r"weight must be .*\[40\]"),
    "weight is float16": ({"weight": torch.ones(40, dtype=torch.float16)}, "weight must be"),
    "residual is short": ({"residual": torch.ones(40)}, "residual must be"),
    "residual is bfloat16": ({"residual": torch.ones(3, 40, dtype=torch.bfloat16)}, "residual must be"),
}


@pytest.mark.parametrize("what", BAD_CALLS)
def test_bad_call_is_an_error(what):
    change, message = BAD_CALLS[what]
    call = {"x": torch.zeros(3, 40), "weight": torch.ones(40), "eps": 1e-6, "offset": 0.0, "residual": None} | change
    with pytest.raises(ValueError, match=message):
        rms_norm(**call)
    if call["x"].device.type == "cpu":
        with pytest.raises(RuntimeError, match="rms_norm: "):
            torch.ops.taut.rms_norm(*call.values())


def test_cost():
    assert op.cost(2, 8, True) == {"flops": 96, "bytes": 192}
