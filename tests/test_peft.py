"""LoRA on a swapped model: it trains, is saved and loads again; what would need the float weight is refused in words."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("peft")

import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.utils import check_peft_version

import taut
from taut import QuantLinear
from taut.integrations.peft import QuantLoraLinear
from tiny_models import tiny_llama

IDS = torch.arange(3, 27)[None]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A directory with a tiny Llama in int4, activations in float."""
    folder = tmp_path_factory.mktemp("peft") / "llama"
    model = tiny_llama()
    taut.swap(model, "int4", activations="float")
    taut.save(model, folder)
    return folder


def load(checkpoint) -> transformers.PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(checkpoint)


def train(model: nn.Module, steps: int = 12) -> list[float]:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


def packed(model: nn.Module) -> list[torch.Tensor]:
    return [module.packed.clone() for module in model.modules() if isinstance(module, QuantLinear)]


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]])
def test_trains_and_loads_again(checkpoint, tmp_path, targets):
    torch.manual_seed(0)
    base = load(checkpoint)
    taut.unfuse(base)  # layers with adapters are not fused, and would round otherwise than those without
    before, plain = packed(base), logits(base)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=targets))
    wrapped = [module for module in model.modules() if isinstance(module, QuantLoraLinear)]
    assert len(wrapped) == (14 if targets == "all-linear" else 4)
    assert torch.equal(logits(model), plain)  # lora_B starts at zero
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trainable
    assert all("lora_" in name for name in trainable)
    losses = train(model)
    assert losses[-1] < 0.7 * losses[0]
    assert all(torch.equal(a, b) for a, b in zip(packed(model), before, strict=True))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load(checkpoint), tmp_path).eval()
    assert torch.equal(logits(again), logits(model))
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)


def test_needs_no_more_than_import_taut(checkpoint, tmp_path):
    model = get_peft_model(load(checkpoint), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path)
    torch.save(logits(model.eval()), tmp_path / "expected.pt")
    # peft first, and taut before anything is loaded: the other order of imports than in this process
    program = f"""
import peft, torch
import taut
model = peft.AutoPeftModelForCausalLM.from_pretrained({str(tmp_path)!r}).eval()
layer = model.base_model.model.model.layers[0].self_attn.q_proj
assert type(layer).__name__ == "QuantLoraLinear", type(layer)
with torch.no_grad():
    found = model(input_ids=torch.arange(3, 27)[None]).logits
assert torch.equal(found, torch.load({str(tmp_path / "expected.pt")!r}))
print("equal")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "equal", done.stderr[-3000:]


def test_gradient_is_that_of_the_dequantized_model(checkpoint):
    low = load(checkpoint)
    dense = tiny_llama()
    for name, module in list(low.named_modules()):
        if isinstance(module, QuantLinear):
            dense.get_submodule(name).weight.data = module.dequantize()
    found = []
    for model in (low, dense):
        torch.manual_seed(1)
        embeds = torch.randn(1, 9, 64, requires_grad=True)
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
        torch.manual_seed(2)
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                parameter.data = 0.1 * torch.randn_like(parameter)
        model(inputs_embeds=embeds).logits.square().mean().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if "lora_" in name}
        found.append((embeds.grad, gradients))
    (grad, gradients), (expected, expected_gradients) = found
    torch.testing.assert_close(grad, expected, rtol=1e-3, atol=1e-6)
    assert set(gradients) == set(expected_gradients)
    for name, gradient in gradients.items():
        assert gradient.abs().sum() > 0, name
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-3, atol=1e-5, msg=name)


def test_bfloat16_model_trains(checkpoint):
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16), LoraConfig(r=4, target_modules=["v_proj"])
    )
    losses = train(model)
    assert losses[-1] < losses[0]


def test_two_adapters_take_turns(checkpoint):
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(load(checkpoint), config, adapter_name="first").eval()
    model.add_adapter("second", config)
    first = logits(model)
    model.set_adapter("second")
    assert not torch.equal(logits(model), first)
    model.set_adapter("first")
    assert torch.equal(logits(model), first)


def test_adapter_of_transformers_itself(checkpoint, tmp_path):
    try:
        check_peft_version(min_version=MIN_PEFT_VERSION)
    except ValueError as reason:
        pytest.skip(f"transformers {transformers.__version__}: {reason}")
    model = load(checkpoint)
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    assert isinstance(model.model.layers[0].self_attn.q_proj, QuantLoraLinear)
    model.save_pretrained(tmp_path)
    again = load(checkpoint)
    again.load_adapter(str(tmp_path))
    assert torch.equal(logits(again.eval()), logits(model.eval()))


def test_merging_is_refused(checkpoint):
    model = get_peft_model(load(checkpoint), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)).eval()
    before, expected = packed(model), logits(model)
    for merge in (model.merge_and_unload, model.merge_adapter, lambda: model.merge_and_unload(safe_merge=True)):
        with pytest.raises(ValueError, match="cannot be merged into a low-bit weight"):
            merge()
    assert all(torch.equal(a, b) for a, b in zip(packed(model), before, strict=True))
    assert torch.equal(logits(model), expected)
    base = model.unload()
    assert all(type(module) is not QuantLoraLinear for module in base.modules())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "DoRA needs the float weight"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' rewrites the float weight"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora' rewrites"),
        ({"fan_in_fan_out": True}, "stores? the weight transposed"),
    ],
)
def test_what_needs_the_float_weight_is_refused(checkpoint, settings, message):
    with pytest.raises(ValueError, match=message):
        get_peft_model(load(checkpoint), LoraConfig(r=4, target_modules=["q_proj"], **settings))


def test_float_layers_are_left_to_peft():
    model = tiny_llama()
    taut.swap(model, skip=["mlp"])
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    layer = model.base_model.model.model.layers[0]
    assert type(layer.self_attn.q_proj) is QuantLoraLinear
    assert type(layer.mlp.up_proj).__module__.startswith("peft.")
