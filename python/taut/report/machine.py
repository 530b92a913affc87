"""The machine and software a number was measured on."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from pathlib import Path

import psutil
import torch

from .. import __version__, build_info, cpu_features


def processor_name() -> str:
    """The processor's name as the system gives it, or its architecture."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Logical cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def installed_version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def describe_machine(threads: int | None = None) -> dict[str, object]:
    """What a reader needs to know beside a number: processor, cores, threads, memory, and versions."""
    return {
        "processor": processor_name(),
        "architecture": platform.machine(),
        "cores": usable_cores(),
        "threads": threads or torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "cpu_features": [name for name, has in cpu_features().items() if has],
        "system": f"{platform.system()} {platform.release()}",
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformers": installed_version("transformers"),
        "taut": __version__,
        "build": build_info(),
    }
