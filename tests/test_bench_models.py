"""bench/run.py --model: model files, generators that write the same tokens, the race, its lines and table; sweeps; perplexity."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import transformers
from bench import generation, language_models, perplexity, plot, run, table
from bench.cases import SWEEP_M, Case, default_formats, parse_format
from bench.contenders import Entry, Prepared
from bench.generation import Died, Process, Work, compare
from bench.generators import Contender, contenders
from bench.language_models import Shape
from bench.timing import Spread

import tiny_models
from taut.formats import KINDS
from taut.roofline import Roofline

PROMPT, FORCED = list(range(5, 25)), [7, 8, 9]
CEILINGS = Roofline(2, "cpu_scalar", 1, 1, 10.0, None, 1, 100.0, 400.0, 100.0)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama small enough for a second, wide enough for blocks of 32 in every matrix."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=2048, initializer_range=0.2, tie_word_embeddings=True,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("llama")
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Gemma 3 with layers of both kinds, and a window shorter than the prompt."""
    torch.manual_seed(0)
    config = transformers.Gemma3TextConfig(
        vocab_size=300, hidden_size=128, intermediate_size=192, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=1,
        head_dim=32, max_position_embeddings=2048, sliding_window=8, query_pre_attn_scalar=32, initializer_range=0.1,
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            "full_attention": {"rope_type": "default", "rope_theta": 1_000_000.0},
        },
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("gemma")
    model = transformers.Gemma3ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return folder


def _load(contender: Contender, directory: Path, cache: Path):
    if reason := contender.missing():
        pytest.skip(reason)
    module = pytest.importorskip(f"bench.generators.{contender.module}")
    if contender.gguf is None:
        return module.Generator(str(directory), 1, **contender.arguments)
    return module.Generator(str(language_models.gguf_of(directory, contender.gguf, cache)), 1, repack=False, **contender.arguments)


# ---- generators


@pytest.mark.parametrize("family", ["llama", "gemma"])
@pytest.mark.parametrize("contender", contenders()[1:], ids=lambda each: f"{each.name}-{each.format}")
def test_every_generator_predicts_what_transformers_does(
    contender: Contender, family: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    directory = request.getfixturevalue(family)
    base = _load(contenders()[0], directory, tmp_path).logits(PROMPT, FORCED)
    generator = _load(contender, directory, tmp_path)
    found = compare(base, generator.logits(PROMPT, FORCED))
    assert found.cosine > {4: 0.7, 8: 0.99, 16: 0.99}[contender.bits]
    again = compare(base, generator.logits(PROMPT, FORCED))  # the cache of the first was emptied
    assert again.cosine == pytest.approx(found.cosine, abs=1e-3)
    generator.prompt(PROMPT)
    assert generator.decode(PROMPT, 3) > 0
    assert generator.weight_bytes > 0


def test_generate_hands_the_clock_the_prompt_then_each_token(llama: Path, tmp_path: Path) -> None:
    generator = _load(contenders()[0], llama, tmp_path)
    assert len(generator._generate(PROMPT, 5)) == 6


def test_weights_a_token_reads_are_counted(llama: Path, tmp_path: Path) -> None:
    shape = Shape.of(transformers.AutoConfig.from_pretrained(llama))
    norms = (2 * shape.layers + 1) * shape.hidden
    fp32, bf16, int4, int8, *_ = contenders()
    weights = shape.layer_weights + shape.head_weights
    assert _load(fp32, llama, tmp_path).weight_bytes == 4 * (weights + norms)
    assert _load(bf16, llama, tmp_path).weight_bytes == 2 * (weights + norms)
    least = 4 * norms + shape.head_weights  # the head has 8 bits
    assert 0.5 * shape.layer_weights < _load(int4, llama, tmp_path).weight_bytes - least < shape.layer_weights
    assert shape.layer_weights < _load(int8, llama, tmp_path).weight_bytes - least < 2 * shape.layer_weights


def test_shape_counts_what_the_model_has(llama: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    shape = Shape.of(model.config)
    linear = sum(module.weight.numel() for module in model.model.modules() if isinstance(module, torch.nn.Linear))
    assert (shape.layer_weights, shape.head_weights) == (linear, model.lm_head.weight.numel())
    assert shape.attention_flops(3, 2) == 4 * 2 * 4 * 32 * (3 + 4 + 5)
    assert shape.cache_bytes(5, 2) == 2 * 2 * 2 * 32 * 5 * 2


# ---- model files


def test_models_are_named_or_directories(llama: Path, tmp_path: Path) -> None:
    assert language_models.directory_of(str(llama), tmp_path) == llama
    with pytest.raises(ValueError, match=r"no model; accepted: smollm2-135m, .* or a directory"):
        language_models.directory_of("gpt-5", tmp_path)


def test_random_models_are_the_same_every_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sizes = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 96}
    monkeypatch.setitem(language_models._SYNTHETIC, "llama-1b", sizes)
    first, second = (dict(language_models.tensors(language_models.directory_of("llama-1b", tmp_path / name))) for name in "ab")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first["lm_head.weight"].dtype == torch.bfloat16
    assert first["lm_head.weight"].float().std() == pytest.approx(64**-0.5, rel=0.02)


def test_a_gguf_file_is_made_of_what_is_known(llama: Path, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    gguf = pytest.importorskip("gguf")
    path = language_models.gguf_of(llama, "q4_0", tmp_path)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert kinds["token_embd.weight"] == "Q8_0"  # 128 columns: no Q6_K
    assert kinds["blk.1.attn_q.weight"] == "Q4_0"
    assert kinds["output_norm.weight"] == "F32"
    assert set(tmp_path.iterdir()) == {path}
    other = tmp_path / "gpt2"
    transformers.GPT2Config(n_layer=1, n_embd=32, n_head=2).save_pretrained(other)
    with pytest.raises(ValueError, match="is a gpt2; a GGUF file can be made of: llama, gemma3_text"):
        language_models.gguf_of(other, "q4_0", tmp_path)
    assert not list(tmp_path.glob("gpt2*.gguf")) + list(tmp_path.glob("*.new"))


def test_prompts_are_text_where_there_is_a_tokenizer(llama: Path, tmp_path: Path) -> None:
    ids = language_models.prompt_ids(llama, 300, 50)
    assert ids == language_models.prompt_ids(llama, 300, 50)
    assert len(ids) == 50
    assert max(ids) < 300
    tiny_models.byte_tokenizer(chat=False).save_pretrained(tmp_path)
    text = (ROOT / "LICENSE").read_text()
    ids = language_models.prompt_ids(tmp_path, 300, len(text) + 10)
    assert ids[:10] == ids[-10:]


# ---- the check and the race


def test_compare_sees_what_differs() -> None:
    base = np.random.default_rng(0).normal(size=(3, 50)).astype(np.float32)
    same = compare(base, base + 5)  # a constant changes no prediction
    assert (same.cosine, same.top1) == (pytest.approx(1), 1)
    assert same.kl == pytest.approx(0, abs=1e-6)
    broken = base.copy()
    broken[1] = base[1, ::-1]
    assert compare(base, broken).cosine < 0.5
    assert compare(base, broken).kl > 0.01
    broken[2, 0] = np.nan
    assert not compare(base, broken).cosine >= 0
    assert not compare(base, base[:2]).cosine >= 0


def test_a_small_race_writes_lines_of_the_schema(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = Contender("liar", "int8_row_a8", True, "transformers", {"dtype": "float32", "weights": "int4"})
    absent = Contender("absent", "fp32", True, "transformers", {}, ("no_such_package",))
    monkeypatch.setattr(generation, "contenders", lambda: [contenders()[0], contenders()[3], wrong, absent])
    monkeypatch.setattr(generation, "_LEAST_COSINE", {8: 0.98, 32: 0.9999})
    monkeypatch.setattr(generation, "QUICK", Work(prompt=20, start=8, steps=4, rounds=2))
    monkeypatch.setattr(run, "roofline", lambda refresh=False: CEILINGS)
    lines = tmp_path / "lines.jsonl"
    command = ["--model", str(llama), "--quick", "--threads", "1", "--cache", str(tmp_path), "--json", str(lines)]
    assert run.main(command) == 1
    said = capsys.readouterr().out
    assert "WRONG, not timed: " in said
    assert "liar int8_row_a8: the cosine" in said
    assert "not measured: absent fp32: no_such_package not installed" in said
    found = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [(line["case"].rpartition("/")[2], line["impl"]) for line in found] == [
        (case, impl) for case in ("prompt20", "decode4") for impl in ("transformers_fp32", "taut")
    ]
    assert set(table._NEEDED) <= set(found[0])
    for line in found:
        assert line["op"] == "generate"
        assert line["tokens_s"] == pytest.approx(1e6 / line["median_us"])
        assert line["gb_s"] > 0
        assert line["gflop_s"] > 0
        assert line["roofline_share"] > 0
        assert line["cosine"] > 0.98


def test_a_base_that_cannot_be_loaded_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert run.main(["--model", str(tmp_path), "--cache", str(tmp_path)]) == 2
    assert "transformers_fp32 fp32, the base: " in capsys.readouterr().err


def test_a_process_that_dies_says_how() -> None:
    with Process(1) as process, pytest.raises(ValueError, match="no_such_module"):
        process.call("load", "no_such_module", {}, [], [])
    with Process(1) as process:
        process._process.kill()
        with pytest.raises(Died, match="SIGKILL"):
            process.call("prompt", [])


def test_counts_of_a_result() -> None:
    shape = Shape(layers=2, hidden=128, intermediate=192, heads=4, kv_heads=2, head_dim=32, vocabulary=300)
    facts = {"weight_bytes": 1000, "cache_element_bytes": 2, "note": ""}
    running = SimpleNamespace(contender=contenders()[2], facts=facts, fidelity=None, samples={"decode": [], "prompt": []})
    timing = Spread(10.0, 9.0, 11.0, 3, 0)
    work = Work(prompt=20, start=8, steps=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "spread", lambda samples: timing)
        decode = generation._result(running, "decode", "m", shape, work, CEILINGS)
        prompt = generation._result(running, "prompt", "m", shape, work, CEILINGS)
    assert decode.case == "m/decode4"
    assert decode.nbytes == 1000 + shape.cache_bytes(8 + 9 + 10 + 11, 2) / 4
    assert decode.int8_ops == 2 * (shape.layer_weights + shape.head_weights)
    assert decode.flops == shape.attention_flops(4, 8) / 4
    assert prompt.int8_ops == 2 * shape.layer_weights + 2 * shape.head_weights / 20
    assert decode.tokens_s == 1e5
    assert prompt.share == pytest.approx(CEILINGS.least_seconds(prompt.nbytes, prompt.flops, prompt.int8_ops) / 10e-6)
    assert decode.share == pytest.approx(CEILINGS.least_seconds(decode.nbytes, decode.flops, decode.int8_ops) / 10e-6)


# ---- the README table


def _line(case: str, impl: str, format: str, rate: float, run: str = "2026-11-02T10:00:00+00:00") -> dict:
    return {
        "op": "generate", "case": case, "format": format, "impl": impl, "peer": impl != "taut", "threads": 2, "median_us": 1e6 / rate,
        "tokens_s": rate, "cold": False, "commit": "abc", "machine": "a machine", "torch": "2.13.0", "run": run,
    }  # fmt: skip


def test_models_table() -> None:
    lines = [
        _line("llama-1b/prompt512", "taut", "int4_g32_a8", 1234.0),
        _line("llama-1b/prompt512", "llama_cpp_q4_0", "int4_g32_a8", 617.0),
        _line("llama-1b/decode64", "taut", "int4_g32_a8", 50.0),
        _line("llama-1b/decode64", "taut", "int8_row_a8", 30.0),
        _line("llama-1b/decode64", "llama_cpp_q8_0", "int8_g32_a8", 20.0),
        _line("llama-1b/decode64", "transformers_fp32", "fp32", 5.0),
        _line("llama-1b/decode64", "taut", "int4_g32_a8", 1.0, run="2026-11-03T10:00:00+00:00"),  # newer, without a peer
    ]
    rows = table.render_models(table.newest_models(lines)).splitlines()
    assert rows[0].endswith("| 1B Llama, prompt | 1B Llama, decode |")
    assert rows[2:7] == [
        "| **taut int4** | 1234 | 50 |",
        "| **taut int8** |  | 30 |",
        "| transformers fp32 |  | 5 (10.0x) |",
        "| llama.cpp Q4_0 | 617 (2.0x) |  |",
        "| llama.cpp Q8_0 |  | 20 (1.5x) |",
    ]
    assert "prompts of 512 tokens, then 64 tokens decoded" in rows[-1]
    assert table.render_models({}).startswith("Not measured yet")


# ---- sweeps and the plot


def test_a_sweep_has_every_impl_or_every_format() -> None:
    races = list(run.select_sweep(never_slower=False, peers=False, pattern=None))
    assert [race[0].case.m for race in races] == list(SWEEP_M)
    assert {entry.format for entry in races[0]} == {"int4_g32_a8", "int8_row_a8"}
    assert not any(entry.peer or "scalar" in entry.impl for race in races for entry in race) or len({e.impl for e in races[0]}) == 1
    races = list(run.select_sweep(never_slower=True, peers=False, pattern=None))
    for race in races:
        assert {entry.format for entry in race if not entry.peer} == set(default_formats())
        assert [entry.impl for entry in race if entry.peer] == ["torch_fp32", "torch_bf16"]
    assert {parse_format(name)[0].name for name in default_formats()} == set(KINDS)


@pytest.mark.parametrize("name", default_formats())
def test_every_format_runs_a_small_race(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("quant_linear", 64, 160, 3)
    context = run.Context(CEILINGS, torch.get_num_threads(), "abc", "a machine", "2026-01-01T00:00:00+00:00")
    wrong: list[str] = []
    shared = run.Problem(case)
    for m in (3, 1):
        entry = run.own_entry(Case("quant_linear", 64, 160, m), name, run.default_impl(case, name))
        rows = run.race([entry], False, 1, context, wrong, set(), shared)
        assert not wrong
        assert len(rows) == 1
    assert len(shared._packed[parse_format(name)[0]]) == 1


def test_who_is_slower_is_named() -> None:
    def row(format: str, impl: str, peer: bool, micros: float) -> run.Row:
        prepared = Prepared(lambda: None, 1, 1, 1, 0, 0.0)
        return run.Row(Entry(Case("quant_linear", 8, 8, 1), format, impl, peer, None), prepared, Spread(micros, 1, 1, 3, 0), False, 0.5)

    rows = [row("int4_g32_a8", "good", False, 1.0), row("int2_g32_a8", "bad", False, 3.0), row("fp32", "torch_fp32", True, 2.0)]
    assert run.where_slower(rows) == ["slower: quant_linear/N8_K8_M1/int2_g32_a8/bad 3 us, torch_fp32 2 us"]


def _sweep_line(m: int, impl: str, format: str, rate: float, peer: bool = False) -> dict:
    line = _line(f"N14336_K4096_M{m}", impl, format, 1.0)
    return {**line, "op": "sweep", "peer": peer, "gflop_s": rate, "roofline_share": 0.5}


def test_the_plot_is_drawn_from_the_newest_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="no sweep in"):
        plot.draw_all(tmp_path)
    lines = [_sweep_line(m, "cpu_avx2.int8_small", "int4_g32_a8", 10.0 * m) for m in (4, 1)]
    lines += [_sweep_line(m, "onnxruntime_4bit", "int4_g32_a8", 5.0 * m, peer=True) for m in (1, 4)]
    (tmp_path / "sweep-x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    pictures = plot.draw_all(tmp_path)
    assert pictures == [tmp_path / "sweep-x-int4.png"]
    assert pictures[0].read_bytes()[:4] == b"\x89PNG"
    assert plot.curves(lines) == {"taut cpu_avx2.int8_small": [(1, 10.0), (4, 40.0)], "ONNX Runtime, 4 bits": [(1, 5.0), (4, 20.0)]}
    assert plot.ceiling(lines) == [(1, 20.0), (4, 80.0)]
    expected = "![Throughput of a layer over M (sweep-x-int4)](bench/results/sweep-x-int4.png)"
    assert table.pictures([tmp_path / "sweep-x.jsonl"], "sweep-*", "Throughput of a layer over M") == expected


# ---- perplexity


def test_perplexity_cost(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    folder, lines = tmp_path / "model", tmp_path / "lines.jsonl"
    tiny_models.write_checkpoint(folder)
    monkeypatch.setattr(perplexity, "_WINDOW", 64)
    assert perplexity.main(["--model", str(folder), "--windows", "2", "--json", str(lines)]) == 0
    found = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [(line["op"], line["case"], line["format"]) for line in found] == [
        ("perplexity", "model", name) for name in ("int4", "int4", "int8", "int8")
    ]
    assert [line["activations"] for line in found] == ["int8", "int8_outliers"] * 2
    for line in found:
        assert line["tokens"] == 2 * 63
        assert line["cost"] == pytest.approx(line["ppl_int8"] / line["ppl_float"] - 1)
        assert 0 < abs(line["cost"]) < 0.1
        assert line["kl"] > 0
    assert "int8: perplexity" in capsys.readouterr().out
    assert perplexity.main(["--model", "nothing"]) == 2
