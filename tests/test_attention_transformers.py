"""The attention function "taut" of transformers: what the other functions give, for every family of models and every argument."""

from __future__ import annotations

import copy
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import taut
from taut.integrations import attention
from taut.nn import attention as own
from tiny_models import FAMILIES, tiny

SIZES = {"vocab_size": 200, "max_position_embeddings": 64, "initializer_range": 0.2}


class Calls:
    """Counts what the function's calls end in: taut's ops by name, and torch."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.own = self.torch = 0
        for module, names, kind in ((own, ("attend", "attend_cache"), "own"), (attention, ("_plain", "sdpa_attention_forward"), "torch")):
            for name in names:
                monkeypatch.setattr(module, name, self.counting(getattr(module, name), kind))

    def counting(self, function, kind):
        def call(*args, **kwargs):
            setattr(self, kind, getattr(self, kind) + 1)
            return function(*args, **kwargs)

        return call

    def take(self) -> tuple[int, int]:
        found = self.own, self.torch
        self.own = self.torch = 0
        return found


@pytest.fixture
def calls(monkeypatch):
    return Calls(monkeypatch)


def prompt(batch: int = 2, length: int = 19, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 200, (batch, length), generator=torch.Generator().manual_seed(seed))


def padded(batch: int = 2, length: int = 19) -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = prompt(batch, length), torch.ones(batch, length, dtype=torch.int64)
    mask[0, :6] = 0
    return ids, mask


def generate(model, ids, mask, **arguments) -> torch.Tensor:
    settings = {"max_new_tokens": 16, "do_sample": False, **arguments}
    return model.generate(ids, attention_mask=mask, eos_token_id=None, pad_token_id=0, **settings)


def gpt2() -> torch.nn.Module:
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=48, n_layer=2, n_head=3, n_positions=64, **SIZES)).eval()


def gpt_oss() -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        sliding_window=8, num_local_experts=2, num_experts_per_tok=1, **SIZES,
    )  # fmt: skip
    return transformers.GptOssForCausalLM(config).eval()


DECODERS = {**{family: (lambda family=family: tiny(family)) for family in FAMILIES}, "gpt2": gpt2, "gpt_oss": gpt_oss}


@pytest.mark.parametrize("name", DECODERS)
def test_generate_writes_what_eager_does(name, calls):
    model = DECODERS[name]()
    ids, mask = padded()
    found = {}
    for function in ("eager", "taut"):
        model.set_attn_implementation(function)
        calls.take()
        found[function] = [generate(model, ids, mask), generate(model, ids, mask, num_beams=3)]
    assert calls.take() == (2 * 2 * 16, 0)  # layers, calls of generate, steps
    assert all(torch.equal(*pair) for pair in zip(*found.values(), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(dtype, calls):
    model = tiny("gemma2").to(dtype)
    ids, mask = padded()
    with torch.no_grad():
        exact = tiny("gemma2")(ids, attention_mask=mask).logits[mask.bool()]
        found = []
        for function in ("eager", "taut"):
            model.set_attn_implementation(function)
            found.append((model(ids, attention_mask=mask).logits[mask.bool()] - exact).abs().max())
    assert calls.take() == (2, 0)
    assert found[1] <= 1.5 * found[0]


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "gpt2"])
def test_a_left_padded_batch_is_each_prompt_alone(name):
    model = DECODERS[name]()
    model.set_attn_implementation("taut")
    ids, mask = padded()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        batch = model(ids, attention_mask=mask, position_ids=positions).logits
        for row in range(2):
            seen = mask[row].bool()
            alone = model(ids[row, seen][None]).logits[0]
            torch.testing.assert_close(batch[row, seen], alone, atol=1e-4 * float(alone.abs().max()), rtol=0)


def bert() -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 3}
    return transformers.BertModel(transformers.BertConfig(**sizes, **SIZES)).eval()


def modern_bert() -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 3}
    config = transformers.ModernBertConfig(
        **sizes, **SIZES, local_attention=8, global_attn_every_n_layers=2, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        cls_token_id=1, sep_token_id=2,
    )  # fmt: skip
    return transformers.ModernBertModel(config).eval()


@pytest.mark.parametrize("make", [bert, modern_bert])
@pytest.mark.parametrize("side", ["right", "left", None])
def test_encoders(make, side, calls):
    model = make()
    ids, mask = prompt(3, 24), torch.ones(3, 24, dtype=torch.int64)
    if side is not None:
        mask[0, slice(14, None) if side == "right" else slice(0, 10)] = 0
    found = []
    with torch.no_grad():
        for function in ("eager", "taut"):
            model.set_attn_implementation(function)
            found.append(model(ids, attention_mask=mask).last_hidden_state[mask.bool()])
    assert calls.take() == (2, 0)
    torch.testing.assert_close(found[1], found[0], atol=1e-4, rtol=1e-4)


def test_encoder_and_decoder(calls):
    torch.manual_seed(0)
    sizes = {"d_model": 48, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 200}
    heads = {"encoder_attention_heads": 3, "decoder_attention_heads": 3, "max_position_embeddings": 64}
    ends = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": None}
    model = transformers.BartForConditionalGeneration(transformers.BartConfig(**sizes, **heads, **ends, init_std=0.3)).eval()
    ids, mask = padded()
    found = []
    for function in ("eager", "taut"):
        model.set_attn_implementation(function)
        found.append(generate(model, ids, mask, max_new_tokens=8))
    assert calls.take()[1] == 0
    assert torch.equal(*found)


def heads(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def module(causal: bool = True, groups: int = 2) -> SimpleNamespace:
    return SimpleNamespace(is_causal=causal, num_key_value_groups=groups, training=False)


def inputs(queries: int = 9, keys: int = 9, dim: int = 16, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    sizes = ((4, queries), (2, keys), (2, keys))
    return [heads(2, count, length, dim, seed=seed).to(dtype) for seed, (count, length) in enumerate(sizes)]


CALLS = {
    "causal": {}, "not causal": {"is_causal": False}, "its own scale": {"scaling": 0.3},
    "bool mask": {"attention_mask": heads(2, 1, 9, 9) > -1.0}, "additive mask": {"attention_mask": heads(1, 4, 9, 9)},
    "float mask": {"attention_mask": torch.zeros(2, 1, 1, 9).index_fill(3, torch.tensor([1, 2]), -torch.inf)},
    "position bias": {"position_bias": heads(1, 4, 9, 9)},
    "position bias, not causal": {"position_bias": heads(1, 4, 9, 9), "is_causal": False},
    "position bias and mask": {"position_bias": heads(1, 4, 9, 9), "attention_mask": heads(2, 1, 9, 9) > -1.0},
    "position bias and additive mask": {"position_bias": heads(1, 4, 9, 9), "attention_mask": heads(2, 1, 9, 9)},
}  # fmt: skip


@pytest.mark.parametrize("arguments", CALLS.values(), ids=CALLS)
def test_is_what_sdpa_gives(arguments, calls):
    q, k, v = inputs()
    given = {"attention_mask": None, **arguments}
    expected, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](module(), q, k, v, **given)
    found, weights = attention.attention_forward(module(), q, k, v, **given)
    assert weights is None and found.is_contiguous()
    assert calls.take() == (1, 0)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


REFUSED = {
    "gradients": ({}, lambda q, k, v: (q.requires_grad_(), k, v)),
    "gradients of values": ({}, lambda q, k, v: (q, k, v.requires_grad_())),
    "gradients of a bias": ({"position_bias": heads(1, 4, 9, 9).requires_grad_()}, None),
    "float64": ({}, lambda q, k, v: (q.double(), k.double(), v.double())),
    "a head dim of 288": ({}, lambda q, k, v: (q.repeat(1, 1, 1, 18), k.repeat(1, 1, 1, 18), v.repeat(1, 1, 1, 18))),
    "more queries than keys": ({}, lambda q, k, v: (q, k[:, :, :5], v[:, :, :5])),
    "a mask of three dimensions": ({"attention_mask": torch.ones(4, 9, 9, dtype=torch.bool).tril()}, None),
    "recorded weights": ({"output_attentions": True}, None),
}


@pytest.mark.parametrize(("arguments", "change"), REFUSED.values(), ids=REFUSED)
def test_what_the_ops_do_not_take_is_computed_by_torch(arguments, change, calls):
    q, k, v = inputs()
    q, k, v = (q, k, v) if change is None else change(q, k, v)
    given = {"attention_mask": None, **arguments}
    expected, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](module(), q, k, v, **given)
    found, _ = attention.attention_forward(module(), q, k, v, **given)
    assert calls.take() == (0, 1)
    assert torch.equal(found, expected)
    assert found.requires_grad == expected.requires_grad


def test_autocast_and_dropout_are_torchs(calls):
    q, k, v = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        expected, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](module(), q, k, v, None)
        found, _ = attention.attention_forward(module(), q, k, v, None)
    assert torch.equal(found, expected) and calls.take() == (0, 1)
    found = []
    for function in (ALL_ATTENTION_FUNCTIONS["sdpa"], attention.attention_forward):
        torch.manual_seed(3)
        found.append(function(module(), q, k, v, None, dropout=0.5)[0])
    assert torch.equal(*found) and calls.take() == (0, 1)


@pytest.mark.parametrize("mask", ["none", "bool", "additive"])
@pytest.mark.parametrize("arguments", [{"softcap": 2.0}, {"s_aux": heads(4)}, {"softcap": 2.0, "s_aux": heads(4)}, {"sliding_window": 3}])
def test_softcap_sinks_and_windows_by_the_ops_and_by_torch(arguments, mask, calls):
    """Both ways give the same, so that training and inference see one model."""
    q, k, v = inputs()
    given = {"none": None, "bool": heads(2, 1, 9, 9) > -1.0, "additive": heads(2, 1, 9, 9)}[mask]
    found, _ = attention.attention_forward(module(), q, k, v, given, **arguments)
    assert calls.take() == (1, 0)
    expected, _ = attention.attention_forward(module(), q.clone().requires_grad_(), k, v, given, **arguments)
    assert calls.take() == (0, 1)
    torch.testing.assert_close(found, expected.detach(), atol=1e-5, rtol=1e-5)
    if "sliding_window" in arguments and mask == "none":
        every, _ = attention.attention_forward(module(), q, k, v, None)
        assert not torch.allclose(found, every)


def test_a_hidden_query_gets_zeros():
    q, k, v = inputs()
    mask = torch.ones(2, 1, 9, 9, dtype=torch.bool)
    mask[0, :, :3] = False
    found, _ = attention.attention_forward(module(), q, k, v, mask)
    assert found.isfinite().all() and not found[0, :3].any() and found[0, 3:].all()


def test_a_static_cache_of_transformers(calls):
    model = tiny("gemma3")
    ids, mask = padded()
    found = []
    for function in ("eager", "taut"):
        model.set_attn_implementation(function)
        found.append(generate(model, ids, mask, cache_implementation="static", disable_compile=True))
    assert calls.take()[1] == 0
    assert torch.equal(*found)


def test_training_goes_through_torch():
    grads = []
    for function in ("eager", "taut"):
        model = tiny("gemma2")
        model.set_attn_implementation(function)
        model.train()
        ids = prompt()
        model(ids, labels=ids, use_cache=False).loss.backward()
        grads.append([p.grad for p in model.parameters()])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_from_pretrained_and_swap(tmp_path):
    model = tiny("llama")
    model.save_pretrained(tmp_path / "float")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "float", attn_implementation="taut")
    assert loaded.config._attn_implementation == "taut"
    swapped = copy.deepcopy(model)
    report = taut.swap(swapped, "int8", attention=True)
    assert report.attention and "attention by taut" in report.summary
    assert swapped.config._attn_implementation == "taut"
    assert not taut.swap(copy.deepcopy(model), "int8").attention
    config = taut.Config("int8", attention=True)
    packed = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config)
    assert packed.taut_report.attention and packed.config._attn_implementation == "taut"
    packed.save_pretrained(tmp_path / "packed")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert again.config._attn_implementation == "taut"
    ids, mask = padded()
    expected = generate(swapped, ids, mask)
    assert torch.equal(generate(packed, ids, mask), expected)
    assert torch.equal(generate(again, ids, mask), expected)
    with pytest.raises(ValueError, match="attention"):
        taut.Config(attention="yes")
    with pytest.raises(ValueError, match="transformers models"):
        taut.swap(torch.nn.Sequential(torch.nn.Linear(32, 32)), "int8", attention=True)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fuse", ["auto", False])
def test_swapped_models(family, fuse):
    """Fused or not, and whoever attends: the same tokens."""
    plain, taken = tiny(family), tiny(family)
    taut.swap(plain, "int8", activations="float", fuse=False)
    taut.swap(taken, "int8", activations="float", fuse=fuse, attention=True)
    plain.set_attn_implementation("eager")
    ids, mask = padded()
    for arguments in ({}, {"num_beams": 3}, {"cache_implementation": "static", "disable_compile": True}):
        assert torch.equal(generate(taken, ids, mask, **arguments), generate(plain, ids, mask, **arguments))


def test_registered_where_taut_is_imported_first():
    code = (
        "import taut; from transformers import LlamaConfig, LlamaForCausalLM;"
        "c = LlamaConfig(vocab_size=9, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2);"
        "m = LlamaForCausalLM._from_config(c, attn_implementation='taut'); print(m.config._attn_implementation)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["taut"]
