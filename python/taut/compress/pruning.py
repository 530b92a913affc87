"""compress: a language model, decoder layer by decoder layer, made sparse, low-bit or both."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..formats import SPARSE_KINDS, NumberFormat, WeightFormat
from ..formats.sparse import Pattern, SparseFormat, sparsify
from ..nn import PackedWeight, QuantLinear, SparseLinear
from ..ops.pack_sparse import pack_sparse
from ..swap import matches
from .calibration import Inputs, Statistics, decoder_layers, gather
from .permutation import permute as permute_layer
from .permutation import reorder
from .recovery import recover as recover_layer
from .solver import Solved, by_error, by_score, error_of

METHODS = ("magnitude", "wanda", "sparsegpt", "gptq")


@dataclass(frozen=True)
class LayerReport:
    """One linear layer: ``error`` is the share of its output's energy that changed on the calibration text."""

    name: str
    out_features: int
    in_features: int
    error: float
    bytes_before: int
    bytes_after: int


@dataclass
class CompressReport:
    """What ``compress`` did. ``kept``: linear layers left alone, and why. ``recovered``: of each decoder layer the error of its output
    against the dense model's before and after recovery, a share of the output's energy. ``permuted``: of each linear layer whose pruning
    another order of channels changed, the share of its importance (by the method's own score) that is kept without and with it;
    ``unpermuted``: modules whose channels stay as they were, and why."""

    method: str
    format: str
    layers: list[LayerReport] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    recovered: dict[str, tuple[float, float]] = field(default_factory=dict)
    permuted: dict[str, tuple[float, float]] = field(default_factory=dict)
    unpermuted: dict[str, str] = field(default_factory=dict)

    @property
    def mean_error(self) -> float:
        return sum(layer.error for layer in self.layers) / max(1, len(self.layers))

    def __str__(self) -> str:
        before, after = (sum(getattr(layer, name) for layer in self.layers) for name in ("bytes_before", "bytes_after"))
        lines = [
            f"{self.method}: {len(self.layers)} linear layers to {self.format}, {before / 1e6:.1f} MB -> {after / 1e6:.1f} MB; "
            f"{self.mean_error:.2%} of their outputs' energy changed on the calibration text, at most "
            f"{max((layer.error for layer in self.layers), default=0.0):.2%}"
        ]
        if self.recovered:
            first, last = (sum(column) / len(self.recovered) for column in zip(*self.recovered.values(), strict=True))
            lines.append(f"recovery: the decoder layers' mean error {first:.2%} -> {last:.2%}")
        if self.permuted:
            first, last = (sum(column) / len(self.permuted) for column in zip(*self.permuted.values(), strict=True))
            lines.append(f"permuted: {len(self.permuted)} linear layers keep {first:.2%} -> {last:.2%} of their importance")
        lines += [f"kept {name}: {reason}" for name, reason in self.kept.items()]
        return "\n".join(lines + [f"not permuted {name}: {reason}" for name, reason in self.unpermuted.items()])


@torch.no_grad()
def compress(
    model: nn.Module, ids: Tensor, *, sparsity: str | None = "2:4", weights: str | None = None, group_size: int | None = None,
    activations: str = "auto", method: str = "sparsegpt", permute: bool = False, recover: int = 0, skip: Sequence[str] | None = None,
    damping: float = 0.01, batch: int = 4, state: str | os.PathLike | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> CompressReport:  # fmt: skip
    """Makes the linear layers in the decoder layers of ``model`` sparse, low-bit or both, in place.

    ``ids``: calibration text, int64 ``[sequences, tokens]`` (``calibration_ids``). ``sparsity``: "2:4", "16:2:4" and the like, or None.
    ``weights``: "int4" or "int8" (then layers become ``SparseLinear``, or ``QuantLinear`` without sparsity), with sparsity "fp16" or
    "bf16" (``SparseLinear``, what is kept rounded to 16 bits alone), or None: they stay ``nn.Linear`` with zeros. ``method``: "magnitude"
    (needs no text, but reports errors on it), "wanda" (arXiv 2306.11695), "sparsegpt" (2301.00774: pruning and rounding, jointly), "gptq"
    (2210.17323: rounding alone). ``skip``: patterns of names to leave alone.
    ``permute``: before a decoder layer is pruned, the channels within its MLP and within its heads' values are put in an order of which the
    pattern keeps more (``permutation.permute``); the model computes the same, stays loadable as it was, and costs nothing more to run.
    ``recover``: so many steps of training of each decoder layer, alone, once it is pruned and before it is rounded: what is kept, norms
    and biases are fitted to what the dense model gave (``recovery.recover``; a float32 model). It takes much longer and helps much.
    Embeddings, the output head and, without ``recover``, norms are never touched.

    Each decoder layer sees what the compressed layers before it give. Memory: hidden states of all tokens, and ``[K, K]`` float64 for
    each input of one decoder layer; with ``recover`` the dense model's hidden states besides. ``state``: a directory; each finished
    decoder layer is written there, and a run that was broken off goes on after the last one. Raises ``ValueError`` for settings that do
    not fit, a model without one list of decoder layers, and a state of another model, text or settings.
    """
    pattern, format = _check(model, ids, sparsity, weights, group_size, method, permute, recover, damping, batch)
    target = SparseFormat(format, pattern) if pattern is not None and format is not None else format
    name_of_list, layers = decoder_layers(model)
    chosen, kept = _choose(layers, name_of_list, pattern, list(skip or ()))
    report = CompressReport(method, str(target or pattern), kept=kept)
    settings = {
        "sparsity": sparsity, "weights": None if format is None else str(format), "method": method, "damping": damping, "batch": batch,
        "skip": sorted(skip or ()), "recover": recover, "version": 3,
    }  # fmt: skip
    if permute:  # WHY not always: a state that was begun before there was such a setting still is of the same run
        settings["permute"] = True
    store = None if state is None else _State(Path(state), {**settings, "model": _fingerprint(model), "text": _hash(ids)})
    was_training = model.training
    model.eval()
    inputs = Inputs(model, layers, ids, batch)
    dense = inputs.copy() if recover else None
    solved: dict[str, Solved] = {}
    for index, layer in enumerate(layers):
        if progress:
            progress(index, len(layers), f"{name_of_list}.{index}")
        if dense is not None:
            dense.advance(layer, index)  # what this layer gives, as long as it is dense
        linears = chosen[index]
        done = None if store is None else store.load(index)
        if done is None:
            done = _Layer()
            if linears:
                targets = None if dense is None else dense.hidden
                done = _compress_layer(inputs, layer, index, linears, targets, permute, recover, pattern, format, target, method, damping)
            if store is not None:
                store.save(index, done)
        elif done.orders:
            reorder(layer, done.orders, pattern.m)
        for name, part in done.parts.items():
            linears[name].weight.copy_(part.weight)
        for name, vector in done.vectors.items():
            layer.get_parameter(name).copy_(vector)
        report.layers += done.reports
        if done.recovered is not None:
            report.recovered[f"{name_of_list}.{index}"] = done.recovered
        report.permuted |= done.permuted
        report.unpermuted |= {f"{name_of_list}.{index}.{name}".rstrip("."): reason for name, reason in done.unpermuted.items()}
        solved |= {name: Solved(part.weight[:0], part.mask, part.codes, part.scales) for name, part in done.parts.items()}
        inputs.advance(layer, index)
    if format is not None:
        for name, part in solved.items():
            model.set_submodule(name, _module(model.get_submodule(name), part, format, target, activations))
        _record(model, format, sparsity, activations, skip)
    model.train(was_training)
    if progress:
        progress(len(layers), len(layers), "")
    return report


@dataclass
class _Layer:
    """What became of a decoder layer: its linear layers, and after recovery its vectors (norms, biases) by their names in it; before all of
    that the order of its channels."""

    parts: dict[str, Solved] = field(default_factory=dict)
    reports: list[LayerReport] = field(default_factory=list)
    vectors: dict[str, Tensor] = field(default_factory=dict)
    recovered: tuple[float, float] | None = None
    orders: dict[str, Tensor] = field(default_factory=dict)
    permuted: dict[str, tuple[float, float]] = field(default_factory=dict)
    unpermuted: dict[str, str] = field(default_factory=dict)


def _compress_layer(
    inputs: Inputs, layer: nn.Module, index: int, linears: dict[str, nn.Linear], targets: list[Tensor] | None, permute: bool,
    recover: int, pattern: Pattern | None, format: WeightFormat | None, target: Any, method: str, damping: float,
) -> _Layer:  # fmt: skip
    """``targets``: where it is to be recovered, what the layer gave in the dense model."""
    done = _Layer()
    statistics = gather(inputs, layer, index, linears)
    if permute:
        found = permute_layer(inputs, layer, index, linears, statistics, pattern, method, damping)
        done.orders, done.permuted, done.unpermuted = found
    weights = {name: linear.weight.float().clone() for name, linear in linears.items()}
    for name, weight in weights.items():
        done.parts[name] = _solve(weight, statistics[name], pattern, None if targets else format, method, damping)
    if targets:
        for name, linear in linears.items():
            linear.weight.copy_(done.parts[name].weight)
        masks = {linear: done.parts[name].mask for name, linear in linears.items()}
        done.recovered = recover_layer(inputs, layer, index, targets, masks, recover)
        done.vectors = {name: each.detach().clone() for name, each in layer.named_parameters() if each.dim() == 1}
        statistics = gather(inputs, layer, index, linears)
        for name, linear in linears.items():
            done.parts[name] = _solve(linear.weight.float(), statistics[name], pattern, format, method, damping, masks[linear])
    for name, linear in linears.items():
        error = error_of(weights[name], done.parts[name].weight, statistics[name].gram)
        before = linear.weight.numel() * linear.weight.element_size()
        done.reports.append(LayerReport(name, linear.out_features, linear.in_features, error, before, _bytes(linear, pattern, target)))
    return done


def _check(
    model: nn.Module,
    ids: Tensor,
    sparsity: str | None,
    weights: str | None,
    group_size: int | None,
    method: str,
    permute: bool,
    recover: int,
    damping: float,
    batch: int,
) -> tuple[Pattern | None, WeightFormat | None]:  # fmt: skip
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; accepted: {', '.join(METHODS)}")
    if sparsity is None and weights is None:
        raise ValueError("there is nothing to do: give sparsity, weights or both")
    if method == "gptq" and (sparsity is not None or weights is None):
        raise ValueError("gptq rounds dense weights: give weights and no sparsity; sparsegpt does both")
    if method != "gptq" and sparsity is None:
        raise ValueError(f"{method} prunes: give sparsity; gptq rounds dense weights")
    if not isinstance(permute, bool) or (permute and sparsity is None):
        raise ValueError(f"permute orders channels for a sparsity pattern: True, with sparsity, or False; got {permute!r}")
    if recover < 0 or (recover and sparsity is None):
        raise ValueError(f"recover is a number of steps that a pruned layer is trained: 0 or more, and with sparsity; got {recover}")
    if recover and any(parameter.dtype != torch.float32 for parameter in model.parameters()):
        raise ValueError("recover trains weights, which takes a float32 model: load it in torch.float32")
    if weights not in (None, "int4", "int8", *SPARSE_KINDS):
        raise ValueError(f"weights must be int4, int8, fp16, bf16 or None, got {weights!r}")
    if ids.dim() != 2 or ids.dtype != torch.int64 or ids.shape[0] < 1 or ids.shape[1] < 2:
        raise ValueError(f"ids must be int64 [sequences, tokens], at least one sequence of two tokens; got {ids.dtype} {list(ids.shape)}")
    if not 0 < damping < 1 or batch < 1:
        raise ValueError(f"damping must be between 0 and 1 and batch at least 1, got {damping} and {batch}")
    if any(isinstance(module, PackedWeight) for module in model.modules()):
        raise ValueError("this model has low-bit layers already: compress a float one")
    if sparsity is None:
        return None, None if weights is None else WeightFormat(weights, group_size)
    target = None if weights is None else SparseFormat.of_names(weights, group_size, False, sparsity)
    return Pattern.parse(sparsity), None if target is None else target.weights


def _choose(
    layers: nn.ModuleList, prefix: str, pattern: Pattern | None, skip: list[str]
) -> tuple[list[dict[str, nn.Linear]], dict[str, str]]:
    """Linear layers of each decoder layer by full name, and those left alone with the reason."""
    chosen, kept, used = [], {}, set()
    for index, layer in enumerate(layers):
        here = {}
        for inner, module in layer.named_modules():
            name = f"{prefix}.{index}.{inner}"
            if not isinstance(module, nn.Linear):
                continue
            fits = [text for text in skip if matches(name, text)]
            used.update(fits)
            if type(module) is not nn.Linear:
                kept[name] = f"{type(module).__name__} is a subclass of nn.Linear with behaviour of its own"
            elif fits:
                kept[name] = f"skip {fits[0]!r}"
            elif pattern is not None and module.in_features % pattern.m:
                kept[name] = f"its {module.in_features} inputs cannot be cut in blocks of {pattern.m}"
            elif module.weight.device.type != "cpu":
                raise ValueError(f"{name} is on {module.weight.device}: compress computes on the CPU; move the model there")
            else:
                here[name] = module
        chosen.append(here)
    if unknown := set(skip) - used:
        raise ValueError(f"pattern {sorted(unknown)[0]!r} matches no linear layer in the decoder layers")
    if not any(chosen):
        raise ValueError("there is nothing to compress: every linear layer in the decoder layers is left alone")
    return chosen, kept


def _solve(
    weight: Tensor, statistics: Statistics, pattern: Pattern | None, format: WeightFormat | None, method: str, damping: float,
    kept: Tensor | None = None,
) -> Solved:  # fmt: skip
    """``kept``: what is kept, where that is decided already."""
    if isinstance(format, NumberFormat):  # rounding to 16 bits moves nothing that other columns would have to make up for
        solved = _solve(weight, statistics, pattern, None, method, damping, kept)
        codes = format.codes_of(solved.weight)
        return Solved(codes.float(), solved.mask, codes)
    if not bool(weight.isfinite().all()):
        raise ValueError("a weight holds a NaN or an infinity")
    if method in ("sparsegpt", "gptq"):
        return by_error(weight, statistics.gram, pattern, format, damping, kept)
    scores = kept.float() if kept is not None else weight.abs() * (statistics.norms if method == "wanda" else 1.0)
    return by_score(weight, scores, pattern, format)


def _bytes(linear: nn.Linear, pattern: Pattern | None, target: Any) -> int:
    if target is not None:
        return target.canonical_bytes(linear.out_features, linear.in_features)
    return linear.weight.numel() * linear.weight.element_size()


def _module(linear: nn.Linear, part: Solved, format: WeightFormat, target: Any, activations: str) -> QuantLinear:
    """The low-bit module with exactly the codes that were found."""
    k, dtype = linear.in_features, linear.weight.dtype
    if part.mask is None:
        return QuantLinear.from_canonical(part.codes, part.scales, None, None, linear.bias, k, format, activations, dtype)
    module = SparseLinear(k, linear.out_features, bias=False, format=target, activations=activations, device="meta")
    module._set_packed(pack_sparse(sparsify(part.codes, part.scales, part.mask, target), k, target))
    module._like = torch.empty(0, dtype=dtype)
    if linear.bias is not None:
        module.bias = linear.bias
    return module


def _record(model: nn.Module, format: WeightFormat, sparsity: str | None, activations: str, skip: Sequence[str] | None) -> None:
    """Notes in a transformers model how it was made, so that ``taut.save`` writes what ``from_pretrained`` reads."""
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is None or not isinstance(model, modeling.PreTrainedModel):
        return
    from ..integrations import transformers
    from ..swap import SwapReport, swapped_entry

    report = SwapReport()
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            size = module.out_features * module.in_features * module._like.element_size()
            report.swapped.append(swapped_entry(name, module, size))
    settings = {"weights": format.name, "group_size": format.group_size, "activations": activations, "sparsity": sparsity}
    transformers.record_swap(model, {**settings, "skip": None if skip is None else list(skip)}, report)


# ---- State: a run that was broken off goes on


def _hash(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:32]


def _fingerprint(model: nn.Module) -> str:
    """Of all parameters' names, shapes and some of their numbers."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().reshape(-1)
        some = flat[:: max(1, flat.numel() // 64)][:64].float()
        digest.update(f"{name} {list(parameter.shape)} {parameter.dtype} {some.tolist()}".encode())
    return digest.hexdigest()[:32]


class _State:
    """A directory: ``state.json`` says of what run, ``layer-<index>.pt`` holds what became of a decoder layer."""

    def __init__(self, folder: Path, run: dict[str, Any]) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        known = folder / "state.json"
        if known.exists():
            try:
                other = json.loads(known.read_text())
            except json.JSONDecodeError as error:
                raise ValueError(f"{known} is no state of compress: {error}") from None
            if different := sorted(key for key in {*run, *other} if run.get(key) != other.get(key)):
                raise ValueError(f"{folder} holds the state of another run: {', '.join(different)} differ; give another directory")
        else:
            self._replace(known, lambda path: path.write_text(json.dumps(run, indent=1)))

    @staticmethod
    def _replace(path: Path, write: Callable[[Path], Any]) -> None:
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            write(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def _path(self, index: int) -> Path:
        return self.folder / f"layer-{index}.pt"

    def save(self, index: int, layer: _Layer) -> None:
        content = {
            **vars(layer),
            "parts": {name: vars(part) for name, part in layer.parts.items()},
            "reports": [vars(e) for e in layer.reports],
        }
        self._replace(self._path(index), lambda path: torch.save(content, path))

    def load(self, index: int) -> _Layer | None:
        if not self._path(index).exists():
            return None
        content = torch.load(self._path(index), weights_only=True)
        parts = {name: Solved(**part) for name, part in content["parts"].items()}
        reports = [LayerReport(**each) for each in content["reports"]]
        return _Layer(**{**content, "parts": parts, "reports": reports})
