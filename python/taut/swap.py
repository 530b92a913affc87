"""swap: replace the linear layers of a model by low-bit ones, in place, and say what was and was not replaced."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from .formats import WeightFormat, activation_code
from .nn import QuantLinear

DEFAULT_GROUP_SIZE = {"int4": 32, "int8": 0}
_RULE_KEYS = ("weights", "group_size", "zeros", "activations")


@dataclass(frozen=True)
class Rule:
    """How one module is quantized: a format and an activation mode; ``format=None`` leaves the module alone."""

    format: WeightFormat | None
    activations: str


def make_rule(weights: str | None, group_size: int | None = None, zeros: bool = False, activations: str = "int8") -> Rule:
    """A checked rule. ``weights``: "int4", "int8" or None (leave alone); ``group_size`` None: 32 for int4, per row for int8."""
    activation_code(activations)
    if weights is None:
        return Rule(None, activations)
    if group_size is None:
        group_size = DEFAULT_GROUP_SIZE.get(weights, 0)
    return Rule(WeightFormat(weights, group_size, zeros), activations)


class RuleBook:
    """Which rule applies to a module name: the first matching ``rules`` entry, else ``skip``, else the default.

    ``rules`` maps a name pattern (fnmatch: ``*.mlp.*``) to a dict with any of weights, group_size, zeros, activations
    (what is left out keeps the default), or to None (leave alone). ``skip`` is a list of such patterns; a pattern also
    matches a module's last name (``lm_head``) or a whole part of its path. Raises ``ValueError`` on unknown formats or keys.
    """

    def __init__(
        self, weights: str | None = "int4", group_size: int | None = None, zeros: bool = False, activations: str = "int8",
        skip: Sequence[str] | None = None, rules: Mapping[str, Mapping | None] | None = None,
    ) -> None:  # fmt: skip
        self.default = make_rule(weights, group_size, zeros, activations)
        if isinstance(skip, str) or not all(isinstance(pattern, str) for pattern in skip or ()):
            raise ValueError(f"skip must be a list of module name patterns, got {skip!r}")
        self.skip = list(skip or ())
        self.rules: list[tuple[str, Rule]] = []
        base = {"weights": weights, "group_size": group_size, "zeros": zeros, "activations": activations}
        if rules is not None and not isinstance(rules, Mapping):
            raise ValueError(f"rules must map module name patterns to settings, got {rules!r}")
        for pattern, settings in (rules or {}).items():
            if settings is None:
                self.rules.append((pattern, Rule(None, activations)))
                continue
            unknown = set(settings) - set(_RULE_KEYS)
            if unknown:
                raise ValueError(f"rule {pattern!r}: unknown key {sorted(unknown)[0]!r}; accepted: {', '.join(_RULE_KEYS)}")
            merged = {**base, **settings}
            if "weights" in settings and settings["weights"] != weights:  # the default's group and zeros were for its own format
                merged = {**merged, **{key: settings.get(key) for key in ("group_size",)}, "zeros": settings.get("zeros", False)}
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


def matches(name: str, pattern: str) -> bool:
    """Whether a module name fits a pattern: whole (fnmatch), or as consecutive whole parts of the path."""
    return fnmatch.fnmatchcase(name, pattern) or f".{pattern}." in f".{name}."


@dataclass(frozen=True)
class Swapped:
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
    """What ``swap`` did: ``swapped`` and ``kept`` modules, each kept one with its reason; sizes in bytes."""

    swapped: list[Swapped] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)

    @property
    def bytes_before(self) -> int:
        return sum(entry.bytes_before for entry in self.swapped)

    @property
    def bytes_after(self) -> int:
        return sum(entry.bytes_after for entry in self.swapped)

    def __str__(self) -> str:
        lines = []
        if self.swapped:
            kinds = sorted({f"{entry.rule.format}, {entry.rule.activations} activations" for entry in self.swapped})
            lines.append(
                f"swapped {len(self.swapped)} linear layers to {'; '.join(kinds)}: {self.bytes_before / 1e6:.1f} MB -> "
                f"{self.bytes_after / 1e6:.1f} MB ({self.bytes_after / max(self.bytes_before, 1):.3f})"
            )
        by_reason: dict[tuple[str, str], list[Kept]] = {}
        for entry in self.kept:
            by_reason.setdefault((entry.kind, entry.reason), []).append(entry)
        for (kind, reason), entries in by_reason.items():
            names = ", ".join(entry.name for entry in entries[:3]) + (f" and {len(entries) - 3} more" if len(entries) > 3 else "")
            lines.append(f"kept {names} ({kind}, {sum(entry.bytes for entry in entries) / 1e6:.1f} MB): {reason}")
        return "\n".join(lines)


def parameter_bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters(recurse=False))


def reason_to_keep(model: nn.Module, name: str, module: nn.Module, shared: set[int]) -> str | None:
    """Why a module that holds a matrix cannot be swapped, in words; None if it can."""
    if isinstance(module, QuantLinear):
        return "already low-bit"
    if not isinstance(module, nn.Linear):
        return f"{type(module).__name__} is not a linear layer taut knows"
    if type(module) is not nn.Linear and type(module).__name__ != "NonDynamicallyQuantizableLinear":
        return f"{type(module).__name__} is a subclass of nn.Linear with behaviour of its own"
    if type(module) is not nn.Linear:
        return "nn.MultiheadAttention reads this weight itself"
    if id(module.weight) in shared:
        return "its weight is tied to another module's"
    if is_output_head(model, module):
        return "the output head is left in float by default; name it in rules to swap it"
    if module.weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"its weight is {module.weight.dtype}; accepted: float32, bfloat16, float16"
    if module.weight.device.type not in ("cpu", "meta"):
        return f"its weight is on {module.weight.device}; this build has kernels for the CPU"
    if module._forward_hooks or module._forward_pre_hooks or hasattr(module, "parametrizations"):
        return "it carries hooks or parametrizations, which a swap would lose"
    if min(module.in_features, module.out_features) == 0:
        return "it is empty"
    return None


def is_output_head(model: nn.Module, module: nn.Module) -> bool:
    get = getattr(model, "get_output_embeddings", None)
    try:
        return callable(get) and get() is module
    except (AttributeError, NotImplementedError):
        return False


def shared_weights(model: nn.Module) -> set[int]:
    """ids of parameters that more than one module holds."""
    seen: set[int] = set()
    shared: set[int] = set()
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                (shared if id(parameter) in seen else seen).add(id(parameter))
    return shared


def plan(model: nn.Module, book: RuleBook) -> tuple[list[tuple[str, nn.Linear, Rule]], list[Kept]]:
    """Which modules of ``model`` the rules swap, and what is kept and why. Changes nothing."""
    shared = shared_weights(model)
    chosen, kept = [], []
    for name, module in model.named_modules():
        if not any(p.dim() >= 2 for p in module.parameters(recurse=False)) and not isinstance(module, QuantLinear):
            continue
        rule, why = book.rule_for(name)
        reason = reason_to_keep(model, name, module, shared)
        if reason and why.startswith("rule") and is_output_head(model, module) and id(getattr(module, "weight", None)) not in shared:
            reason = None
        if rule.format is None and isinstance(module, nn.Linear):
            reason = f"left alone by {why}"
        if reason is None:
            chosen.append((name, module, rule))
        else:
            held = module.weight_bytes if isinstance(module, QuantLinear) else parameter_bytes(module)
            kept.append(Kept(name, type(module).__name__, reason, held))
    return chosen, kept


def nothing_to_swap(kept: Sequence[Kept]) -> str:
    lines = [f"  {entry.name} ({entry.kind}): {entry.reason}" for entry in kept[:10]]
    return "there is nothing to swap in this model: no nn.Linear that the rules and taut allow.\n" + "\n".join(lines)


def swap(
    model: nn.Module, weights: str = "int4", *, group_size: int | None = None, zeros: bool = False, activations: str = "int8",
    skip: Sequence[str] | None = None, rules: Mapping[str, Mapping | None] | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> SwapReport:  # fmt: skip
    """Replaces the ``nn.Linear`` layers of ``model`` by ``QuantLinear``, in place, one at a time.

    ``weights``: "int4" or "int8". ``group_size``: 32, 64, 128, 0 (one scale a row); default 32 for int4, 0 for int8.
    ``zeros``: int4 with a zero point a group. ``activations``: "int8" (fast) or "float" (exact arithmetic).
    ``skip``: patterns of names to leave alone. ``rules``: pattern -> settings, see ``RuleBook``.
    ``progress(done, total, name)`` is called before each layer. Tied weights, the output head and modules taut does not
    know are kept, and named with their reason in the returned report. Raises ``ValueError`` for bad settings, a pattern
    that matches nothing, or a model with nothing to swap; the model is unchanged then.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    book = RuleBook(weights, group_size, zeros, activations, skip, rules)
    if weights is None:
        raise ValueError("weights must be 'int4' or 'int8'; use skip or rules to leave modules alone")
    names = [name for name, _ in model.named_modules()]
    for pattern in [*book.skip, *(pattern for pattern, _ in book.rules)]:
        if not any(matches(name, pattern) for name in names):
            raise ValueError(f"pattern {pattern!r} matches no module of this model")
    chosen, kept = plan(model, book)
    if not chosen:
        raise ValueError(nothing_to_swap(kept))
    for name, module, _ in chosen:
        if module.weight.device.type == "meta":
            raise ValueError(f"{name} is on the meta device: load the model first, or give taut.Config to from_pretrained")
        if not bool(torch.isfinite(module.weight).all()):
            raise ValueError(f"{name}: its weight holds a NaN or an infinity")
    report = SwapReport(kept=kept)
    for index, (name, module, rule) in enumerate(chosen):
        if progress:
            progress(index, len(chosen), name)
        new = QuantLinear.from_float(module, rule.format, rule.activations)
        new.train(module.training)
        model.set_submodule(name, new) if name else None
        report.swapped.append(
            Swapped(name, rule, module.out_features, module.in_features, module.weight.numel() * module.weight.element_size(), new.weight_bytes)
        )
    if progress:
        progress(len(chosen), len(chosen), "")
    return report
