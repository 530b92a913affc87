"""The conventions of the repository, enforced: what a reviewer would otherwise have to remember."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import taut

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
sys.path.insert(0, str(ROOT / "tests" / "sanitize"))

from build import MACHINE, compiler, isa_flags, isa_of, isas_of

MAX_LINES = 700
HEADINGS = ("COMPUTES", "LAYOUT", "WORK", "BOUND", "LIMITS")
OPS = sorted(path.parent.name for path in CSRC.glob("*/op.cpp"))
KERNELS = sorted(CSRC.glob("*/cpu_*.cpp")) + sorted(CSRC.glob("*/cuda_*.cu"))
KERNELS = [path for path in KERNELS if path.parent.name in OPS]
ISA_KERNELS = [path for path in KERNELS if isa_of(path)]
# They compute no numbers: what they must give back is their own input, and what the bytes mean is formats.h's and sparse.h's affair
OPS_WITHOUT_REFERENCE = {"pack_weight", "pack_sparse"}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def repository_files() -> list[Path]:
    """What is committed or about to be: the files git does not ignore."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def text_of(path: Path) -> str:
    try:
        return path.read_text()
    except UnicodeDecodeError:
        return ""


@pytest.mark.parametrize("path", KERNELS, ids=name_of)
def test_a_kernel_says_what_it_does(path):
    head = path.read_text().split("#include", 1)[0]
    found = re.findall(rf"^// ({'|'.join(HEADINGS)})\b", head, re.M)
    assert tuple(found) == HEADINGS, f"{name_of(path)} must open with {', '.join(HEADINGS)} in this order; it has {found}"


def test_only_op_files_know_torch():
    allowed = {f"csrc/{op}/{name}" for op in OPS for name in ("op.cpp", "op_cuda.cpp")}
    allowed |= {f"csrc/common/{name}_bridge.h" for name in ("torch", "attention", "kv", "sparse", "x8")}
    allowed |= {"csrc/common/torch_cuda.h", "csrc/attention_prefill/call.h", "csrc/common/parallel.cpp"}
    for path in sorted(CSRC.rglob("*")):
        if path.suffix in {".cpp", ".h", ".cu", ".cuh"} and re.search(
            r'#\s*include\s*[<"](torch/|ATen/|c10/|common/torch_)', path.read_text()
        ):
            assert name_of(path) in allowed, f"{name_of(path)} includes torch; kernels take Params"


@pytest.mark.parametrize("path", ISA_KERNELS, ids=name_of)
def test_isa_files_hold_no_containers(path):
    included = re.findall(r"#\s*include\s*<(\w+)>", path.read_text())
    assert not {"vector", "map", "string", "memory", "functional", "unordered_map"} & set(included)


@pytest.mark.parametrize("path", ISA_KERNELS, ids=name_of)
def test_isa_files_emit_no_weak_symbols(path, tmp_path):
    """The linker keeps one copy of a weak symbol, for every processor: it might be the one full of AVX-512."""
    machine = next(name for name in ("x86_64", "aarch64") if isa_of(path) in isas_of(name))
    cxx = compiler() if machine == MACHINE else shutil.which(f"{machine}-linux-gnu-g++")
    if cxx is None or shutil.which("nm") is None:
        pytest.skip(f"needs a C++ compiler for {machine} and nm")
    target = tmp_path / "kernel.o"
    # -O1: less is inlined away than in the library, so nothing it emits escapes.
    command = [
        cxx,
        "-std=c++20",
        "-O1",
        "-fPIC",
        "-fvisibility=hidden",
        *isa_flags()[isa_of(path)],
        f"-I{CSRC}",
        "-c",
        str(path),
        "-o",
        str(target),
    ]
    subprocess.run(command, check=True, capture_output=True)
    listed = subprocess.run(["nm", "-C", "--defined-only", str(target)], check=True, capture_output=True, text=True).stdout
    symbols = [line.split(maxsplit=2) for line in listed.splitlines()]
    weak = [name for _, kind, name in symbols if kind in "WwVvuC"]
    assert not weak, f"{name_of(path)} defines weak symbols: {weak}"
    namespace = f"taut::{path.parent.name}::"
    public = [name for _, kind, name in symbols if kind in "TDBR"]
    assert public, "a kernel file must define what op.h declares"
    assert all(name.startswith(namespace) and "::run" in name for name in public), f"only run functions may be visible: {public}"


def test_the_weak_symbol_check_can_fail(tmp_path):
    """An inline function in an ISA file is what the check above is for."""
    cxx = compiler()
    if cxx is None:
        pytest.skip("needs a C++ compiler")
    source = tmp_path / "planted.cpp"
    source.write_text("inline int weak(int x) { return x + 1; }\nint (*keep)(int) = weak;\n")
    subprocess.run([cxx, "-O1", "-c", str(source), "-o", str(tmp_path / "planted.o")], check=True)
    listed = subprocess.run(["nm", str(tmp_path / "planted.o")], check=True, capture_output=True, text=True).stdout
    assert re.search(r" W ", listed)


def test_isa_suffixes_have_flags():
    for path in KERNELS:
        suffixes = path.stem.split("_")[1:]
        assert suffixes[-1] in ("scalar", "dense") or isa_of(path) or path.suffix == ".cu", (
            f"{name_of(path)}: CMakeLists.txt has no flags for {suffixes[-1]}"
        )


@pytest.mark.parametrize("op", OPS)
def test_an_op_is_whole(op):
    contract = ROOT / "python" / "taut" / "ops" / f"{op}.py"
    assert contract.exists(), f"{op} has no Python contract"
    text = contract.read_text()
    assert f'register_fake("taut::{op}")' in text, f"{op} has no fake"
    assert re.search(rf"^def {op}\(", text, re.M), f"{op} has no checked entry"
    if op not in OPS_WITHOUT_REFERENCE:
        assert re.search(r"^def reference\(", text, re.M), f"{op} has no float64 reference"
        assert re.search(r"^def cost\(", text, re.M), f"{op} has no cost"
    assert (ROOT / "tests" / f"test_{op}.py").exists(), f"{op} has no test"
    assert (CSRC / op / "op.h").exists()
    assert (CSRC / op / "cpu_scalar.cpp").exists(), f"{op} has no scalar impl"


def test_every_registered_impl_is_declared_with_its_isa():
    for op, names in taut.list_impls().items():
        assert op in OPS
        for name in names:
            isa = name.split(".")[0].removeprefix("cpu_")
            assert any(path.stem.endswith(f"_{isa}") for path in KERNELS if path.parent.name == op), f"{op}: no file for {name}"


def test_no_file_is_too_long():
    for path in repository_files():
        if path.suffix in {".py", ".cpp", ".h", ".cu", ".cuh", ".sh"} or path.parent.name == "scripts":
            lines = len(text_of(path).splitlines())
            assert lines <= MAX_LINES, f"{name_of(path)} has {lines} lines; {MAX_LINES} is the limit"


def test_no_file_names_a_machine():
    """No home or working directory of whoever wrote it, and no package index other than the defaults."""
    forbidden = re.compile(r"(?<![\w.$}])/(?:home|root|Users|work|tmp/w)/\w|--(?:extra-)?index-url|--find-links")
    for path in repository_files():
        if path != Path(__file__).resolve():
            found = forbidden.search(text_of(path))
            assert not found, f"{name_of(path)} holds {found.group()!r}"


def test_nothing_is_left_unfinished():
    marks = re.compile(r"\b(?:TO" + r"DO|FIX" + r"ME|XX" + r"X)\b")
    for path in repository_files():
        if path.suffix in {".py", ".cpp", ".h", ".cu", ".cuh", ".md", ".toml"}:
            found = marks.search(text_of(path))
            assert not found, f"{name_of(path)} holds {found.group()!r}"


def test_versions_agree():
    project = re.search(r'^version = "([^"]+)"', (ROOT / "pyproject.toml").read_text(), re.M).group(1)
    changelog = re.search(r"^## \[(\d[^\]]*)\]", (ROOT / "CHANGELOG.md").read_text(), re.M).group(1)
    assert changelog == project, "CHANGELOG.md's newest version is not pyproject.toml's"
    assert taut.__version__ == project, "the build is of another version; install again"


def test_torch_target_agrees():
    target = re.search(r"TORCH_TARGET_VERSION=0x(\w\w)(\w\w)", (ROOT / "CMakeLists.txt").read_text())
    version = f"{int(target.group(1), 16)}.{int(target.group(2), 16)}"
    assert taut.build_info()["torch_target"] == version
    assert f'"torch>={version}"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize("name", ("CONTRIBUTING.md", "CHANGELOG.md", "README.md", "LICENSE"))
def test_links_of_the_documents_lead_somewhere(name):
    path = ROOT / name
    assert path.exists()
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text()):
        if "://" not in target:
            assert (ROOT / target).exists(), f"{name} links to {target}, which does not exist"


@pytest.mark.parametrize("path", [*sorted((ROOT / "scripts").glob("*")), ROOT / ".ci" / "run"], ids=name_of)
def test_scripts_parse(path):
    if not path.is_file() or path.suffix == ".py":
        pytest.skip("not a shell script")
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
