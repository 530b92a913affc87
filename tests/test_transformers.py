"""transformers: Config, streaming load, save and reload bit for bit, generation, compile and export, hostile checkpoints."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

import taut
from checks import assert_same_bits
from taut import QuantLinear, _native
from taut.integrations import transformers as ours
from tiny_models import byte_tokenizer, tiny_llama, write_checkpoint, write_gguf

IDS = torch.arange(3, 27)[None]
Q_PROJ = "model.layers.0.self_attn.q_proj"
FORMATS = [
    {"weights": "int4"},
    {"weights": "int4", "group_size": 64, "zeros": True},
    {"weights": "int4", "group_size": 0, "activations": "float"},
    {"weights": "int8"},
    {"weights": "int8", "group_size": 128, "activations": "float"},
    {"weights": "int8", "activations": "int8_row"},
    {"weights": "fp8_e4m3"},
]
CPU_FORMATS = [
    {"weights": "ternary", "group_size": 32},
    {"weights": "int2", "zeros": True},
    {"weights": "int3", "activations": "int8_outliers"},
    {"weights": "nf4"},
    {"weights": "mxfp4", "activations": "float"},
    {"weights": "nvfp4"},
    {"weights": "fp8_block"},
]
THREE = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A tiny float32 Llama, its output head tied to the embeddings, and a tokenizer."""
    return write_checkpoint(tmp_path_factory.mktemp("float") / "llama")


@pytest.fixture
def saved(checkpoint, tmp_path) -> Path:
    """The same in int4 with zeros, as taut saves it; a test may damage it."""
    model = load(checkpoint, group_size=64, zeros=True)
    taut.save(model, tmp_path / "saved")
    return tmp_path / "saved"


def load(folder, dtype=torch.float32, auto=AutoModelForCausalLM, **settings):
    return auto.from_pretrained(folder, dtype=dtype, quantization_config=taut.Config(**settings))


def reload(folder, auto=AutoModelForCausalLM, **arguments):
    return auto.from_pretrained(folder, **arguments)


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(IDS).logits


def formats(model: nn.Module) -> dict[str, str]:
    return {name: f"{m.format}, {m.activations}" for name, m in model.named_modules() if isinstance(m, QuantLinear)}


def kept(model: nn.Module) -> dict[str, str]:
    return {entry.name: entry.reason for entry in model.taut_report.kept}


def assert_same_model(a: nn.Module, b: nn.Module) -> None:
    """The same modules in the same formats, the same state and the same logits, bit for bit."""
    assert formats(a) == formats(b)
    ours, theirs = a.state_dict(), b.state_dict()
    assert list(ours) == list(theirs)
    for key, value in ours.items():
        assert value.dtype == theirs[key].dtype, key
        assert_same_bits(value, theirs[key], key)
    if hasattr(a, "lm_head"):
        assert torch.equal(logits(a), logits(b))


def run_python(program: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


# Config


@pytest.mark.parametrize("settings", [*FORMATS, {"skip": ["lm_head"], "rules": {"*.mlp.*": None, "q_proj": {"weights": "int8"}}}])
def test_config_round_trips_through_json(settings):
    config = taut.Config(**settings)
    again = taut.Config.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert json.loads(config.to_json_string(use_diff=False)) == config.to_dict()
    assert config.to_dict()["quant_method"] == "taut"
    assert again.weights == settings.get("weights", "int4")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": "int5"}, "unknown weight format 'int5'; accepted: ternary, int2, int3, int4"),
        ({"weights": None}, "weights must be"),
        ({"group_size": 16}, "group_size 16 does not fit; accepted: 32, 64, 128"),
        ({"weights": "int8", "zeros": True}, "int4 only"),
        ({"activations": "fp8"}, "unknown activations 'fp8'; accepted: auto, float, int8"),
        ({"skip": "lm_head"}, "skip must be a list"),
        ({"rules": {"mlp": {"bits": 4}}}, "rule 'mlp': unknown key 'bits'"),
        ({"rules": []}, "rules must map"),
        ({"modules": [{"names": ["a"]}]}, "modules: .* is unknown or missing"),
    ],
)
def test_config_refuses_at_construction(settings, message):
    with pytest.raises(ValueError, match=message):
        taut.Config(**settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 4}, "unknown key 'bits'; accepted: weights, group_size"),
        ({"quant_method": "gptq"}, "quant_method is 'gptq'"),
        ({"version": 2}, "format version 2; this taut reads version 1"),
        ({"weights": "int5"}, "unknown weight format 'int5'"),
    ],
)
def test_config_refuses_what_it_reads(change, message):
    with pytest.raises(ValueError, match=message):
        taut.Config.from_dict({**taut.Config().to_dict(), **change})


def test_a_config_serves_more_than_one_model(checkpoint):
    config = taut.Config(weights="int8")
    before = config.to_dict()
    for _ in range(2):
        model = AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=config)
        assert len(formats(model)) == 14
    assert config.to_dict() == before


# Import order


def test_taut_imports_without_transformers_and_without_peft():
    program = """
import sys
sys.modules["transformers"] = sys.modules["peft"] = None  # as if neither were installed
import taut, torch
model = torch.nn.Sequential(torch.nn.Linear(64, 64))
print(len(taut.swap(model).swapped))
try:
    taut.Config
except ImportError as error:
    print("transformers" in str(error))
"""
    assert run_python(program).split() == ["1", "True"]


def test_taut_does_not_import_transformers():
    assert run_python("import sys, taut; print('transformers' in sys.modules)") == "False"


@pytest.mark.parametrize("imports", ["import taut, transformers", "import transformers, taut", "import transformers.quantizers, taut"])
def test_a_checkpoint_loads_with_only_import_taut(saved, tmp_path, imports):
    torch.save(logits(reload(saved)), tmp_path / "expected.pt")
    program = f"""
{imports}
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(saved)!r})
with torch.no_grad():
    found = model(torch.arange(3, 27)[None]).logits
print(torch.equal(found, torch.load({str(tmp_path / "expected.pt")!r})))
"""
    assert run_python(program) == "True"


def test_without_taut_no_low_bit_tensor_passes_for_a_weight(saved):
    state = load_file(saved / "model.safetensors")
    low = {name.rpartition(".")[0] for name in state if name.endswith(".qweight")}
    assert len(low) == 14
    assert not any(f"{name}.weight" in state for name in low)


# Loading, saving, loading again


@pytest.mark.parametrize(
    ("settings", "dtype"),
    [(settings, dtype) for settings in FORMATS for dtype in THREE] + [(settings, THREE[i % 3]) for i, settings in enumerate(CPU_FORMATS)],
    ids=str,
)
def test_streamed_equals_swapped_equals_reloaded(checkpoint, tmp_path, settings, dtype):
    streamed = load(checkpoint, dtype, **settings)
    swapped = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype)
    report = taut.swap(swapped, **settings)
    assert_same_model(streamed, swapped)
    assert [entry.name for entry in report.swapped] == list(formats(swapped))
    assert {e.name for e in streamed.taut_report.swapped} == {e.name for e in report.swapped}
    assert (streamed.taut_report.bytes_before, streamed.taut_report.bytes_after) == (report.bytes_before, report.bytes_after)
    assert kept(streamed) == kept(swapped)
    for number, model in enumerate((streamed, swapped)):
        model.save_pretrained(tmp_path / f"{number}")
        again = reload(tmp_path / f"{number}", dtype=dtype)
        assert_same_model(again, model)
        assert again.dtype == dtype
        assert again.hf_quantizer.quantization_config == model.config.quantization_config


def test_quantized_numbers_are_those_of_the_float_weights(checkpoint):
    model, dense = load(checkpoint, weights="int8"), reload(checkpoint)
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            weight = dense.get_submodule(name).weight
            assert (module.dequantize() - weight).abs().max() <= weight.abs().max() / 127
    assert nn.functional.cosine_similarity(logits(model).flatten(), logits(dense).flatten(), dim=0) > 0.998


def test_generates_the_same_text_after_reload(checkpoint, tmp_path):
    model = load(checkpoint)
    taut.save(model, tmp_path / "a", AutoTokenizer.from_pretrained(checkpoint))
    again, tokenizer = reload(tmp_path / "a"), AutoTokenizer.from_pretrained(tmp_path / "a")
    ids = tokenizer("Hello there", return_tensors="pt").input_ids
    texts = [m.generate(ids, max_new_tokens=24, do_sample=False) for m in (model, again)]
    assert texts[0].shape[1] > ids.shape[1]
    assert torch.equal(*texts)


def test_static_cache_generates_what_the_dynamic_one_does(checkpoint):
    model = load(checkpoint)
    dynamic = model.generate(IDS, max_new_tokens=16, do_sample=False)
    static = model.generate(IDS, max_new_tokens=16, do_sample=False, cache_implementation="static", disable_compile=True)
    assert torch.equal(dynamic, static)


def test_sharded_checkpoints(checkpoint, tmp_path):
    reload(checkpoint).save_pretrained(tmp_path / "float", max_shard_size="60KB")
    assert len(list((tmp_path / "float").glob("model-*.safetensors"))) > 2
    model = load(tmp_path / "float")
    assert_same_model(model, load(checkpoint))
    taut.save(model, tmp_path / "low", max_shard_size="30KB")
    assert len(list((tmp_path / "low").glob("model-*.safetensors"))) > 2
    assert_same_model(reload(tmp_path / "low"), model)
    taut.save(model, tmp_path / "low")  # and one file takes the place of many
    assert [path.name for path in sorted((tmp_path / "low").glob("model*"))] == ["model.safetensors"]
    assert_same_model(reload(tmp_path / "low"), model)


def test_rules_per_module(checkpoint, tmp_path):
    model = load(
        checkpoint, group_size=128, skip=["layers.1.self_attn"],
        rules={"*.down_proj": {"weights": "int8"}, "layers.0.mlp": {"activations": "float", "zeros": True}, "k_proj": None},
    )  # fmt: skip
    found = formats(model)
    assert len(found) == 9
    assert found["model.layers.0.mlp.down_proj"] == found["model.layers.1.mlp.down_proj"] == "int8 per row, auto"
    assert found["model.layers.0.mlp.up_proj"] == "int4 group 128 with zeros, float"
    assert found["model.layers.1.mlp.up_proj"] == found[Q_PROJ] == "int4 group 128, auto"
    assert kept(model)["model.layers.0.self_attn.k_proj"] == "left alone by rule 'k_proj'"
    assert kept(model)["model.layers.1.self_attn.v_proj"] == "left alone by skip 'layers.1.self_attn'"
    model.save_pretrained(tmp_path)
    assert_same_model(reload(tmp_path), model)


def test_a_tied_head_is_kept_and_named(checkpoint):
    model = load(checkpoint)
    assert kept(model)["lm_head"] == "its weight is tied to another module's"
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_report_counts_every_byte_once(saved, checkpoint):
    swapped = reload(checkpoint)
    taut.swap(swapped, group_size=64, zeros=True)
    for model in (load(checkpoint, group_size=64, zeros=True), reload(saved), swapped):
        report = model.taut_report
        matrices = {id(p): p.numel() * p.element_size() for p in model.parameters() if p.dim() > 1}
        assert sum(entry.bytes for entry in report.kept) == sum(matrices.values())
        assert report.bytes_after == sum(m.packed.numel() for m in model.modules() if isinstance(m, QuantLinear))


def test_a_tied_head_by_rule_gets_low_bits_of_its_own(checkpoint, tmp_path):
    model = reload(checkpoint)
    taut.swap(model, "int4", rules={"lm_head": {"weights": "int8"}})
    assert formats(model)["lm_head"] == "int8 per row, auto"
    assert type(model.model.embed_tokens.weight) is nn.Parameter
    taut.save(model, tmp_path / "a")
    assert_same_model(reload(tmp_path / "a"), model)


def untied(tmp_path) -> Path:
    model = tiny_llama()
    model.config.tie_word_embeddings = False
    model = transformers.LlamaForCausalLM(model.config)
    model.save_pretrained(tmp_path / "untied")
    return tmp_path / "untied"


def test_an_untied_head_is_kept_unless_a_rule_names_it(tmp_path):
    folder = untied(tmp_path)
    assert "output head is left in float by default" in kept(load(folder))["lm_head"]
    model = load(folder, rules={"lm_head": {"weights": "int8"}})
    assert formats(model)["lm_head"] == "int8 per row, auto"
    model.save_pretrained(tmp_path / "a")
    assert_same_model(reload(tmp_path / "a"), model)


def test_biases_come_along(tmp_path):
    config = transformers.Qwen2Config(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2
    )
    model = transformers.Qwen2ForCausalLM(config).eval()
    nn.init.normal_(model.model.layers[0].self_attn.q_proj.bias)
    model.save_pretrained(tmp_path / "float")
    low = load(tmp_path / "float")
    assert torch.equal(low.model.layers[0].self_attn.q_proj.bias, model.model.layers[0].self_attn.q_proj.bias)
    low.save_pretrained(tmp_path / "low")
    assert_same_model(reload(tmp_path / "low"), low)


def test_encoder_with_and_without_its_head(tmp_path):
    config = transformers.BertConfig(vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "float")
    model = load(tmp_path / "float", auto=transformers.AutoModelForSequenceClassification)
    assert len([name for name in formats(model) if name.startswith("bert.encoder.layer.")]) == 12
    assert torch.equal(model.bert.pooler.dense.bias, torch.zeros(64))
    model.save_pretrained(tmp_path / "low")
    again = reload(tmp_path / "low", transformers.AutoModelForSequenceClassification)
    assert_same_model(again, model)
    base = reload(tmp_path / "low", AutoModel)  # the encoder alone, out of a checkpoint of the whole
    assert set(formats(base)) == {name.removeprefix("bert.") for name in formats(model) if name.startswith("bert.")}
    with torch.no_grad():
        assert torch.equal(base(IDS).last_hidden_state, model.bert(IDS).last_hidden_state)


def test_gpt2_has_nothing_to_swap_and_says_why(tmp_path):
    config = transformers.GPT2Config(vocab_size=64, n_positions=32, n_embd=64, n_layer=1, n_head=4)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"nothing to swap(.|\n)*c_attn \(Conv1D\): Conv1D is not a linear layer taut knows"):
        load(tmp_path)


def test_fused_experts_are_kept_and_never_silently(tmp_path, caplog):
    config = transformers.Qwen3MoeConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "float")
    with caplog.at_level(logging.INFO, logger="taut"):
        model = load(tmp_path / "float")
    assert len(formats(model)) == 4  # attention
    experts = next(entry for entry in model.taut_report.kept if entry.name.endswith(".experts"))
    assert experts.reason == "fused experts are not supported yet"
    assert experts.bytes == 4 * (64 * 64 + 64 * 32) * 4
    assert "fused experts are not supported yet" in caplog.text
    assert "fused experts are not supported yet" in str(model.taut_report)
    model.save_pretrained(tmp_path / "low")
    assert_same_model(reload(tmp_path / "low"), model)


def test_the_report_and_the_line_in_the_log(checkpoint, caplog):
    with caplog.at_level(logging.INFO, logger="taut"):
        model = load(checkpoint)
    report = model.taut_report
    assert isinstance(report, taut.SwapReport)
    assert report.bytes_before == sum(m.in_features * m.out_features * 4 for m in model.modules() if isinstance(m, QuantLinear))
    lines = [record.getMessage() for record in caplog.records if record.name == "taut"]
    assert lines == [report.summary]
    assert "swapped 14 linear layers to int4 group 32, int8 activations" in lines[0]


def test_swapped_twice_is_saved_as_it_is(checkpoint, tmp_path):
    model = reload(checkpoint)
    taut.swap(model, "int8", skip=["mlp"])
    taut.swap(model, "int4")
    assert sorted(set(formats(model).values())) == ["int4 group 32, auto", "int8 per row, auto"]
    taut.save(model, tmp_path / "a")
    assert_same_model(reload(tmp_path / "a"), model)


def test_dequantize_gives_the_float_model_back(checkpoint):
    model = load(checkpoint, weights="int8", activations="float")
    expected = logits(model)
    model.dequantize()
    assert formats(model) == {}
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-3)


def test_gguf_goes_through_swap(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf")
    with pytest.raises(ValueError, match="GGUF"):
        AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, quantization_config=taut.Config())
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    taut.swap(model, "int4")
    taut.save(model, tmp_path / "low")
    assert_same_model(reload(tmp_path / "low"), model)


# Compile and export


def test_compiles_and_exports_without_a_graph_break(checkpoint):
    model = load(checkpoint)
    assert model.hf_quantizer.is_compileable
    assert model.hf_quantizer.is_trainable
    expected = model(IDS, use_cache=False).logits
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(IDS, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)
    explained = torch._dynamo.explain(model)(IDS, use_cache=False)
    assert explained.graph_break_count == 0
    with torch.no_grad():
        program = torch.export.export(model, (IDS,), {"use_cache": False}, strict=False)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets.count("taut.quant_linear.default") == 14
    torch.testing.assert_close(program.module()(IDS, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)


# Refusals


@contextlib.contextmanager
def edited(folder: Path):
    state = load_file(folder / "model.safetensors")
    yield state
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def spoil(key: str, change):
    def edit(state):
        full = f"{Q_PROJ}.{key}"
        value = change(state.pop(full, None))
        if value is not None:
            state[full] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (spoil("scales", lambda _: None), f"lacks {Q_PROJ}.scales"),
        (spoil("zeros", lambda _: None), f"lacks {Q_PROJ}.zeros"),
        (spoil("qweight", lambda _: None), f"lacks {Q_PROJ}.qweight"),
        (spoil("qweight", lambda q: q[:-8].clone()), r"qweight must be \[64, 32\] .* has \[56, 32\]"),
        (spoil("scales", lambda s: s.repeat(1, 2)), r"scales must be \[64, 1\] .* has \[64, 2\]"),
        (spoil("scales", lambda s: s.float()), "scales must be F16, the checkpoint has F32"),
        (spoil("qweight", lambda q: q.to(torch.int8)), "qweight must be U8, the checkpoint has I8"),
        (spoil("zeros", lambda z: torch.full_like(z, 16)), f"{Q_PROJ}: zeros must be 0..15, got 16"),
        (spoil("scales", lambda s: torch.full_like(s, torch.inf)), f"{Q_PROJ}: scales must be finite"),
        (spoil("weight", lambda _: torch.zeros(64, 64)), f"has {Q_PROJ}.weight, which a int4 group 64 with zeros layer does not have"),
    ],
)
def test_inconsistent_checkpoints(saved, edit, message):
    with edited(saved) as state:
        edit(state)
    with pytest.raises(ValueError, match=message):
        reload(saved)


@pytest.mark.parametrize("left", [0, 7, 100, 0.5, 0.999])
def test_truncated_checkpoints(saved, left):
    path = saved / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(left * len(whole)) if isinstance(left, float) else left])
    with pytest.raises((ValueError, OSError), match=r"model\.safetensors"):
        reload(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 4}, "unknown key 'bits'"),
        ({"version": 9}, "format version 9"),
        ({"modules": None}, "has no 'modules'"),
        ({"modules": []}, "none of the low-bit layers"),
        (
            {"modules": [{"weights": "int4", "group_size": 32, "zeros": False, "activations": "int8", "names": [Q_PROJ]}]},
            "must be|does not have",
        ),
        ({"modules": [{"weights": "int9", "group_size": 32, "zeros": False, "activations": "int8", "names": [Q_PROJ]}]}, "'int9'"),
        ({"modules": [{"names": [Q_PROJ]}]}, "unknown or missing"),
    ],
)
def test_edited_config_json(saved, change, message):
    path = saved / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"].update(change)
    if change.get("modules", 1) is None:
        del config["quantization_config"]["modules"]
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        reload(saved)


def test_a_float_checkpoint_that_calls_itself_quantized(checkpoint, saved):
    reload(checkpoint).save_pretrained(saved.parent / "float")
    (saved / "model.safetensors").write_bytes((saved.parent / "float" / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="lacks|does not have"):
        reload(saved)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 3e38])
def test_weights_that_cannot_be_quantized(tmp_path, value):
    model = tiny_llama()
    model.model.layers[0].self_attn.q_proj.weight.data[3, 5] = value
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"cannot be quantized: {Q_PROJ}: its weight holds"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device_map": "cuda"}, "device_map names 'cuda:0', where taut cannot compute: no kernels here"),
        ({"device_map": {"": 0}}, "device_map names '0'"),
        ({"device_map": {"model": "cpu", "lm_head": "disk"}}, "names the disk: taut .* does not offload"),
        ({"dtype": torch.float64}, "dtype must be float32, bfloat16 or float16, got torch.float64"),
    ],
)
@pytest.mark.parametrize("quantized", [False, True])
def test_where_and_what_it_cannot_load(checkpoint, saved, arguments, message, quantized, monkeypatch):
    monkeypatch.setattr(_native, "_WHY_NO_CUDA", "no kernels here")
    with pytest.raises(ValueError, match=message):
        if quantized:
            reload(saved, **arguments)
        else:
            AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=taut.Config(), **arguments)


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_device_maps_that_mean_the_cpu(saved, device_map):
    pytest.importorskip("accelerate")
    assert_same_model(reload(saved, device_map=device_map), reload(saved))


def test_device_maps_where_there_is_cuda(monkeypatch):
    monkeypatch.setattr(_native, "_WHY_NO_CUDA", "")
    quantizer = ours.TautQuantizer(taut.Config())
    for device_map in ("cuda", 0, "auto", {"": torch.device("cuda:1")}, {"model.embed": 0, "model.layers": "cuda:1"}):
        quantizer.validate_environment(device_map=device_map)
        assert quantizer.update_device_map(device_map) == device_map
    with pytest.raises(ValueError, match="spreads the model over the CPU and CUDA: taut does not offload"):
        quantizer.validate_environment(device_map={"model.embed": 0, "lm_head": "cpu"})
    with pytest.raises(ValueError, match="device_map names 'xpu', where taut cannot compute"):
        quantizer.validate_environment(device_map={"": "xpu"})


@pytest.mark.skipif(bool(_native.why_not("cuda")), reason=_native.why_not("cuda"))
@pytest.mark.parametrize("settings", FORMATS, ids=str)
def test_on_cuda(checkpoint, tmp_path, settings):
    """Quantized as it is loaded there, swapped there, moved there and reloaded there: one model."""
    pytest.importorskip("accelerate")
    config = taut.Config(**settings)
    loaded = AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=config, device_map="cuda", dtype=torch.float16)
    swapped = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float16).cuda()
    report = taut.swap(swapped, **settings)
    assert not any("cannot compute" in entry.reason for entry in report.kept)
    moved = load(checkpoint, dtype=torch.float16, **settings).cuda()
    taut.save(moved, tmp_path / "a")
    models = [loaded, swapped, moved, reload(tmp_path / "a", device_map="cuda")]
    assert all(module.packed.is_cuda for model in models for module in model.modules() if isinstance(module, QuantLinear))
    with torch.no_grad():
        results = [model(IDS.cuda()).logits for model in models]
    assert all(torch.equal(result, results[0]) for result in results)


def test_a_pattern_that_matches_nothing(checkpoint):
    with pytest.raises(ValueError, match="pattern 'haed' matches no module"):
        load(checkpoint, skip=["haed"])


def test_quantized_by_another_library(checkpoint, saved):
    class Other:
        quantization_config = type("OtherConfig", (), {"quant_method": "awq"})()

    model = reload(checkpoint)
    model.hf_quantizer = Other()
    with pytest.raises(ValueError, match="already quantized by awq"):
        taut.swap(model)


# save


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


class Interrupted(BaseException):
    pass


@pytest.mark.parametrize("step", ["save_pretrained", "_carry_over", "_sync_tree", "_exchange"])
def test_an_interrupted_save_leaves_the_old_directory_whole(saved, checkpoint, monkeypatch, step):
    model = load(checkpoint, weights="int8")
    before = contents(saved)

    def interrupt(*_, **__):
        raise Interrupted

    if step == "save_pretrained":
        monkeypatch.setattr("safetensors.torch.save_file", interrupt)
        monkeypatch.setattr("transformers.modeling_utils.safe_save_file", interrupt)
    else:
        monkeypatch.setattr(ours, step, interrupt)
    with pytest.raises(Interrupted):
        taut.save(model, saved)
    assert contents(saved) == before
    assert [path.name for path in saved.parent.iterdir()] == ["saved"]
    monkeypatch.undo()
    taut.save(model, saved)
    assert_same_model(reload(saved), model)


def test_save_without_an_atomic_exchange(saved, checkpoint, monkeypatch):
    monkeypatch.setattr(sys, "platform", "other")
    model = load(checkpoint, weights="int8")
    taut.save(model, saved)
    monkeypatch.undo()
    assert_same_model(reload(saved), model)
    assert [path.name for path in saved.parent.iterdir()] == ["saved"]


def test_save_replaces_weights_and_keeps_the_rest(saved, checkpoint):
    (saved / "README.md").write_text("mine")
    (saved / "notes").mkdir()
    (saved / "notes" / "a.txt").write_text("more")
    (saved / "model-00001-of-00002.safetensors").write_bytes(b"old shard")
    (saved / "model.safetensors.index.json").write_text("{}")
    byte_tokenizer(True).save_pretrained(saved)
    model = load(checkpoint, weights="int8")
    taut.save(model, saved)
    names = set(contents(saved))
    assert {"README.md", "notes/a.txt", "tokenizer.json", "model.safetensors", "config.json"} <= names
    assert not names & {"model-00001-of-00002.safetensors", "model.safetensors.index.json"}
    assert_same_model(reload(saved), model)


def test_save_through_a_link_and_into_new_folders(saved, checkpoint, tmp_path):
    model = load(checkpoint, weights="int8")
    (tmp_path / "link").symlink_to(saved)
    taut.save(model, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert_same_model(reload(saved), model)
    taut.save(model, tmp_path / "new" / "deep")
    assert_same_model(reload(tmp_path / "new" / "deep"), model)


def test_save_refuses_what_it_cannot_write(checkpoint, tmp_path, monkeypatch):
    model = load(checkpoint)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="save takes a transformers model, got Linear"):
        taut.save(nn.Linear(8, 8), tmp_path / "a")
    with pytest.raises(OSError, match="file is a file; accepted: a directory"):
        taut.save(model, tmp_path / "file")
    with pytest.raises(OSError, match="file"):
        taut.save(model, tmp_path / "file" / "below")
    monkeypatch.setattr(ours, "_sync_tree", Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        taut.save(model, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_save_into_a_read_only_folder(checkpoint, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(PermissionError):
        taut.save(load(checkpoint), tmp_path / "locked" / "model")


def test_save_of_a_float_model_is_a_float_checkpoint(checkpoint, tmp_path):
    taut.save(model := reload(checkpoint), tmp_path / "a", byte_tokenizer(False))
    assert getattr(AutoConfig.from_pretrained(tmp_path / "a"), "quantization_config", None) is None
    assert_same_model(reload(tmp_path / "a"), model)
    assert AutoTokenizer.from_pretrained(tmp_path / "a")("a").input_ids
