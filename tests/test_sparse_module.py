"""SparseLinear, swap(sparsity=...), and models with sparse layers saved and loaded again."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM

import taut
from checks import assert_same_bits
from emulator import build
from emulator.emulated import emulated
from taut import SparseLinear, _native
from taut.formats import NumberFormat, WeightFormat
from taut.formats.sparse import Pattern, SparseFormat
from tiny_models import tiny, tiny_llama, write_checkpoint

IDS = torch.arange(3, 40)[None]
SETTINGS = (
    {"weights": "int8", "sparsity": "2:4"},
    {"weights": "int4", "group_size": 32, "sparsity": "16:2:4"},
    {"weights": "fp8_e4m3", "sparsity": "4:8"},
    {"weights": "bf16", "sparsity": "2:4"},
    {"weights": "fp16", "sparsity": "16:2:4"},
)
BF16 = SparseFormat(NumberFormat("bf16"), Pattern(2, 4))


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(IDS).logits


def test_a_layer_keeps_the_largest_of_each_block():
    layer = nn.Linear(64, 24)
    sparse = SparseLinear.from_float(layer, SparseFormat(WeightFormat("int8", 32), Pattern(2, 4)), "float")
    w, kept = sparse.dequantize(), Pattern(2, 4).mask(layer.weight.abs())
    assert Pattern(2, 4).holds(w) and torch.equal(w != 0, kept & (w != 0))
    assert torch.allclose(w[kept], layer.weight[kept], atol=float(layer.weight.detach().abs().max()) / 120)
    x = torch.randn(5, 3, 64)
    assert torch.allclose(sparse(x), linear(x, w, layer.bias), atol=1e-5)
    assert sparse.weight.shape == (24, 64) and torch.equal(sparse.weight + 0, w)


def test_a_layer_that_holds_to_the_pattern_keeps_its_own_nonzeros():
    layer = nn.Linear(64, 16)
    kept = Pattern(2, 4).mask(torch.rand(16, 64))  # not the largest
    layer.weight.data *= kept
    sparse = SparseLinear.from_float(layer, SparseFormat(WeightFormat("int8", 32), Pattern(2, 4)))
    assert not bool(sparse.dequantize()[~kept].any())
    assert torch.allclose(sparse.dequantize(), layer.weight, atol=float(layer.weight.detach().abs().max()) / 120)


def test_state_dict_round_trip():
    format = SparseFormat(WeightFormat("int4", 32), Pattern(2, 4, 8))
    sparse = SparseLinear.from_float(nn.Linear(96, 20), format)
    state = sparse.state_dict()
    assert {name: tuple(value.shape) for name, value in state.items()} == {
        "qweight": (20, 24), "scales": (20, 3), "meta": (3, 12), "bias": (20,)
    }  # fmt: skip
    other = SparseLinear(96, 20, format=format)
    other.load_state_dict(state)
    x = torch.randn(4, 96)
    assert_same_bits(other(x), sparse(x), "loaded again")
    for name, value in other.state_dict().items():
        assert_same_bits(value, state[name], name)
    state["meta"] = torch.zeros_like(state["meta"])
    with pytest.raises(RuntimeError, match="places within 4 must ascend"):
        SparseLinear(96, 20, format=format).load_state_dict(state)
    half = sparse.half()
    assert half.bias.dtype == torch.float16 and half(x.half()).dtype == torch.float16


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("name", ("fp16", "bf16"))
def test_a_layer_of_numbers_keeps_them_as_they_are(name, dtype):
    format = SparseFormat(NumberFormat(name), Pattern(2, 4))
    layer = nn.Linear(64, 24).to(dtype)
    kept = Pattern(2, 4).mask(torch.rand(24, 64))  # not the largest
    layer.weight.data *= kept
    sparse = SparseLinear.from_float(layer, format)
    stored = torch.where(kept, layer.weight.detach(), 0.0).to(format.weights.codes_dtype)
    assert_same_bits(sparse.dequantize(), stored.float(), "rounded to 16 bits alone")
    assert str(sparse.format) == f"2:4 {name}" and sparse.weight_bytes == 3 * 2 * (256 + 32)
    x = torch.randn(5, 64).to(dtype)
    torch.testing.assert_close(sparse(x), linear(x, sparse.dequantize(dtype), layer.bias), rtol=2e-2, atol=2e-2)


def test_state_dict_of_numbers():
    sparse = SparseLinear.from_float(nn.Linear(96, 20), BF16)
    state = sparse.state_dict()
    found = {name: (value.dtype, tuple(value.shape)) for name, value in state.items()}
    assert found == {"qweight": (torch.bfloat16, (20, 48)), "meta": (torch.uint8, (20, 12)), "bias": (torch.float32, (20,))}
    other = SparseLinear(96, 20, format=BF16, device="meta")
    other.load_state_dict(state, assign=True)
    x = torch.randn(4, 96)
    assert_same_bits(other(x), sparse(x), "loaded again")
    for moved in (copy.deepcopy(sparse).half().float(), pickle.loads(pickle.dumps(sparse)), copy.deepcopy(sparse).to(torch.float64)):
        assert_same_bits(moved.state_dict()["qweight"], state["qweight"], "casting the module rounds no stored number")
    for change, words in (
        ({"meta": torch.zeros_like(state["meta"])}, "places within 4 must ascend"),
        ({"qweight": state["qweight"] * float("inf")}, "must be finite"),
        ({"qweight": state["qweight"].half()}, "must be torch.bfloat16"),
        ({"qweight": state["qweight"][:, 1:]}, r"qweight must be \[20, 48\]"),
    ):
        with pytest.raises(RuntimeError, match=words):
            SparseLinear(96, 20, format=BF16).load_state_dict(state | change)
    with pytest.raises(RuntimeError, match="Unexpected key.*scales"):
        SparseLinear(96, 20, format=BF16).load_state_dict(state | {"scales": torch.ones(20, 1).half()})


def test_numbers_that_do_not_fit_are_refused():
    layer = nn.Linear(8, 4)
    layer.weight.data[1, 2] = 1e5
    with pytest.raises(ValueError, match="stored as fp16 must be finite and at most 65504"):
        SparseLinear.from_float(layer, SparseFormat(NumberFormat("fp16"), Pattern(2, 4)))
    model = nn.Sequential(layer)
    with pytest.raises(ValueError, match="0: its weight holds 100000; fp16 reaches up to 65504"):
        taut.swap(model, "fp16", sparsity="2:4")
    assert model[0] is layer
    taut.swap(model, "bf16", sparsity="2:4")
    assert float(model[0].dequantize()[1, 2]) == 99840


PATTERNS = (Pattern(2, 4), Pattern(2, 4, 16), Pattern(1, 4), Pattern(4, 8, 8))


@pytest.mark.parametrize("weights", (WeightFormat("int4", 32), NumberFormat("fp16")), ids=str)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_moves_to_another_layout_and_computes_there(pattern, weights):
    """The kernels and packing of a CUDA device, by way of the routing of the tests' emulator."""
    if reason := build.unavailable():
        pytest.skip(reason)
    format = SparseFormat(weights, pattern)
    module = SparseLinear.from_float(nn.Linear(136, 40), format, "float").half()
    state, size, weight = module.state_dict(), module.weight_bytes, module.dequantize(torch.float64)
    x = torch.randn(5, 136, generator=torch.Generator().manual_seed(1)).half()
    expected = linear(x.double(), weight, module.bias.double())
    int8 = SparseLinear.from_float(nn.Linear(136, 40), format, "int8" if format.has_scales else "float")
    int8_expected = int8(x.float())

    def assert_state(module: SparseLinear, what: str) -> None:
        for name, value in module.state_dict().items():
            assert_same_bits(value, state[name], f"{name}, {what}")

    with emulated("fast", sm=80):
        assert_same_bits(copy.deepcopy(module)(x), copy.deepcopy(module).cpu()(x), "packed again when it is called, and when it is moved")
        module.cpu()
        assert module.weight_bytes == module.packed.numel() == format.layout_bytes(40, 136, 1)
        found = module(x)
        fresh = SparseLinear(136, 40, format=format, activations="float", dtype=torch.float16)
        fresh.load_state_dict(state)
        assert_same_bits(fresh(x), found, "loaded there")
        assert_state(module, "there")
        stored = pickle.dumps(module)
        int8_found = int8(x.float())
    torch.testing.assert_close(int8_found, int8_expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.double(), expected, rtol=2e-3, atol=2e-3)
    assert_state(pickle.loads(stored), "its bytes moved as they were")
    assert_state(module.cpu(), "back")
    assert module.weight_bytes == size


needs_cuda = pytest.mark.skipif(bool(_native.why_not("cuda")), reason=_native.why_not("cuda"))


@needs_cuda
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_to_cuda_and_back(pattern):
    format = SparseFormat(WeightFormat("int8", 64), pattern)
    layer = nn.Linear(136, 40)
    module = SparseLinear.from_float(layer, format)
    state, weight = module.state_dict(), module.dequantize()
    x = torch.randn(5, 136)
    module.to("cuda", torch.float16)
    assert module.packed.is_cuda and module.weight.device.type == "cuda"
    torch.testing.assert_close(module(x.cuda().half()).float().cpu(), linear(x, weight, layer.bias), rtol=2e-2, atol=2e-2)
    with pytest.raises(ValueError, match="x is on cpu, the weight of this SparseLinear on cuda:0"):
        module(x)
    y = x.cuda().half().requires_grad_()
    module(y).sum().backward()
    torch.testing.assert_close(y.grad[0].float().cpu(), weight.sum(0), rtol=2e-2, atol=2e-2)
    there = SparseLinear.from_float(nn.Linear(136, 40).cuda(), format)
    assert there.packed.is_cuda and there(x.cuda()).is_cuda
    module.to("cpu", torch.float32)
    for name, value in module.state_dict().items():
        if name != "bias":
            assert_same_bits(value, state[name], name)


def test_cuda_without_kernels_is_a_value_error(monkeypatch):
    format = SparseFormat(WeightFormat("int8", 32), Pattern(2, 4))
    module = SparseLinear.from_float(nn.Linear(64, 24), format)
    monkeypatch.setattr(_native, "_WHY_NO_CUDA", "this build of taut has no CUDA kernels")
    with FakeTensorMode():
        x = torch.empty(3, 64, device="cuda")
        with pytest.raises(ValueError, match="x is on cuda:0, the weight of this SparseLinear on cpu"):
            module(x)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_swapped_model_computes_with_the_kept_numbers(settings):
    model, dense = tiny_llama(), tiny_llama()
    report = taut.swap(model, activations="float", **settings)
    assert len(report.swapped) == 14 and all(isinstance(model.get_submodule(entry.name), SparseLinear) for entry in report.swapped)
    assert settings["sparsity"] in report.summary
    assert report.bytes_after == sum(model.get_submodule(entry.name).weight_bytes for entry in report.swapped)
    for entry in report.swapped:
        dense.get_submodule(entry.name).weight.data = model.get_submodule(entry.name).dequantize()
    assert torch.allclose(logits(model), logits(dense), atol=2e-4)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_saved_and_loaded_again(settings, tmp_path):
    model = tiny_llama()
    taut.swap(model, **settings)
    expected = logits(model)
    taut.save(model, tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert sum(isinstance(module, SparseLinear) for module in loaded.modules()) == 14
    assert_same_bits(logits(loaded), expected, "the loaded model's logits")
    folder = write_checkpoint(tmp_path / "float")
    on_arrival = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=taut.Config(**settings))
    fresh = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    taut.swap(fresh, **settings)
    assert_same_bits(logits(on_arrival), logits(fresh), "quantized as it loaded")
    text = loaded.generate(IDS, max_new_tokens=5, do_sample=False)
    assert torch.equal(text, model.generate(IDS, max_new_tokens=5, do_sample=False))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_fused_blocks_give_the_same(settings, dtype):
    model, plain = tiny_llama().to(dtype), tiny_llama().to(dtype)
    report = taut.swap(model, strict=True, **settings)
    taut.swap(plain, fuse=False, **settings)
    assert {entry.kind for entry in report.fused} == {"layer", "stack"} and not any(entry.reason for entry in report.fused)

    def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:  # unfused layers round more often
        found, expected = found.float(), expected.float()
        assert (found - expected).norm() <= (1e-5 if dtype == torch.float32 else 6e-2) * expected.norm()

    assert_close(logits(model), logits(plain))
    with torch.no_grad():  # a few tokens after a text: all layers in one call
        caches = [m(IDS[:, :30]).past_key_values for m in (model, plain)]
        found, expected = (m(IDS[:, 30:34], past_key_values=cache).logits for m, cache in zip((model, plain), caches, strict=True))
    assert_close(found, expected)
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    for name, value in plain.state_dict().items():
        assert_same_bits(kept[name], value, name)


def test_rows_that_share_places_stay_together():
    """k has 72 rows here: stacked, 16 that share places would be of two matrices."""
    settings = {"weights": "int8", "sparsity": "16:2:4"}
    model = tiny("llama", head_dim=36)
    report = taut.swap(model, **settings)
    assert all("not a multiple of 16" in entry.reason for entry in report.fused if entry.kind == "layer")


def test_rules_name_their_own_sparsity():
    model = tiny_llama()
    report = taut.swap(model, "int8", rules={"mlp": {"sparsity": "2:4"}})
    kinds = {entry.name.split(".")[-1]: type(model.get_submodule(entry.name)).__name__ for entry in report.swapped}
    assert kinds["up_proj"] == kinds["down_proj"] == "SparseLinear" and kinds["q_proj"] == "QuantLinear"
    assert report.fused and not any(entry.reason for entry in report.fused)


def test_rules_mix_numbers_and_codes():
    model = tiny_llama()
    report = taut.swap(model, "int8", activations="int8_row", rules={"mlp": {"weights": "bf16", "sparsity": "2:4"}})
    assert {entry.rule.format.name for entry in report.swapped if "mlp" in entry.name} == {"bf16"}
    assert {entry.rule.activations for entry in report.swapped if "mlp" in entry.name} == {"float"}
    assert report.fused and not any(entry.reason for entry in report.fused)


def test_numbers_report_their_bytes():
    model = tiny_llama().to(torch.bfloat16)
    report = taut.swap(model, "bf16", sparsity="2:4")
    assert report.bytes_after == report.bytes_before * 9 // 16
    assert "2:4 bf16, float activations" in report.summary


def test_what_cannot_be_sparse_is_kept_and_named():
    model = nn.Sequential(nn.Linear(30, 8), nn.Linear(8, 4))
    report = taut.swap(model, "int8", sparsity="2:4")
    assert [entry.name for entry in report.swapped] == ["1"]
    assert "30 inputs cannot be cut in blocks of 4" in report.kept[0].reason


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"weights": "nf4", "sparsity": "2:4"}, "sparse weights are int8, int4, fp8_e4m3"),
        ({"weights": "int4", "zeros": True, "sparsity": "2:4"}, "without zero points"),
        ({"weights": "int8", "sparsity": "3:4"}, "no sparsity pattern"),
        ({"weights": "int8", "sparsity": 2}, "is no sparsity pattern"),
        ({"weights": "bf16"}, "bf16 weights are for sparse layers alone: give a sparsity, such as 2:4"),
        ({"weights": "fp32", "sparsity": "2:4"}, "unknown weight format 'fp32'; accepted: ternary, .*; fp16 and bf16 with sparsity"),
        ({"weights": "fp16", "sparsity": "2:4", "group_size": 32}, "fp16 weights have no scales"),
        ({"weights": "fp16", "sparsity": "2:4", "activations": "int8"}, "fp16 weights cannot be multiplied with 'int8' activations"),
        ({"weights": "int8", "rules": {"mlp": {"weights": "bf16"}}}, "bf16 weights are for sparse layers alone"),
        ({"weights": "bf16", "sparsity": "2:4", "rules": {"mlp": {"sparsity": None}}}, "bf16 weights are for sparse layers alone"),
        ({"weights": "int8", "lm_head": "bf16"}, "bf16 weights are for sparse layers alone"),
        ({"weights": "int8", "sparsity": "2:4", "lm_head": "int8", "skip": ["nobody"]}, "matches no module"),
    ],
    ids=str,
)
def test_bad_settings(settings, words):
    with pytest.raises(ValueError, match=words):
        taut.swap(tiny_llama(), **settings)


def test_embeddings_and_norms_are_never_pruned():
    model = tiny_llama()
    before = {name: value.clone() for name, value in model.state_dict().items() if "embed" in name or "norm" in name}
    taut.swap(model, "int8", sparsity="2:4")
    for name, value in before.items():
        assert_same_bits(model.state_dict()[name], value, name)
