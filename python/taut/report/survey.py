"""The five-resource report: a base model against its swapped variants.

The survey Beyond Efficiency (arXiv 2401.00625) orders the cost of a language model by five resources, computation, memory,
energy, money and network, and judges a compression by what it keeps besides. Here each is a set of ``Figure``s, and each
figure says whether it was measured, counted or modelled; what this machine cannot tell is unavailable, never 0.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..models import Settings
from .energy import EnergyCounter
from .figures import Figure, counted, measured, modelled, unavailable
from .measure import Measurement
from .resources import checkpoint_file_bytes

RESOURCES = ("computation", "memory", "energy", "money", "network", "fidelity")


@dataclass(frozen=True)
class Assumptions:
    """What no counter tells, and only the user can: each None leaves the figures that need it unavailable.

    ``watts_per_core``: (low, high) watts of one busy core. ``grid_intensity``: grams of CO2 equivalent a kWh.
    ``price_per_hour``: of the machine, in dollars. ``bandwidth``: megabits a second. Raises ``ValueError`` unless positive.
    """

    watts_per_core: tuple[float, float] | None = None
    grid_intensity: float | None = None
    price_per_hour: float | None = None
    bandwidth: float | None = None

    def __post_init__(self) -> None:
        for name in ("grid_intensity", "price_per_hour", "bandwidth"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name.replace('_', '-')} must be a positive number, got {value}")
        if self.watts_per_core is not None and not 0 < self.watts_per_core[0] <= self.watts_per_core[1] < float("inf"):
            raise ValueError(f"watts-per-core must be a positive number or a range LOW:HIGH, got {self.watts_per_core}")


@dataclass
class VariantReport:
    """One column of the report: ``figures[resource][name]``."""

    name: str
    description: str
    figures: dict[str, dict[str, Figure]] = field(default_factory=dict)


@dataclass
class Report:
    model: str
    machine: dict[str, Any]
    workload: dict[str, Any]
    variants: list[VariantReport]
    created: str = field(default_factory=lambda: datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"))

    def as_dict(self) -> dict[str, Any]:
        """The report as plain numbers, for JSON."""
        return {
            "model": self.model,
            "created": self.created,
            "machine": self.machine,
            "workload": self.workload,
            "variants": [
                {
                    "name": variant.name,
                    "description": variant.description,
                    "figures": {resource: {key: f.as_dict() for key, f in group.items()} for resource, group in variant.figures.items()},
                }
                for variant in self.variants
            ],
        }


def build_report(
    model: str, measurements: Sequence[Measurement], assumptions: Assumptions, machine: dict[str, Any], workload: dict[str, Any]
) -> Report:
    """The report of ``measurements``, the first of which is the base."""
    base = measurements[0]
    columns = []
    for found in measurements:
        settings = found.variant.settings
        columns.append(VariantReport(found.variant.name, describe(found.facts, settings)))
        columns[-1].figures = {
            "computation": computation(found, base),
            "memory": memory(found, base),
            "energy": energy(found, assumptions),
            "money": money(found, assumptions),
            "network": network(found, base, assumptions),
            "fidelity": fidelity(found, base),
        }
    return Report(model, machine, workload, columns)


def describe(facts: dict[str, Any], settings: Settings | None) -> str:
    return f"{facts['dtype']}, as loaded" if settings is None else f"{settings}; the rest {facts['dtype']}"


def computation(found: Measurement, base: Measurement) -> dict[str, Figure]:
    """FLOPs, latency, throughput and speed-up (the survey's section 2)."""
    beside = "median, ± half the range" + ("" if found.interleaved else "; not interleaved with the other columns")
    figures = {"operations a token": counted(found.flops, "FLOP", "of matrix products and attention; a multiply-add is two")}
    for kind, name in (("prompts", "prompt"), ("decodes", "decode")):
        rate, spread = found.rate(kind)
        samples = getattr(found, kind)
        figures[f"{name} throughput"] = measured(rate, "tokens/s", f"{samples[0]['tokens']} tokens, {len(samples)} runs; {beside}", spread)
        if found is not base:
            figures[f"{name} speed-up"] = measured(rate / base.rate(kind)[0], "x", "against the base")
    prompt = found.prompts[0]["tokens"]
    figures["time to first token"] = measured(prompt / found.rate("prompts")[0], "s", f"after a prompt of {prompt} tokens")
    figures["time a token"] = measured(1 / found.rate("decodes")[0], "s", "of decode")
    return figures


def memory(found: Measurement, base: Measurement) -> dict[str, Figure]:
    """Parameters, model size and peak."""
    facts = found.facts
    figures = {
        "size": counted(facts["parameters"], "parameters"),
        "weights": counted(facts["weight_bytes"], "B", "all parameters and buffers in memory"),
        "swapped layers": counted(facts["swapped_weight_bytes"], "B", "weights of the layers that taut swaps"),
    }
    if found is not base:
        figures["compression of swapped layers"] = counted(base.facts["swapped_weight_bytes"] / facts["swapped_weight_bytes"], "x")
        figures["compression of the model"] = counted(base.facts["weight_bytes"] / facts["weight_bytes"], "x")
    cache = facts["cache_bytes_per_token"]
    figures["KV cache"] = (
        counted(cache, "B/token") if cache else unavailable("B/token", "this model's cache does not show its keys and values")
    )
    figures["peak"] = measured(
        facts["peak_bytes"],
        "B",
        f"anonymous memory of a fresh process from load to decode, {facts['before_bytes'] / 1e6:.0f} MB of it before the model",
    )
    return figures


def energy(found: Measurement, assumptions: Assumptions) -> dict[str, Figure]:
    """Joules a token by a counter, core-seconds as the proxy that is always there, and joules modelled if the user asks."""
    core_seconds = found.per_token("decodes", "core_seconds")
    joules = found.per_token("decodes", "joules")
    figures = {"core-seconds a token": measured(core_seconds, "core-s", "processor time of decode, over all threads")}
    if joules is not None:
        figures["energy a token"] = measured(joules, "J", "processor package, with whatever else ran on it")
        low = high = joules
    else:
        figures["energy a token"] = unavailable("J", EnergyCounter().reason or "the energy counters could not be read")
        low = high = None
    if assumptions.watts_per_core:
        low, high = (core_seconds * watts for watts in assumptions.watts_per_core)
        for word, value, watts in zip(("low", "high"), (low, high), assumptions.watts_per_core, strict=True):
            figures[f"energy a token, {word}"] = modelled(value, "J", f"core-seconds x {watts:g} W a busy core, which you assumed")
    if assumptions.grid_intensity is None:
        figures["carbon of 1M tokens"] = unavailable("kgCO2eq", "needs --grid-intensity")
    elif low is None:
        figures["carbon of 1M tokens"] = unavailable("kgCO2eq", "needs an energy counter or --watts-per-core")
    else:
        kind = "modelled" if assumptions.watts_per_core else "measured"
        assumed = f"{kind} energy x {assumptions.grid_intensity:g} g/kWh, which you assumed"
        for word, value in (("low", low), ("high", high)) if low != high else (("", low),):
            kg = value * 1e6 / 3.6e6 * assumptions.grid_intensity / 1000
            figures[f"carbon of 1M tokens{', ' + word if word else ''}"] = modelled(kg, "kgCO2eq", assumed)
    return figures


def money(found: Measurement, assumptions: Assumptions) -> dict[str, Figure]:
    """Dollars of running, from a price a machine-hour."""
    price = assumptions.price_per_hour
    figures = {}
    for kind, name in (("decodes", "1M tokens written"), ("prompts", "1M tokens read")):
        figures[name] = (
            unavailable("$", "needs --price-per-hour")
            if price is None
            else modelled(
                price / 3600 * 1e6 / found.rate(kind)[0], "$", f"${price:g} a machine-hour, which you assumed, one request at a time"
            )
        )
    return figures


def network(found: Measurement, base: Measurement, assumptions: Assumptions) -> dict[str, Figure]:
    """Bytes to ship the weights, and the time that takes at a bandwidth."""
    on_disk = checkpoint_file_bytes(found.variant.source) if found is base else None
    shipped = found.facts["ship_bytes"] if on_disk is None else on_disk
    figures = {"checkpoint": counted(shipped, "B", "weight files as they are" if on_disk is not None else "weights as taut saves them")}
    if found is not base:
        figures["share of the base in memory"] = counted(shipped / base.facts["ship_bytes"], "share")
    if assumptions.bandwidth is None:
        figures["time to ship"] = unavailable("s", "needs --bandwidth")
    else:
        figures["time to ship"] = modelled(
            shipped * 8 / (assumptions.bandwidth * 1e6), "s", f"at {assumptions.bandwidth:g} Mbit/s, which you assumed"
        )
    return figures


_FIDELITY = {
    "kl_mean": ("KL divergence, mean", "nats"),
    "kl_median": ("KL divergence, median", "nats"),
    "kl_p99": ("KL divergence, 99%", "nats"),
    "top1": ("same top token", "share"),
    "rms_dp": ("RMS change of token probability", "share"),
    "ppl_base": ("perplexity of the base", ""),
    "ppl_other": ("perplexity", ""),
    "log_ppl_ratio": ("log of the perplexity ratio", ""),
}


def fidelity(found: Measurement, base: Measurement) -> dict[str, Figure]:
    """Agreement with the base's predictions and distributions (the survey's loyalty), with standard errors."""
    if found is base:
        return {}
    if found.fidelity is None:
        return {name: unavailable(unit, "no text was compared") for name, unit in _FIDELITY.values()}
    note = f"{found.compared_tokens} tokens; ± standard error, tokens taken as independent"
    return {name: measured(found.fidelity[key].value, unit, note, found.fidelity[key].stderr) for key, (name, unit) in _FIDELITY.items()}
