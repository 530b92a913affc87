"""swap: replace the linear layers of a model by low-bit ones, in place, and say what was and was not replaced."""

from __future__ import annotations

import fnmatch
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from . import _native
from . import fuse as fusing
from . import head as heads
from .formats import ACTIVATIONS, FORMATS, KINDS, SPARSE_KINDS, WeightFormat, check_activations, resolve_activations
from .formats.sparse import SparseFormat
from .nn import PackedWeight, QuantLinear, SparseLinear
from .ops.pack_weight import check_device

_RULE_KEYS = ("weights", "group_size", "zeros", "activations", "sparsity")


@dataclass(frozen=True)
class Rule:
    """How one module is quantized: a format and an activation mode; ``format=None`` leaves the module alone."""

    format: WeightFormat | SparseFormat | None
    activations: str


def make_rule(
    weights: str | None, group_size: int | None = None, zeros: bool = False, activations: str = "auto", sparsity: str | None = None
) -> Rule:
    """A checked rule. ``weights``: a name of ``taut.formats.KINDS``, with sparsity also of ``SPARSE_KINDS``, or None (leave alone);
    ``group_size`` None: the format's default; ``sparsity``: a pattern ("2:4", "16:2:4"), or None for dense weights."""
    if not isinstance(activations, str):
        raise ValueError(f"activations must be one of auto, {', '.join(ACTIVATIONS)}, got {activations!r}")
    check_activations(activations)
    if weights is None:
        return Rule(None, activations)
    if not isinstance(weights, str) or weights not in (*FORMATS, *SPARSE_KINDS):
        raise ValueError(f"unknown weight format {weights!r}; accepted: {', '.join(FORMATS)}; {' and '.join(SPARSE_KINDS)} with sparsity")
    if not isinstance(zeros, bool):
        raise ValueError(f"zeros must be True or False, got {zeros!r}")
    if not isinstance(group_size, (int, type(None))):
        raise ValueError(f"group_size must be 32, 64, 128, 0 (one scale a row) or None, got {group_size!r}")
    if sparsity is None:
        format: WeightFormat | SparseFormat = WeightFormat(weights, group_size, zeros)
    else:
        format = SparseFormat.of_names(weights, group_size, zeros, sparsity)
    check_activations(activations, format)
    return Rule(format, activations)


def low_bit(linear: nn.Linear, rule: Rule) -> QuantLinear:
    """What takes the place of a linear layer by this rule."""
    module = SparseLinear if isinstance(rule.format, SparseFormat) else QuantLinear
    return module.from_float(linear, rule.format, rule.activations)


class RuleBook:
    """Which rule applies to a module name: the first matching ``rules`` entry, else ``skip``, else the default.

    ``rules`` maps a name pattern (fnmatch: ``*.mlp.*``) to a dict with any of weights, group_size, zeros, activations, sparsity
    (what is left out keeps the default), or to None (leave alone). ``skip`` is a list of such patterns; a pattern also
    matches a module's last name (``lm_head``) or a whole part of its path. Raises ``ValueError`` on unknown formats or keys.
    """

    def __init__(
        self, weights: str | None = "int4", group_size: int | None = None, zeros: bool = False, activations: str = "auto",
        skip: Sequence[str] | None = None, rules: Mapping[str, Mapping | None] | None = None, sparsity: str | None = None,
    ) -> None:  # fmt: skip
        if weights is None:
            raise ValueError(f"weights must be one of {', '.join(FORMATS)}; use skip or rules to leave modules alone")
        self.default = make_rule(weights, group_size, zeros, activations, sparsity)
        if not isinstance(skip, (list, tuple, set, type(None))) or not all(isinstance(pattern, str) for pattern in skip or ()):
            raise ValueError(f"skip must be a list of module name patterns, got {skip!r}")
        self.skip = list(skip or ())
        self.rules: list[tuple[str, Rule]] = []
        base = {"weights": weights, "group_size": group_size, "zeros": zeros, "activations": activations, "sparsity": sparsity}
        if rules is not None and not isinstance(rules, Mapping):
            raise ValueError(f"rules must map module name patterns to settings, got {rules!r}")
        for pattern, settings in (rules or {}).items():
            if not isinstance(pattern, str):
                raise ValueError(f"rules must map module name patterns to settings, got the pattern {pattern!r}")
            if settings is None:
                self.rules.append((pattern, Rule(None, activations)))
                continue
            if not isinstance(settings, Mapping):
                raise ValueError(f"rule {pattern!r} must be None or a dict of {', '.join(_RULE_KEYS)}, got {settings!r}")
            unknown = set(settings) - set(_RULE_KEYS)
            if unknown:
                raise ValueError(f"rule {pattern!r}: unknown key {sorted(unknown)[0]!r}; accepted: {', '.join(_RULE_KEYS)}")
            merged = {**base, **settings}
            if "weights" in settings and settings["weights"] != weights:  # the default's group and zeros were for its own format
                merged = {**merged, "group_size": settings.get("group_size"), "zeros": settings.get("zeros", False)}
                merged["activations"] = settings.get("activations", _activations_for(settings["weights"], activations))
            self.rules.append((pattern, make_rule(**merged)))

    def rule_for(self, name: str) -> tuple[Rule, str]:
        """The rule of module ``name``, and the words for why."""
        for pattern, rule in self.rules:
            if matches(name, pattern):
                return rule, f"rule {pattern!r}"
        for pattern in self.skip:
            if matches(name, pattern):
                return Rule(None, self.default.activations), f"skip {pattern!r}"
        return self.default, "default"


def _activations_for(weights: str | None, activations: str) -> str:
    """The default's activations where a rule's format takes them, else "auto"."""
    kind = {**KINDS, **SPARSE_KINDS}.get(weights) if isinstance(weights, str) else None
    return activations if kind is None or activations in kind.activations else "auto"


def matches(name: str, pattern: str) -> bool:
    """Whether a module name fits a pattern: whole (fnmatch), or as consecutive whole parts of the path."""
    return fnmatch.fnmatchcase(name, pattern) or f".{pattern}." in f".{name}."


@dataclass(frozen=True)
class Swapped:
    """A layer that is low-bit now; its rule says what it computes with where it lies, never "auto"."""

    name: str
    rule: Rule
    out_features: int
    in_features: int
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class Kept:
    name: str
    kind: str
    reason: str
    bytes: int


@dataclass
class SwapReport:
    """What ``swap`` did: ``swapped`` and ``kept`` modules, each kept one with its reason; sizes in bytes. ``fused``: decoder
    layers (and stacks of them) that run as fused ops, and with a reason those that do not. ``attention``: whether the model
    attends by taut's function now."""

    swapped: list[Swapped] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)
    fused: list[fusing.Fused] = field(default_factory=list)
    shared: dict[str, str] = field(default_factory=dict)  # embeddings, and the head whose packed table they share
    attention: bool = False

    @property
    def bytes_before(self) -> int:
        return sum(entry.bytes_before for entry in self.swapped)

    @property
    def bytes_after(self) -> int:
        return sum(entry.bytes_after for entry in self.swapped)

    @property
    def summary(self) -> str:
        """One line: how many layers became what, how much smaller they are, and how much was kept."""
        kinds = sorted({f"{entry.rule.format}, {entry.rule.activations} activations" for entry in self.swapped})
        return (
            f"swapped {len(self.swapped)} linear layers{' to ' if kinds else ''}{'; '.join(kinds)}: {self.bytes_before / 1e6:.1f} MB -> "
            f"{self.bytes_after / 1e6:.1f} MB ({self.bytes_after / max(self.bytes_before, 1):.3f}); "
            f"kept {len(self.kept)} modules, {sum(entry.bytes for entry in self.kept) / 1e6:.1f} MB{fusing.summary(self.fused)}"
            f"{'; attention by taut' if self.attention else ''}"
        )

    def __str__(self) -> str:
        lines = [self.summary]
        by_reason: dict[tuple[str, str], list[Kept]] = {}
        for entry in self.kept:
            by_reason.setdefault((entry.kind, entry.reason), []).append(entry)
        for (kind, reason), entries in by_reason.items():
            names = ", ".join(entry.name for entry in entries[:3]) + (f" and {len(entries) - 3} more" if len(entries) > 3 else "")
            lines.append(f"kept {names} ({kind}, {sum(entry.bytes for entry in entries) / 1e6:.1f} MB): {reason}")
        for embeddings, head in self.shared.items():
            table = next(entry for entry in self.swapped if entry.name == head)
            sizes = f"{table.bytes_before / 1e6:.1f} MB -> {table.bytes_after / 1e6:.1f} MB"
            lines.append(f"{embeddings} and {head} share one table, {table.rule.format}: {sizes}")
        return "\n".join([*lines, *fusing.words(self.fused)])


def held_bytes(model: nn.Module) -> dict[str, int]:
    """Bytes of each module's own weights, by name. One that several modules share counts once, so that the sum is the model's."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}  # transformers: what shares a weight, or will when it is loaded
    counted: set[int] = set()
    sizes = {}
    for name, module in model.named_modules():
        if isinstance(module, PackedWeight):
            sizes[name] = module.weight_bytes if module.packed is None or id(module.packed) not in counted else 0
            counted.add(id(module.packed))
            continue
        own = {key: p for key, p in module.named_parameters(recurse=False) if f"{name}.{key}" not in tied and id(p) not in counted}
        counted.update(map(id, own.values()))
        sizes[name] = sum(p.numel() * p.element_size() for p in own.values())
    return sizes


@dataclass
class _Facts:
    """What has to be known of a whole model to judge one of its modules."""

    head: nn.Module | None
    shared: set[str]
    float32: list[str]

    @classmethod
    def of(cls, model: nn.Module, dtype: torch.dtype | None) -> _Facts:
        get_head = getattr(model, "get_output_embeddings", None)
        try:
            head = get_head() if callable(get_head) else None
        except (AttributeError, NotImplementedError):
            head = None
        # transformers' own list of what must stay in float32 when the model is loaded in 16 bits
        plan = getattr(model, "_get_dtype_plan", None)
        dtype = dtype or getattr(model, "dtype", None)
        return cls(head, shared_weights(model), list(plan(dtype)) if plan is not None and dtype is not None else [])


def shared_weights(model: nn.Module) -> set[str]:
    """Names of modules whose weight more than one place in the model uses."""
    users: dict[int, set[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for parameter in module._parameters.values():
            if parameter is not None:
                users.setdefault(id(parameter), set()).add(name)
    shared = {name for names in users.values() if len(names) > 1 for name in names}
    # Before transformers has loaded a model nothing is tied yet; this is what will be.
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return shared | {key.rpartition(".")[0] for pair in tied.items() for key in pair}


def reason_to_keep(model: nn.Module, name: str, module: nn.Module, facts: _Facts) -> str | None:
    """Why a module that holds a matrix cannot be swapped, in words; None if it can."""
    if isinstance(module, QuantLinear):
        return "already low-bit"
    if not isinstance(module, nn.Linear):
        if any(p.dim() == 3 for p in module.parameters(recurse=False)) and "expert" in f"{name} {type(module).__name__}".lower():
            return "fused experts are not supported yet"
        return f"{type(module).__name__} is not a linear layer taut knows"
    if type(module) is nn.modules.linear.NonDynamicallyQuantizableLinear:
        return "nn.MultiheadAttention reads this weight itself"
    if type(module) is not nn.Linear:
        return f"{type(module).__name__} is a subclass of nn.Linear with behaviour of its own"
    if not name:
        return "it is the model itself, and cannot be replaced in place; use QuantLinear.from_float"
    if name in facts.shared:
        return "its weight is tied to another module's"
    parent, _, own = name.rpartition(".")
    if own in ("gate", "router") and hasattr(model.get_submodule(parent), "experts"):
        return "it routes tokens to experts, which low bits would disturb"
    if module.weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"its weight is {module.weight.dtype}; accepted: float32, bfloat16, float16"
    if any(matches(name, pattern) or fnmatch.fnmatchcase(f"{name}.weight", pattern) for pattern in facts.float32):
        return "the model keeps it in float32 when the rest is 16-bit"
    if not module.weight.is_meta and (why := _native.why_not(module.weight.device.type)):
        return f"its weight is on {module.weight.device}, where taut cannot compute: {why}"
    if (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        or hasattr(module, "parametrizations") or "forward" in module.__dict__
    ):  # fmt: skip
        return "it carries hooks or parametrizations, which a swap would lose"
    if min(module.in_features, module.out_features) == 0:
        return "it is empty"
    return None


def plan(model: nn.Module, book: RuleBook, dtype: torch.dtype | None = None) -> tuple[list[tuple[str, nn.Linear, Rule]], list[Kept]]:
    """Which modules of ``model`` the rules swap, and what is kept and why. Changes nothing.

    ``dtype``: what the model will be loaded in, where it is not loaded yet. Raises ``ValueError`` if a pattern matches no
    module, or if there is nothing to swap.
    """
    names = [name for name, _ in model.named_modules()]
    for pattern in [*book.skip, *(pattern for pattern, _ in book.rules)]:
        if not any(matches(name, pattern) for name in names):
            raise ValueError(f"pattern {pattern!r} matches no module of this model")
    facts, sizes = _Facts.of(model, dtype), held_bytes(model)
    chosen, kept = [], []
    for name, module in model.named_modules():
        if not any(p.dim() >= 2 for p in module.parameters(recurse=False)) and not isinstance(module, QuantLinear):
            continue
        rule, why = book.rule_for(name)
        reason = reason_to_keep(model, name, module, facts)
        if reason is not None and name in facts.shared and _can_untie(model, module, facts) and why.startswith("rule"):
            reason = None
        if reason is None and module is facts.head and not why.startswith("rule"):
            reason = "the output head is left in float by default; name it in rules to swap it"
        if rule.format is None and type(module) is nn.Linear:
            reason = f"left alone by {why}"
        if reason is None and isinstance(rule.format, SparseFormat):
            reason = why_not_sparse(module, rule.format)
        if reason is None:
            chosen.append((name, module, rule))
        else:
            kept.append(Kept(name, type(module).__name__, reason, sizes[name]))
    if not chosen:
        raise ValueError(nothing_to_swap(kept))
    return chosen, kept


def why_not_sparse(linear: nn.Linear, format: SparseFormat) -> str | None:
    """Why a linear layer that can have low bits cannot be sparse, in words; None if it can."""
    if linear.in_features % format.pattern.m:
        return f"its {linear.in_features} inputs cannot be cut in blocks of {format.pattern.m}, as sparsity {format.pattern} wants"
    return None


def _can_untie(model: nn.Module, module: nn.Module, facts: _Facts) -> bool:
    """Whether a tied output head can have low bits of its own, beside the embeddings: in a model that is loaded, it can."""
    return module is facts.head and type(module) is nn.Linear and not module.weight.is_meta and hasattr(model, "config")


def untie(model: nn.Module, name: str) -> None:
    """Tells transformers that module ``name`` no longer shares the embeddings' weight, now and after a reload."""
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        config.tie_word_embeddings = False
    tied = getattr(model, "all_tied_weights_keys", None)
    if tied:
        for key in [key for key in tied if key.rpartition(".")[0] == name]:
            del tied[key]


def nothing_to_swap(kept: Sequence[Kept]) -> str:
    lines = [f"  {entry.name} ({entry.kind}): {entry.reason}" for entry in kept[:10]]
    return "there is nothing to swap in this model: no nn.Linear that the rules and taut allow.\n" + "\n".join(lines)


def swap(
    model: nn.Module, weights: str = "int4", *, group_size: int | None = None, zeros: bool = False, activations: str = "auto",
    skip: Sequence[str] | None = None, rules: Mapping[str, Mapping | None] | None = None,
    lm_head: str | None = None, fuse: bool | str = "auto", strict: bool = False, attention: bool = False,
    progress: Callable[[int, int, str], None] | None = None, sparsity: str | None = None,
) -> SwapReport:  # fmt: skip
    """Replaces the ``nn.Linear`` layers of ``model`` by ``QuantLinear``, in place, one at a time.

    ``weights``: "ternary", "int2", "int3", "int4", "nf4", "mxfp4", "nvfp4", "int8", "fp8_e4m3" or "fp8_block" (what each means:
    ``taut.formats.KINDS``). ``group_size``: 32, 64, 128, 0 (one scale a row); default 32 for int2, int3 and int4, 64 for nf4, 0
    for ternary, int8 and fp8_e4m3; the others fix it. ``zeros``: int2, int3, int4 with a zero point a group. ``activations``:
    "float" (exact arithmetic), "int8" (fast on CPUs), "int8_outliers" (a quarter of its error), "int8_row",
    "fp8_row" or "auto" (int8 on the CPU, float on CUDA and for 8-bit floats): see ``taut.QuantLinear``.
    A model on a CUDA device stays there: its layers are quantized on the CPU, one at
    a time, and packed where they were; its weights can be int4, int8 or fp8_e4m3.
    ``skip``: patterns of names to leave alone. ``rules``: pattern -> settings, see ``RuleBook``.
    ``lm_head``: a format for the output head ("int8", say); embeddings that are tied to it share its packed table.
    ``fuse``: decoder layers whose linear layers are all low-bit then run as a few fused ops on the CPU (see README); "auto"
    fuses what can be, True asks for at least one, False leaves them alone. ``strict``: every decoder layer must be fused.
    ``attention``: a transformers model then attends by taut's ops too, as after ``model.set_attn_implementation("taut")``.
    ``sparsity``: "2:4", "1:4", "2:8", "4:8", or with 8 or 16 rows that share places "16:2:4": the layers become ``SparseLinear``,
    with int8, int4 or fp8_e4m3 weights without zeros, or with "fp16" or "bf16", which round to 16 bits alone. A weight that holds to
    the pattern keeps its nonzeros; of another one the largest of each block are kept, which costs much more than low bits do.
    ``progress(done, total, name)`` is called before each layer. The output head is swapped only by ``lm_head``, or if a rule
    names it; one that is tied then gets low bits of its own beside the float embeddings. Other tied weights and modules taut
    does not know are kept, and named with their reason in the returned report. Raises ``ValueError`` for bad settings, a
    pattern that matches nothing, or a model with nothing to swap; the model is unchanged then.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    fusing.check_mode(fuse, strict)
    book = RuleBook(weights, group_size, zeros, activations, skip, rules, sparsity)
    record = _recorder(model)
    check_attention(attention, model)
    chosen, kept = plan(model, book)
    fusing.check_wanted(model, {id(module): rule for _, module, rule in chosen}, fuse, strict)
    head = head_to_swap(model, lm_head, [name for name, _, _ in chosen])
    tied = shared_weights(model)
    for name, module, rule in chosen:
        check_values(name, module.weight, rule)
    report = SwapReport(kept=kept)
    total = len(chosen)
    for index in range(total):
        name, module, rule = chosen.pop(0)  # WHY pop: so that each float weight is freed as soon as it is replaced
        if progress:
            progress(index, total, name)
        new = low_bit(module, rule)
        new.train(module.training)
        model.set_submodule(name, new)
        if name in tied:
            untie(model, name)
        size = module.weight.numel() * module.weight.element_size()
        report.swapped.append(swapped_entry(name, new, size))
        del module
    if progress:
        progress(total, total, "")
    if head is not None:
        add_head(model, head, heads.make_head_rule(lm_head), report)
        del head
    if fuse is not False:
        report.fused = fusing.fuse_model(model)
    if attention:
        set_attention(model, report)
    if record is not None:
        settings = {"weights": weights, "group_size": group_size, "zeros": zeros, "activations": activations, "sparsity": sparsity}
        settings |= {"skip": skip, "rules": rules, "lm_head": lm_head, "fuse": fuse, "strict": strict, "attention": attention}
        record(model, settings, report)
    return report


def check_attention(attention: bool, model: nn.Module | None = None) -> None:
    """Raises ``ValueError`` where ``attention`` is no bool, or ``model`` cannot be given an attention function."""
    if not isinstance(attention, bool):
        raise ValueError(f"attention must be True or False, got {attention!r}")
    if attention and model is not None and not getattr(model, "_can_set_attn_implementation", bool)():
        raise ValueError(
            f"attention=True is for transformers models that can be given an attention function; {type(model).__name__} cannot"
        )


def set_attention(model: nn.Module, report: SwapReport) -> None:
    """Has a transformers model attend by taut's function, and notes it in the report."""
    model.set_attn_implementation("taut")
    report.attention = True


def head_to_swap(model: nn.Module, lm_head: str | None, chosen: Sequence[str]) -> heads.Head | None:
    """The head that ``lm_head`` asks for. Raises ``ValueError`` where there is none, or the rules have ``chosen`` it already."""
    rule = heads.make_head_rule(lm_head)
    head = None if rule is None else heads.check_head(model, rule)
    if head is not None and head.name in chosen:
        raise ValueError(f"{head.name} is named by a rule and by lm_head={lm_head!r}: give one of them")
    return head


def add_head(model: nn.Module, head: heads.Head, rule: Rule, report: SwapReport) -> None:
    """Swaps the output head, and notes it in the report."""
    size = head.module.weight.numel() * head.module.weight.element_size()
    report.swapped.append(swapped_entry(head.name, heads.swap_head(model, head, rule), size))
    report.kept = [entry for entry in report.kept if entry.name not in (head.name, head.embeddings)]
    report.shared = {} if head.embeddings is None else {head.embeddings: head.name}


def swapped_entry(name: str, module: QuantLinear, bytes_before: int) -> Swapped:
    """What a report says of a layer that is low-bit now."""
    device = module._like.device if module.packed is None else module.packed.device
    rule = Rule(module.format, resolve_activations(module.activations, module.format, device.type))
    return Swapped(name, rule, module.out_features, module.in_features, bytes_before, module.weight_bytes)


def check_values(name: str, weight: torch.Tensor, rule: Rule) -> None:
    """Raises ``ValueError`` if the weight of module ``name`` cannot be quantized, so that nothing is changed then."""
    if weight.device.type == "meta":
        raise ValueError(f"{name} is on the meta device: load the model first, or give taut.Config to from_pretrained")
    try:
        if not isinstance(rule.format, SparseFormat):
            check_device(weight.device, rule.format)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    least, most = torch.aminmax(weight.detach())
    largest = max(-float(least), float(most))
    if not math.isfinite(largest):
        raise ValueError(f"{name}: its weight holds a NaN or an infinity")
    if largest > (limit := rule.format.kind.largest):
        reaches = "a float16 scale" if rule.format.has_scales else rule.format.name
        raise ValueError(f"{name}: its weight holds {largest:g}; {reaches} reaches up to {limit:g}")


def _recorder(model: nn.Module) -> Callable[[nn.Module, dict, SwapReport], None] | None:
    """For a transformers model, what notes in its config how it was swapped, so that it can be saved and loaded again."""
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is None or not isinstance(model, modeling.PreTrainedModel):
        return None
    from .integrations import transformers

    transformers.check_float(model)
    return transformers.record_swap
