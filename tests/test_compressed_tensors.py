"""Sparse checkpoints of compressed-tensors, written here from their published definition, with numpy."""

from __future__ import annotations

import json
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import taut
from checks import assert_same_bits
from taut import SparseLinear, models
from taut.formats.sparse import Pattern
from taut.integrations.compressed_tensors import dense_weight
from tiny_models import tiny_llama


def pruned() -> torch.nn.Module:
    model = tiny_llama()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "layers" in name:
            module.weight.data[~Pattern(2, 4).mask(torch.rand(module.weight.shape))] = 0.0
    return model


def compressed(name: str, weight: torch.Tensor, format: str) -> dict[str, torch.Tensor]:
    kept = (weight != 0).numpy()
    found = {
        "shape": torch.tensor(weight.shape).reshape(-1, 1),
        "bitmask": torch.from_numpy(numpy.packbits(kept, axis=-1, bitorder="little")),
    }
    values = weight[weight != 0]
    if format == "sparse-24-bitmask":
        found["compressed"] = values.reshape(weight.shape[0], -1)
    else:
        found["compressed"] = values
        found["row_offsets"] = torch.from_numpy(kept.sum(1).cumsum() - kept.sum(1))
    return {f"{name}.{part}": tensor.contiguous() for part, tensor in found.items()}


def write(folder: Path, model: torch.nn.Module, sparse: str, shards: int = 1, **config) -> Path:
    model.save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    for name in [name for name in state if "proj" in name]:
        state |= compressed(name.removesuffix(".weight"), state.pop(name), sparse)
    (folder / "model.safetensors").unlink()
    names = sorted(state)
    for shard in range(shards):  # a weight's parts side by side in the order of names
        layers = sorted({name.rpartition(".")[0] for name in names})
        mine = {name: state[name] for name in names if layers.index(name.rpartition(".")[0]) % shards == shard}
        save_file(mine, folder / f"model-{shard + 1:05d}-of-{shards:05d}.safetensors", metadata={"format": "pt"})
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "dense",
        "sparsity_config": {"format": sparse, "sparsity_structure": "2:4"},
    }
    known = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**known, "quantization_config": {**quantization, **config}}))
    return folder


@pytest.mark.parametrize(("format", "shards"), [("sparse-24-bitmask", 1), ("sparse-24-bitmask", 2), ("sparse-bitmask", 1)])
def test_read_as_the_dense_model(format, shards, tmp_path):
    model = pruned()
    folder = write(tmp_path / "sparse", model, format, shards)
    found, report = models.load_model(models.find_source(folder))
    assert report is None
    for name, value in model.state_dict().items():
        assert_same_bits(found.state_dict()[name], value, name)
    found.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())


def test_packed_as_it_is_read_keeps_exactly_its_nonzeros(tmp_path):
    model = pruned()
    folder = write(tmp_path / "sparse", model, "sparse-24-bitmask")
    found, report = models.load_model(models.find_source(folder), "float32", models.Settings("int8", sparsity="2:4"))
    assert len(report.swapped) == 14
    for entry in report.swapped:
        layer, weight = found.get_submodule(entry.name), model.get_submodule(entry.name).weight.detach()
        assert isinstance(layer, SparseLinear)
        assert not bool(layer.dequantize()[weight == 0].any())
        assert torch.allclose(layer.dequantize(), weight, atol=float(weight.abs().max()) / 200)


@pytest.mark.parametrize("name", ("bf16", "fp16"))
def test_packed_in_16_bits_it_is_the_checkpoint_itself(name, tmp_path):
    """A model pruned in 16 bits: what is packed are its own numbers, and saved and loaded again it still is."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[name]
    model = pruned().to(dtype)
    folder = write(tmp_path / "sparse", model, "sparse-bitmask")
    found, report = models.load_model(models.find_source(folder), "auto", models.Settings(name, sparsity="2:4"))
    assert len(report.swapped) == 14 and report.bytes_after * 16 == report.bytes_before * 9
    taut.save(found, tmp_path / "saved")
    for module in (found, AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=dtype)):
        for entry in report.swapped:
            expected = model.get_submodule(entry.name).weight.detach()
            assert_same_bits(module.get_submodule(entry.name).dequantize(dtype), expected + 0.0, entry.name)


def test_checkpoints_that_are_not_read(tmp_path):
    model = pruned()
    for name, config, words in (
        ("quantized", {"config_groups": {"group_0": {}}, "format": "marlin-24"}, "sparse and quantized"),
        ("other", {"sparsity_config": {"format": "sparse-waffle"}}, "sparse-waffle"),
    ):
        folder = write(tmp_path / name, model, "sparse-24-bitmask", **config)
        with pytest.raises(ValueError, match=words):
            models.load_model(models.find_source(folder))


def test_parts_that_do_not_fit():
    parts = {name.removeprefix("w."): tensor for name, tensor in compressed("w", torch.eye(8), "sparse-bitmask").items()}
    assert torch.equal(dense_weight("w", parts), torch.eye(8))
    with pytest.raises(ValueError, match="keeps 8 numbers, and w.compressed holds 7"):
        dense_weight("w", {**parts, "compressed": parts["compressed"][:7]})
    with pytest.raises(ValueError, match=r"w.bitmask must be uint8 \[N, ceil\(K / 8\)\]"):
        dense_weight("w", {**parts, "shape": torch.tensor([8, 9])})
    with pytest.raises(ValueError, match="w has no compressed"):
        dense_weight("w", {name: part for name, part in parts.items() if name != "compressed"})
