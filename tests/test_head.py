"""The output head in low bits, and embeddings that share its table: numbers, memory, checkpoints, and what is refused."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers

import taut
from taut import QuantLinear
from taut.nn import QuantEmbedding
from tiny_models import HIDDEN, WORDS, tiny

IDS = torch.arange(3, 27)[None]


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(IDS).logits


def head_bytes(model: torch.nn.Module) -> set[int]:
    return {module.packed.untyped_storage().data_ptr() for module in (model.lm_head, model.get_input_embeddings().head)}


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3"])  # tied; Gemma scales its embeddings
@pytest.mark.parametrize("lm_head", ["int8", "int4"])
def test_tied_embeddings_share_the_table(family, lm_head):
    model = tiny(family, tie_word_embeddings=True)
    float_table = model.lm_head.weight.detach()
    report = taut.swap(model, "int8", activations="float", lm_head=lm_head)
    assert type(model.lm_head) is QuantLinear
    assert model.lm_head.format.name == lm_head
    assert type(model.model.embed_tokens) is QuantEmbedding
    assert len(head_bytes(model)) == 1
    assert not any(p.dim() == 2 and p.dtype.is_floating_point for p in model.parameters())  # no float table is left
    entry = next(entry for entry in report.swapped if entry.name == "lm_head")
    assert (entry.bytes_before, entry.bytes_after) == (len(WORDS) * HIDDEN * 4, model.lm_head.packed.numel())
    assert not {"lm_head", "model.embed_tokens"} & {entry.name for entry in report.kept}
    assert "model.embed_tokens and lm_head share one table, " + lm_head in str(report)
    # the same as the swapped layers around a float table of these numbers
    expected = tiny(family, tie_word_embeddings=True)
    taut.swap(expected, "int8", activations="float")
    expected.lm_head.weight.data = model.lm_head.dequantize()
    expected.model.embed_tokens.weight = expected.lm_head.weight
    model.lm_head._calls = {"cpu": (*model.lm_head._calls["cpu"][:-1], 0)}  # activations="float" here too
    assert (logits(model) - logits(expected)).abs().max() < 1e-4 * logits(expected).abs().max()
    assert (model.lm_head.dequantize() - float_table).abs().max() < float_table.abs().max() / 7


def test_a_head_of_its_own():
    model = tiny("qwen3", tie_word_embeddings=False)
    report = taut.swap(model, lm_head="int8")
    assert type(model.model.embed_tokens) is torch.nn.Embedding
    assert model.lm_head.format.name == "int8"
    assert report.shared == {}
    assert [entry.name for entry in report.kept] == ["model.embed_tokens"]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_saved_once_and_loaded_again(family, tmp_path):
    model = tiny(family, tie_word_embeddings=True)
    taut.swap(model, "int4", lm_head="int8")
    expected, state = logits(model), model.state_dict()
    assert [key for key in state if "embed" in key] == []
    assert {"lm_head.qweight", "lm_head.scales"} <= set(state)
    taut.save(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization_config"]["tied"] == {"model.embed_tokens": "lm_head"}
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), expected)
    assert len(head_bytes(again)) == 1
    assert again.taut_report.shared == {"model.embed_tokens": "lm_head"}
    taut.save(again, tmp_path / "second")
    assert (tmp_path / "second" / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="the embeddings of this checkpoint are in lm_head, which .*Model does not have"):
        transformers.AutoModel.from_pretrained(tmp_path)


def test_streamed_from_a_float_checkpoint(tmp_path):
    model = tiny("llama")
    model.save_pretrained(tmp_path)
    streamed = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=taut.Config("int8", lm_head="int4"))
    taut.swap(model, "int8", lm_head="int4")
    assert torch.equal(logits(streamed), logits(model))
    assert streamed.taut_report.shared == {"model.embed_tokens": "lm_head"}
    assert len(head_bytes(streamed)) == 1


def test_copies_casts_and_a_way_back():
    model = tiny("gemma2", tie_word_embeddings=True)
    taut.swap(model, "int8", activations="float", lm_head="int8")
    other = copy.deepcopy(model)
    assert len(head_bytes(other)) == 1
    assert not head_bytes(other) & head_bytes(model)
    assert torch.equal(logits(other), logits(model))
    assert other.to(torch.bfloat16).get_input_embeddings()(IDS).dtype == torch.bfloat16
    assert other.model.embed_tokens.weight.dtype == torch.bfloat16
    assert logits(other).dtype == torch.bfloat16
    floats = copy.deepcopy(model).dequantize()
    assert floats.lm_head.weight is floats.get_input_embeddings().weight
    assert type(floats.get_input_embeddings()) is type(tiny("gemma2").get_input_embeddings())
    assert (logits(floats) - logits(model)).abs().max() < 2e-2 * logits(model).abs().max()


def test_generate_and_train_beside_it():
    peft = pytest.importorskip("peft")
    model = tiny("llama")
    taut.swap(model, lm_head="int8")
    found = model.generate(IDS, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert found.shape == (1, IDS.shape[1] + 5)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    loss = adapted(input_ids=IDS, labels=IDS).loss
    loss.backward()
    assert all(p.grad is not None for name, p in adapted.named_parameters() if "lora_B" in name)


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (None, {"lm_head": "int5"}, "unknown weight format 'int5'"),
        (None, {"lm_head": "int8", "rules": {"lm_head": {"weights": "int8"}}}, "lm_head is named by a rule and by lm_head='int8'"),
        (lambda m: m.lm_head.register_forward_hook(print), {"lm_head": "int8"}, "carry hooks"),
        (lambda m: m.lm_head.weight.data.fill_(torch.inf), {"lm_head": "int8"}, "lm_head: its weight holds a NaN or an infinity"),
    ],
)  # fmt: skip
def test_what_is_refused_changes_nothing(change, arguments, message):
    model = tiny("llama")
    if change:
        change(model)
    types = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        taut.swap(model, **arguments)
    assert [type(module) for module in model.modules()] == types


def test_a_model_without_a_head():
    with pytest.raises(ValueError, match="lm_head is for models with an output head; Sequential has none"):
        taut.swap(torch.nn.Sequential(torch.nn.Linear(64, 64)), lm_head="int8")
