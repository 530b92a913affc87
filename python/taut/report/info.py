"""What this machine, this torch and this build can run, and in words what does not fit."""

from __future__ import annotations

import re
from typing import Any

import psutil
import torch

from .. import _native, build_info, explain, force_impl, list_impls
from .energy import EnergyCounter
from .machine import describe_machine, installed_version, usable_cores

# The calls an impl may be made for: it can run here if it can run one of them.
_CALLS = [
    {"M": m, "N": 64, "K": 64, "format": f, "activations": a}
    for m in (1, 128, 2048) for f, a in ((4, 0), (4, 1), (8, 0), (8, 1), (8, 2), (9, 0), (9, 3))
]  # fmt: skip


def describe() -> dict[str, Any]:
    """Machine, versions, and each op's impls with whether they can run here and why not: ``impls[op] = [{name, can_run, reason}]``."""
    memory = psutil.virtual_memory()
    return {
        "machine": describe_machine(),
        "memory_available_bytes": memory.available,
        "peft": installed_version("peft"),
        "cuda_devices": [_cuda_device(index) for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else [],
        "cuda_reason": _native.why_not("cuda"),
        "energy_counters": EnergyCounter().available,
        "energy_reason": EnergyCounter().reason,
        "impls": {op: [_can_run(op, impl) for impl in impls] for op, impls in list_impls().items()},
    }


def _cuda_device(index: int) -> dict[str, Any]:
    found = torch.cuda.get_device_properties(index)
    return {"name": found.name, "sm": found.major * 10 + found.minor, "memory_bytes": found.total_memory}


def _can_run(op: str, impl: str) -> dict[str, Any]:
    reason = ""
    device = "cuda" if impl.startswith("cuda") else "cpu"
    with force_impl(op, impl):
        for call in _CALLS if op == "quant_linear" else [{}]:
            try:
                verdict = next(verdict for verdict in explain(op, device, **call) if verdict.impl == impl)
            except ValueError as error:
                reason = reason or str(error)
                continue
            if verdict.chosen:
                return {"name": impl, "can_run": True, "reason": ""}
            reason = reason or verdict.reason
    return {"name": impl, "can_run": False, "reason": reason}


def words(found: dict[str, Any]) -> list[str]:
    """The description as lines to read."""
    machine = found["machine"]
    features = ", ".join(machine["cpu_features"]) or "none that taut has kernels for"
    build = ", ".join(f"{key} {value}" for key, value in machine["build"].items() if key not in ("version", "cuda"))
    lines = [
        f"processor: {machine['processor']} ({machine['architecture']}), {machine['cores']} cores usable",
        f"instruction sets taut knows: {features}",
        f"memory: {machine['memory_bytes'] / 1e9:.1f} GB, {found['memory_available_bytes'] / 1e9:.1f} GB free",
        f"taut {machine['taut']}, {build}",
        f"torch {machine['torch']}, which uses {machine['threads']} threads; Python {machine['python']}; {machine['system']}",
    ]
    for package, version in (("transformers", machine["transformers"]), ("peft", found["peft"])):
        lines.append(f"{package} {version}" if version else f"{package} is not installed")
    lines += [
        f"CUDA device {index}: {device['name']}, sm_{device['sm']}, {device['memory_bytes'] / 1e9:.1f} GB"
        for index, device in enumerate(found["cuda_devices"])
    ]
    archs = machine["build"]["cuda"]
    lines.append(f"CUDA kernels: built for {archs}; {found['cuda_reason'] or 'loaded'}" if archs else "CUDA kernels: none in this build")
    lines.append("energy counters: can be read" if found["energy_counters"] else f"energy: {found['energy_reason']}")
    return lines + misfits(found)


def misfits(found: dict[str, Any]) -> list[str]:
    """What does not fit, one sentence each."""
    machine = found["machine"]
    lines = []
    if found["cuda_reason"]:
        stays = "; a model must stay on the CPU" if found["cuda_devices"] else ""
        lines.append(f"no CUDA: {found['cuda_reason']}{stays}")
    oldest = version_tuple(build_info().get("torch_target", ""))
    if oldest and version_tuple(machine["torch"]) < oldest:
        lines.append(f"this build serves torch {'.'.join(map(str, oldest))} and newer; torch {machine['torch']} is too old")
    if machine["threads"] > usable_cores():
        lines.append(
            f"torch uses {machine['threads']} threads on {usable_cores()} usable cores: slower than with as many, see OMP_NUM_THREADS"
        )
    if not machine["transformers"]:
        lines.append("quantize, generate and report need transformers: pip install 'taut[transformers]'")
    return lines


def version_tuple(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: ``2.13.0+cpu`` is (2, 13)."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return tuple(int(part) for part in found.groups()) if found else ()
