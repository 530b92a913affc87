"""The README's tables, out of committed benchmark lines: ``python bench/run.py --table``, or ``python bench/table.py``.

Times are of the newest runs; but for those of older processors (``OLDER``), which the README quotes in words.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
MODELS_BEGIN, MODELS_END = "<!-- bench-models:begin -->", "<!-- bench-models:end -->"
ATTENTION_BEGIN, ATTENTION_END = "<!-- bench-attention:begin -->", "<!-- bench-attention:end -->"
SPARSITY_BEGIN, SPARSITY_END = "<!-- bench-sparsity:begin -->", "<!-- bench-sparsity:end -->"
OLDER = ("zen1-2core",)  # how the names of their files end
SHAPE = "N14336_K4096"
COLUMNS = (1, 4, 32, 512)
NAMES = {
    "torch_fp32": "torch fp32", "torch_bf16": "torch bf16",
    "torch_int4pack_f32": "torch int4pack, fp32", "torch_int4pack_bf16": "torch int4pack, bf16",
    "onnxruntime_4bit": "ONNX Runtime, 4 bits", "onnxruntime_8bit": "ONNX Runtime, 8 bits", "openvino_u4": "OpenVINO, 4 bits",
    "openvino_u8": "OpenVINO, 8 bits", "llama_cpp_q4_0": "llama.cpp Q4_0", "llama_cpp_q8_0": "llama.cpp Q8_0",
}  # fmt: skip
_GENERATORS = {
    ("taut", "int4_g32_a8"): "**taut int4**", ("taut", "int8_row_a8"): "**taut int8**",
    ("transformers_fp32", "fp32"): "transformers fp32", ("transformers_bf16", "bf16"): "transformers bf16",
    ("llama_cpp_q4_0", "int4_g32_a8"): "llama.cpp Q4_0", ("llama_cpp_q8_0", "int8_g32_a8"): "llama.cpp Q8_0",
    ("onnxruntime_4bit", "int4_g32_a8"): "ONNX Runtime, 4 bits", ("onnxruntime_8bit", "int8_g32_a8"): "ONNX Runtime, 8 bits",
}  # fmt: skip
_MODELS = {
    "smollm2-135m": "SmolLM2 135M", "gemma3-270m": "Gemma 3 270M", "llama-1b": "1B Llama", "llama-8b-4layers": "8B Llama, 4 layers",
}  # fmt: skip
_OWN = {"int4_g32_a8": "**taut int4**", "int8_row_a8": "**taut int8**"}
_NEEDED = ("op", "case", "format", "impl", "peer", "threads", "median_us", "cold", "commit", "machine", "torch", "run")
# What lines of other measurements need; those of no table are passed over, and so are those of a GPU, which have a kind.
_NEEDED_BY = {
    "sparse_linear": ("case", "pattern", "format", "impl", "picked", "median_us", "dense_ratio", "threads", "commit", "machine", "run"),
    "sparsity": ("case", "format", "bits", "kl", "same_top", "ppl_float", "ppl", "tokens", "commit", "run"),
    "perplexity": None, "kv_cache": None,
}  # fmt: skip

_SPARSE_COLUMNS = (1, 16, 512)
_SPARSE_WEIGHTS = {
    "int8_row_a8row": "int8",
    "int8_g32_a8": "int8, groups of 32",
    "int4_g32_a8": "int4, groups of 32",
    "int4_g128_a8": "int4, groups of 128",
    "bf16": "bf16",
}

_ATTENTION_CASES = {
    "attention_prefill/B1_H32.8_L1024.1024_D128": "prompt of 1024",
    "attention_backward/B1_H32.8_L1024.1024_D128": "1024 tokens and gradients",
    "attention_decode/B1_H32.8_L1.4096_D128": "1 token, 4096 keys",
    "attention_decode/B1_H32.8_L1.32768_D128": "1 token, 32768 keys", "attention_decode/B16_H32.8_L1.1024_D128": "16 x 1 token, 1024 keys",
}  # fmt: skip
_ATTENTION = {
    "fp32": "**taut fp32**", "bf16": "**taut bf16**", "kv_float32": "**taut fp32**", "kv_bf16": "**taut bf16**",
    "kv_fp8": "**taut, fp8 cache**", "kv_int8": "**taut, int8 cache**", "kv_int4": "**taut, int4 cache**",
}  # fmt: skip
ATTENTION_PEERS = {
    "torch_sdpa_fp32": "torch SDPA fp32", "torch_sdpa_bf16": "torch SDPA bf16", "torch_flex_fp32": "torch FlexAttention fp32",
    "torch_flex_bf16": "torch FlexAttention bf16",
}  # fmt: skip

Line = dict[str, Any]


def read_lines(paths: Iterable[Path]) -> list[Line]:
    """Every measurement in the files. Raises ``ValueError`` for a line that is none, naming file and line."""
    lines = []
    for path in paths:
        for number, text in enumerate(path.read_text().splitlines(), 1):
            if not text.strip():
                continue
            try:
                line = json.loads(text)
                needed = _NEEDED_BY.get(line.get("op"), _NEEDED)
                if needed is None or "kind" in line:
                    continue
                missing = [name for name in needed if name not in line]
            except (json.JSONDecodeError, TypeError, AttributeError) as error:
                raise ValueError(f"{path}:{number}: not a JSON object: {error}") from None
            if missing:
                raise ValueError(f"{path}:{number}: has no {missing[0]!r}")
            lines.append(line)
    return lines


def is_older(path: Path) -> bool:
    return path.stem.endswith(OLDER)


def newest_run(lines: Sequence[Line]) -> list[Line]:
    """The lines the table shows, all of one run: the newest that timed taut int4 at every M beside a peer; else the newest with any.

    Raises ``ValueError`` where no run timed taut on the table's shape.
    """
    runs: dict[str, list[Line]] = {}
    for line in lines:
        if line["op"] == "quant_linear" and line["case"].startswith(f"{SHAPE}_M") and (line["peer"] or line["format"] in _OWN):
            runs.setdefault(line["run"], []).append(line)
    own = [run for run, found in runs.items() if any(not line["peer"] for line in found)]
    if not own:
        raise ValueError(f"no line times taut on {SHAPE}; run: python bench/run.py --peers --json bench/results/<machine>.jsonl")
    full = [run for run in own if _is_full(runs[run])]
    return runs[max(full or own)]


def _is_full(lines: Sequence[Line]) -> bool:
    int4 = {line["case"] for line in lines if line["format"] == "int4_g32_a8" and not line["peer"]}
    return int4 >= {f"{SHAPE}_M{m}" for m in COLUMNS} and any(line["peer"] for line in lines)


def render(lines: Sequence[Line]) -> str:
    """The table in Markdown, times in milliseconds: cold weights where they were timed, else warm.

    A peer's time over taut's stands beside it: over taut int8 for a peer of 8 bits, over taut int4 for all others.
    """
    times: dict[str, dict[int, float]] = {}
    rival: dict[str, str] = {}
    for line in sorted(lines, key=lambda line: line["cold"]):  # cold last: it stays
        name = NAMES.get(line["impl"], line["impl"]) if line["peer"] else _OWN[line["format"]]
        if line["peer"]:
            rival[name] = _OWN["int8_row_a8" if line["format"].startswith("int8") else "int4_g32_a8"]
        times.setdefault(name, {})[int(line["case"].rpartition("_M")[2])] = line["median_us"] / 1e3
    order = [*_OWN.values(), *NAMES.values()]
    names = sorted(times, key=lambda name: (order.index(name) if name in order else len(order), name))
    first = lines[0]
    rows = [
        "| ms (times taut of as many bits; floats: times int4) | " + " | ".join(f"M={m}" for m in COLUMNS) + " |",
        "|---|" + "---:|" * len(COLUMNS),
    ]
    for name in names:
        ours = times.get(rival.get(name, ""), {})
        rows.append(f"| {name} | " + " | ".join(_cell(times[name].get(m), ours.get(m)) for m in COLUMNS) + " |")
    note = (
        f"One linear layer, N=14336, K=4096, M rows of x; 4 bits in groups of 32. {first['machine']}, {first['threads']} threads, "
        f"torch {first['torch']}, commit {first['commit']}, {first['run'][:10]}. Weights come from memory (M=512: from wherever they are). "
        "Reproduce: `python bench/run.py --peers`."
    )
    return "\n".join([*rows, "", note])


def newest_models(lines: Sequence[Line]) -> dict[str, list[Line]]:
    """The lines of each model's newest run beside a peer of few bits, or else of its newest; in the order of the table."""
    found: dict[str, list[Line]] = {}
    for model in _MODELS:
        runs: dict[str, list[Line]] = {}
        for line in lines:
            if line["op"] == "generate" and line["case"].partition("/")[0] == model:
                runs.setdefault(line["run"], []).append(line)
        full = [run for run, own in runs.items() if any(line["peer"] and line["format"].startswith("int") for line in own)]
        if runs:
            found[model] = runs[max(full or runs)]
    return found


def render_models(found: dict[str, list[Line]]) -> str:
    """Tokens a second in Markdown, of prompts and of decoding, and taut's over a peer's; ``found`` as ``newest_models`` gives it."""
    if not found:
        return "Not measured yet: `python bench/run.py --model smollm2-135m --peers`."
    columns = [(model, case) for model, lines in found.items() for case in dict.fromkeys(line["case"] for line in lines)]
    rates = {(line["impl"], line["format"], line["case"]): line["tokens_s"] for lines in found.values() for line in lines}
    heads = [f"{_MODELS[model]}, {case.partition('/')[2].rstrip('0123456789')}" for model, case in columns]
    rows = ["| tokens/s (taut of as many bits is so many times as fast) | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(heads)]
    for (impl, format), name in _GENERATORS.items():
        if not any((impl, format, case) in rates for _, case in columns):
            continue
        ours = "int8_row_a8" if format.startswith("int8") else "int4_g32_a8"
        cells = []
        for _, case in columns:
            rate, own = rates.get((impl, format, case)), rates.get(("taut", ours, case))
            ratio = f" ({own / rate:.1f}x)" if rate and own and impl != "taut" else ""
            cells.append("" if rate is None else f"{rate:.3g}{ratio}" if rate < 1000 else f"{rate:.0f}{ratio}")
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    first = next(iter(found.values()))[0]
    tokens = {case.partition("/")[2] for _, case in columns}
    prompt, decode = (max(part.removeprefix(kind) for part in tokens if part.startswith(kind)) for kind in ("prompt", "decode"))
    note = (
        f"Batch 1, greedy; prompts of {prompt} tokens, then {decode} tokens decoded after a prompt of 32. transformers and taut through "
        "`model.generate`. The Llamas have random weights and 32000 words. Heads have 8 bits (llama.cpp: what its quantizer gives "
        f"them). {first['machine']}, {first['threads']} threads, torch {first['torch']}, commit {first['commit']}, {first['run'][:10]}. "
        "Reproduce: `python bench/run.py --model smollm2-135m --peers`."
    )
    return "\n".join([*rows, "", note])


def render_attention(lines: Sequence[Line]) -> str:
    """Milliseconds of attention in Markdown, and torch's over taut's of the same precision; of each case's newest run."""
    cells: dict[str, dict[str, float]] = {}
    first: Line | None = None
    for key in _ATTENTION_CASES:
        found = [line for line in lines if f"{line['op']}/{line['case']}" == key]
        newest = max((line["run"] for line in found), default="")
        for line in (line for line in found if line["run"] == newest):
            name = ATTENTION_PEERS[line["impl"]] if line["peer"] else _ATTENTION[line["format"]]
            cells.setdefault(name, {})[key] = line["median_us"] / 1e3
            first = first or line
    if first is None:
        return "Not measured yet: `python bench/run.py --attention`."
    rows = [
        "| ms (torch: times taut of the same precision) | " + " | ".join(_ATTENTION_CASES.values()) + " |",
        "|---|" + "---:|" * len(_ATTENTION_CASES),
    ]
    for name in dict.fromkeys((*_ATTENTION.values(), *ATTENTION_PEERS.values())):
        if name not in cells:
            continue
        ours = cells.get(f"**taut {name.rpartition(' ')[2]}**", {}) if name.startswith("torch") else {}
        rows.append(f"| {name} | " + " | ".join(_cell(cells.get(name, {}).get(key), ours.get(key)) for key in _ATTENTION_CASES) + " |")
    note = (
        f"Causal, 32 query and 8 key heads of 128; caches come from memory. {first['machine']}, {first['threads']} threads, "
        f"torch {first['torch']}, commit {first['commit']}, {first['run'][:10]}. Reproduce: `python bench/run.py --attention`."
    )
    return "\n".join([*rows, "", note])


def render_sparse_speed(lines: Sequence[Line]) -> str:
    """Milliseconds of ``bench.sparse``'s newest run in Markdown: what taut picks, and how much faster than the fastest dense kernel."""
    found = [line for line in lines if line["op"] == "sparse_linear" and line["case"].startswith(f"{SHAPE}_M")]
    if not found:
        return "Speed is not measured yet: `python -m bench.sparse`."
    found = [line for line in found if line["run"] == max(line["run"] for line in found)]
    picked = {(line["format"], int(line["case"].rpartition("_M")[2])): line for line in found if line["picked"]}
    rows = [
        "| ms (times as fast as the fastest dense kernel) | " + " | ".join(f"M={m}" for m in _SPARSE_COLUMNS) + " |",
        "|---|" + "---:|" * len(_SPARSE_COLUMNS),
    ]
    for weights, name in _SPARSE_WEIGHTS.items():
        for pattern in dict.fromkeys(line["pattern"] for line in found if line["format"].endswith(f"_{weights}")):
            cells = []
            for m in _SPARSE_COLUMNS:
                line = picked.get((f"{pattern}_{weights}", m))
                ratio = f" ({line['dense_ratio']:.2f}x)" if line and pattern != "dense" else ""
                cells.append("" if line is None else f"{line['median_us'] / 1e3:.3g}{ratio}")
            whose = " (torch)" if weights == "bf16" and pattern == "dense" else ""
            rows.append(f"| {name}, {pattern}{whose} | " + " | ".join(cells) + " |")
    first = found[0]
    note = (
        f"One linear layer, N=14336, K=4096, M rows of x, int8 activations, beside bf16 weights bf16 ones; weights from memory. "
        f"{first['machine']}, {first['threads']} threads, torch {first['torch']}, commit {first['commit']}, {first['run'][:10]}. "
        "Reproduce: `python -m bench.sparse`."
    )
    return "\n".join([*rows, "", note])


def render_sparsity(lines: Sequence[Line]) -> str:
    """What compressing changes, in Markdown, the newest line of each entry of ``bench.sparsity``; a group of columns for each model."""
    newest: dict[tuple[str, str], Line] = {}
    for line in sorted((line for line in lines if line["op"] == "sparsity"), key=lambda line: line["run"]):
        newest[line["format"], line["case"]] = line
    if not newest:
        return "Fidelity is not measured yet: `python -m bench.sparsity`."
    cases = [case for case in _MODELS if any(own == case for _, own in newest)]
    heads = [f"{_MODELS[case]}: {what}" for case in cases for what in ("KL", "same top word", "perplexity")]
    rows = ["| method, pattern, weights | bits a weight | " + " | ".join(heads) + " |", "|---|" + "---:|" * (1 + len(heads))]
    # Dense first, then from pruning that changes most to pruning that changes least.
    entries = sorted(
        {entry for entry, _ in newest}, key=lambda entry: (" dense " not in entry, -newest.get((entry, cases[0]), {"kl": 0.0})["kl"])
    )
    for entry in entries:
        own = [newest.get((entry, case)) for case in cases]
        bits = next(line["bits"] for line in own if line is not None)
        cells = [
            part
            for line in own
            for part in (("", "", "") if line is None else (f"{line['kl']:.3g}", f"{line['same_top']:.1%}", f"{line['ppl']:.4g}"))
        ]
        rows.append(f"| {entry} | {bits:.2f} | " + " | ".join(cells) + " |")
    base = ", ".join(
        f"{next(line['ppl_float'] for (_, own), line in newest.items() if own == case):.4g} of {_MODELS[case]}" for case in cases
    )
    some = next(iter(newest.values()))
    note = (
        f"KL divergence in nats a token from the float model, over {some['tokens']} tokens that calibration did not see; perplexity of the "
        f'float model: {base}. "+64": 64 steps of recovery a layer; "~p": channels permuted first. "float" keeps 16 bits for each weight, '
        "zeros too. Reproduce: `python -m bench.sparsity`."
    )
    return "\n".join([*rows, "", note])


def pictures(results: Iterable[Path], name: str, words: str) -> str:
    """Markdown of the plots of this name that lie beside the results, newest name last; empty where there is none."""
    found = sorted({path for result in results for path in result.parent.glob(f"{name}.png")})
    return "\n".join(f"![{words} ({path.stem})](bench/results/{path.name})" for path in found)


def _cell(value: float | None, ours: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" + (f" ({value / ours:.1f}x)" if ours else "")


def update_readme(readme: Path, results: Sequence[Path]) -> None:
    """Puts the tables between the marker comments of ``readme``; the rest stays as it is.

    Raises ``ValueError`` where the markers are not there once each, in order, or no result fits the layers' table. A file
    without markers for the tables of models, attention and sparsity gets none.
    """
    text = readme.read_text()
    _check_markers(readme, text, BEGIN, END)
    lines = read_lines(path for path in results if not is_older(path))
    layers = "\n\n".join(filter(None, (render(newest_run(lines)), pictures(results, "linear-*", "Throughput of a layer over M"))))
    text = _between(text, BEGIN, END, layers)
    if MODELS_BEGIN in text or MODELS_END in text:
        _check_markers(readme, text, MODELS_BEGIN, MODELS_END)
        text = _between(text, MODELS_BEGIN, MODELS_END, render_models(newest_models(lines)))
    if ATTENTION_BEGIN in text or ATTENTION_END in text:
        _check_markers(readme, text, ATTENTION_BEGIN, ATTENTION_END)
        drawn = pictures(results, "attention-*", "Attention over its length")
        text = _between(text, ATTENTION_BEGIN, ATTENTION_END, "\n\n".join(filter(None, (render_attention(lines), drawn))))
    if SPARSITY_BEGIN in text or SPARSITY_END in text:
        _check_markers(readme, text, SPARSITY_BEGIN, SPARSITY_END)
        drawn = pictures(results, "sparsity-*", "KL divergence over bits a weight")
        parts = (render_sparse_speed(lines), render_sparsity(lines), drawn)
        text = _between(text, SPARSITY_BEGIN, SPARSITY_END, "\n\n".join(filter(None, parts)))
    temporary = readme.with_name(f".{readme.name}.new")
    try:
        temporary.write_text(text)
        temporary.replace(readme)
    finally:
        temporary.unlink(missing_ok=True)


def _check_markers(readme: Path, text: str, begin: str, end: str) -> None:
    if text.count(begin) != 1 or text.count(end) != 1 or text.find(begin) > text.find(end):
        raise ValueError(f"{readme} must hold {begin} and {end}, once each, in this order")


def _between(text: str, begin: str, end: str, new: str) -> str:
    return f"{text[: text.find(begin)]}{begin}\n{new}\n{text[text.find(end) :]}"


if __name__ == "__main__":
    root = Path(__file__).resolve().parents[1]
    try:
        update_readme(root / "README.md", sorted((root / "bench" / "results").glob("*.jsonl")))
    except (ValueError, OSError) as problem:
        sys.exit(f"bench: {problem}")
