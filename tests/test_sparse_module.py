"""SparseLinear, swap(sparsity=...), and models with sparse layers saved and loaded again."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM

import taut
from checks import assert_same_bits
from taut import SparseLinear
from taut.formats import WeightFormat
from taut.formats.sparse import Pattern, SparseFormat
from tiny_models import tiny, tiny_llama, write_checkpoint

IDS = torch.arange(3, 40)[None]
SETTINGS = (
    {"weights": "int8", "sparsity": "2:4"},
    {"weights": "int4", "group_size": 32, "sparsity": "16:2:4"},
    {"weights": "fp8_e4m3", "sparsity": "4:8"},
)


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
