"""Builds the test program of the CPU kernels for a processor that may be another than this one, and runs it there.

    python tests/other_isas/build.py native                 # this processor
    python tests/other_isas/build.py aarch64                # 64-bit ARM, in qemu's user-mode emulation
    python tests/other_isas/build.py bochs                  # x86 with AVX-512, booted on the emulated computer of Bochs

Everything is made in build/other_isas. Ends with 1 if a kernel was wrong, did not run, or a planted fault did not show.
"""

from __future__ import annotations

import argparse
import os
import platform
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "sanitize"))

from build import ROOT, compiler, impl_lines, isa_flags, isa_of, kernel_sources

FLAGS = ("-std=c++20", "-O2", "-ffp-contract=off", "-fno-math-errno", "-Wall", "-Wextra", "-Wno-unused-parameter")
# Neither exceptions nor the red zone, which an interrupt would overwrite; roundss instead of a call of the C library.
BARE = ("-ffreestanding", "-fno-builtin-printf", "-fno-exceptions", "-fno-rtti", "-fno-threadsafe-statics", "-fno-stack-protector", "-fno-pic",
        "-mno-red-zone", "-msse4.1", "-fno-asynchronous-unwind-tables", "-U_FORTIFY_SOURCE")  # fmt: skip
# What each emulated processor must be able to run, and what the program must find that it cannot.
ARM_PROCESSORS = {
    "max": "cpu_neon.float_small,cpu_neon.float_tile,cpu_neondot.int8_small,cpu_neondot.int8_tile,cpu_i8mm.int8_tile",
    "cortex-a76": "cpu_neon.float_small,cpu_neon.float_tile,cpu_neondot.int8_small,cpu_neondot.int8_tile",
    "cortex-a72": "cpu_neon.float_small,cpu_neon.float_tile",
}


def build(folder: Path, cxx: str, machine: str, flags: tuple[str, ...], main: list[Path], link: list[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "impls.inc").write_text("".join(f"{line}\n" for line in impl_lines("quant_linear", machine)))
    sources = [path for path in kernel_sources(machine) if path.parent.name == "quant_linear"]
    sources += [ROOT / "csrc/common/cpu_features.cpp", HERE / "program.cpp", *main]

    def compile_one(source: Path) -> str:
        target = folder / f"{source.parent.name}-{source.stem}.o"
        command = [cxx, *FLAGS, *flags, *isa_flags().get(isa_of(source) or "", []), f"-I{ROOT / 'csrc'}", f"-I{folder}", "-c", str(source)]
        subprocess.run([*command, "-o", str(target)], check=True)
        return str(target)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    program = folder / "program"
    subprocess.run([cxx, *flags, *objects, *link, "-o", str(program)], check=True)
    return program


def native(out: Path) -> int:
    cxx = compiler()
    if cxx is None:
        raise FileNotFoundError("no C++ compiler was found; set CXX to one")
    machine = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
    return subprocess.run([build(out / "native", cxx, machine, (), [HERE / "main_hosted.cpp"], [])], check=False).returncode


def aarch64(out: Path) -> int:
    program = build(out / "aarch64", "aarch64-linux-gnu-g++", "aarch64", (), [HERE / "main_hosted.cpp"], ["-static"])
    failed = 0
    for processor, required in ARM_PROCESSORS.items():
        print(f"---- ARM, {processor} (qemu)", flush=True)
        failed |= subprocess.run(["qemu-aarch64-static", "-cpu", processor, str(program), required], check=False).returncode != 0
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("where", choices=("native", "aarch64", "bochs"), nargs="+")
    arguments = parser.parse_args()
    failed = 0
    for where in arguments.where:
        failed |= globals()[where](ROOT / "build" / "other_isas")
    return failed


if __name__ == "__main__":
    sys.exit(main())
