"""Sparse float checkpoints of compressed-tensors, written out dense, so that transformers reads them and ``swap`` finds their zeros.

Formats (github.com/neuralmagic/compressed-tensors, compressors/sparse_compressors): for a weight ``[N, K]`` instead of ``<layer>.weight``
``<layer>.shape``, the two sizes; ``<layer>.bitmask`` uint8 ``[N, ceil(K / 8)]``, lowest bit first, 1 where a number is kept;
``<layer>.compressed``, the kept ones in order: ``[N, K / 2]`` ("sparse-24-bitmask"), or one after the other with where each row begins in
``<layer>.row_offsets`` ("sparse-bitmask").
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

FORMATS = ("sparse-24-bitmask", "sparse-bitmask")
_CONFIGS = ("quantization_config", "compression_config")  # the second in older ones
_PARTS = ("shape", "bitmask", "compressed", "row_offsets")


def is_sparse(folder: Path) -> bool:
    """Whether a directory holds a float checkpoint in one of ``FORMATS``. Raises ``ValueError`` for sparse ones that are not read."""
    config = json.loads((folder / "config.json").read_text())
    quantization = next((config[name] for name in _CONFIGS if config.get(name)), {})
    sparsity = quantization.get("sparsity_config") or {}
    format = sparsity.get("format", "dense")
    if quantization.get("quant_method") != "compressed-tensors" or format == "dense":
        return False
    if format not in FORMATS:
        raise ValueError(f"{folder} is sparse in format {format!r}; accepted: {', '.join(FORMATS)}")
    if quantization.get("config_groups"):
        raise ValueError(f"{folder} is sparse and quantized ({quantization.get('format')}); accepted: sparse float weights")
    return True


def dense_weight(name: str, parts: Mapping[str, Tensor]) -> Tensor:
    """``parts``: by the names of ``_PARTS``. Raises ``ValueError`` where they do not fit together."""
    if missing := [part for part in _PARTS[:3] if part not in parts]:
        raise ValueError(f"{name} has no {missing[0]}")
    sizes = parts["shape"].flatten().tolist()
    bitmask, values = parts["bitmask"], parts["compressed"]
    if len(sizes) != 2 or bitmask.dtype != torch.uint8 or tuple(bitmask.shape) != (sizes[0], -(-sizes[1] // 8)):
        raise ValueError(f"{name}.bitmask must be uint8 [N, ceil(K / 8)] for shape {sizes}, got {bitmask.dtype} {list(bitmask.shape)}")
    bits = (bitmask[..., None] >> torch.arange(8, dtype=torch.uint8)) & 1
    kept = bits.flatten(1)[:, : sizes[1]].bool()
    if int(kept.sum()) != values.numel():
        raise ValueError(f"{name}.bitmask keeps {int(kept.sum())} numbers, and {name}.compressed holds {values.numel()}")
    dense = torch.zeros(sizes, dtype=values.dtype)
    dense[kept] = values.flatten()
    return dense


@contextmanager
def written_dense(folder: Path) -> Iterator[Path]:
    """A directory with the same checkpoint, dense and without its ``quantization_config``, as long as the context lasts.

    Memory: one file of weights; disk: the dense model. Raises ``ValueError`` for files that do not fit together.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        raise ValueError(f"{folder} holds no *.safetensors")
    with TemporaryDirectory(prefix="taut-") as temporary:
        target, weight_map, total = Path(temporary), {}, 0
        for shard in shards:
            dense, parts = {}, {}
            with safe_open(shard, "pt") as file:
                names = list(file.keys())
                sparse = {name.rpartition(".")[0] for name in names if name.endswith(".bitmask")}
                for name in names:
                    layer, _, part = name.rpartition(".")
                    if layer in sparse and part in _PARTS:
                        parts.setdefault(layer, {})[part] = file.get_tensor(name)
                    else:
                        dense[name] = file.get_tensor(name)
            dense |= {f"{layer}.weight": dense_weight(layer, found) for layer, found in parts.items()}
            name = shard.name if len(shards) > 1 else "model.safetensors"
            save_file(dense, target / name, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(dense, name)
            total += sum(tensor.nbytes for tensor in dense.values())
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (target / "model.safetensors.index.json").write_text(json.dumps(index))
        config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        for name in _CONFIGS:
            config.pop(name, None)
        (target / "config.json").write_text(json.dumps(config))
        if (folder / "generation_config.json").exists():
            shutil.copy(folder / "generation_config.json", target)
        yield target
