"""transformers: ``taut.Config`` for ``from_pretrained``, and saving swapped models so that they load again.

Loading a float checkpoint quantizes tensor by tensor: the skeleton keeps its ``nn.Linear`` layers on the meta device, and
the moment a weight arrives it is packed and a ``QuantLinear`` takes the layer's place, so that no float copy of the model
exists. A checkpoint that taut wrote names its low-bit layers in config.json (``modules``) and holds ``qweight``, ``scales``,
``zeros`` and ``global_scale`` for them, never a ``weight``: without taut imported, transformers cannot take it for
something else.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import logging
import os
import re
import shutil
import sys
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer, _assign_is_quantized
from transformers.utils.quantization_config import QuantizationConfigMixin

from .. import _native
from .. import fuse as fusing
from .. import head as heads
from ..formats.sparse import SparseFormat
from ..nn import QuantLinear, SparseLinear
from ..nn.packed_weight import PARTS
from ..swap import (
    Kept,
    Rule,
    RuleBook,
    SwapReport,
    add_head,
    check_attention,
    check_values,
    head_to_swap,
    held_bytes,
    low_bit,
    make_rule,
    plan,
    set_attention,
    swapped_entry,
)  # fmt: skip

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger("taut")

METHOD = "taut"
VERSION = 1
_RULE_KEYS = ("weights", "group_size", "zeros", "activations", "sparsity")
_ARGUMENTS = (*_RULE_KEYS, "skip", "rules", "lm_head", "fuse", "strict", "attention")
_DEFAULTS = {"lm_head": None, "fuse": "auto", "strict": False, "attention": False, "sparsity": None}  # not written into config.json
_WRITTEN = ("modules", "tied")  # by taut, not by users
_TENSORS = (*PARTS, "meta", "bias")


@register_quantization_config(METHOD)
class Config(QuantizationConfigMixin):
    """How ``from_pretrained`` quantizes a model: ``AutoModelForCausalLM.from_pretrained(name, quantization_config=taut.Config())``.

    ``weights``, ``group_size``, ``zeros``, ``activations``, ``sparsity``: as ``taut.swap`` takes them. ``skip``: names or patterns of
    modules to leave alone. ``rules``: pattern -> a dict of the first four, or None to leave alone (see ``taut.swap``).
    ``lm_head``: a format for the output head, None to leave it in float.
    ``fuse``, ``strict``: whether decoder layers run as fused ops, and must; ``attention``: whether the model attends by taut's
    function (see ``taut.swap``).
    ``modules`` and ``tied`` are written by taut into the config.json of a quantized checkpoint: which layers are in which format,
    and which embeddings share the table of which head. They are not for users to give, and not looked at where a float
    checkpoint is loaded. Raises ``ValueError`` for anything else.
    """

    def __init__(
        self, weights: str = "int4", group_size: int | None = None, zeros: bool = False, activations: str = "auto",
        skip: Sequence[str] | None = None, rules: Mapping[str, Mapping | None] | None = None,
        modules: Sequence[Mapping[str, Any]] | None = None, tied: Mapping[str, str] | None = None,
        lm_head: str | None = None, fuse: bool | str = "auto", strict: bool = False, attention: bool = False,
        sparsity: str | None = None,
    ) -> None:  # fmt: skip
        self.quant_method = METHOD
        self.weights, self.group_size, self.zeros, self.activations, self.sparsity = weights, group_size, zeros, activations, sparsity
        self.book = RuleBook(weights, group_size, zeros, activations, skip, rules, sparsity)
        fusing.check_mode(fuse, strict)
        heads.make_head_rule(lm_head)
        check_attention(attention)
        self.lm_head, self.fuse, self.strict, self.attention = lm_head, fuse, strict, attention
        self.skip = None if skip is None else list(skip)
        self.rules = None if rules is None else {name: None if rule is None else dict(rule) for name, rule in rules.items()}
        self.modules = None if modules is None else [dict(entry) for entry in modules]
        if tied is not None and not (isinstance(tied, Mapping) and all(isinstance(part, str) for pair in tied.items() for part in pair)):
            raise ValueError(f"tied must map names of embeddings to names of output heads, got {tied!r}")
        self.tied = None if not tied else dict(tied)
        self._check_modules()

    def _check_modules(self) -> None:
        for entry in self.modules or ():
            entry.setdefault("sparsity", None)  # which checkpoints of dense weights do not name
            unknown = set(entry) ^ {*_RULE_KEYS, "names"}
            if unknown:
                raise ValueError(f"modules: {sorted(unknown)[0]!r} is unknown or missing; an entry has {', '.join(_RULE_KEYS)}, names")
            if not isinstance(entry["names"], list) or not all(isinstance(name, str) for name in entry["names"]):
                raise ValueError(f"modules: names must be a list of module names, got {entry['names']!r}")
            make_rule(*(entry[key] for key in _RULE_KEYS))

    def swapped(self, names: Iterable[str]) -> dict[str, Rule]:
        """Which of these module names a checkpoint holds in low bits (as ``modules`` says), and how."""
        found = {}
        for entry in self.modules or ():
            rule = make_rule(*(entry[key] for key in _RULE_KEYS))
            patterns = [re.compile(re.escape(name).replace(r"\*", r"\d+")) for name in entry["names"]]
            found.update({name: rule for name in names if any(pattern.fullmatch(name) for pattern in patterns)})
        return found

    def to_dict(self) -> dict[str, Any]:
        given = {key: getattr(self, key) for key in _ARGUMENTS}
        fields = {"quant_method": METHOD, "version": VERSION} | {k: v for k, v in given.items() if k not in _DEFAULTS or v != _DEFAULTS[k]}
        written = {key: value for key in _WRITTEN if (value := getattr(self, key)) is not None}
        return copy.deepcopy(fields | written)

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any):
        """A Config out of config.json. Raises ``ValueError`` for unknown keys, and for what a newer taut wrote."""
        settings = {**config_dict, **{key: value for key, value in kwargs.items() if key in _ARGUMENTS}}
        method, version = settings.pop("quant_method", METHOD), settings.pop("version", VERSION)
        if method != METHOD:
            raise ValueError(f"quant_method is {method!r}; taut.Config reads {METHOD!r}")
        if version != VERSION:
            raise ValueError(f"this checkpoint is of taut's format version {version!r}; this taut reads version {VERSION}")
        unknown = set(settings) - {*_ARGUMENTS, *_WRITTEN}
        if unknown:
            raise ValueError(f"quantization_config: unknown key {sorted(unknown)[0]!r}; accepted: {', '.join(_ARGUMENTS)}")
        config = cls(**settings)
        unused = {key: value for key, value in kwargs.items() if key not in _ARGUMENTS}
        return (config, unused) if return_unused_kwargs else config

    def update(self, **kwargs: Any) -> dict[str, Any]:
        """Changes settings, checked as at construction; returns what it does not know."""
        known = {key: value for key, value in kwargs.items() if key in _ARGUMENTS}
        changed = type(self)(**{**{key: getattr(self, key) for key in _ARGUMENTS}, **known}, modules=self.modules, tied=self.tied)
        self.__dict__.update(changed.__dict__)
        return {key: value for key, value in kwargs.items() if key not in known}

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield from self.to_dict().items()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Config) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]


class _QuantizeOnArrival:
    """transformers' conversion op: packs a float weight the moment it is read, and puts a QuantLinear in its layer's place."""

    def __init__(self, quantizer: TautQuantizer) -> None:
        self.quantizer = quantizer

    def convert(self, input_dict: dict[str, Any], *, model: nn.Module, missing_keys: set[str] | None = None, **_: Any) -> dict[str, Any]:
        rest = {}
        for key, value in input_dict.items():
            name = key.removesuffix(".weight")
            weight = value[0] if isinstance(value, list) else value
            if name == key or name not in self.quantizer.chosen or not self.quantizer.take(model, name, weight):
                rest[key] = value
            elif missing_keys is not None:
                missing_keys.discard(key)
        return rest


@register_quantizer(METHOD)
class TautQuantizer(HfQuantizer):
    """transformers' loading and saving of models with low-bit linear layers."""

    requires_calibration = False
    serialized_names: ClassVar[dict[str, list[str]]] = {"weight": list(PARTS)}
    is_qat_trainable = False

    def __init__(self, quantization_config: Config, **kwargs: Any) -> None:
        # WHY a copy: ours comes to say which modules were swapped, and the user may load another model with theirs.
        super().__init__(copy.deepcopy(quantization_config), **kwargs)
        self.report = SwapReport()
        self.chosen: dict[str, Rule] = {}
        self.refused: list[str] = []
        # WHY apart from their modules: transformers empties every non-persistent buffer while it finishes loading.
        self.packed: dict[str, Tensor] = {}
        self.read_bytes = 0

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        kinds = set()
        for device in device_map.values() if isinstance(device_map, Mapping) else [device_map]:
            if device == "disk":
                raise ValueError("device_map names the disk: taut holds packed weights in memory, and does not offload them")
            if device is None or device in ("auto", "balanced", "balanced_low_0", "sequential"):
                continue
            kind = "cuda" if isinstance(device, int) else torch.device(device).type
            if why := _native.why_not(kind):
                raise ValueError(f"device_map names {str(device)!r}, where taut cannot compute: {why}")
            kinds.add(kind)
        if len(kinds) > 1:
            raise ValueError("device_map spreads the model over the CPU and CUDA: taut does not offload; give it one kind of device")

    def update_device_map(self, device_map: Any) -> Any:
        automatic = isinstance(device_map, str) and device_map != "cpu"
        return {"": "cpu"} if automatic and _native.why_not("cuda") else device_map

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
        return dtype

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        return not self.pre_quantized and param_name.endswith(".weight") and param_name.removesuffix(".weight") in self.chosen

    @property
    def quantized_element_size(self) -> float:
        return self.quantization_config.book.default.format.canonical_bytes(1, 4096) / 4096

    def get_quantize_ops(self) -> _QuantizeOnArrival:
        return _QuantizeOnArrival(self)

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, dtype: torch.dtype | None = None, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if getattr(model.config, "distributed_config", None) is not None:
            raise ValueError("taut does not load a model in parts over several processes yet (tp_plan, distributed_config)")
        check_attention(self.quantization_config.attention, model)
        if not self.pre_quantized:
            chosen, self.report.kept = plan(model, self.quantization_config.book, dtype)
            self.chosen = {name: rule for name, _, rule in chosen}
            self._check_fuse(model, {id(module): rule for _, module, rule in chosen})
            head_to_swap(model, self.quantization_config.lm_head, list(self.chosen))
            return
        if self.quantization_config.modules is None:
            raise ValueError("the quantization_config of this checkpoint has no 'modules': it was not written by taut, or was edited")
        linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        self.chosen = _resolve(self.quantization_config, linears, model.base_model_prefix)
        if not self.chosen:
            raise ValueError(f"none of the low-bit layers of this checkpoint is in {type(model).__name__}")
        for name, rule in self.chosen.items():
            old = linears[name]
            if type(old) is not nn.Linear:
                raise ValueError(f"{name} is low-bit in the checkpoint, but here it is a {type(old).__name__}, not an nn.Linear")
            new = (SparseLinear if isinstance(rule.format, SparseFormat) else QuantLinear)(
                old.in_features, old.out_features, old.bias is not None,
                format=rule.format, activations=rule.activations, dtype=dtype, device="meta",
            )  # fmt: skip
            model.set_submodule(name, new)
        self._tie(model)
        self._check_fuse(model, {})
        _check_files(model, self.chosen, checkpoint_files or ())

    def _tie(self, model: PreTrainedModel) -> None:
        """Has embeddings share the table of a head, as the checkpoint says they do."""
        prefix = model.base_model_prefix
        for embeddings, head in (self.quantization_config.tied or {}).items():
            names = {alias: name for name in (embeddings, head) for alias in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))}
            here = {names[name]: name for name, _ in model.named_modules() if name in names}
            if embeddings in here and head not in here:
                raise ValueError(f"the embeddings of this checkpoint are in {head}, which {type(model).__name__} does not have")
            if embeddings not in here or type(model.get_submodule(here[head])) is not QuantLinear:
                raise ValueError(
                    f"the checkpoint says that {embeddings} shares the table of {head}; {type(model).__name__} has no such layers"
                )
            heads.tie(model, here[embeddings], model.get_submodule(here[head]))

    def _check_fuse(self, model: nn.Module, linears: dict[int, Rule]) -> None:
        fusing.check_wanted(model, linears, self.quantization_config.fuse, self.quantization_config.strict)

    def take(self, model: nn.Module, name: str, weight: Tensor) -> bool:
        """Puts a QuantLinear for ``weight`` in the place of linear layer ``name``; False if it has to stay as it is."""
        linear, rule = model.get_submodule(name), self.chosen.pop(name)
        if tuple(weight.shape) != tuple(linear.weight.shape):
            return False  # transformers has an error of its own for this, and an option to go on
        try:
            check_values(name, weight, rule)
            new = low_bit(_Loaded(weight, linear), rule)
        except ValueError as error:
            self.refused.append(str(error))  # WHY not raise: transformers would turn it into a RuntimeError of forty lines
            return False
        new.train(linear.training)
        model.set_submodule(name, new)
        size = weight.numel() * weight.element_size()
        self.report.swapped.append(swapped_entry(name, new, size))
        self.packed[name], new.packed = new.packed, None
        self.read_bytes += size
        if self.read_bytes >= _TRIM_BYTES:
            _give_back_memory()
            self.read_bytes = 0
        return True

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if self.refused:
            raise ValueError("this checkpoint cannot be quantized: " + "; ".join(self.refused[:5]))
        for name, packed in self.packed.items():
            model.get_submodule(name).packed = packed
        self.packed = {}
        _give_back_memory()
        if self.pre_quantized:
            self._finalize(model)
        else:
            for name in self.chosen:
                linear = model.get_submodule(name)
                held = sum(p.numel() * p.element_size() for p in linear.parameters(recurse=False))
                self.report.kept.append(Kept(name, "Linear", "the checkpoint has no weight for it: newly initialized, in float", held))
            if (lm_head := self.quantization_config.lm_head) is not None:
                add_head(model, head_to_swap(model, lm_head, ()), heads.make_head_rule(lm_head), self.report)
        self.report.shared = heads.tied_tables(model)
        self.chosen = {}
        if self.quantization_config.fuse is not False:
            self.report.fused = fusing.fuse_model(model)
        if self.quantization_config.attention and _attends_by_default(model):
            set_attention(model, self.report)
        model.taut_report = self.report
        record_modules(model)
        _tell(self.report)
        return model

    def _finalize(self, model: nn.Module) -> None:
        for name in self.chosen:
            module = model.get_submodule(name)
            expected = {key: value for key in _TENSORS if isinstance(value := getattr(module, key, None), Tensor)}
            lost = [key for key, value in expected.items() if not getattr(value, "_is_hf_initialized", False)]
            if lost:
                raise ValueError(f"the checkpoint lacks {', '.join(f'{name}.{key}' for key in lost)}")
            try:
                module.finalize()
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
            size = module.in_features * module.out_features * module._like.element_size()
            self.report.swapped.append(swapped_entry(name, module, size))
        sizes = held_bytes(model)
        for name, module in model.named_modules():
            if name not in self.chosen and any(p.dim() >= 2 for p in module.parameters(recurse=False)):
                self.report.kept.append(Kept(name, type(module).__name__, "float in the checkpoint", sizes[name]))

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[None, dict[str, str]]:
        """Called first by ``save_pretrained``: what is saved has to be what config.json says."""
        if not getattr(model, "_hf_peft_config_loaded", False):
            record_modules(model)
            _drop_conversions(model)
        return None, {}

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        fusing.unfuse(model)
        shared = heads.tied_tables(model)
        heads.to_float(model, dtype)
        for name, module in list(model.named_modules()):
            if isinstance(module, QuantLinear):
                linear = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
                linear.weight = nn.Parameter(module.dequantize(dtype or module._like.dtype))
                linear.bias = module.bias
                linear.train(module.training)
                model.set_submodule(name, linear)
        for embeddings, head in shared.items():
            model.get_submodule(head).weight = model.get_submodule(embeddings).weight
        return model


def _attends_by_default(model: PreTrainedModel) -> bool:
    """Whether nobody has asked for another attention function: ``from_pretrained(attn_implementation="eager")``, say."""
    return model.config._attn_implementation in ("taut", model.get_correct_attn_implementation(None))


# The C library keeps freed blocks of up to 32 MB for itself. A float weight lives for a moment only, and what it leaves
# behind is too fragmented to be reused: without this, loading in bfloat16 peaks at twice the memory.
_TRIM_BYTES = 1 << 23


def _give_back_memory() -> None:
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError, OSError):  # a C library without malloc_trim
            ctypes.CDLL(None).malloc_trim(0)


class _Loaded:
    """A float weight that has just been read, with the bias its layer has by now: what QuantLinear.from_float looks at."""

    def __init__(self, weight: Tensor, linear: nn.Linear) -> None:
        self.weight, self.bias, self.in_features = weight, linear.bias, linear.in_features


def _tell(report: SwapReport) -> None:
    logger.info("%s", report.summary)
    experts = [entry for entry in report.kept if "fused experts" in entry.reason]
    if experts:
        logger.warning(
            "taut left %d modules of fused experts in float (%.1f MB): fused experts are not supported yet",
            len(experts), sum(entry.bytes for entry in experts) / 1e6,
        )  # fmt: skip


def _resolve(config: Config, linears: Mapping[str, nn.Module], prefix: str) -> dict[str, Rule]:
    """The low-bit layers among ``linears``. A checkpoint of a whole model also fills its base model, and the other way round."""
    aliases: dict[str, str] = {}
    for name in linears:
        for alias in (f"{prefix}.{name}", name.removeprefix(f"{prefix}."), name):
            aliases[alias] = name
    found = config.swapped(aliases)
    return {name: found[alias] for alias, name in aliases.items() if alias in found}


_SAFETENSORS_NAMES = {
    torch.uint8: "U8", torch.int8: "I8", torch.float8_e4m3fn: "F8_E4M3", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float32: "F32",
}  # fmt: skip


def _check_files(model: nn.Module, chosen: Mapping[str, Rule], files: Iterable[str]) -> None:
    """Compares what the safetensors headers say with what the low-bit layers need, before anything is read.

    Raises ``ValueError`` for a truncated file, a missing tensor, a wrong shape or dtype.
    """
    from safetensors import SafetensorError, safe_open

    aliases = {}
    for name in chosen:
        for alias in (f"{model.base_model_prefix}.{name}", name.removeprefix(f"{model.base_model_prefix}."), name):
            aliases[alias] = name
    found: dict[str, dict[str, tuple[str, tuple[int, ...], str]]] = {}
    for path in files:
        if not str(path).endswith(".safetensors"):
            raise ValueError(f"{path}: a taut checkpoint is in safetensors files")
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():
                    stem, _, last = key.rpartition(".")
                    if last in (*_TENSORS, "weight") and stem in aliases:
                        view = file.get_slice(key)
                        found.setdefault(aliases[stem], {})[last] = (key, tuple(view.get_shape()), view.get_dtype())
        except SafetensorError as error:
            raise ValueError(f"{path} is truncated or no safetensors file: {error}") from None
    if not found:
        return  # the model renames its weights on loading; they are checked when they have arrived
    for name in chosen:
        module = model.get_submodule(name)
        for key in _TENSORS:
            expected = getattr(module, key, None)
            if expected is None:
                continue
            if key not in found.get(name, {}):
                raise ValueError(f"the checkpoint lacks {name}.{key}")
            full, shape, dtype = found[name][key]
            if shape != tuple(expected.shape):
                raise ValueError(f"{full} must be {list(expected.shape)} for {module.format}, the checkpoint has {list(shape)}")
            if key != "bias" and dtype != _SAFETENSORS_NAMES[expected.dtype]:
                raise ValueError(f"{full} must be {_SAFETENSORS_NAMES[expected.dtype]}, the checkpoint has {dtype}")
        extra = sorted(set(found[name]) & {"weight", *_TENSORS} - {key for key in _TENSORS if getattr(module, key, None) is not None})
        if extra:
            raise ValueError(f"the checkpoint has {found[name][extra[0]][0]}, which a {module.format} layer does not have")


def record_modules(model: PreTrainedModel) -> None:
    """Writes into ``model.config.quantization_config`` which layers are low-bit now, and how."""
    config = model.config.quantization_config
    linears = {name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, QuantLinear))}
    groups: dict[tuple, dict[str, list[str]]] = {}
    for name, module in linears.items():
        if isinstance(module, QuantLinear):
            pattern = str(module.format.pattern) if isinstance(module, SparseLinear) else None
            key = (module.format.name, module.format.group_size, module.format.zeros, module.activations, pattern)
            groups.setdefault(key, {}).setdefault(_star(name), []).append(name)
    config.modules, config.tied = [], heads.tied_tables(model) or None
    for key, patterns in groups.items():
        names = []
        for pattern, members in patterns.items():
            # Layers that differ in numbers only are one line, where every layer of that form is in this format.
            alike = [name for name in linears if _star(name) == pattern]
            names += [pattern] if len(alike) == len(members) > 1 else members
        written = {name: value for name, value in zip(_RULE_KEYS, key, strict=True) if name != "sparsity" or value is not None}
        config.modules.append({**written, "names": names})


def _star(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _drop_conversions(model: PreTrainedModel) -> None:
    """transformers undoes on saving what it did to weights on loading (a fused q, k, v, say). For a layer that is low-bit
    there is no such weight any more, and half a conversion would lose its float siblings: those are saved as they are."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange, WeightConverter

    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:
        conversions = [c for c in get_model_conversion_mapping(model, add_legacy=False) if not isinstance(c, PrefixChange)]
    weights = [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, QuantLinear)]

    def touches(conversion: WeightConverter) -> bool:
        reverse = conversion.reverse_transform()
        return any(reverse.rename_source_key(weight)[1] is not None for weight in weights)

    model._weight_conversions = [c for c in conversions if not (isinstance(c, WeightConverter) and touches(c))]


def check_float(model: PreTrainedModel) -> None:
    """Raises ``ValueError`` if another library has quantized ``model``."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None or isinstance(quantizer, TautQuantizer):
        return
    method = getattr(quantizer.quantization_config.quant_method, "value", quantizer.quantization_config.quant_method)
    if method != "gguf":  # transformers has turned a GGUF file into floats, or left modules that are kept and named
        raise ValueError(f"this model is already quantized by {method}; load it in float to swap it")


def record_swap(model: PreTrainedModel, settings: Mapping[str, Any], report: SwapReport) -> None:
    """After ``taut.swap``: marks ``model`` as transformers would have, had it been loaded with a ``Config`` of these settings."""
    quantizer = getattr(model, "hf_quantizer", None)
    if not isinstance(quantizer, TautQuantizer):
        quantizer = TautQuantizer(Config(**settings), pre_quantized=True)
    model.hf_quantizer, model.is_quantized, model.quantization_method = quantizer, True, METHOD
    model.config.quantization_config = quantizer.quantization_config
    quantizer.report = model.taut_report = report
    _assign_is_quantized(model)
    record_modules(model)
    _tell(report)


def save(model: PreTrainedModel, directory: str | os.PathLike, tokenizer: Any = None, **kwargs: Any) -> None:
    """Writes ``model`` (and ``tokenizer``) so that ``from_pretrained(directory)`` gives the same logits, bit for bit.

    ``kwargs`` go to ``save_pretrained`` (``max_shard_size`` and the like). Everything is written to a new directory beside
    the old one, forced to disk, and then takes its place in one step: an interrupted save leaves the old one whole. Files of
    the old directory that are not part of a model's weights (a README, a tokenizer not given here) stay.
    Raises ``ValueError`` if ``model`` is no transformers model, ``OSError`` where ``directory`` cannot be written.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"save takes a transformers model, got {type(model).__name__}; for others, torch.save(model.state_dict(), ...)")
    target = Path(os.path.realpath(directory))
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{target} is a file; accepted: a directory, which may not exist yet")
    target.parent.mkdir(parents=True, exist_ok=True)
    new = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    new.mkdir()
    try:
        model.save_pretrained(new, **kwargs)
        if tokenizer is not None:
            tokenizer.save_pretrained(new)
        if target.exists():
            shutil.copymode(target, new)
            _carry_over(target, new)
        _sync_tree(new)
        _exchange(new, target)
        _sync(target.parent)
    finally:
        shutil.rmtree(new, ignore_errors=True)  # after the exchange this is the old directory


# What save_pretrained writes weights to: one file or shards, with a variant or without, and the index of the shards.
_WEIGHTS = re.compile(r"(model|adapter_model)(\.\w+)?(-\d{5}-of-\d{5})?\.safetensors(\.index(\.\w+)?\.json)?")


def _carry_over(old: Path, new: Path) -> None:
    def link(source: str, destination: str) -> None:
        try:
            os.link(source, destination)
        except OSError:  # a file system without hard links
            shutil.copy2(source, destination)

    for entry in old.iterdir():
        if (new / entry.name).exists() or _WEIGHTS.fullmatch(entry.name):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, new / entry.name, symlinks=True, copy_function=link)
        elif entry.is_symlink():
            (new / entry.name).symlink_to(os.readlink(entry))
        else:
            link(str(entry), str(new / entry.name))


def _sync(path: Path) -> None:
    if sys.platform == "win32" and path.is_dir():  # Windows opens no directories
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(folder: Path) -> None:
    for root, _, files in os.walk(folder):
        for name in files:
            if not os.path.islink(path := os.path.join(root, name)):
                _sync(Path(path))
        _sync(Path(root))


def _exchange(new: Path, target: Path) -> None:
    """``new`` becomes ``target``; what was ``target`` becomes ``new``, where there was one."""
    if not target.exists():
        new.rename(target)
        return
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # a C library without renameat2
            at_cwd, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of linux/fs.h
            if ctypes.CDLL(None).renameat2(at_cwd, os.fsencode(new), at_cwd, os.fsencode(target), exchange) == 0:
                return
    old = new.with_name(f"{new.name}.old")
    target.rename(old)
    try:
        new.rename(target)
    except OSError:
        old.rename(target)
        raise
    old.rename(new)
