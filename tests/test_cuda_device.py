"""What only a real GPU can show: graphs, streams, several devices, compilation, modules that move. Skipped where there is none."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import taut
from taut.formats import WeightFormat
from taut.formats.kv import KV_FORMATS
from taut.ops.attention_decode import attention_decode
from taut.ops.kv_append import KvCache, kv_append
from taut.ops.pack_weight import dequantize_weight, pack_weight, unpack_weight
from taut.ops.quant_linear import quant_linear
from taut.ops.quantize_weight import quantize_weight

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")

N, K = 192, 256
FORMATS = (WeightFormat("int4", 128), WeightFormat("int4", 32, True), WeightFormat("int8", 0))


def dtype_here() -> torch.dtype:
    return torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16


@pytest.fixture(params=FORMATS, ids=str)
def weight(request):
    """Format and packed weight on the GPU."""
    torch.manual_seed(0)
    canonical = quantize_weight(torch.randn(N, K), request.param)
    return request.param, pack_weight(*(None if part is None else part.cuda() for part in canonical), K, request.param), canonical


@pytest.mark.parametrize("m", [1, 16, 200])
def test_close_to_plain_torch(weight, m):
    format, packed, _ = weight
    x = torch.randn(m, K, device="cuda", dtype=dtype_here())
    out = quant_linear(x, packed, None, N, format, "float")
    expected = x.double() @ dequantize_weight(packed, N, K, format).double().T
    assert float((out - expected).abs().max()) <= 1e-2 * float(expected.abs().max())


def test_packing_on_the_gpu_gives_the_bits_of_the_cpu(weight):
    format, packed, canonical = weight
    for mine, theirs in zip(unpack_weight(packed, N, K, format), canonical, strict=True):
        assert mine is theirs is None or torch.equal(mine.cpu().view(torch.uint8), theirs.view(torch.uint8))


@pytest.mark.parametrize("m", [1, 16, 200])
def test_a_graph_replays_what_was_captured(weight, m):
    format, packed, _ = weight
    x = torch.randn(m, K, device="cuda", dtype=dtype_here())
    expected = quant_linear(x, packed, None, N, format, "float")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = quant_linear(x, packed, None, N, format, "float")
    other = torch.randn_like(x)
    for values in (other, x.clone()):
        x.copy_(values)
        graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, expected)
    x.copy_(other)
    graph.replay()
    assert torch.equal(out, quant_linear(other, packed, None, N, format, "float"))


def test_a_side_stream_waits_for_its_own_work_only(weight):
    format, packed, _ = weight
    x = torch.zeros(64, K, device="cuda", dtype=dtype_here())
    values = torch.randn(64, K, device="cuda", dtype=dtype_here())
    expected = quant_linear(values, packed, None, N, format, "float")
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # about 10 ms: a kernel on another stream would read zeros
        x.copy_(values)
        out = quant_linear(x, packed, None, N, format, "float")
    stream.synchronize()
    assert torch.equal(out, expected)


def test_many_streams_at_once_do_not_share_scratch(weight):
    format, packed, _ = weight
    streams = [torch.cuda.Stream() for _ in range(4)]
    inputs = [torch.randn(3, K, device="cuda", dtype=dtype_here()) for _ in streams]
    expected = [quant_linear(x, packed, None, N, format, "float") for x in inputs]
    torch.cuda.synchronize()
    for _ in range(50):
        outputs = []
        for stream, x in zip(streams, inputs, strict=True):
            with torch.cuda.stream(stream):
                outputs.append(quant_linear(x, packed, None, N, format, "float"))
        torch.cuda.synchronize()
        for out, right in zip(outputs, expected, strict=True):
            assert torch.equal(out, right)


def test_compiled_without_a_graph_break():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(K, N), nn.ReLU(), nn.Linear(N, 64)).to("cuda", dtype_here()).eval()
    taut.swap(model, weights="int4")
    x = torch.randn(5, K, device="cuda", dtype=dtype_here())
    with torch.no_grad():
        expected = model(x)
        found = torch.compile(model, fullgraph=True, dynamic=False)(x)
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


def test_a_module_moves_there_and_back():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(K, N)).eval()
    taut.swap(model, weights="int8", activations="float")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(7, K)
    expected = model(x)
    model.cuda()
    assert all(value.is_cuda for value in model.state_dict().values())
    there = model(x.cuda())
    torch.testing.assert_close(there.cpu(), expected, rtol=1e-3, atol=1e-3)
    model.cpu()
    assert torch.equal(model(x), expected)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_gradients_reach_x_on_the_gpu():
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(K, N, bias=False))
    taut.swap(layer, weights="int8", activations="float")
    x = torch.randn(4, K)
    grads = []
    for device in ("cpu", "cuda"):
        layer.to(device)
        here = x.detach().to(device).requires_grad_()
        layer(here).square().sum().backward()
        grads.append(here.grad.cpu())
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-3, atol=1e-3 * float(grads[0].abs().max()))


def test_batch_invariant_mode(weight):
    format, packed, _ = weight
    x = torch.randn(300, K, device="cuda", dtype=dtype_here())
    with taut.batch_invariant():
        whole = quant_linear(x, packed, None, N, format, "float")
        for begin, end in ((0, 1), (7, 12), (100, 164), (0, 300)):
            assert torch.equal(quant_linear(x[begin:end], packed, None, N, format, "float"), whole[begin:end])


def test_mixed_devices_are_refused(weight):
    format, packed, _ = weight
    with pytest.raises(ValueError, match="device"):
        quant_linear(torch.randn(2, K), packed, None, N, format, "float")
    with pytest.raises(ValueError, match="device"):
        quant_linear(torch.randn(2, K, device="cuda"), packed, torch.zeros(N), N, format, "float")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device only")
def test_the_second_device_computes_while_the_first_is_current(weight):
    format, packed, _ = weight
    x = torch.randn(20, K, device="cuda:0", dtype=dtype_here())
    expected = quant_linear(x, packed, None, N, format, "float")
    there = quant_linear(x.to("cuda:1"), packed.to("cuda:1"), None, N, format, "float")
    assert there.device == torch.device("cuda", 1)
    assert torch.equal(there.cpu(), expected.cpu())


@pytest.mark.parametrize("name", KV_FORMATS)
def test_a_graph_of_decoding_reads_lengths_on_the_device(name):
    """One captured step, append and attend, replayed as the sequences grow: what the op gives outside of a graph."""
    dtype = dtype_here()
    cache = KvCache.empty(name, 2, 2, 96, 64, device="cuda")
    lengths = torch.zeros(2, dtype=torch.int32, device="cuda")
    q, k, v = (torch.randn(2, heads, 1, 64, device="cuda", dtype=dtype) for heads in (8, 2, 2))
    prompt = [torch.randn(2, 2, 95, 64, device="cuda", dtype=dtype) for _ in range(2)]
    kv_append(*prompt, cache)

    def step() -> torch.Tensor:
        kv_append(k, v, cache, 0, lengths)
        return attention_decode(q, cache, 96, lengths + 1)[0]

    step()  # what is loaded lazily
    kv_append(*prompt, cache)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for now in ((70, 33), (71, 34), (95, 0)):
        lengths.copy_(torch.tensor(now, dtype=torch.int32))
        for t in (q, k, v):
            t.copy_(torch.randn(t.shape))
        graph.replay()
        found = out.clone()
        assert torch.equal(found, step())
