"""What nvcc made of the kernels: registers, spills and instructions of every kernel in libtaut_cuda.so, held against EXPECTED.

    python scripts/check_cubins.py [--all] [LIBRARY or object file]

Needs no GPU, only cuobjdump and nvdisasm (`pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm`, or the CUDA toolkit's).
Without an argument it reads the library of the taut that Python imports. --all shows every instance of a template.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Rule:
    """What a kernel must be made of. The first rule that fits a kernel is the one it is held against."""

    file: str  # regular expression for the file's stem
    kernel: str  # for the kernel's name
    needs: tuple[str, ...]  # for the beginning of instructions, each to be found. {type}: the part that says fp16 or bf16
    sms: range = range(1000)


LOAD, STORE = r"LDG\.E\.(?:\w+\.)*128", r"STG\.E\.(?:\w+\.)*128"  # 16 bytes a lane
COPY = r"LDGSTS\.E\.(?:\w+\.)*128"  # the same by cp.async
WIDE = r"LDS\.(?:U\.)?128"  # 16 bytes a lane of shared memory
EXPECTED = (
    Rule("cuda_sm75", "pack_kernel", (STORE,)),
    Rule("cuda_sm75", "unpack_kernel|dequantize_kernel", (LOAD,)),
    Rule("cuda_sm75", "expand_kernel", (STORE,)),
    Rule("cuda_sm75", "(check|pack|unpack)_places_kernel|copy_kernel", ()),  # places of sparse weights, byte by byte
    Rule("cuda_sm75", "(pack|unpack)_numbers_kernel", ()),  # and what is kept of them in 16 bits, a pair at a time
    Rule("cuda_sm75_quantize_rows", "quantize_rows", (LOAD, STORE)),
    Rule("cuda_sm75_simt", "simt", (LOAD, r"FFMA")),
    Rule("cuda_sm75_simt", "sparse_simt", (r"LDS\b", r"FFMA")),  # what a lane needs of w may be 2 to 16 bytes
    Rule("cuda_sm75_simt", "backward_(rows|dq|dkv|repair_dq|repair_dkv)", (r"FFMA", r"MUFU\.EX2")),
    Rule("cuda_sm75_simt", "backward_sinks", ("SHFL",)),
    Rule("cuda_sm75_simt", "attention_simt", (r"LDS\b", r"FFMA"), range(80)),  # nvcc makes shorter loads of it
    Rule("cuda_sm75_simt", "attention_simt", (r"LDS\.128", r"FFMA")),
    Rule("cuda_sm75_simt", "append_kernel|read_kernel", ()),  # a lane has every 32nd number of a row
    Rule("cuda_sm75_simt", "decode_simt", (LOAD, WIDE, r"FFMA", r"MUFU\.EX2")),
    Rule("cuda_sm75_simt", "decode_simt_unaligned", (WIDE, r"FFMA", r"MUFU\.EX2")),  # number by number
    Rule("cuda_sm75_mma", "decode_mma", (r"HMMA\.1688\.F32", LOAD, WIDE, r"MUFU\.EX2")),
    Rule("cuda_sm80_mma", "decode_mma", (r"HMMA\.16816\.F32", LOAD, WIDE, r"MUFU\.EX2")),
    Rule(r"cuda_sm(75_simt|75_mma|80_mma)", "decode_combine", (LOAD, r"MUFU\.EX2")),
    Rule("cuda_sm75_mma", "mma_kernel", (r"HMMA\.1688\.F32", "LDSM", LOAD)),
    Rule("cuda_sm75_mma", "attention_mma", (r"HMMA\.1688\.F32", "LDSM", r"LDSM\S*\.MT88", LOAD, STORE, r"MUFU\.EX2")),
    Rule("cuda_sm80_mma", "attention_mma", (r"HMMA\.16816\.F32{type}", "LDSM", r"LDSM\S*\.MT88", COPY, STORE, r"MUFU\.EX2")),
    Rule(r"cuda_sm(75|80)_mma", "attention_align", ()),  # q, k or v that is not aligned to 16 bytes: 2 at a time
    Rule("cuda_sm80_mma", "backward_(dq|dkv)_mma", (r"HMMA\.16816\.F32{type}", "LDSM", r"LDSM\S*\.MT88", COPY, STORE, r"MUFU\.EX2")),
    Rule("cuda_sm80_mma", "sparse_mma_kernel", (r"HMMA\.SP\.16832\.F32{type}", "LDSM", COPY, WIDE)),
    Rule("cuda_sm80_mma", "mma_kernel", (r"HMMA\.16816\.F32{type}", "LDSM", COPY)),
    Rule(r"cuda_sm(75|80)_mma", "combine", (LOAD, STORE)),
    Rule(r"cuda_sm(75|80)_mma", "align_rows", ()),  # x that is not aligned to 16 bytes: 2 at a time
    Rule("cuda_sm80_int8", "int8_kernel", (r"IMMA\.16832\.S8\.S8", "LDSM", COPY)),
    # WHY: 9.0 and 10.x have no e4m3 for mma.sync; ptxas makes fp16 of it, exactly, and multiplies at fp16's rate.
    Rule("cuda_sm89_fp8", "fp8_kernel", (r"F2FP\.F16\.E4M3\.UNPACK_B", r"HMMA\.16816\.F32", "LDSM", COPY), range(90, 120)),
    Rule("cuda_sm89_fp8", "fp8_kernel", (r"QMMA\.16832\.F32\.E4M3\.E4M3", "LDSM", COPY)),
    Rule("cuda_sm80_int8", "sparse_int8_kernel", (r"IMMA\.SP\.168(32|64)\.S8\.S8", "LDSM", COPY)),
    Rule("cuda_sm89_fp8", "sparse_fp8_kernel", (r"QMMA\.SP\.16864\.F32\.E4M3\.E4M3", "LDSM", COPY)),
    Rule(r"cuda_sm(80_int8|89_fp8)", "mma8_reduce", (LOAD, STORE)),
    Rule("cuda_sm90a_wgmma", "quant_linear_wgmma", (r"HGMMA\.64x\d+x16\.F32{type}", "UTMALDG", "UBLKCP", "STSM")),
    Rule("cuda_sm90a_wgmma", "quant_linear_wgmma_combine", (LOAD, STORE)),
    Rule("cuda_sm90a_wgmma", "attention_wgmma", (r"HGMMA\.64x\d+x16\.F32{type}", "UTMALDG", STORE, r"MUFU\.EX2")),
)
# Never: registers that did not fit and arrays that are indexed at run time; sums in no fixed order.
FORBIDDEN = {"local memory access": re.compile(r"(?:LDL|STL)\b"), "atomic on floats": re.compile(r"(?:RED|ATOM\w*)\.\S*F(?:16|32|64)")}
# What the table counts: matrix instructions of all generations.
MATRIX = re.compile(r"[HIQBD]G?MMA\b")


@dataclass
class Kernel:
    file: str
    name: str
    arguments: str  # of the template
    arch: str
    registers: int = 0
    smem_bytes: int = 0  # static
    stack_bytes: int = 0
    opcodes: Counter[str] = field(default_factory=Counter)

    @property
    def sm(self) -> int:
        return int(re.match(r"\d+", self.arch).group())

    @property
    def instructions(self) -> int:
        return sum(count for opcode, count in self.opcodes.items() if opcode != "NOP")

    @property
    def matrix(self) -> int:
        return sum(count for opcode, count in self.opcodes.items() if MATRIX.match(opcode))

    @property
    def is_empty(self) -> bool:
        """Whether its body was left out for this SM (common/cuda.cuh)."""
        return not any(opcode.startswith(("ST", "RED", "ATOM", "UTMA")) for opcode in self.opcodes)

    def __str__(self) -> str:
        return f"{self.file} {self.name}<{self.arguments}> for {self.arch}"


def find_tool(name: str) -> str | None:
    """cuobjdump or nvdisasm: on the path, or pip's."""
    spec = importlib.util.find_spec("nvidia")
    folders = [f"{folder}/cu13/bin" for folder in (spec.submodule_search_locations if spec else ())]
    return shutil.which(name, path=os.pathsep.join([*folders, os.environ.get("PATH", ""), "/usr/local/cuda/bin"]))


def find_library() -> Path:
    """libtaut_cuda.so of the taut that Python imports, without importing it."""
    spec = importlib.util.find_spec("taut")
    for folder in spec.submodule_search_locations if spec else ():
        if (found := Path(folder) / "libtaut_cuda.so").exists():
            return found
    raise FileNotFoundError("the installed taut has no libtaut_cuda.so: it was built without CUDA (README.md, Install)")


def lines_of(command: list[str]) -> Iterator[str]:
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        yield from process.stdout
        error = process.stderr.read()
    if process.returncode:
        raise OSError(f"{' '.join(command)}: {error.strip() or f'exit status {process.returncode}'}")


def demangle(names: list[str]) -> list[str]:
    if (tool := shutil.which("c++filt")) is None:
        return names
    return subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True).stdout.splitlines()


def file_of(mangled: str) -> str:
    """The stem of the file a kernel is in: nvcc names anonymous namespaces by it, as _GLOBAL__N__<hash>_<length>_<name>_cu..."""
    if found := re.search(r"_GLOBAL__N__[0-9a-f]+_(\d+)_", mangled):
        return mangled[found.end() : found.end() + int(found.group(1))].removesuffix("_cu")
    return "?"


def read_kernels(library: Path) -> list[Kernel]:
    """Every kernel in every cubin of a library or object file."""
    tool = find_tool("cuobjdump")
    if tool is None:
        raise FileNotFoundError("cuobjdump was not found: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    # nvdisasm, which cuobjdump calls, lies beside it or is on the path.
    kernels: dict[tuple[str, str], Kernel] = {}
    arch = mangled = ""
    for line in lines_of([tool, "-res-usage", str(library)]):
        if found := re.match(r"arch = sm_(\w+)", line):
            arch = found.group(1)
        elif found := re.match(r" Function (\S+):", line):
            mangled = found.group(1)
        elif found := re.match(r"  REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            registers, stack, smem, local = map(int, found.groups())
            kernels[arch, mangled] = Kernel(file_of(mangled), mangled, "", arch, registers, smem, stack + local)
    instruction = re.compile(r"\t?\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+ )?([A-Z][\w.]*)")
    opcodes: Counter[str] = Counter()
    for line in lines_of([tool, "-sass", str(library)]):
        if found := instruction.match(line):
            opcodes[found.group(1)] += 1
        elif found := re.match(r"\s+Function : (\S+)", line):
            opcodes = kernels[arch, found.group(1)].opcodes
        elif found := re.match(r"\s+code for sm_(\w+)", line):
            arch = found.group(1)
    found = list(kernels.values())
    for kernel, readable in zip(found, demangle([kernel.name for kernel in found]), strict=True):
        short = re.sub(r"taut::(?:\w+::)*|\(anonymous namespace\)::|\((?:\w+::)*\w+\)(?=\d)", "", readable)
        if parts := re.match(r"(?:void )?(?P<name>\w+)(?:<(?P<arguments>.*)>)?\(", short):
            kernel.name, kernel.arguments = parts["name"], (parts["arguments"] or "").replace(" >", ">")
    return found


def faults_of(kernel: Kernel) -> list[str]:
    faults = []
    if kernel.stack_bytes:
        faults.append(f"{kernel.stack_bytes} bytes of stack")
    for what, pattern in FORBIDDEN.items():
        if count := sum(count for opcode, count in kernel.opcodes.items() if pattern.match(opcode)):
            faults.append(f"{count} x {what}")
    if kernel.is_empty:
        if kernel.file.startswith(f"cuda_sm{kernel.arch}"):
            faults.append("no body for the very SM that its file is named after")
        return faults
    rule = next(
        (r for r in EXPECTED if re.fullmatch(r.file, kernel.file) and re.fullmatch(r.kernel, kernel.name) and kernel.sm in r.sms), None
    )
    if rule is None:
        return [*faults, "no rule in EXPECTED of scripts/check_cubins.py says what it must be made of"]
    type_part = r"\.BF16$" if "__nv_bfloat16" in kernel.arguments else "$"
    needs = [need.replace("{type}", type_part) for need in rule.needs]
    return faults + [f"no {need}" for need in needs if not any(re.match(need, opcode) for opcode in kernel.opcodes)]


def table(kernels: list[Kernel], every: bool) -> Iterator[str]:
    """Lines of the table: one for each kernel and SM, with the range over its instances, or one for each instance."""
    groups: dict[tuple, list[Kernel]] = {}
    for kernel in sorted(kernels, key=lambda k: (k.file, k.name, k.sm, k.arguments)):
        groups.setdefault((kernel.file, kernel.name, kernel.arch, *((kernel.arguments,) if every else ())), []).append(kernel)

    def spread(values: list[int]) -> str:
        return f"{min(values)}-{max(values)}" if min(values) < max(values) else str(values[0])

    rows = [("kernel", "SM", "instances", "registers", "static smem", "matrix", "instructions")]
    for key, group in groups.items():
        full = [kernel for kernel in group if not kernel.is_empty]
        columns = [spread([get(kernel) for kernel in full]) if full else "" for get in (
            lambda k: k.registers, lambda k: k.smem_bytes, lambda k: k.matrix, lambda k: k.instructions)]  # fmt: skip
        name = f"{key[0]} {key[1]}" + (f"<{key[3]}>" if every else "")
        rows.append((name, key[2], str(len(group)) if full else f"{len(group)} without a body", *columns))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", nargs="?", type=Path)
    parser.add_argument("--all", action="store_true", help="one line for each instance of a template")
    options = parser.parse_args()
    try:
        library = options.library or find_library()
        kernels = read_kernels(library)
    except OSError as error:
        print(f"check_cubins: {error}", file=sys.stderr)
        return 2
    print("\n".join(table(kernels, options.all)))
    faulty = {str(kernel): faults for kernel in kernels if (faults := faults_of(kernel))}
    for kernel, faults in faulty.items():
        print(f"{kernel}: {', '.join(faults)}")
    print(f"{library.name}: {len(kernels)} kernels, {len(faulty)} of them faulty")
    return 1 if faulty or not kernels else 0


if __name__ == "__main__":
    sys.exit(main())
