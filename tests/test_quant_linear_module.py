"""QuantLinear: the module around the op. States, copies, casts, devices, gradients, compile and export, refusals."""

from __future__ import annotations

import copy
import io
import pickle
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import taut
from checks import assert_same_bits
from emulator import build
from emulator.emulated import emulated
from taut import QuantLinear, WeightFormat, _native
from taut.formats import resolve_activations
from taut.ops import quant_linear as op
from taut.ops import quantize_weight as weight_op

N, K = 40, 75
FORMATS = [
    WeightFormat("int4", 32),
    WeightFormat("int4", 64, True),
    WeightFormat("int4", 0),
    WeightFormat("int8", 0),
    WeightFormat("int8", 32),
    WeightFormat("fp8_e4m3", 64),
    WeightFormat("ternary"),
    WeightFormat("int3", 32, True),
    WeightFormat("nf4"),
    WeightFormat("mxfp4"),
    WeightFormat("nvfp4"),
    WeightFormat("fp8_block"),
]
CUDA_FORMATS = [format for format in FORMATS if format.kind.cuda]


def make(
    format: WeightFormat = FORMATS[0], activations: str = "auto", bias: bool = True, dtype: torch.dtype = torch.float32
) -> QuantLinear:
    torch.manual_seed(0)
    return QuantLinear.from_float(nn.Linear(K, N, bias=bias).to(dtype), format, activations)


def inputs(dtype: torch.dtype = torch.float32, *shape: int) -> torch.Tensor:
    return torch.randn(*(shape or (5,)), K, generator=torch.Generator().manual_seed(1)).to(dtype)


def assert_same_module(a: QuantLinear, b: QuantLinear) -> None:
    assert (a.format, a.activations, a.in_features, a.out_features) == (b.format, b.activations, b.in_features, b.out_features)
    assert torch.equal(a.packed, b.packed)
    assert torch.equal(a(inputs()), b(inputs()))


def assert_same_state(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert set(a) == set(b)
    for key, value in a.items():
        assert_same_bits(value.cpu(), b[key].cpu(), key)


@pytest.mark.parametrize(
    ("format", "activations"), [(format, mode) for format in FORMATS for mode in ("auto", *format.kind.activations)], ids=str
)
def test_forward_is_the_op(format, activations):
    module = make(format, activations)
    x = inputs(torch.float32, 2, 3)
    out = module(x)
    assert out.shape == (2, 3, N)
    assert out.dtype == torch.float32
    assert torch.equal(out, op.quant_linear(x, module.packed, module.bias, N, format, activations))
    mode = resolve_activations(activations, format, "cpu")
    w = weight_op.reference(*module.canonical(), K, format, mode)
    exact = op.reference(x.reshape(-1, K), w, module.bias.detach(), mode)
    torch.testing.assert_close(out.reshape(-1, N).double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_state_dict_is_canonical_and_loads_bit_exactly(format):
    module = make(format)
    state = module.state_dict()
    extra = {"zeros": format.zeros, "global_scale": format.has_global_scale}
    assert set(state) == {"qweight", "scales", "bias"} | {name for name, has in extra.items() if has}
    assert "weight" not in state
    assert (state["qweight"].dtype, tuple(state["qweight"].shape)) == (format.codes_dtype, format.codes_shape(N, K))
    assert (state["scales"].dtype, tuple(state["scales"].shape)) == (format.scales_dtype, format.scales_shape(N, K))
    other = QuantLinear(K, N, format=format)
    assert not other.load_state_dict(state, strict=True).missing_keys
    assert_same_module(module, other)
    assert_same_state(other.state_dict(), state)


def test_meta_module_is_filled_by_assign():
    module = make(FORMATS[1])
    with torch.device("meta"):
        empty = QuantLinear(K, N, format=FORMATS[1])
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    with pytest.raises(ValueError, match="meta device and holds no weight"):
        empty(inputs())
    empty.load_state_dict(module.state_dict(), assign=True)
    assert_same_module(module, empty)
    assert empty.weight.device.type == "cpu"


def test_load_reports_what_is_missing_or_wrong():
    state = make(FORMATS[1]).state_dict()
    fresh = lambda: QuantLinear(K, N, format=FORMATS[1])  # noqa: E731
    for key in ("qweight", "scales", "zeros"):
        with pytest.raises(RuntimeError, match=rf'Missing key.*"{key}"'):
            fresh().load_state_dict({name: value for name, value in state.items() if name != key})
        found = fresh().load_state_dict({name: value for name, value in state.items() if name != key}, strict=False)
        assert found.missing_keys == [key]
    for key, value, message in (
        ("qweight", state["qweight"][:-8], r"qweight must be \[40, 38\], got \[32, 38\]"),
        ("qweight", state["qweight"].to(torch.int16), "codes of a int4"),
        ("scales", state["scales"][:, :1], r"scales must be torch.float16 \[40, 2\]"),
        ("scales", state["scales"].float(), "scales must be torch.float16"),
        ("scales", torch.full_like(state["scales"], torch.nan), "scales must be finite"),
        ("zeros", torch.full_like(state["zeros"], 16), r"zeros must be 0\.\.15"),
    ):
        module = fresh()
        with pytest.raises(RuntimeError, match=message):
            module.load_state_dict({**state, key: value})
        module.load_state_dict(state)  # and is not spoilt by the failed attempt
        assert_same_module(module, make(FORMATS[1]))


def test_deepcopy_and_pickle():
    module = make()
    assert_same_module(module, copy.deepcopy(module))
    assert_same_module(module, pickle.loads(pickle.dumps(module)))
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    assert_same_module(module, torch.load(file, weights_only=False))
    twin = copy.deepcopy(module)
    twin.bias.data.zero_()
    assert module.bias.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("finalized", [True, False])
@pytest.mark.parametrize("format", FORMATS[1:2] + FORMATS[-6:], ids=str)
def test_casting_leaves_what_is_stored(format, dtype, finalized):
    module = make(format)
    state = module.state_dict()
    if not finalized:
        with torch.device("meta"):
            module = QuantLinear(K, N, format=format)
        for key, value in state.items():
            setattr(module, key, nn.Parameter(value, requires_grad=key == "bias"))
    module.to(dtype)
    assert module.bias.dtype == module.weight.dtype == dtype
    out = module(inputs(dtype))
    assert out.dtype == dtype
    after = module.state_dict()
    assert after["scales"].dtype == format.scales_dtype
    assert_same_state({**after, "bias": state["bias"]}, state)
    assert_same_state({**module.type(torch.float32).state_dict(), "bias": state["bias"]}, state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_from_float_takes_every_dtype(dtype):
    module = make(dtype=dtype)
    assert module.weight.dtype == dtype
    assert module(inputs(dtype)).dtype == dtype


def test_weight_is_lazy_and_read_only():
    module = make(FORMATS[3])
    weight = module.weight
    assert (weight.dtype, tuple(weight.shape), weight.device.type) == (torch.float32, (N, K), "cpu")
    assert not isinstance(weight, nn.Parameter)
    assert torch.equal(weight + 0, module.dequantize())
    assert torch.equal(torch.mm(inputs(), weight.t()), inputs() @ module.dequantize().t())
    assert torch.equal(torch.from_numpy(weight.numpy()), module.dequantize())
    assert type(copy.deepcopy(weight)) is torch.Tensor
    before = module.packed.clone()
    for write in (
        lambda w: w.mul_(2),
        lambda w: w.copy_(torch.zeros(N, K)),
        lambda w: torch.add(w, 1, out=w),
        lambda w: setattr(w, "data", torch.zeros(N, K)),
        lambda w: nn.init.zeros_(w),
    ):
        with pytest.raises(ValueError, match="read-only"):
            write(module.weight)
    assert torch.equal(module.packed, before)
    assert "weight" not in dict(module.named_parameters())


def test_gradient_reaches_input_and_bias_but_not_the_weight():
    module = make(FORMATS[1], "float")
    x = inputs().requires_grad_()
    target = torch.randn(5, N, generator=torch.Generator().manual_seed(2))
    (module(x) * target).sum().backward()
    torch.testing.assert_close(x.grad, target @ module.dequantize())
    torch.testing.assert_close(module.bias.grad, target.sum(0))
    assert [name for name, p in module.named_parameters() if p.requires_grad] == ["bias"]


def test_compile_and_export_have_no_graph_break():
    module = make(FORMATS[1])
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(inputs()), module(inputs()))
    program = torch.export.export(module, (inputs(),), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert "taut.quant_linear.default" in called
    assert torch.equal(program.module()(inputs(torch.float32, 9)), module(inputs(torch.float32, 9)))


def test_weight_bytes_and_repr():
    module = make(FORMATS[0])
    assert module.weight_bytes == FORMATS[0].layout_bytes(N, K) == module.packed.numel()
    assert "in_features=75, out_features=40, bias=True, weight=int4 group 32, activations=auto" in repr(module)
    with torch.device("meta"):
        assert QuantLinear(K, N, format=FORMATS[0]).weight_bytes == FORMATS[0].canonical_bytes(N, K)


def test_empty_batch_and_no_bias():
    assert make(bias=False)(torch.empty(0, K)).shape == (0, N)
    assert "bias" not in make(bias=False).state_dict()


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(3, K + 1), rf"takes x \[\.\.\., {K}\], got \[3, {K + 1}\]"),
        (torch.zeros(()), "takes x"),
        (torch.zeros(3, K, dtype=torch.float64), "float32, bfloat16 or float16, got torch.float64"),
        (torch.zeros(3, K, dtype=torch.int64), "got torch.int64"),
        (torch.zeros(3, K, device="meta"), "x is on meta"),
    ],
)
def test_forward_refuses(x, message):
    with pytest.raises(ValueError, match=message):
        make()(x)


def test_from_float_refuses():
    linear = nn.Linear(K, N)
    with pytest.raises(ValueError, match="unknown activations 'int3'"):
        QuantLinear.from_float(linear, FORMATS[0], "int3")
    with pytest.raises(ValueError, match="got torch.float64"):
        QuantLinear.from_float(nn.Linear(K, N).double(), FORMATS[0])
    linear.weight.data[3, 4] = torch.nan
    with pytest.raises(ValueError, match="row 3 of w holds a NaN"):
        QuantLinear.from_float(linear, FORMATS[0])
    with pytest.raises(ValueError, match="unknown weight format 'int5'"):
        taut.WeightFormat("int5")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_of_more_rows_than_are_dequantized_at_a_time(dtype):
    torch.manual_seed(0)
    module = QuantLinear.from_float(nn.Linear(40, 1030), FORMATS[1]).to(dtype)
    x, grad = torch.randn(3, 2, 40, dtype=dtype, requires_grad=True), torch.randn(3, 2, 1030, dtype=dtype)
    module(x).backward(grad)
    expected = grad.double() @ module.dequantize().double()
    assert (x.grad.double() - expected).abs().max() < (1e-5 if dtype == torch.float32 else 2e-2) * expected.abs().max()


def test_the_same_with_and_without_gradients():
    module, x = make(FORMATS[1]), inputs()
    expected = module(x)
    assert expected.requires_grad
    with torch.no_grad():
        found = module(x)
    assert not found.requires_grad
    assert torch.equal(found, expected)
    with torch.inference_mode():
        assert torch.equal(module(inputs()), expected)


def test_opcheck():
    for format in FORMATS:
        module = make(format)
        for bias in (None, module.bias.detach().requires_grad_()):
            call = inputs().requires_grad_(), module.packed, bias, *module._calls["cpu"]
            torch.library.opcheck(torch.ops.taut.quant_linear.default, call)


def test_a_weight_read_inside_a_compiled_graph_is_the_dequantized_one():
    module = make(bias=False)
    compiled = torch.compile(lambda x: x.to(module.weight.dtype) @ module.weight.T, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(inputs()), inputs() @ module.dequantize().T)


def test_one_dimensional_x():
    module = make()
    assert torch.equal(module(inputs()[0]), module(inputs()[:1])[0])


def test_an_int8_code_of_minus_128_means_what_the_format_says():
    module = make(FORMATS[3], "float")
    state = module.state_dict()
    state["qweight"][3, 4] = -128
    module.load_state_dict(state)
    assert module.state_dict()["qweight"][3, 4] == -128
    assert module.dequantize()[3, 4] == -128 * state["scales"][3, 0].float()


# ---- Devices ----


@pytest.fixture
def other_device(monkeypatch):
    """``with other_device():`` the CPU stands in for a CUDA device: packed weights are in MmaTiles, and the op that reads them is
    a plain product here. Everything about moving a module between layouts can be tested so, without a GPU."""

    def quant_linear(x, packed, bias, n, code, group, zeros, activations):
        w = torch.ops.taut.dequantize_weight(packed, n, x.shape[-1], code, group, zeros, _native.MMA_TILES, 0, n, x.dtype)
        return nn.functional.linear(x, w, bias)

    real = torch.ops.taut
    ops = SimpleNamespace(
        pack_weight=real.pack_weight, unpack_weight=real.unpack_weight, dequantize_weight=real.dequantize_weight,
        quantize_weight=real.quantize_weight, quant_linear=quant_linear,
    )  # fmt: skip

    @contextmanager
    def block():
        with monkeypatch.context() as patch:
            patch.setattr(_native, "layout_for", lambda device_type: _native.MMA_TILES)
            patch.setattr(_native, "ops_for", lambda device_type: ops)
            yield

    return block


@pytest.mark.parametrize("format", CUDA_FORMATS, ids=str)
def test_moving_packs_again(format, other_device):
    module, x = make(format, "float"), inputs()
    state, expected, size = module.state_dict(), module(x), module.weight_bytes
    with other_device():
        module.cpu()
        assert module.weight_bytes == module.packed.numel() == format.layout_bytes(N, K, _native.MMA_TILES)
        assert_same_state(module.state_dict(), state)
        torch.testing.assert_close(module(x), expected)
        assert torch.equal(module.half().float().dequantize(), module.dequantize())
        assert_same_state({**module.state_dict(), "bias": state["bias"]}, state)
    module.to("cpu")
    assert module.weight_bytes == size
    assert_same_state({**module.state_dict(), "bias": state["bias"]}, state)


@pytest.mark.parametrize("format", CUDA_FORMATS, ids=str)
def test_loading_packs_for_the_device(format, other_device):
    state = make(format).state_dict()
    with other_device():
        module = QuantLinear(K, N, format=format, activations="float")
        module.load_state_dict(state)
        assert module.weight_bytes == format.layout_bytes(N, K, _native.MMA_TILES)
        assert_same_state(module.state_dict(), state)
        assert_same_state(make(format).state_dict(), state)  # from_float


@pytest.mark.parametrize("format", CUDA_FORMATS, ids=str)
def test_bytes_moved_past_the_module_are_packed_again(format, other_device):
    """Unpickling with map_location moves ``packed`` as it is, and so do libraries that place buffers one by one."""
    module, x = make(format, "float"), inputs()
    state, expected, weight = module.state_dict(), module(x), module.dequantize()
    with other_device():
        there = copy.deepcopy(module)
        torch.testing.assert_close(there(x), expected)
        assert_same_state(there.state_dict(), state)
        stored = pickle.dumps(there)
        assert torch.equal(copy.deepcopy(module).dequantize(), weight)
    back = pickle.loads(stored)
    assert back.packed.numel() == format.layout_bytes(N, K, _native.MMA_TILES)
    assert torch.equal(back(x), expected)
    assert_same_module(back, module)
    assert_same_state(pickle.loads(stored).state_dict(), state)


@pytest.mark.parametrize("format", [format for format in FORMATS if not format.kind.cuda], ids=str)
def test_a_format_of_the_cpu_does_not_move(format, other_device):
    module = make(format)
    state = module.state_dict()
    message = f"{format.name} weights are for the CPU only; on CUDA taut takes int4, int8, fp8_e4m3"
    with other_device():
        for call in (module.cpu, lambda: make(format), lambda: QuantLinear(K, N, format=format).load_state_dict(state)):
            with pytest.raises((ValueError, RuntimeError), match=message):
                call()
    assert_same_state(module.state_dict(), state)
    assert_same_module(module, make(format))


def test_meta_and_back(other_device):
    module = make(FORMATS[1])
    state = module.state_dict()
    with other_device():
        module.to("meta")
        assert module(torch.empty(3, K, device="meta")).shape == (3, N)
    module.to_empty(device="cpu")
    assert module.packed.numel() == FORMATS[1].layout_bytes(N, K)
    module.load_state_dict(state)
    assert_same_module(module, make(FORMATS[1]))


def test_a_failed_move_loses_nothing(other_device, monkeypatch):
    module = make(FORMATS[1])
    state = module.state_dict()
    with other_device():
        with monkeypatch.context() as patch:
            patch.setattr("taut.nn.packed_weight.repack", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("no memory left")))
            with pytest.raises(torch.OutOfMemoryError):
                module.cpu()
        module.cpu()
    module.cpu()
    assert_same_state(module.state_dict(), state)


def test_mixed_devices_are_a_value_error():
    module = make()
    module.bias = nn.Parameter(torch.empty(N, device="meta"))
    with pytest.raises(ValueError, match="x is on cpu, the bias of this QuantLinear on meta: move one of them"):
        module(inputs())


def test_cuda_without_kernels_is_a_value_error(monkeypatch):
    """What a CUDA tensor meets where the library is missing; a fake tensor, since there may be no GPU."""
    monkeypatch.setattr(_native, "_WHY_NO_CUDA", "this build of taut has no CUDA kernels")
    module = make()
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(3, K, device="cuda")
        with pytest.raises(ValueError, match="x is on cuda:0, the weight of this QuantLinear on cpu"):
            module(x)
        with pytest.raises(ValueError, match="taut cannot compute on cuda tensors: this build of taut has no CUDA kernels"):
            taut.ops.quant_linear.quant_linear(x, torch.empty(10, dtype=torch.uint8, device="cuda"), None, N, FORMATS[0])


@pytest.mark.parametrize("format", CUDA_FORMATS, ids=str)
def test_computes_with_emulated_cuda_kernels(format):
    """The real kernels and packing of a CUDA device, by way of the routing of the tests' emulator."""
    if reason := build.unavailable():
        pytest.skip(reason)
    module, x = make(format, "float").half(), inputs(torch.float16)
    state, expected = module.state_dict(), op.reference(x, module.dequantize(), module.bias.detach())
    with emulated("fast", sm=80):
        module.cpu()
        assert module.weight_bytes == format.layout_bytes(N, K, _native.MMA_TILES)
        found = module(x)
        fresh = QuantLinear(K, N, format=format, activations="float", dtype=torch.float16)
        fresh.load_state_dict(state)
        assert_same_bits(fresh(x), found, "loaded there")
        assert_same_state(module.state_dict(), state)
    torch.testing.assert_close(found.double(), expected, rtol=2e-3, atol=2e-3)
    assert_same_state(module.cpu().state_dict(), state)


needs_cuda = pytest.mark.skipif(bool(_native.why_not("cuda")), reason=_native.why_not("cuda"))


@needs_cuda
@pytest.mark.parametrize("format", CUDA_FORMATS, ids=str)
def test_to_cuda_and_back(format):
    module, x = make(format), inputs(torch.float16)
    state, expected = module.state_dict(), make(format, "float").half()(x).float()
    module.to("cuda", torch.float16)
    assert module.packed.is_cuda
    assert module.weight.device.type == "cuda"
    assert_same_state({**module.state_dict(), "bias": state["bias"]}, state)
    torch.testing.assert_close(module(x.cuda()).float().cpu(), expected, rtol=2e-2, atol=2e-2)
    with pytest.raises(ValueError, match="x is on cpu, the weight of this QuantLinear on cuda:0"):
        module(x)
    fresh = QuantLinear(K, N, format=format).to("cuda", torch.float16)
    fresh.load_state_dict(state)
    assert fresh.packed.is_cuda
    assert_same_bits(fresh(x.cuda()).cpu(), module(x.cuda()).cpu(), "loaded on the device")
    quantized = QuantLinear.from_float(nn.Linear(K, N).cuda(), format)
    assert quantized.packed.is_cuda
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    assert_same_state(torch.load(file, map_location="cpu", weights_only=False).state_dict(), module.state_dict())
    assert_same_state({**module.cpu().state_dict(), "bias": state["bias"]}, state)
