"""Builds and runs the kernels under AddressSanitizer and UndefinedBehaviorSanitizer, without torch or Python in the process.

    python tests/sanitize/build.py [--compiler g++]

Objects are kept in build/sanitize and made again only if a source, a header or the flags changed.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
OUT = ROOT / "build" / "sanitize"
# -O1: -O0 would not inline what the kernels need inlined. Warnings are the library build's affair; gcc gives false ones here.
FLAGS = ("-std=c++20", "-O1", "-g1", "-ffp-contract=off", "-fno-math-errno", "-pthread")
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")
OPS = (
    "quant_linear", "quantize_weight", "pack_weight", "attention_prefill", "attention_backward", "attention_decode", "kv_append",
    "sparse_linear",
)  # fmt: skip
# By program: the ops that choose among impls, whose tables it includes as <program>.inc.
TABLES = {
    "impls": ("quant_linear", "quantize_weight"),
    "attention": ("attention_prefill", "attention_backward", "attention_decode", "kv_append"),
    "sparse": ("sparse_linear",),
}
ANY_PROCESSOR = ("scalar", "dense")  # in the place of an ISA
# What the program checks at a time.
PARTS = ("weights", "attention")


def isa_flags() -> dict[str, list[str]]:
    """The flags CMakeLists.txt gives to a file by its suffix."""
    text = (ROOT / "CMakeLists.txt").read_text()
    return {isa: flags.split() for isa, flags in re.findall(r"set\(TAUT_FLAGS_(\w+) ([^)]*)\)", text)}


def isa_of(source: Path) -> str | None:
    """The ISA suffix of a kernel file, or None for one that any processor can run."""
    return next((isa for isa in isa_flags() if source.stem.endswith(f"_{isa}")), None)


def compiler(name: str | None = None) -> str | None:
    return next(filter(None, map(shutil.which, [name] if name else [os.environ.get("CXX", "c++"), "g++", "clang++"])), None)


MACHINE = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())


def isas_of(machine: str) -> list[str]:
    """The ISA suffixes of an architecture, as CMakeLists.txt has them."""
    return next(iter(re.findall(rf"set\(TAUT_ISAS_{machine} ([^)]*)\)", (ROOT / "CMakeLists.txt").read_text())), "").split()


def kernel_sources(machine: str = MACHINE) -> list[Path]:
    """Every kernel file that can be compiled for this architecture."""
    files = sorted(path for op in OPS for path in (ROOT / "csrc" / op).glob("cpu_*.cpp"))
    return [path for path in files if isa_of(path) in (None, *isas_of(machine))]


def impl_rows(op: str, machine: str = MACHINE) -> list[tuple[str, str, str]]:
    """(name, `supported`, run function) of each row of the op's table in op.cpp, of those that can be compiled for this architecture."""
    rows = re.findall(r'\{"(cpu_\w+(?:\.\w+)?)", (\w+), \w+, (\w+::\w+)\}', (ROOT / "csrc" / op / "op.cpp").read_text())
    if not rows:
        raise ValueError(f"csrc/{op}/op.cpp: no row of the form {{name, supported, preferred, namespace::run}} was found")
    here = {*isas_of(machine), *ANY_PROCESSOR}
    return [(name, supported, run) for name, supported, run in rows if name.split(".")[0].removeprefix("cpu_") in here]


def impl_lines(op: str, machine: str = MACHINE) -> list[str]:
    """The op's table as TAUT_IMPL_<op>(name, run, what it takes: activations, or caches; whether this processor can)."""
    lines = []
    for name, supported, run in impl_rows(op, machine):
        isa = name.split(".")[0].removeprefix("cpu_")
        can_run = "true" if isa in ANY_PROCESSOR else f"cpu_features().{isa}"
        takes = {"needs_codes": "codes", "needs_pairs": "bf16"}.get(supported, "any")
        takes = next((mode for mode in ("float", "int8") if f".{mode}" in name), takes)
        lines.append(f'TAUT_IMPL_{op}("{name}", {op}::{run}, {takes}, {can_run})')
    return lines


def write_impls() -> None:
    """impls.inc, attention.inc, sparse.inc: op.cpp's tables as the programs need them, so that a new impl is tested without being named."""
    for name, ops in TABLES.items():
        text = "".join(f"{line}\n" for op in ops for line in impl_lines(op))
        target = OUT / f"{name}.inc"
        if not target.exists() or target.read_text() != text:
            target.write_text(text)


def fingerprint(command: list[str], source: Path) -> str:
    digest = hashlib.sha256(" ".join(command).encode())
    own = [*HERE.glob("*.h"), *(OUT / f"{name}.inc" for name in TABLES)] if source.parent == HERE else []
    for path in [source, *sorted((ROOT / "csrc").rglob("*.h")), *own]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def compile_one(cxx: str, source: Path) -> Path:
    command = [cxx, *FLAGS, *SANITIZERS, *isa_flags().get(isa_of(source) or "", []), f"-I{ROOT / 'csrc'}", f"-I{OUT}", "-c"]
    target = OUT / f"{source.parent.name}-{source.stem}-{fingerprint(command, source)[:16]}.o"
    if not target.exists():
        for old in OUT.glob(f"{source.parent.name}-{source.stem}-*.o"):
            old.unlink()
        partial = target.with_suffix(".partial")
        subprocess.run([*command, str(source), "-o", str(partial)], check=True)
        partial.rename(target)
    return target


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compiler", help="default: $CXX, c++, g++ or clang++")
    arguments = parser.parse_args()
    cxx = compiler(arguments.compiler)
    if cxx is None:
        print("sanitize: no C++ compiler was found; set CXX to one", file=sys.stderr)
        return 1
    OUT.mkdir(parents=True, exist_ok=True)
    write_impls()
    sources = [*kernel_sources(), ROOT / "csrc/common/cpu_features.cpp", *sorted(HERE.glob("*.cpp"))]
    try:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(lambda source: compile_one(cxx, source), sources))
        program = OUT / "kernels"
        subprocess.run([cxx, *SANITIZERS, "-pthread", *map(str, objects), "-o", str(program)], check=True)
    except subprocess.CalledProcessError as error:
        print(f"sanitize: {error}", file=sys.stderr)
        return 1
    options = {"ASAN_OPTIONS": "detect_stack_use_after_return=1:strict_init_order=1", "UBSAN_OPTIONS": "print_stacktrace=1"}
    runs = [subprocess.Popen([str(program), part], env=options | dict(os.environ)) for part in PARTS]
    return max(abs(run.wait()) for run in runs)


if __name__ == "__main__":
    sys.exit(main())
