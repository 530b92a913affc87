"""Fused decoder blocks: the same numbers as the modules they stand for, in every way a model is run, and a way back."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import transformers

import taut
from taut import QuantLinear
from taut.fuse import FusedClass, cache_name
from taut.nn import fused_block
from tiny_models import FAMILIES, tiny


def pair(family: str = "llama", activations: str = "float", dtype: torch.dtype = torch.float32, weights: str = "int4", **changes):
    """The same swapped model twice: not fused, and fused."""
    plain = tiny(family, **changes).to(dtype)
    fused = copy.deepcopy(plain)
    taut.swap(plain, weights, activations=activations, fuse=False)
    report = taut.swap(fused, weights, activations=activations, strict=True)
    assert all(entry.reason is None for entry in report.fused)
    return plain, fused


def prompt(batch: int = 2, length: int = 13, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 200, (batch, length), generator=torch.Generator().manual_seed(seed))


class Calls:
    """Counts how often the fused path is taken: by layer, and by stack."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from taut.nn import fused_block, fused_stack

        self.layers = self.stacks = 0
        run, write = fused_block.run_layer, fused_stack.write

        def count_layer(*args, **kwargs):
            self.layers += 1
            return run(*args, **kwargs)

        def count_stack(*args, **kwargs):
            found = write(*args, **kwargs)
            self.stacks += found is not None
            return found

        monkeypatch.setattr(fused_block, "run_layer", count_layer)
        monkeypatch.setattr(fused_stack, "write", count_stack)

    def take(self) -> tuple[int, int]:
        found = self.layers, self.stacks
        self.layers = self.stacks = 0
        return found


@pytest.fixture
def calls(monkeypatch):
    return Calls(monkeypatch)


def past(model: torch.nn.Module, cache) -> dict:
    return {cache_name(type(model)): cache}


def steps(model: torch.nn.Module, ids: torch.Tensor, sizes: tuple[int, ...], cache=None, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Logits of all of ``ids``, given to the model in pieces of these sizes with a cache."""
    cache = transformers.DynamicCache(config=model.config) if cache is None else cache
    found, begin = [], 0
    positions = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        for size in sizes:
            end = begin + size
            given = {} if mask is None else {"attention_mask": mask[:, :end], "position_ids": positions[:, begin:end]}
            found.append(model(ids[:, begin:end], use_cache=True, **past(model, cache), **given).logits)
            begin = end
    return torch.cat(found, 1)


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    assert found.isfinite().all()
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("config", [True, False])
def test_logits_equal_those_of_the_modules(family, config, calls):
    plain, fused = pair(family)
    ids, sizes = prompt(2, 34), (20, 1, 1, 3, 1, 5, 1, 1, 1)
    caches = [transformers.DynamicCache(config=plain.config) if config else transformers.DynamicCache() for _ in range(2)]
    expected = steps(plain, ids, sizes, caches[0])
    assert calls.take() == (0, 0)
    assert_close(steps(fused, ids, sizes, caches[1]), expected)
    assert calls.take() == (2, 8)  # the prompt layer by layer, the rest in one call each
    for one, other in zip(*(cache.layers for cache in caches), strict=True):
        assert one.get_seq_length() == other.get_seq_length() == 34
        assert_close(other.keys, one.keys)
        assert_close(other.values, one.values)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_left_padded_batch(family, calls):
    plain, fused = pair(family)
    ids, mask = prompt(3, 30), torch.ones(3, 30, dtype=torch.int64)
    mask[0, :7], mask[2, :12] = 0, 0
    sizes = (17, 1, 1, 2, 1, 4, 1, 1, 1, 1)
    expected, found = steps(plain, ids, sizes, mask=mask), steps(fused, ids, sizes, mask=mask)
    assert calls.take() == (2, 9)
    assert_close(found[mask.bool()], expected[mask.bool()])


def generate(model: torch.nn.Module, ids: torch.Tensor, **arguments) -> torch.Tensor:
    torch.manual_seed(7)
    settings = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(ids), **arguments}
    return model.generate(ids, eos_token_id=None, pad_token_id=0, **settings)


@pytest.mark.parametrize(
    ("arguments", "stacked"),
    [
        ({}, 11), ({"do_sample": True, "top_k": 20}, 11), ({"num_beams": 3}, 11), ({"num_beams": 2, "do_sample": True}, 11),
        ({"cache_implementation": "static", "disable_compile": True}, 0), ({"use_cache": False}, 0),
        ({"num_return_sequences": 2, "do_sample": True}, 11), ({"prompt_lookup_num_tokens": 3, "max_new_tokens": 30}, None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_generate_writes_the_same(family, arguments, stacked, calls):
    plain, fused = pair(family)
    ids = prompt(1, 17)
    expected = generate(plain, ids, **arguments)
    calls.take()
    found = generate(fused, ids, **arguments)
    layers, stacks = calls.take()
    assert stacks == stacked if stacked is not None else stacks > 5
    assert layers > 0
    assert torch.equal(found, expected)


def test_recorded_states_are_all_there_and_the_next_call_is_fused_again(calls):
    plain, fused = pair("qwen3")
    plain.set_attn_implementation("eager")
    fused.set_attn_implementation("eager")
    ids = prompt(1, 20)
    with torch.no_grad():
        expected, found = (model(ids, output_hidden_states=True, output_attentions=True) for model in (plain, fused))
        assert calls.take() == (0, 0)
        for one, other in ((expected.hidden_states, found.hidden_states), (expected.attentions, found.attentions)):
            assert len(one) == len(other)
            assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(one, other, strict=True))
        fused(ids)
    assert calls.take() == (2, 0)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
def test_compiled_with_a_static_cache(family):
    torch.compiler.reset()
    plain, fused = pair(family)
    ids = prompt(1, 17)
    expected = generate(plain, ids, cache_implementation="static", disable_compile=True)
    ops: set[str] = set()

    def backend(graph, _):
        ops.update(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    compiled = torch.compile(fused.forward, fullgraph=True, backend=backend)
    cache = transformers.StaticCache(config=fused.config, max_cache_len=32)
    with torch.no_grad():
        logits = fused(ids, **past(fused, cache)).logits
        found = [ids, logits[:, -1:].argmax(-1)]
        for position in range(17, 28):
            step = compiled(found[-1], position_ids=torch.tensor([[position]]), **past(fused, cache))
            found.append(step.logits[:, -1:].argmax(-1))
    assert torch.equal(torch.cat(found, 1), expected)
    assert {"taut.fused_linear", "taut.split_rope"} <= ops
    assert "taut.quant_linear" not in ops


def test_exported():
    _, fused = pair("qwen2")
    ids = prompt(1, 20)
    with torch.no_grad():
        exported = torch.export.export(fused, (ids,), {"use_cache": False}, strict=False)
        assert_close(exported.module()(ids, use_cache=False).logits, fused(ids).logits)


def test_gradient_checkpointing():
    plain, fused = pair("llama")
    ids = prompt(2, 20)
    for model in (plain, fused):
        model.gradient_checkpointing_enable()
        model.train()
        model(ids, labels=ids, use_cache=False).loss.backward()
    for (name, one), other in zip(plain.named_parameters(), fused.parameters(), strict=True):
        if one.requires_grad:
            assert torch.equal(one.grad, other.grad), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", ["int4", "int8", "nf4"])
def test_rounding_of_fast_arithmetic(weights, dtype):
    """int8 activations and 16-bit numbers: the fused path is as near to exact arithmetic as the modules are."""
    exact, _ = pair("qwen3", "float", weights=weights)
    plain, fused = pair("qwen3", "auto", dtype, weights=weights)
    ids, sizes = prompt(2, 30), (20, 1, 4, 1, 1, 1, 1, 1)
    truth, one, other = (steps(model, ids, sizes).float() for model in (exact, plain, fused))
    assert (other - truth).norm() <= 1.3 * (one - truth).norm()


def state_equals(model: torch.nn.Module, other: torch.nn.Module) -> bool:
    one, two = model.state_dict(), other.state_dict()
    return list(one) == list(two) and all(torch.equal(one[key], two[key]) for key in one)


def test_the_modules_and_their_state_stay_what_they_were():
    plain, fused = pair("qwen2")
    assert [(name, type(m).__name__) for name, m in plain.named_modules()] == [
        (name, type(m).__name__) for name, m in fused.named_modules()
    ]
    assert [name for name, _ in plain.named_parameters()] == [name for name, _ in fused.named_parameters()]
    assert state_equals(plain, fused)
    layer = fused.model.layers[0]
    assert isinstance(layer, type(plain.model.layers[0]))
    attention = layer.self_attn
    parts = [attention.q_proj, attention.k_proj, attention.v_proj]
    assert len({part.packed.untyped_storage().data_ptr() for part in parts}) == 1
    assert parts[0].packed.untyped_storage().nbytes() == sum(part.packed.numel() for part in parts)
    x = torch.randn(3, 64)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        assert torch.equal(getattr(attention, name)(x), getattr(plain.model.layers[0].self_attn, name)(x))


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3"])
def test_saved_and_loaded_again(family, tmp_path, calls):
    plain, fused = pair(family, "auto")
    ids = prompt(1, 20)
    expected = steps(fused, ids, (18, 1, 1))
    taut.save(fused, tmp_path / "fused")
    taut.save(plain, tmp_path / "plain")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("fused", "plain")]
    assert files[0] == files[1]
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "fused")
    assert all(entry.reason is None for entry in again.taut_report.fused)
    # WHY a copy: what is loaded lies where it lay in the file, and the last bits of MKL's sums depend on that
    again.lm_head.weight = torch.nn.Parameter(again.lm_head.weight.clone())
    calls.take()
    assert torch.equal(steps(again, ids, (18, 1, 1)), expected)
    assert calls.take() == (2, 2)


def test_streamed_from_a_float_checkpoint(tmp_path):
    tiny("gemma3").save_pretrained(tmp_path)
    load = transformers.AutoModelForCausalLM.from_pretrained
    fused = load(tmp_path, quantization_config=taut.Config(activations="float", strict=True))
    plain = load(tmp_path, quantization_config=taut.Config(activations="float", fuse=False))
    assert fused.taut_report.summary.endswith("fused 2 of 2 decoder layers")
    assert "fused" not in plain.taut_report.summary
    ids = prompt(1, 20)
    assert_close(steps(fused, ids, (18, 1, 1)), steps(plain, ids, (18, 1, 1)))
    with pytest.raises(
        ValueError, match=r"strict=True: 1 of 2 decoder layers cannot be fused: model.layers.1: q_proj is not a low-bit layer"
    ):
        load(tmp_path, quantization_config=taut.Config(skip=["layers.1.self_attn.q_proj"], strict=True))


def copied(model):
    return copy.deepcopy(model)


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def pickled(model):
    import pickle

    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("again", [copied, saved_and_loaded, pickled])
def test_copies_are_fused_too_and_hold_no_more(again, calls):
    _, fused = pair("qwen2")
    ids = prompt(1, 20)
    expected = steps(fused, ids, (18, 1, 1))
    other = again(fused)
    calls.take()
    assert torch.equal(steps(other, ids, (18, 1, 1)), expected)
    assert calls.take() == (2, 2)
    mine = {m.packed.untyped_storage().data_ptr() for m in fused.modules() if isinstance(m, QuantLinear)}
    storages = {
        m.packed.untyped_storage().data_ptr(): m.packed.untyped_storage().nbytes() for m in other.modules() if isinstance(m, QuantLinear)
    }
    assert not mine & set(storages)
    assert sum(storages.values()) == sum(m.packed.numel() for m in other.modules() if isinstance(m, QuantLinear))
    other.model.layers[0].self_attn.q_proj.packed.zero_()
    assert torch.equal(steps(fused, ids, (18, 1, 1)), expected)


def test_another_dtype_and_another_state(calls):
    plain, fused = pair("qwen2")
    ids = prompt(1, 20)
    steps(fused, ids, (18, 1, 1))
    other = copy.deepcopy(fused)
    one, two = other.model.layers
    one.self_attn.q_proj.packed, two.self_attn.q_proj.packed = two.self_attn.q_proj.packed, one.self_attn.q_proj.packed.clone()
    one.self_attn.k_proj.bias.data.zero_()
    with torch.no_grad():
        unfused = copy.deepcopy(other)
        taut.unfuse(unfused)
        assert_close(steps(other, ids, (18, 1, 1)), steps(unfused, ids, (18, 1, 1)))
        other.load_state_dict(fused.state_dict())
        assert torch.equal(steps(other, ids, (18, 1, 1)), steps(fused, ids, (18, 1, 1)))
        calls.take()
        half, expected = fused.to(torch.bfloat16), plain.to(torch.bfloat16)
        found = steps(half, ids, (18, 1, 1))
        assert calls.take() == (2, 2)
        assert (found - steps(expected, ids, (18, 1, 1))).float().norm() < 0.1 * found.float().norm()
        half.model.layers[1].input_layernorm.to(torch.float16)  # the ops take no such mixture
        calls.take()
        half.model(ids)
        assert calls.take() == (1, 0)


def test_training_is_that_of_the_modules(calls):
    plain, fused = pair("qwen2")
    ids = prompt(2, 20)
    steps(fused, ids, (18, 2))
    calls.take()
    for model in (plain, fused):
        model.train()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.05)
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    assert calls.take() == (0, 0)
    for (name, one), other in zip(plain.named_parameters(), fused.parameters(), strict=True):
        assert torch.equal(one, other), name
    assert_close(steps(fused.eval(), ids, (18, 1, 1)), steps(plain.eval(), ids, (18, 1, 1)))  # sees the biases that were trained
    assert calls.take() == (2, 2)
    fused(ids)  # in grad mode, with parameters to train
    assert calls.take() == (0, 0)
    for parameter in fused.parameters():
        parameter.requires_grad_(False)
    fused(ids)
    assert calls.take() == (2, 0)


def test_lora_trains_beside_it_and_goes_again(calls):
    peft = pytest.importorskip("peft")
    _, fused = pair("llama")
    ids = prompt(2, 20)
    expected = steps(fused, ids, (18, 1, 1))
    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], layers_to_transform=[0], layers_pattern="layers")
    model = peft.get_peft_model(fused, settings)
    calls.take()
    assert_close(steps(model, ids, (18, 1, 1)), expected)
    assert calls.take() == (3, 0)  # the other layer
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    again = model.eval().unload()
    calls.take()
    assert torch.equal(steps(again, ids, (18, 1, 1)), expected)
    assert calls.take() == (2, 2)


def test_hooks_and_replaced_forwards_are_heard(calls):
    _, fused = pair("llama")
    ids = prompt(1, 20)
    expected = steps(fused, ids, (18, 1, 1))
    seen = []
    handle = fused.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: seen.append(1))
    calls.take()
    assert_close(steps(fused, ids, (18, 1, 1)), expected)
    assert (len(seen), *calls.take()) == (3, 3, 0)
    handle.remove()
    handle = fused.model.layers[1].register_forward_pre_hook(lambda *_: seen.append(1))
    steps(fused, ids, (18, 1, 1))
    assert (len(seen), *calls.take()) == (6, 6, 0)
    handle.remove()
    norm = fused.model.layers[0].post_attention_layernorm
    norm.forward = lambda x: 2 * type(norm).forward(norm, x)
    assert not torch.allclose(steps(fused, ids, (18, 1, 1)), expected, atol=0.1)
    del norm.forward
    calls.take()
    assert torch.equal(steps(fused, ids, (18, 1, 1)), expected)
    assert calls.take() == (2, 2)


def test_calls_that_are_for_the_original_forward(calls):
    plain, fused = pair("llama")
    ids = prompt(2, 20)
    square = torch.ones(2, 1, 20, 20, dtype=torch.bool).tril()
    square[:, :, :, 3] = False
    for given in (
        {"attention_mask": square}, {"use_cache": False}, {"inputs_embeds": torch.randn(2, 20, 64), "input_ids": None},
        {"position_ids": torch.arange(20)[None] + 5}, {"return_dict": False},
    ):  # fmt: skip
        arguments = {"input_ids": ids, **given}
        with torch.no_grad():
            assert_close(fused(**arguments)[0], plain(**arguments)[0])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        calls.take()
        fused(ids)
        assert calls.take() == (0, 0)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_cache_in_other_hands(family, calls):
    """Cropped, reordered, repeated, reset, copied, converted from one that was filled elsewhere: always the numbers of the stock one."""
    plain, fused = pair(family)
    ids = prompt(3, 32)

    def script(model: torch.nn.Module) -> list[torch.Tensor]:
        cache = transformers.DynamicCache(config=model.config)
        found = [steps(model, ids[:, :6], (5, 1), cache)]
        kept = [layer.keys for layer in cache.layers]
        before = [keys.clone() for keys in kept]
        cache.crop(-2)
        found.append(steps(model, ids[:, 6:9], (1, 1, 1), cache))
        assert all(torch.equal(one, other) for one, other in zip(kept, before, strict=True))  # a view that was handed out
        cache.reorder_cache(torch.tensor([2, 0, 0]))
        found.append(steps(model, ids[:, 9:21], (1, 10, 1), cache))
        other = copy.deepcopy(cache)
        cache.batch_select_indices(torch.tensor([1, 2]))
        found.append(steps(model, ids[:2, 21:24], (1, 2), cache))
        cache.batch_repeat_interleave(2)
        found.append(steps(model, ids[:1, 24:26].repeat(4, 1), (1, 1), cache))
        found.append(steps(model, ids[:, 21:24], (1, 1, 1), other))
        data = [(layer.keys, layer.values) for layer in other.layers]
        assert all(keys.shape == values.shape for keys, values in data)
        other.reset()
        assert other.get_seq_length() == 0
        found.append(steps(model, ids[:1, :4], (3, 1), other))
        return found

    expected = script(plain)
    calls.take()
    for one, other in zip(script(fused), expected, strict=True):
        assert_close(one, other)
    assert calls.take()[1] == 17
    filled = transformers.DynamicCache(config=plain.config)
    steps(plain, ids[:, :12], (12,), filled)
    other = copy.deepcopy(filled)
    assert_close(steps(fused, ids[:, 12:15], (1, 1, 1), filled), steps(plain, ids[:, 12:15], (1, 1, 1), other))


def test_a_cache_made_in_inference_mode():
    plain, fused = pair("llama")
    ids = prompt(1, 12)
    caches = [transformers.DynamicCache(config=plain.config) for _ in range(2)]
    with torch.inference_mode():
        for model, cache in zip((plain, fused), caches, strict=True):
            model(ids, **past(model, cache))
    expected, found = (steps(model, ids, (1, 1, 3), cache) for model, cache in zip((plain, fused), caches, strict=True))
    assert_close(found, expected)


def test_a_model_made_in_inference_mode(calls):
    with torch.inference_mode():
        plain, fused = pair("qwen2")
        ids = prompt(1, 20)
        expected, found = (
            model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0) for model in (plain, fused)
        )
    assert torch.equal(found, expected)
    assert calls.take() == (2, 5)


def test_what_cannot_be_fused_is_named():
    model = tiny("llama")
    report = taut.swap(model, rules={"*.layers.0.*.k_proj": {"weights": "int8"}, "layers.1.mlp.down_proj": None})
    reasons = {entry.name: entry.reason for entry in report.fused}
    assert reasons["model.layers.0"] == "q_proj, k_proj and v_proj differ in format, activations or bias"
    assert reasons["model.layers.1"] == "down_proj is not a low-bit layer (it is a Linear)"
    assert reasons["model"] == "model.layers.0 is not fused"
    assert report.summary.endswith("fused 0 of 2 decoder layers")
    assert "not fused model.layers.1: down_proj is not a low-bit layer" in str(report)
    steps(model, prompt(), (10, 2))

    assert "nvfp4" in taut.swap(tiny("llama"), "nvfp4").fused[0].reason
    odd = taut.swap(tiny("llama", hidden_act="relu")).fused
    assert odd[0].reason == "its activation function ReLU is none that a fused op computes"
    narrow = taut.swap(tiny("llama", intermediate_size=92)).fused
    assert narrow[0].reason == "gate_proj has 92 outputs, not a multiple of 8"


def test_models_without_decoder_layers_are_swapped_as_ever():
    config = transformers.BertConfig(vocab_size=50, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64)
    model = transformers.BertModel(config).eval()
    report = taut.swap(model)
    assert [(entry.name, entry.reason) for entry in report.fused] == [("encoder.layer.0", "taut has no fused block for BertLayer")]
    assert not any(isinstance(module, FusedClass) for module in model.modules())
    model = torch.nn.Sequential(torch.nn.Linear(64, 64))
    assert taut.swap(model).fused == []
    with pytest.raises(ValueError, match="fuse=True, but nothing in this model can be fused: it has no decoder layers"):
        taut.swap(torch.nn.Sequential(torch.nn.Linear(64, 64)), fuse=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strict": True, "skip": ["layers.0.mlp.up_proj"]}, "1 of 2 decoder layers cannot be fused: model.layers.0: up_proj is not"),
        ({"strict": True, "weights": "nvfp4"}, "2 of 2 decoder layers cannot be fused"),
        ({"fuse": True, "skip": ["up_proj"]}, "fuse=True, but nothing in this model can be fused: model.layers.0: up_proj"),
        ({"fuse": "yes"}, "fuse must be 'auto', True or False, got 'yes'"),
        ({"fuse": 1}, "fuse must be 'auto', True or False, got 1"),
        ({"strict": 1}, "strict must be True or False"),
        ({"strict": True, "fuse": False}, "give one of them"),
    ],
)  # fmt: skip
def test_refused_settings_leave_the_model_as_it_was(arguments, message):
    model = tiny("llama")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    types = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        taut.swap(model, **arguments)
    assert [type(module) for module in model.modules()] == types
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_changes_between_two_tokens_are_seen(calls):
    _, fused = pair("llama")
    ids, cache = prompt(1, 24), transformers.DynamicCache()
    steps(fused, ids, (18, 1, 1), cache)
    seen = []
    calls.take()
    handle = fused.model.layers[1].mlp.register_forward_hook(lambda *_: seen.append(1))
    steps(fused, ids, (1,), cache)
    assert (len(seen), *calls.take()) == (1, 1, 0)
    handle.remove()
    steps(fused, ids, (1,), cache)
    assert calls.take() == (0, 1)
    fused.model.layers[1].mlp.up_proj = torch.nn.Linear(64, 96, bias=False)
    steps(fused, ids, (1, 1), cache)
    assert calls.take() == (2, 0)


@pytest.mark.parametrize("masked", [False, True], ids=["causal", "masked"])
@pytest.mark.parametrize("queries, keys", [(20, 20), (5, 40), (20, 40), (1, 40)])
def test_attention_is_that_of_sdpa(queries, keys, masked):
    _, fused = pair("llama", "auto")
    plan = fused_block.plan_of(fused.model.layers[0])
    sdpa = transformers.AttentionInterface()["sdpa"]
    generator = torch.Generator().manual_seed(queries)
    q, k, v = (
        torch.randn(2, heads, n, plan.head_dim, generator=generator)
        for heads, n in ((plan.q_heads * 4, queries), (plan.kv_heads, keys), (plan.kv_heads, keys))
    )
    mask = None
    if masked:
        mask = torch.ones(2, 1, queries, keys, dtype=torch.bool).tril(keys - queries)
        mask[1, :, :, :2] = False  # padding on the left
    found = fused_block.own_attention(plan, sdpa, q, k, v, mask, {})
    if not masked and 1 < queries != keys:
        assert found is None
        return
    plan.attention.num_key_value_groups = plan.q_heads * 4 // plan.kv_heads
    expected, _ = sdpa(plan.attention, q, k, v, mask, scaling=plan.attention.scaling)
    seen = torch.ones(2, queries, dtype=torch.bool) if mask is None else mask.any(-1)[:, 0]
    assert_close(found[seen], expected[seen])
    assert fused_block.own_attention(plan, lambda *_: None, q, k, v, mask, {}) is None
    assert fused_block.own_attention(plan, sdpa, q, k, v, mask, {"position_bias": q}) is None
