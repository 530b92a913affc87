"""libtaut_cuda.so as it was built: what nvcc made of the kernels, what the library needs, and when it is loaded. No GPU is needed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import taut

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import check_cubins

# The one function of torch's CUDA library that ours calls: all else is in libtorch_cpu.so, which every torch has.
FROM_TORCH_CUDA = {"aoti_torch_get_current_cuda_stream"}
PLANTED = """
namespace { __global__ void planted(float* out, int n) {
  float kept[64];
  for (int i = 0; i < 64; i++) kept[i] = out[i * n];
  for (int i = 0; i < n; i++) kept[i % 64] += kept[(i * 7) % 64];
  float sum = 0;
  for (int i = 0; i < 64; i++) sum += kept[i];
  atomicAdd(out + 1, sum);
} }
void run(float* out) { planted<<<1, 32>>>(out, 3); }
"""


@pytest.fixture(scope="module")
def library() -> Path:
    if taut.build_info()["cuda"] is None:
        pytest.skip("taut was built without CUDA" if nvcc() else "there is no nvcc: taut was built without CUDA")
    return check_cubins.find_library()


def nvcc() -> str | None:
    return os.environ.get("CUDACXX") or check_cubins.find_tool("nvcc")


def needs(*tools: str) -> None:
    for tool in tools:
        if check_cubins.find_tool(tool) is None:
            pytest.skip(f"needs {tool}" + (" (pip install 'taut[dev]')" if tool == "cuobjdump" else ""))


def symbols(path: Path, kind: str) -> set[str]:
    """Names of the undefined or defined dynamic symbols of a library."""
    listed = subprocess.run(["nm", "-D", f"--{kind}-only", str(path)], capture_output=True, text=True, check=True).stdout
    return {line.split()[-1].split("@")[0] for line in listed.splitlines()}


def test_every_kernel_is_made_of_what_it_should_be(library):
    needs("cuobjdump")
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "check_cubins.py"), str(library)], capture_output=True, text=True, check=False
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_planted_fault_is_found(tmp_path):
    needs("cuobjdump", "nvcc")
    source = tmp_path / "cuda_sm80_mma.cu"
    source.write_text(PLANTED)
    subprocess.run([nvcc(), "-arch=sm_80", "-c", str(source), "-o", str(tmp_path / "planted.o")], check=True)
    (kernel,) = check_cubins.read_kernels(tmp_path / "planted.o")
    assert (kernel.file, kernel.name, kernel.arch) == ("cuda_sm80_mma", "planted", "80")
    faults = "; ".join(check_cubins.faults_of(kernel))
    for expected in ("bytes of stack", "local memory", "atomic on floats", "no rule"):
        assert expected in faults


def test_it_is_made_for_the_gpus_that_the_build_names(library):
    needs("cuobjdump")
    tool = check_cubins.find_tool("cuobjdump")
    listed = subprocess.run([tool, "-lelf", "-lptx", str(library)], capture_output=True, text=True, check=True).stdout
    named = taut.build_info()["cuda"].split()
    real = {re.sub(r"\+ptx$", "", name) for name in named}
    assert set(re.findall(r"sm_(\w+)\.cubin", listed)) == real
    assert set(re.findall(r"sm_(\w+)\.ptx", listed)) == {name.removesuffix("+ptx") for name in named if name.endswith("+ptx")}


def test_it_needs_nothing_but_torch_and_taut(library):
    """cudart is inside; the driver is asked for what it has at run time: a wheel must load wherever torch does."""
    needs("readelf")
    listed = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"\(NEEDED\).*\[(.*?)\.so", listed))
    assert needed >= {"libtaut_cpu", "libtorch_cpu", "libtorch_cuda"}
    assert needed <= {
        "libtaut_cpu",
        "libtorch_cpu",
        "libtorch_cuda",
        "libstdc++",
        "libgcc_s",
        "libm",
        "libc",
        "libdl",
        "librt",
        "libpthread",
        "ld-linux-x86-64",
    }


def test_every_symbol_is_somewhere(library):
    """Nothing checks that at link time: torch is not there. And what is missing would be found in the first call."""
    needs("nm")
    torch_cpu = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    undefined = symbols(library, "undefined")
    ours = {name for name in undefined if "4taut" in name}
    assert ours <= symbols(library.with_name("libtaut_cpu.so"), "defined")
    theirs = {name for name in undefined if name.startswith(("aoti_", "torch_"))}
    assert theirs <= symbols(torch_cpu, "defined") | FROM_TORCH_CUDA
    if torch.version.cuda is not None:
        assert symbols(torch_cpu.with_name("libtorch_cuda.so"), "defined") >= FROM_TORCH_CUDA
    assert not {name for name in undefined if name.startswith("cu")}, "CUDA's own functions must be linked in, or asked for by name"
    exported = {name for name in symbols(library, "defined") if not name.startswith("_Z")}
    assert not exported, f"the library shows {sorted(exported)[:5]}, which somebody else's could be taken for"


def test_it_is_not_loaded_without_a_gpu(library):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    program = "import taut; print('libtaut_cuda' in open('/proc/self/maps').read(), 'libtaut_cpu' in open('/proc/self/maps').read())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


def test_it_loads_into_a_torch_with_cuda(library):
    """Also without a GPU; `scripts/test --torch VERSION` runs this with other torches."""
    if torch.version.cuda is None:
        pytest.skip("this torch has no CUDA")
    program = """
import ctypes, os, sys, torch, taut
ctypes.CDLL(sys.argv[1], mode=os.RTLD_NOW)
torch.ops.load_library(sys.argv[1])
for op in ("quant_linear", "pack_weight", "unpack_weight", "dequantize_weight"):
    print(op, torch._C._dispatch_has_kernel_for_dispatch_key(f"taut::{op}", "CUDA"))
print(*(name for name in taut.list_impls()["quant_linear"] if name.startswith("cuda_")))
"""
    done = subprocess.run([sys.executable, "-c", program, str(library)], capture_output=True, text=True, check=False)
    print(torch.__version__, done.stdout, sep="\n")
    assert done.returncode == 0, done.stderr
    *ops, impls = done.stdout.splitlines()
    assert [line.split()[1] for line in ops] == ["True"] * 4, done.stdout
    assert "cuda_sm80.mma" in impls


# (TAUT_CUDA_ARCHS_STRING, the SM in the kernel's file name, the device's SM, whether it has code there)
CODE = (
    ("80", "80", 80, True),
    ("80", "75", 86, True),  # 8.0 code runs on 8.6
    ("80", "80", 75, False),
    ("80", "80", 90, False),  # and not on 9.0
    ("80+ptx", "80", 90, True),
    ("86", "80", 80, False),
    ("80 90a", "89", 89, False),  # the file is compiled for 90a only
    ("80 90a", "80", 90, True),
    ("80 90a", "90a", 90, True),
    ("80+ptx", "90a", 90, False),  # PTX of 8.0 has no wgmma
    ("90", "90a", 90, False),
    ("90a", "80", 100, False),
    ("90a+ptx", "80", 100, False),
    ("75 80 86 89 90a 100 120+ptx", "89", 103, True),
    ("75 80 86 89 90a 100 120+ptx", "75", 121, True),
    ("75 80 86 89 90a 100 120+ptx", "90a", 120, False),
    ("75 80 86 89 90a 100 120+ptx", "80", 70, False),
)


def test_which_gpus_a_kernel_has_code_for(tmp_path):
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    lines = [f'static_assert(taut::has_code("{archs}", "{file}", {sm}) == {str(code).lower()});' for archs, file, sm, code in CODE]
    source = tmp_path / "code.cpp"
    source.write_text("\n".join(['#define TAUT_CUDA_ARCHS_STRING ""', '#include "common/cuda_archs.h"', *lines]))
    done = subprocess.run(
        [compiler, "-std=c++20", "-fsyntax-only", f"-I{ROOT / 'csrc'}", str(source)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
