"""Builds the CUDA kernels for the emulator: ``libtaut_emulated_fast.so`` and ``libtaut_emulated_checked.so``.

    python tests/emulator/build.py

Needs g++ (the checked mode lives on the hooks it inserts), an x86-64 Linux, and the headers of CUDA, from an installed
toolkit or from pip; neither nvcc nor a GPU. Objects are kept in build/emulator and made again only if what they were made from
changed: the command, the source, or a header it includes.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
OUT = ROOT / "build" / "emulator"
MODES = ("fast", "checked")

CUDA_HEADERS = ("cuda_runtime.h", "cuda_fp16.h", "cuda_bf16.h", "vector_types.h", "crt/host_config.h")
CUDA_WHEELS = "nvidia-cuda-runtime nvidia-cuda-cccl nvidia-cuda-crt"

COMMON = (
    "-std=c++20", "-DTAUT_EMULATE", "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique", "-g1", "-ffp-contract=off",
    "-fno-math-errno", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-unused-parameter",
)  # fmt: skip
# Kernels. Variables that a kernel forgot to set hold a pattern. The sanitizers insert calls that memory.cpp defines; nothing
# that would merge or move accesses may run after them.
KERNEL_FLAGS = {
    "fast": ("-O2", "-ftrivial-auto-var-init=pattern"),
    "checked": (
        "-O1", "-ftrivial-auto-var-init=pattern", "-fsanitize=thread", "-fsanitize=alignment", "--param=tsan-instrument-func-entry-exit=0",
        "--param=tsan-distinguish-volatile=1", "-fno-store-merging", "-fno-tree-vectorize", "-Wno-tsan",
    ),
}  # fmt: skip
HOST_FLAGS = ("-O2",)
RUNTIME_FLAGS = ("-O3",)


class Unavailable(RuntimeError):
    """What this machine lacks to build the emulator."""


@cache
def compiler() -> str:
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64"):
        raise Unavailable("the CUDA emulator runs on x86-64 Linux only")
    for name in filter(None, (os.environ.get("CXX"), "g++", "c++")):
        path = shutil.which(name)
        if path and "clang" not in subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout:
            return path
    raise Unavailable("the CUDA emulator needs g++")


@cache
def cuda_include() -> Path:
    """The folder of CUDA's headers: that of nvcc, or of the wheels pip has installed."""
    folders = []
    if nvcc := os.environ.get("CUDACXX") or shutil.which("nvcc"):
        asked = subprocess.run([nvcc, "--dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True, check=False).stderr
        tops = [line.split("=", 1)[1].strip() for line in asked.splitlines() if line.startswith("#$ TOP=")]
        folders += [Path(top) / "include" for top in (*tops, Path(nvcc).resolve().parents[1])]
    for home in filter(None, (os.environ.get("CUDA_HOME"), "/usr/local/cuda")):
        folders.append(Path(home) / "include")
    for distribution in ("nvidia-cuda-runtime", "nvidia-cuda-crt", "nvidia-cuda-cccl"):
        try:
            files = importlib.metadata.files(distribution) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        folders += [Path(str(file.locate())).parent for file in files if file.name in ("cuda_runtime.h", "cuda_fp16.h")]
    for folder in folders:
        if all((folder / header).is_file() for header in CUDA_HEADERS):
            return folder.resolve()
    raise Unavailable(f"the CUDA emulator needs CUDA's headers: install a CUDA 13.0 toolkit, or `pip install {CUDA_WHEELS}` (all ==13.0.*)")


def unavailable() -> str | None:
    """Why the emulator cannot be built here, or None."""
    try:
        compiler(), cuda_include()
    except Unavailable as reason:
        return str(reason)
    return None


@cache
def machine_flags() -> tuple[str, ...]:
    """The library never leaves this machine: half conversions and double arithmetic are several times faster in AVX2."""
    try:
        flags = Path("/proc/cpuinfo").read_text().split("flags", 1)[1].split("\n", 1)[0].split()
    except (OSError, IndexError):
        return ()
    return ("-march=x86-64-v3",) if {"avx2", "fma", "f16c", "bmi2"} <= set(flags) else ()


def include_flags() -> list[str]:
    return [f"-ffile-prefix-map={ROOT}/=", f"-I{CSRC}", f"-I{HERE}", "-isystem", str(cuda_include())]


def torch_flags() -> list[str]:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise Unavailable("the emulated ops need torch")
    return ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-isystem", str(Path(spec.origin).parent / "include")]


def digest_of(command: list[str], files: list[Path]) -> str:
    digest = hashlib.sha256("\0".join(command).encode())
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def made_from(depfile: Path) -> list[Path]:
    """The files a compiler wrote into a depfile, system headers left out."""
    words = depfile.read_text().replace("\\\n", " ").split()
    return [Path(word) for word in words if not word.endswith(":")]


def compile_one(source: Path, flags: list[str], name: str) -> tuple[Path, str]:
    """The object of one source, and the key of what it was made from."""
    command = [compiler(), *flags, "-c", "-x", "c++", str(source)]
    target, depfile, keyfile = (OUT / f"{name}{suffix}" for suffix in (".o", ".d", ".key"))
    try:
        key = digest_of(command, made_from(depfile))
        if target.exists() and keyfile.read_text() == key:
            return target, key
    except OSError:  # never made, or a header is gone
        pass
    keyfile.unlink(missing_ok=True)
    done = subprocess.run([*command, "-o", str(target), "-MMD", "-MF", str(depfile)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{source.relative_to(ROOT)} does not compile for the emulator:\n{done.stderr}")
    if done.stderr:
        print(done.stderr, file=sys.stderr)
    key = digest_of(command, made_from(depfile))
    keyfile.write_text(key)
    return target, key


@contextmanager
def locked() -> Iterator[None]:
    """One build at a time: test workers start together."""
    OUT.mkdir(parents=True, exist_ok=True)
    with (OUT / "lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def build_library(
    name: str, mode: str, kernels: Sequence[Path], hosts: Sequence[Path] = (), links: Sequence[str] = (), defines: Sequence[str] = ()
) -> Path:
    """``lib<name>_<mode>.so`` of kernel sources (instrumented, if checked), host sources, and the emulator's runtime."""
    common = [*COMMON, *machine_flags(), *include_flags()]
    jobs = [(source, [*common, *KERNEL_FLAGS[mode], *defines], f"{source.parent.name}-{source.stem}-{mode}") for source in kernels]
    jobs += [(source, [*common, *HOST_FLAGS, *torch_flags(), *defines], f"{source.parent.name}-{source.stem}-{mode}") for source in hosts]
    jobs += [(source, [*common, *RUNTIME_FLAGS], f"runtime-{source.stem}") for source in sorted(HERE.glob("*.cpp"))]
    with locked():
        with ThreadPoolExecutor(max(1, os.cpu_count() or 1)) as pool:
            made = list(pool.map(lambda job: compile_one(*job), jobs))
        target, keyfile = OUT / f"lib{name}_{mode}.so", OUT / f"lib{name}_{mode}.key"
        command = [compiler(), "-shared", "-Wl,-Bsymbolic", "-Wl,--no-as-needed", *map(str, (object for object, _ in made)), *links, "-ldl"]
        key = digest_of([*command, *(key for _, key in made)], [])
        if not target.exists() or not keyfile.exists() or keyfile.read_text() != key:
            partial = target.with_suffix(".partial")
            subprocess.run([*command, "-o", str(partial)], check=True)
            partial.rename(target)  # WHY: a library that a process has loaded must not be written to
            keyfile.write_text(key)
    return target


def build_ops(mode: str) -> Path:
    """Every CUDA op and kernel, registered with torch as ``torch.ops.taut_emulated_<mode>``."""
    import taut

    cpu_library = Path(taut._C.__file__).resolve().parent / "libtaut_cpu.so"
    hosts = sorted(CSRC.glob("*/op_cuda.cpp")) + sorted(path for path in CSRC.glob("common/*_cuda.cpp") if path.name != "device_cuda.cpp")
    return build_library(
        "taut_emulated", mode, sorted(CSRC.glob("*/cuda_*.cu")), hosts,
        links=[str(cpu_library), f"-Wl,-rpath,{cpu_library.parent}"],
        defines=[f'-DTAUT_EMULATED_MODE="{mode}"', f"-DTAUT_EMULATED_LIBRARY=taut_emulated_{mode}"],
    )  # fmt: skip


def build_selftest(mode: str) -> Path:
    """The emulator's own test kernels; needs no torch."""
    return build_library("taut_selftest", mode, sorted(HERE.glob("*.cu")))


if __name__ == "__main__":
    if reason := unavailable():
        sys.exit(reason)
    for mode in MODES:
        print(build_ops(mode).relative_to(ROOT))
