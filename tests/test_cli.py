"""The command line, on a tiny random Llama with a tokenizer of single bytes."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file

from taut import QuantLinear, SparseLinear, cli, list_impls, models
from taut.formats.sparse import Pattern
from taut.report import microbench
from taut.report.worker import WorkerDied
from tiny_models import write_checkpoint, write_gguf


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def taut(capfd):
    """Runs one command; gives its exit code, standard output and standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = cli.run([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return code, out, err

    return run


def test_info_names_every_impl_and_what_does_not_fit(taut):
    code, out, _ = taut("info")
    assert code == 0
    for op, impls in list_impls().items():
        assert op in out
        for impl in impls:
            assert impl in out
    assert torch.__version__ in out
    if not list_impls("cuda"):
        assert "no CUDA: " in out


def test_info_as_json(taut):
    code, out, _ = taut("info", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["machine"]["torch"] == torch.__version__
    assert {op: [impl["name"] for impl in impls] for op, impls in found["impls"].items()} == list_impls()
    for impls in found["impls"].values():
        for impl in impls:
            assert impl["can_run"] != bool(impl["reason"]), "an impl that cannot run has a reason"
        scalar = [impl for impl in impls if impl["name"] == "cpu_scalar"]
        assert all(impl["can_run"] for impl in scalar)


@pytest.mark.parametrize("options", [("--weights", "int8"), ("--weights", "int4", "--group-size", "64", "--zeros", "--skip", "down_proj")])
def test_quantize_writes_what_generate_reads(taut, checkpoint, tmp_path, options):
    target = tmp_path / "quantized"
    code, out, err = taut("quantize", checkpoint, target, *options)
    assert code == 0, err
    assert "wrote" in out
    assert [path.name for path in tmp_path.iterdir()] == ["quantized"], "no temporary directory may be left"
    assert (target / "tokenizer.json").is_file()

    model, _ = models.load_model(models.find_source(target))
    low_bit = {name for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    skipped = "--skip" in options
    assert len(low_bit) == 2 * (6 if skipped else 7)
    assert any("down_proj" in name for name in low_bit) != skipped
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    assert layer.format.zeros == ("--zeros" in options)
    source, _ = models.load_model(models.find_source(checkpoint))
    error = (layer.dequantize() - source.get_submodule("model.layers.0.self_attn.q_proj").weight).abs().max()
    assert 0 < error < 0.15

    code, out, err = taut("generate", target, "--prompt", "Hello", "--max-new-tokens", "4", "--no-chat")
    assert code == 0, err
    assert "prompt: 5 tokens" in err
    assert "wrote 4 tokens" in err


def test_a_gguf_file_is_read_quantized_and_written(taut, tmp_path):
    path, target = write_gguf(tmp_path / "tiny.gguf"), tmp_path / "out"
    code, out, err = taut("quantize", path, target, "--weights", "int8")
    assert code == 0, err
    assert "swapped 14 linear layers to int8 per row" in out
    written, read = (models.load_model(models.find_source(name))[0] for name in (target, tmp_path / "tiny.gguf"))
    for name, module in written.named_modules():
        if isinstance(module, QuantLinear):
            weight = read.get_submodule(name).weight
            assert (module.dequantize() - weight).abs().max() <= weight.abs().max() / 200, name
    assert torch.equal(written.get_input_embeddings().weight, read.get_input_embeddings().weight)
    command = ("--prompt", "Hello", "--max-new-tokens", "5", "--weights", "int8")
    code, streamed, err = taut("generate", path, *command)
    assert code == 0, err
    assert streamed == taut("generate", target, *command[:-2])[1]
    assert "prompt: 4 tokens" in err


def test_quantize_writes_sparse_models_of_16_bits(taut, checkpoint, tmp_path):
    code, out, err = taut("quantize", checkpoint, tmp_path / "out", "--weights", "bf16", "--sparsity", "2:4")
    assert code == 0, err
    assert "to 2:4 bf16, float activations" in out
    loaded, _ = models.load_model(models.find_source(tmp_path / "out"))
    layers = [module for module in loaded.modules() if isinstance(module, SparseLinear)]
    assert len(layers) == 14 and all(str(layer.format) == "2:4 bf16" for layer in layers)
    code, _, err = taut("quantize", checkpoint, tmp_path / "dense", "--weights", "bf16")
    assert code == 2 and "bf16 weights are for sparse layers alone" in err


def test_quantize_keeps_what_is_there_unless_forced(taut, checkpoint, tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "mine.txt").write_text("keep me")
    code, _, err = taut("quantize", checkpoint, target)
    assert code == 2
    assert "not empty" in err
    assert "--force" in err
    assert (target / "mine.txt").read_text() == "keep me"
    code, _, err = taut("quantize", checkpoint, target, "--force")
    assert code == 0, err
    assert not (target / "mine.txt").exists()
    assert (target / "config.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_interrupted_write_leaves_the_old_directory_whole(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("old")

    def fill(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        models.write_directory(target, fill, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (target / "old").read_text() == "old"


def test_generate_swaps_on_the_fly_and_is_repeatable(taut, checkpoint):
    command = ("generate", checkpoint, "--prompt", "Hello", "--max-new-tokens", "6", "--weights", "int8")
    first, second = taut(*command), taut(*command)
    assert first[0] == second[0] == 0
    assert first[1] == second[1]
    drawn = [taut(*command, "--temperature", "2.5", "--seed", seed)[1] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]


def test_generate_uses_the_chat_template_it_finds(taut, checkpoint, tmp_path, monkeypatch):
    plain = write_checkpoint(tmp_path, chat=False)
    length = len("[user]Hi[assistant]")
    assert f"prompt: {length} tokens" in taut("generate", checkpoint, "--prompt", "Hi", "--max-new-tokens", "1")[2]
    assert "prompt: 2 tokens" in taut("generate", checkpoint, "--prompt", "Hi", "--max-new-tokens", "1", "--no-chat")[2]
    assert "prompt: 2 tokens" in taut("generate", plain, "--prompt", "Hi", "--max-new-tokens", "1")[2]
    code, _, err = taut("generate", plain, "--prompt", "Hi", "--chat")
    assert (code, "no chat template" in err) == (2, True)
    monkeypatch.setattr("sys.stdin", io.StringIO("four"))
    assert "prompt: 4 tokens" in taut("generate", plain, "--prompt", "-", "--max-new-tokens", "1")[2]


def test_report_writes_every_resource(taut, checkpoint, tmp_path):
    path = tmp_path / "report.json"
    small = ("--tokens", "96", "--window", "48", "--new-tokens", "2", "--rounds", "2", "--threads", "1")
    code, out, err = taut(
        "report", checkpoint, "--weights", "int4", *small, "--price-per-hour", "0.1", "--watts-per-core", "2:8", "--json", path
    )
    assert code == 0, err
    found = json.loads(path.read_text())
    assert [variant["name"] for variant in found["variants"]] == ["base", "int4"]
    for variant in found["variants"]:
        assert set(variant["figures"]) == {"computation", "memory", "energy", "money", "network", "fidelity"}
    low_bit = found["variants"][1]["figures"]
    assert low_bit["fidelity"]["same top token"]["source"] == "measured"
    assert low_bit["fidelity"]["same top token"]["note"].startswith("94 tokens")
    assert low_bit["money"]["1M tokens written"]["source"] == "modelled"
    assert low_bit["network"]["time to ship"] == {
        "value": None,
        "unit": "s",
        "source": "unavailable",
        "note": "needs --bandwidth",
        "error": None,
    }
    for word in ("computation", "memory", "energy", "money", "network", "fidelity", "unavailable"):
        assert word in out
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.json"]


def test_bench_prints_medians(taut, tmp_path, monkeypatch):
    monkeypatch.setattr(microbench, "SHAPES", (microbench.Shape(64, 64, 1), microbench.Shape(64, 64, 5)))
    path = tmp_path / "bench.json"
    code, out, err = taut("bench", "--seconds", "0.05", "--json", path)
    assert code == 0, err
    assert "N=64 K=64 M=5" in out
    assert len(json.loads(path.read_text())["rows"]) == 8


BAD = {
    "unknown command": (["frobnicate"], "frobnicate"),
    "unknown option": (["info", "--frobnicate"], "--frobnicate"),
    "missing argument": (["generate"], "Missing"),
    "unknown format": (["quantize", "MODEL", "OUT", "--weights", "int5"], "'int5'; accepted: ternary, int2, int3, int4"),
    "group that does not fit": (["quantize", "MODEL", "OUT", "--group-size", "48"], "48 does not fit; accepted: 32, 64, 128"),
    "zeros for int8": (["quantize", "MODEL", "OUT", "--weights", "int8", "--zeros"], "zeros=True is for int2, int3 and int4 only"),
    "unknown activations": (["quantize", "MODEL", "OUT", "--activations", "fp4"], "'fp4'; accepted: auto, float, int8, int8_row, fp8_row"),
    "pattern without a module": (["quantize", "MODEL", "OUT", "--skip", "nonsense"], "'nonsense' matches no module"),
    "everything skipped": (["quantize", "MODEL", "OUT", "--skip", "*"], "nothing to swap"),
    "unknown dtype": (["quantize", "MODEL", "OUT", "--dtype", "int7"], "'int7'; accepted: auto"),
    "a checkpoint that lacks a weight": (["generate", "LACKING", "--prompt", "x"], "lacks 1 weight: model.norm.weight"),
    "no such model": (["generate", "no/such/model", "--prompt", "x"], "no such file"),
    "a file that is no model": (["generate", "FILE", "--prompt", "x"], "not a GGUF file"),
    "a broken GGUF file": (["generate", "GGUF", "--prompt", "x"], "cannot read"),
    "a directory without a model": (["generate", "EMPTY", "--prompt", "x"], "neither a config.json nor a GGUF file"),
    "a truncated checkpoint": (["generate", "TRUNCATED", "--prompt", "x"], "cannot read"),
    "target is a file": (["quantize", "MODEL", "FILE"], "is a file"),
    "no threads": (["bench", "--threads", "0"], "threads must be at least 1"),
    "greedy with temperature": (["generate", "MODEL", "--prompt", "x", "--greedy", "--temperature", "1"], "takes no temperature"),
    "temperature of nothing": (["generate", "MODEL", "--prompt", "x", "--temperature", "0"], "must be a positive number"),
    "group without weights": (["generate", "MODEL", "--prompt", "x", "--group-size", "32"], "give --weights"),
    "empty prompt": (["generate", "MODEL", "--prompt", "", "--no-chat"], "prompt is empty"),
    "too many tokens": (["generate", "MODEL", "--prompt", "x", "--max-new-tokens", "2000"], "do not fit the 1024"),
    "watts that are no number": (["report", "MODEL", "--watts-per-core", "many"], "'many'"),
    "negative price": (["report", "MODEL", "--price-per-hour", "-1"], "price-per-hour must be a positive number"),
    "text that is not there": (["report", "MODEL", "--text", "EMPTY/absent.txt"], "absent.txt"),
    "text too short": (["report", "MODEL", "--text", "FILE"], "one window takes 512"),
    "nowhere to write": (["report", "MODEL", "--json", "EMPTY/absent/x.json"], "no such directory"),
}


@pytest.fixture(scope="module")
def places(checkpoint, tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("bad")
    (root / "empty").mkdir()
    (root / "text.txt").write_text("some text")
    (root / "broken.gguf").write_bytes(b"GGUF" + b"\xff" * 64)
    truncated = write_checkpoint(root / "truncated")
    weights = truncated / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    lacking = write_checkpoint(root / "lacking")
    tensors = load_file(lacking / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, lacking / "model.safetensors", {"format": "pt"})
    return {
        "MODEL": str(checkpoint), "OUT": str(root / "out"), "EMPTY": str(root / "empty"), "FILE": str(root / "text.txt"),
        "GGUF": str(root / "broken.gguf"), "TRUNCATED": str(truncated), "LACKING": str(lacking),
    }  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(taut, places, case):
    arguments, expected = BAD[case]
    head, *rest = arguments
    for name, path in places.items():
        rest = [part.replace(name, path) if part.split("/")[0] == name else part for part in rest]
    code, _, err = taut(head, *rest)
    assert code == 2
    lines = [line for line in err.splitlines() if line.startswith("taut: ")]
    assert len(lines) == 1, err
    assert expected in lines[0]
    assert "Traceback" not in err
    assert not Path(places["OUT"]).exists()


def test_quantizing_twice_is_refused(taut, checkpoint, tmp_path):
    target = tmp_path / "out"
    assert taut("quantize", checkpoint, target)[0] == 0
    for command in (
        ["quantize", target, tmp_path / "again"],
        ["generate", target, "--prompt", "x", "--weights", "int8"],
        ["report", target],
    ):
        code, _, err = taut(*command)
        assert code == 2
        assert "already quantized (taut)" in err


def test_failures_that_are_no_bad_input(taut, checkpoint, monkeypatch):
    def die(*arguments, **options):
        raise WorkerDied("int4: its process was killed")

    monkeypatch.setattr("taut.report.measure.measure", die)
    code, _, err = taut("report", checkpoint)
    assert (code, err.strip().splitlines()[-1]) == (1, "taut: int4: its process was killed")

    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "load_tokenizer", interrupt)
    assert taut("generate", checkpoint, "--prompt", "x")[0] == 130
    assert taut()[0] == 2
    assert taut("--help")[0] == 0


def test_compress_writes_a_sparse_model(taut, checkpoint, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog, and then it sleeps. " * 40)
    arguments = (
        "compress",
        checkpoint,
        tmp_path / "out",
        "--calibration",
        text,
        "--sequences",
        6,
        "--length",
        64,
        "--state",
        tmp_path / "state",
    )
    code, out, err = taut(*arguments, "--weights", "int8", "--method", "sparsegpt")
    assert code == 0, err
    assert "sparsegpt: 14 linear layers to 2:4 int8 per row" in out
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert sum(isinstance(module, SparseLinear) for module in loaded.modules()) == 14
    code, out, err = taut("generate", tmp_path / "out", "--prompt", "The", "--max-new-tokens", 3)
    assert code == 0, err


def test_compress_writes_floats_with_zeros(taut, checkpoint, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog, and then it sleeps. " * 40)
    arguments = ("--calibration", text, "--sequences", 4, "--length", 32, "--weights", "none", "--method", "wanda", "--sparsity", "4:8")
    code, _, err = taut("compress", checkpoint, tmp_path / "out", *arguments)
    assert code == 0, err
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert Pattern(4, 8).holds(loaded.model.layers[1].mlp.up_proj.weight)


def test_compress_permutes_channels(taut, checkpoint, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog, and then it sleeps. " * 40)
    arguments = ("--calibration", text, "--sequences", 4, "--length", 32, "--weights", "none", "--method", "magnitude")
    outs = {}
    for name, more in (("plain", ()), ("permuted", ("--permute",))):
        code, outs[name], err = taut("compress", checkpoint, tmp_path / name, *arguments, *more)
        assert code == 0, err
    assert "permuted: 4 linear layers keep" in outs["permuted"] and "permuted" not in outs["plain"].replace(str(tmp_path), "")
    plain, permuted = (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name).model.layers[1].mlp.down_proj.weight for name in outs
    )
    assert Pattern(2, 4).holds(permuted) and float(permuted.abs().sum()) > 1.005 * float(plain.abs().sum())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--sequences", 1000), "the calibration text is too short"),
        (
            ("--permute", "--sparsity", "none", "--method", "gptq", "--sequences", 2, "--length", 32),
            "permute orders channels for a sparsity pattern",
        ),
        (("--method", "guess", "--sequences", 2, "--length", 32), "unknown method"),
        (("--sparsity", "none", "--sequences", 2, "--length", 32), "sparsegpt prunes: give sparsity"),
    ],
)
def test_compress_says_what_is_wrong(taut, checkpoint, tmp_path, arguments, words):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    code, _, err = taut("compress", checkpoint, tmp_path / "out", "--calibration", text, *arguments)
    assert code != 0 and words in err and not (tmp_path / "out").exists()
