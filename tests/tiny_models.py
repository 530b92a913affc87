"""Tiny random language models with a tokenizer of single bytes, on disk: a checkpoint of transformers, and a GGUF file."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

TEMPLATE = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
WORDS = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
HIDDEN, MLP, LAYERS, HEADS, KV_HEADS, POSITIONS = 64, 96, 2, 4, 2, 1024


def tiny_llama() -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS), hidden_size=HIDDEN, intermediate_size=MLP, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, max_position_embeddings=POSITIONS, initializer_range=0.2, bos_token_id=1, eos_token_id=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


_SIZES = {
    "vocab_size": len(WORDS), "hidden_size": HIDDEN, "intermediate_size": MLP, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS, "max_position_embeddings": POSITIONS, "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
_TYPES = ["sliding_attention", "full_attention"] * (LAYERS // 2)
# family -> the name of its configuration, and what makes it different from a Llama
FAMILIES: dict[str, tuple[str, dict]] = {
    "llama": ("LlamaConfig", {"tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {"sliding_window": 8, "head_dim": 16}),
    "qwen2": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": 8, "layer_types": _TYPES}),
    "qwen3": ("Qwen3Config", {"head_dim": 32}),
    "gemma2": ("Gemma2Config", {"head_dim": 32, "sliding_window": 8, "layer_types": _TYPES, "query_pre_attn_scalar": 24}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 32, "sliding_window": 8, "layer_types": _TYPES, "query_pre_attn_scalar": 24}),
    "phi3": ("Phi3Config", {"partial_rotary_factor": 0.5}),
}


def tiny(family: str, **changes) -> torch.nn.Module:
    """A random causal language model of a family of FAMILIES. Norms and biases are random too, so that each of them counts."""
    torch.manual_seed(0)
    kind, own = FAMILIES[family]
    config = getattr(transformers, kind)(**{**_SIZES, **own, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            offset = 0.0 if name.endswith("bias") or family.startswith("gemma") else 1.0
            parameter.data = offset + 0.3 * torch.randn_like(parameter)
    return model


def byte_tokenizer(chat: bool) -> transformers.PreTrainedTokenizerFast:
    tokenizer = Tokenizer(BPE(vocab={word: index for index, word in enumerate(WORDS)}, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    if chat:
        fast.chat_template = TEMPLATE
    return fast


def write_checkpoint(folder: Path, chat: bool = True) -> Path:
    """Writes ``tiny_llama`` and its tokenizer to ``folder``."""
    tiny_llama().save_pretrained(folder)
    byte_tokenizer(chat).save_pretrained(folder)
    return folder


def write_gguf(path: Path) -> Path:
    """Writes a Llama of the same shape as ``tiny_llama`` and a byte tokenizer to a GGUF file, in float32."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(POSITIONS)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10_000.0)
    words = [*WORDS, "He"]  # a byte-pair tokenizer must have at least one pair
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(words) - 3))
    writer.add_token_merges(["H e"])
    for name, index in (("unk", 0), ("bos", 1), ("eos", 2), ("pad", 2)):
        getattr(writer, f"add_{name}_token_id")(index)
    generator = torch.Generator().manual_seed(0)

    def add(name: str, *shape: int) -> None:
        tensor = torch.ones(shape) if len(shape) == 1 else 0.2 * torch.randn(shape, generator=generator)
        writer.add_tensor(name, tensor.numpy())

    add("token_embd.weight", len(words), HIDDEN)
    for layer in range(LAYERS):
        for name, *shape in (
            ("attn_norm", HIDDEN), ("attn_q", HIDDEN, HIDDEN), ("attn_k", HIDDEN * KV_HEADS // HEADS, HIDDEN),
            ("attn_v", HIDDEN * KV_HEADS // HEADS, HIDDEN), ("attn_output", HIDDEN, HIDDEN), ("ffn_norm", HIDDEN),
            ("ffn_gate", MLP, HIDDEN), ("ffn_up", MLP, HIDDEN), ("ffn_down", HIDDEN, MLP),
        ):  # fmt: skip
            add(f"blk.{layer}.{name}.weight", *shape)
    add("output_norm.weight", HIDDEN)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
