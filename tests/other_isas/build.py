"""Builds the test program of the CPU kernels for a processor that may be another than this one, and runs it there.

    python tests/other_isas/build.py native                 # this processor
    python tests/other_isas/build.py aarch64                # 64-bit ARM, in qemu's user-mode emulation
    python tests/other_isas/build.py library                # no run: does all of libtaut_cpu compile and link for ARM?
    python tests/other_isas/build.py bochs                  # x86 with AVX-512, booted on the emulated computer of Bochs

Everything is made in build/other_isas. Ends with 1 if a kernel was wrong, did not run, or a planted fault did not show.
"""

from __future__ import annotations

import argparse
import fcntl
import importlib.util
import os
import platform
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
SHARED = HERE.parent / "sanitize"
sys.path.insert(0, str(SHARED))

from build import ROOT, TABLES, compiler, impl_lines, impl_rows, isa_flags, isa_of, isas_of, kernel_sources

SHARED_PARTS = ("attention", "sparse")  # of the sanitizers' program
OPS = ("quant_linear", *(op for name in SHARED_PARTS for op in TABLES[name]))
FLAGS = ("-std=c++20", "-O2", "-ffp-contract=off", "-fno-math-errno", "-w")  # warnings are the affair of the library's build
# No exceptions, no red zone, which an interrupt would overwrite; roundss instead of a call of the C library.
BARE = ("-fno-exceptions", "-fno-rtti", "-fno-threadsafe-statics", "-fno-stack-protector", "-fno-pic",
        "-mno-red-zone", "-msse4.1", "-fno-asynchronous-unwind-tables", "-U_FORTIFY_SOURCE", "-fcf-protection=none",
        "-DTAUT_BARE", "-D_GLIBCXX_EXTERN_TEMPLATE=0")  # fmt: skip
# ISAs whose impls must run on each emulated processor; what it cannot run is passed over, and the program says so.
ARM_PROCESSORS = {"max": ("neon", "neondot", "i8mm"), "cortex-a76": ("neon", "neondot"), "cortex-a72": ("neon",)}
X86_PROCESSORS = {
    "corei7_icelake_u": ("avx2", "avx512bw", "avx512vnni"),
    "corei7_skylake_x": ("avx2", "avx512bw"),
    "corei7_haswell_4770": ("avx2",),
}


def required_impls(machine: str, isas: tuple[str, ...]) -> str:
    rows = [(op, row[0]) for op in OPS for row in impl_rows(op, machine)]
    return ",".join(f"{op}:{name}" for op, name in rows if name.split(".")[0].removeprefix("cpu_") in isas)


def table() -> str:
    """The impl table of op.cpp and the functions it names: pure functions, that know no torch."""
    text = (ROOT / "csrc/quant_linear/op.cpp").read_text()
    return text[text.index("namespace {") + len("namespace {") : text.index("\n};\n", text.index(" kImpls[] = {")) + 4]


def build(folder: Path, cxx: str, machine: str, flags: tuple[str, ...], main: list[Path], link: list[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.inc").write_text(table())
    for name in SHARED_PARTS:
        (folder / f"{name}.inc").write_text("".join(f"{line}\n" for op in TABLES[name] for line in impl_lines(op, machine)))
    sources = [path for path in kernel_sources(machine) if path.parent.name in OPS]
    sources += [ROOT / "csrc/common/cpu_features.cpp", *(SHARED / f"{name}.cpp" for name in SHARED_PARTS), HERE / "program.cpp", *main]

    def compile_one(source: Path) -> str:
        target = folder / f"{source.parent.name}-{source.stem}.o"
        own = ("-fno-builtin", "-fno-tree-loop-distribute-patterns") if source.stem == "main_bare" else ()
        own += tuple(isa_flags().get(isa_of(source) or "", []))
        include = [f"-I{path}" for path in (ROOT / "csrc", SHARED, HERE, folder)]
        subprocess.run([cxx, *FLAGS, *flags, *own, *include, "-c", str(source), "-o", str(target)], check=True)
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
    return subprocess.run([build(out / "native", cxx, machine, (), [HERE / "main_hosted.cpp"], []), "all"], check=False).returncode


def library(out: Path) -> int:
    """Whether libtaut_cpu could be linked on ARM: every file compiles, and none names a kernel that is not there."""
    folder = out / "library"
    folder.mkdir(parents=True, exist_ok=True)
    spec = importlib.util.find_spec("torch")
    if spec is None:
        print("---- libtaut_cpu for ARM: not checked, it needs the headers of torch", flush=True)
        return 0
    torch = ["-isystem", str(Path(spec.origin).parent / "include"), "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    sources = [path for path in (ROOT / "csrc").glob("*/*.cpp") if not path.stem.endswith("_cuda")]
    sources = [path for path in sources if isa_of(path) in (None, *isas_of("aarch64"))]

    def compile_one(source: Path) -> str:
        target = folder / f"{source.parent.name}-{source.stem}.o"
        flags = [*FLAGS, "-O1", "-fPIC", "-fvisibility=hidden", *isa_flags().get(isa_of(source) or "", []), f"-I{ROOT / 'csrc'}", *torch]
        subprocess.run(["aarch64-linux-gnu-g++", *flags, "-c", str(source), "-o", str(target)], check=True)
        return str(target)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    linked = subprocess.run(
        ["aarch64-linux-gnu-g++", "-shared", "-Wl,-z,defs", "-Wl,--demangle", *objects, "-o", str(folder / "libtaut_cpu.so")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    missing = sorted(set(re.findall(r"undefined reference to `(taut::[^']*)'", linked.stderr)))
    print(f"---- libtaut_cpu for ARM: {len(sources)} files compile; missing: {', '.join(missing) or 'nothing but torch'}", flush=True)
    return bool(missing)


def aarch64(out: Path) -> int:
    program = build(out / "aarch64", "aarch64-linux-gnu-g++", "aarch64", (), [HERE / "main_hosted.cpp"], ["-static"])
    failed = 0
    for processor, isas in ARM_PROCESSORS.items():
        print(f"---- ARM, {processor} (qemu)", flush=True)
        # On the others the news is what must not run.
        cases = "all" if processor == "max" else "few"
        command = ["qemu-aarch64-static", "-cpu", processor, str(program), cases, required_impls("aarch64", isas)]
        failed |= subprocess.run(command, check=False).returncode != 0
    return failed


LOADER = ("/usr/lib/ISOLINUX/isolinux.bin", *(f"/usr/lib/syslinux/modules/bios/{name}.c32" for name in ("ldlinux", "libcom32", "mboot")))
BOCHS_SECONDS = 900


def bochs(out: Path) -> int:
    failed = 0
    for processor, isas in X86_PROCESSORS.items():
        print(f"---- x86, {processor} (Bochs)", flush=True)
        folder = out / processor
        flags = (*BARE, f'-DTAUT_REQUIRED="{required_impls("x86_64", isas)}"')
        link = ["-nostdlib", "-static", "-no-pie", f"-Wl,--no-warn-rwx-segments,--build-id=none,-z,max-page-size=4096,-T,{HERE}/link.ld"]
        program = build(folder, "g++", "x86_64", flags, [HERE / "boot.S", HERE / "main_bare.cpp"], link)
        iso = folder / "iso"
        iso.mkdir(exist_ok=True)
        for path in (*LOADER, HERE / "isolinux.cfg", program):
            shutil.copy(path, iso)
        how = ("-quiet", "-b", "isolinux.bin", "-c", "boot.cat", "-no-emul-boot", "-boot-load-size", "4", "-boot-info-table")
        command = ["xorriso", "-as", "mkisofs", *how, "-o", str(folder / "program.iso"), str(iso)]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        (folder / "bochsrc").write_text((HERE / "bochsrc").read_text().replace("MODEL", processor))
        (folder / "commands").write_text("c\n")
        status = boot(folder)
        if status is None:
            print(f"FAILED: no result in {BOCHS_SECONDS} s; see {folder}/bochs.log")
        failed |= status != 0
    return failed


def boot(folder: Path) -> int | None:
    """Shows what the program prints; the status it ends with, or None if there was none in time."""
    started = time.monotonic()
    child, terminal = pty.fork()
    if child == 0:
        os.environ["TERM"] = "xterm"
        os.chdir(folder)
        time.sleep(0.2)  # until the terminal has its size
        os.execvp("bochs", ["bochs", "-q", "-f", "bochsrc", "-rc", "commands"])
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 132, 0, 0))
    text, status = b"", None
    try:
        while status is None and time.monotonic() - started < BOCHS_SECONDS:
            if not select.select([terminal], [], [], 1)[0]:
                continue
            try:
                data = os.read(terminal, 65536)
            except OSError:  # it ended
                break
            text += data
            (folder / "terminal.txt").write_bytes(text)
            if found := re.search(rb"BEGIN\s+(.*)END (\d)", text, re.S):
                print(found[1].decode(errors="replace").replace("\r", ""), end="", flush=True)
                status = int(found[2])
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(terminal)
    return status


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("where", choices=("native", "aarch64", "library", "bochs"), nargs="+")
    arguments = parser.parse_args()
    failed = 0
    for where in arguments.where:
        failed |= globals()[where](ROOT / "build" / "other_isas")
    return failed


if __name__ == "__main__":
    sys.exit(main())
