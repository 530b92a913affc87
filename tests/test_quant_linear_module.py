"""QuantLinear as a module: what torch does to any nn.Linear has to work on it too."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import taut
from taut.ops import quant_linear as op

FORMATS = [taut.WeightFormat("int4", 32), taut.WeightFormat("int4", 128, True), taut.WeightFormat("int8", 0), taut.WeightFormat("int8", 64)]


def make(
    format: taut.WeightFormat, n: int = 24, k: int = 75, bias: bool = True, activations: str = "int8", seed: int = 0
) -> taut.QuantLinear:
    torch.manual_seed(seed)
    return taut.QuantLinear.from_float(nn.Linear(k, n, bias), format, activations)


def same_state(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("activations", ["int8", "float"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_forward_is_the_reference(format, activations, dtype):
    module = make(format, activations=activations).to(dtype)
    x = torch.randn(2, 3, 75).to(dtype)
    out = module(x)
    expected = op.reference(x.reshape(6, 75), module.dequantize(), module.bias, activations).reshape(2, 3, 24)
    assert out.dtype == dtype and out.shape == (2, 3, 24)
    error = (out.double() - expected).abs().max() / expected.abs().max()
    assert error < {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_state_dict_is_canonical_and_loads_strictly(format):
    module, other = make(format), make(format, seed=1)
    state = module.state_dict()
    assert list(state) == ["bias", "qweight", "scales", "zeros"] if format.zeros else ["bias", "qweight", "scales"]
    assert state["qweight"].shape == format.codes_shape(24, 75) and state["scales"].dtype == torch.float16
    assert not same_state(other.state_dict(), state)
    other.load_state_dict(state, strict=True)
    assert same_state(other.state_dict(), state)
    x = torch.randn(5, 75)
    assert torch.equal(other(x), module(x))


def test_a_module_built_on_the_meta_device_is_filled_by_load_state_dict():
    module = make(FORMATS[1])
    with torch.device("meta"):
        empty = taut.QuantLinear(75, 24, format=FORMATS[1])
    assert all(p.device.type == "meta" for p in empty.parameters())
    with pytest.raises(ValueError, match="holds no weight yet"):
        empty(torch.randn(1, 75))
    empty.load_state_dict(module.state_dict(), strict=True, assign=True)
    x = torch.randn(3, 75)
    assert torch.equal(empty(x), module(x)) and same_state(empty.state_dict(), module.state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("scales"), "scales"),
        (lambda s: s.update(scales=s["scales"][:12]), "scales must be"),
        (lambda s: s.update(qweight=s["qweight"][:12]), "qweight must be"),
        (lambda s: s.update(qweight=s["qweight"].to(torch.int8)), "torch.uint8"),
        (lambda s: s.update(scales=s["scales"].float()), "torch.float16"),
        (lambda s: s["scales"].fill_(torch.nan), "finite"),
        (lambda s: s["zeros"].fill_(16), "zeros must be 0..15"),
        (lambda s: s.update(weight=torch.randn(24, 75)), "weight"),
    ],
    ids=["no scales", "few scales", "few rows", "codes dtype", "scales dtype", "NaN scale", "zero of 16", "a float weight"],
)
def test_a_bad_state_dict_is_refused_and_changes_nothing(change, message):
    module = make(FORMATS[1])
    before = module.state_dict()
    state = copy.deepcopy(before)
    change(state)
    with pytest.raises(RuntimeError, match=message):
        module.load_state_dict(state, strict=True)
    assert torch.equal(module.state_dict()["qweight"], before["qweight"])


def test_an_int8_code_of_minus_128_is_refused():
    module = make(FORMATS[2])
    state = module.state_dict()
    state["qweight"][3, 4] = -128
    with pytest.raises(RuntimeError, match="-127..127"):
        module.load_state_dict(state)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_deepcopy_and_pickle(format):
    module, x = make(format), torch.randn(2, 75)
    for clone in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(clone(x), module(x)) and same_state(clone.state_dict(), module.state_dict())
        assert clone.packed.data_ptr() != module.packed.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("finalized", [True, False])
def test_a_cast_changes_the_bias_and_nothing_that_is_stored(dtype, finalized):
    module = make(FORMATS[1])
    before = module.state_dict()
    if not finalized:
        empty = taut.QuantLinear(75, 24, format=FORMATS[1])
        for name in ("qweight", "scales", "zeros"):
            setattr(empty, name, nn.Parameter(before[name], requires_grad=False))
        module = empty
    module.to(dtype)
    after = module.state_dict()
    assert after["bias"].dtype == dtype and module.weight.dtype == dtype
    assert all(
        torch.equal(after[name], before[name]) and after[name].dtype == before[name].dtype for name in ("qweight", "scales", "zeros")
    )
    assert module.half().bias.dtype == torch.float16 and module.float().weight.dtype == torch.float32


def test_train_and_eval_and_requires_grad():
    module = make(FORMATS[0])
    assert module.train().training and not module.eval().training
    assert [name for name, p in module.named_parameters() if p.requires_grad] == ["bias"]
    assert isinstance(module, nn.Linear) and "int4 group 32" in repr(module)


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_is_that_of_the_dequantized_layer(format, dtype):
    module = make(format, n=1030, k=40).to(dtype)  # more rows than the backward dequantizes at a time
    x, grad = torch.randn(3, 2, 40, dtype=dtype, requires_grad=True), torch.randn(3, 2, 1030, dtype=dtype)
    module(x).backward(grad)
    expected = grad.double() @ module.dequantize().double()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert ((x.grad.double() - expected).abs().max() / expected.abs().max()) < tolerance
    assert ((module.bias.grad.double() - grad.double().sum((0, 1))).abs().max()) < (1e-5 if dtype == torch.float32 else 0.1)
    assert module.packed.grad is None


def test_weight_is_the_dequantized_matrix_and_cannot_be_written():
    module = make(FORMATS[0])
    weight = module.weight
    assert weight.shape == (24, 75) and weight.dtype == torch.float32 and weight.device.type == "cpu"
    assert torch.equal(weight + 0, module.dequantize()) and torch.equal(weight.data, module.dequantize())
    assert type(weight.float().sum()) is torch.Tensor and torch.equal(copy.deepcopy(weight), module.dequantize())
    x = torch.randn(2, 75)
    assert torch.equal(nn.functional.linear(x, weight), nn.functional.linear(x, module.dequantize()))
    for write in (lambda: weight.add_(1), lambda: weight.copy_(torch.zeros(24, 75)), lambda: setattr(weight, "data", torch.zeros(24, 75))):
        with pytest.raises(ValueError, match="read-only"):
            write()


def test_opcheck():
    for format in FORMATS:
        module = make(format, n=16, k=33)
        for bias in (None, module.bias.detach().requires_grad_()):
            x = torch.randn(2, 33, requires_grad=True)
            torch.library.opcheck(torch.ops.taut.quant_linear.default, (x, module.packed, bias, *module._call))


@pytest.mark.parametrize("shape", [(0, 75), (2, 0, 75), (75,)])
def test_empty_and_one_dimensional_x(shape):
    assert make(FORMATS[0])(torch.randn(shape)).shape == (*shape[:-1], 24)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.randn(2, 74), r"\[..., 75\]"),
        (torch.tensor(1.0), r"\[..., 75\]"),
        (torch.randn(2, 75).double(), "float64"),
        (torch.zeros(2, 75, dtype=torch.int64), "int64"),
        (torch.empty(2, 75, device="meta"), "on the CPU"),
    ],
)
def test_bad_input_is_refused(x, message):
    with pytest.raises(ValueError, match=message):
        make(FORMATS[0])(x)


def test_moved_to_the_meta_device_it_still_gives_shapes():
    assert make(FORMATS[0]).to("meta")(torch.empty(2, 75, device="meta")).shape == (2, 24)
