"""What scripts/gpu runs. Only Python's own modules here: a machine with a GPU may have nothing but torch.

Steps, each with a time limit and a log in the output folder, so that a run that is cut off is worth what it did:
  build      taut, for this GPU alone, with cmake; pybind11 is taken from torch's headers
  golden     what the GPU answers to every PTX wrapper, for the emulator to be held against
  tests      the impl tests on the GPU; needs pytest and hypothesis
  decode     python -m bench.gpu_decode: attention_decode beside torch's attention
  prefill    python -m bench.gpu_prefill: attention_prefill and its gradients beside cuDNN's and FlashAttention's
  sparse     python -m bench.gpu_sparse: sparse_linear beside quant_linear and cuBLAS
  bench      python -m bench.gpu; started again where a kernel crashes or never returns, without that kernel
  sanitizer  compute-sanitizer memcheck and racecheck on tiny cases, where it is installed
Packages that the machine lacks can be carried as wheels in ./wheels, or where $TAUT_WHEELS says; `scripts/gpu --fetch-wheels` on a
machine with network fills that folder. A taut wheel among them is used where the build fails.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STEPS = ("build", "golden", "tests", "decode", "prefill", "sparse", "bench", "sanitizer")
DEFAULT_BUDGET = 460.0
# The most a step may take, and what it must leave for those after it, in seconds.
LIMITS = {
    "build": (240.0, 150.0), "golden": (40.0, 120.0), "tests": (100.0, 100.0), "decode": (40.0, 100.0), "prefill": (40.0, 80.0),
    "sparse": (40.0, 60.0), "bench": (300.0, 45.0), "sanitizer": (120.0, 5.0),
}  # fmt: skip
STALL_SECONDS = 75.0  # without a new line the benchmark is stuck: in a kernel that does not return, or a peer that tunes itself
MOST_STARTS = 8
TESTS = tuple(
    f"tests/test_{name}.py"
    for name in ("quant_linear", "attention_prefill", "attention_backward", "attention_decode", "kv_append", "sparse_linear", "pack_weight",
                 "pack_sparse", "quant_linear_module", "sparse_module", "cuda_device")
)  # fmt: skip
# Needed to import taut and to run its tests; a machine with torch has numpy and more.
WHEELS = (
    "psutil", "rich", "markdown-it-py", "mdurl", "pygments", "safetensors",
    "pytest", "pytest-xdist", "execnet", "pluggy", "iniconfig", "packaging", "hypothesis", "sortedcontainers",
)  # fmt: skip
PEER_WHEELS = ("bitsandbytes", "tqdm")  # GemLite comes as a source archive: unpack it in the wheels folder
LAST_LINES = 8


@dataclass
class Outcome:
    """What became of a step."""

    step: str
    ok: bool
    words: str
    seconds: float = 0.0
    shown: list[str] = field(default_factory=list)  # lines for the summary


class Run:
    """One run: the output folder, the clock, the environment of what is started."""

    def __init__(self, out: Path, budget: float, dry_run: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self.out, self.dry_run, self._clock = out, dry_run, clock
        self._end = clock() + budget
        self.site = ROOT / "build" / "gpu" / "site"
        self.outcomes: list[Outcome] = []
        self.environment = dict(os.environ)
        self.environment.update(PYTHONUNBUFFERED="1", OUT=str(out))
        out.mkdir(parents=True, exist_ok=True)

    def left(self) -> float:
        return self._end - self._clock()

    def limit(self, step: str) -> float:
        """Seconds that a step may take now."""
        most, reserve = LIMITS[step]
        return max(0.0, min(most, self.left() - reserve))

    def use_site(self) -> None:
        paths = [str(self.site), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.environment["PYTHONPATH"] = os.pathsep.join(paths)

    def execute(
        self, command: Sequence[str], log: str, limit: float, show: bool = False, append: bool = False,
        alive: Callable[[], bool] = lambda: True,
    ) -> int:  # fmt: skip
        """Runs a command with its output in ``out/log``; its exit code, or -9 where it was ended for its time or by ``alive``.

        WHY an interrupt before the kill: pytest then still says what failed.
        """
        path = self.out / log
        with path.open("a" if append else "w") as file:
            file.write(f"$ {' '.join(map(str, command))}\n")
            file.flush()
            begin = path.stat().st_size
            process = subprocess.Popen(
                [str(part) for part in command],
                cwd=ROOT,
                env=self.environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            end = self._clock() + limit
            stopped = False
            while process.poll() is None:
                if not stopped and (self._clock() > end or not alive()):
                    stopped = True
                    self._stop(process)
                time.sleep(0.1)
                begin = _print_from(path, begin) if show else begin
            if show:
                _print_from(path, begin)
        return -9 if stopped else process.returncode

    @staticmethod
    def _stop(process: subprocess.Popen) -> None:
        for signum, patience in ((signal.SIGINT, 8.0), (signal.SIGKILL, 10.0)):
            try:
                os.killpg(process.pid, signum)
                process.wait(patience)
                return
            except ProcessLookupError:
                return
            except subprocess.TimeoutExpired:
                continue

    def tail(self, log: str, count: int = LAST_LINES) -> list[str]:
        path = self.out / log
        return path.read_text(errors="replace").splitlines()[-count:] if path.exists() else []


def _print_from(path: Path, begin: int) -> int:
    with path.open("rb") as file:
        file.seek(begin)
        fresh = file.read()
    sys.stdout.write(fresh.decode(errors="replace"))
    sys.stdout.flush()
    return begin + len(fresh)


# ---- what is here


def torch_facts() -> dict[str, str]:
    """What torch says of this machine, asked in a process of its own: importing it here would hold GPU memory all the while."""
    program = (
        "import torch, pathlib; print('torch', torch.__version__); print('cuda', torch.version.cuda);"
        "print('include', pathlib.Path(torch.__file__).parent / 'include')\n"
        "if torch.cuda.is_available():\n"
        "    p = torch.cuda.get_device_properties(0); print('name', p.name); print('sm', p.major * 10 + p.minor)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"torch cannot be imported: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else done.returncode}")
    return dict(line.split(" ", 1) for line in done.stdout.splitlines() if " " in line)


def arch_of(sm: int) -> str:
    """The GPU as cmake's CUDA architectures name it; Hopper's own instructions are in its "a" variant."""
    return "90a-real" if sm == 90 else f"{sm}-real"


def unpack_wheels(folder: Path, site: Path) -> list[str]:
    """Unpacks what Python does not have yet of the wheels, and source archives of pure Python packages, in a folder; gives their
    names. WHY not pip: it may be missing, and wants every requirement. A wheel of taut is left alone here."""
    names = []
    for path in sorted([*folder.glob("*.whl"), *folder.glob("*.tar.gz")]):
        if path.name.startswith("taut-"):
            continue
        if path.suffix == ".whl":
            with zipfile.ZipFile(path) as archive:
                tops = {member.split("/")[0] for member in archive.namelist() if not re.match(r"[^/]*\.(dist-info|data)/", member)}
                if wanted := not _all_here(tops):
                    archive.extractall(site)
        else:
            name = path.name.rpartition("-")[0].replace("-", "_")
            if wanted := not _all_here({name}):
                with tarfile.open(path) as archive:
                    members = [member for member in archive.getmembers() if member.name.split("/")[1:2] == [name]]
                    for member in members:
                        member.name = member.name.split("/", 1)[1]
                    safely = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # Python 3.11.4 and newer
                    archive.extractall(site, members, **safely)
        names += [path.name.split("-")[0]] if wanted else []
    return names


def _all_here(tops: set[str]) -> bool:
    return all(importlib.util.find_spec(top.partition(".")[0]) for top in tops)


def wheels_folder() -> Path:
    return Path(os.environ.get("TAUT_WHEELS", ROOT / "wheels"))


def fetch_wheels(folder: Path) -> int:
    """Downloads what a machine without network may lack, for Python 3.12 on x86-64 Linux."""
    folder.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    platforms = [part for glibc in ("2_28", "2_24", "2_17", "2014", "2010") for part in ("--platform", _platform(glibc))]
    binary = ["--only-binary=:all:", "--python-version", "3.12", "--implementation", "cp", *platforms]
    failed = subprocess.run([*pip, *binary, *WHEELS, *PEER_WHEELS], check=False).returncode
    failed = subprocess.run([*pip, "--no-binary", "gemlite", "--no-build-isolation", "gemlite"], check=False).returncode or failed
    sizes = [path.stat().st_size for path in folder.iterdir()]
    print(f"{len(sizes)} files, {sum(sizes) / 1e6:.0f} MB in {folder}")
    return failed


def _platform(glibc: str) -> str:
    return f"manylinux{glibc}_x86_64" if glibc.startswith("20") else f"manylinux_{glibc}_x86_64"


# ---- the steps


def write_pybind11(folder: Path, torch_include: Path) -> Path:
    """A cmake package of the pybind11 headers that torch carries."""
    include = folder / "include"
    include.mkdir(parents=True, exist_ok=True)
    link = include / "pybind11"
    if not link.exists():
        link.symlink_to(torch_include / "pybind11")
    (folder / "pybind11Config.cmake").write_text(
        f'add_library(pybind11::module INTERFACE IMPORTED)\ntarget_include_directories(pybind11::module SYSTEM INTERFACE "{include}")\n'
    )
    return folder


def find_cmake() -> str:
    """A cmake that is new enough, on the path or in pip's package; raises ``OSError`` where there is none."""
    needed = re.search(r"cmake_minimum_required\(VERSION ([\d.]+)", (ROOT / "CMakeLists.txt").read_text()).group(1)
    program = "import cmake, pathlib; print(pathlib.Path(cmake.CMAKE_BIN_DIR) / 'cmake')"
    from_pip = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False).stdout.strip()
    found = []
    for candidate in filter(None, (shutil.which("cmake"), from_pip)):
        said = subprocess.run([candidate, "--version"], capture_output=True, text=True, check=False).stdout
        version = re.search(r"version (\d+)\.(\d+)", said)
        if version and tuple(map(int, version.groups())) >= tuple(map(int, needed.split("."))):
            return candidate
        found.append(f"{candidate}: {version.group(0) if version else 'does not run'}")
    raise OSError(f"cmake {needed} or newer is needed; found {', '.join(found) or 'none'}")


def configure_command(build: Path, site: Path, pybind11: Path, arch: str | None) -> list[str]:
    """``arch`` None: without CUDA."""
    version = re.search(r'^version = "([^"]+)"', (ROOT / "pyproject.toml").read_text(), re.M).group(1)
    command = [find_cmake(), "-S", str(ROOT), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release", f"-DCMAKE_INSTALL_PREFIX={site}"]
    if shutil.which("ninja"):
        command += ["-G", "Ninja"]
    command += ["-DSKBUILD_PROJECT_NAME=taut", f"-DSKBUILD_PROJECT_VERSION={version}", f"-DPython_EXECUTABLE={sys.executable}"]
    command += [f"-Dpybind11_DIR={pybind11}"]
    if arch is None:
        return [*command, "-DTAUT_CUDA=OFF"]
    # WHY split: one file of many kernels takes longer than all others together
    return [*command, "-DTAUT_CUDA=ON", f"-DTAUT_CUDA_ARCHS={arch}", "-DCMAKE_CUDA_FLAGS=--split-compile=0"]


def build(run: Run, facts: dict[str, str]) -> Outcome:
    arch = None if run.dry_run else arch_of(int(facts["sm"]))
    cmake = run.site.parent / "cmake"
    pybind11 = write_pybind11(run.site.parent / "pybind11", Path(facts["include"]))
    end = time.monotonic() + run.limit("build")
    try:
        code = run.execute(configure_command(cmake, run.site, pybind11, arch), "build.log", run.limit("build"))
    except OSError as error:
        (run.out / "build.log").write_text(f"{error}\n")
        code = 1
    jobs = str(min(os.cpu_count() or 1, 32))
    for command in ([find_cmake(), "--build", str(cmake), "--parallel", jobs], [find_cmake(), "--install", str(cmake)]):
        if code == 0:
            code = run.execute(command, "build.log", end - time.monotonic(), append=True)
    if code == 0:
        shutil.copytree(ROOT / "python" / "taut", run.site / "taut", dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        return Outcome("build", True, f"for {arch or 'the CPU alone'}")
    carried = sorted(wheels_folder().glob("taut-*.whl"))
    why = "took too long" if code == -9 else "failed"
    if not carried:
        return Outcome("build", False, why, shown=run.tail("build.log", 15))
    with zipfile.ZipFile(carried[-1]) as archive:
        archive.extractall(run.site)
    return Outcome("build", False, f"{why}; {carried[-1].name} is used", shown=run.tail("build.log"))


def tests(run: Run) -> Outcome:
    if not _importable(run, "pytest") or not _importable(run, "hypothesis"):
        return Outcome(
            "tests", False, "not run: carry wheels of pytest, pluggy, iniconfig, packaging, pygments, hypothesis and sortedcontainers"
        )
    if run.dry_run:
        command = ["tests/test_formats.py"]
    else:
        command = [path for path in TESTS if (ROOT / path).exists()] + ["-k", "cuda and not emulated"]
    if _importable(run, "xdist"):
        command += ["-n", str(min(6, os.cpu_count() or 1))]
    code = run.execute(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", "-rfE", *command], "tests.log", run.limit("tests")
    )
    last = next(
        (line for line in reversed(run.tail("tests.log", 40)) if re.search(r"\d+ (passed|failed|error|skipped)", line)), "no summary"
    )
    failed = [line[:160] for line in run.tail("tests.log", 400) if line.startswith(("FAILED", "ERROR"))]
    words = last.strip("= ") + (" (stopped for its time)" if code == -9 else "")
    # stopped for its time is no failure where nothing failed until then
    ok = code == 0 or (code == -9 and not failed and "passed" in last)
    return Outcome("tests", ok, words, shown=failed[:LAST_LINES])


def _importable(run: Run, name: str) -> bool:
    return (
        subprocess.run([sys.executable, "-c", f"import {name}"], env=run.environment, cwd=ROOT, capture_output=True, check=False).returncode
        == 0
    )


def golden(run: Run, facts: dict[str, str]) -> Outcome:
    source = ROOT / "tests" / "emulator" / "golden.cu"
    if not source.exists() or run.dry_run:
        return Outcome("golden", True, "not recorded")
    folder = run.site.parent / "golden"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    arch = arch_of(int(facts["sm"])).removesuffix("-real")
    end = time.monotonic() + run.limit("golden")
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    command = [
        nvcc,
        "-std=c++20",
        "-O2",
        "--expt-relaxed-constexpr",
        f"-gencode=arch=compute_{arch},code=sm_{arch}",
        "-Icsrc",
        "-Itests/emulator",
    ]
    code = run.execute([*command, source, "-o", folder / "golden"], "golden.log", run.limit("golden"))
    if code == 0:
        code = run.execute([folder / "golden", folder], "golden.log", max(1.0, end - time.monotonic()), append=True)
    files = [path for path in sorted(folder.iterdir()) if path.name != "golden"]
    if files:
        with tarfile.open(run.out / "golden.tar.gz", "w:gz") as archive:
            for path in files:
                archive.add(path, arcname=path.name)
    return Outcome("golden", code == 0 and bool(files), f"{len(files)} files", shown=[] if code == 0 else run.tail("golden.log"))


def one_op(run: Run, step: str) -> Outcome:
    """The benchmark of one op: "decode", "prefill" or "sparse"."""
    limit = run.limit(step)
    command = [sys.executable, "-m", f"bench.gpu_{step}", "--out", str(run.out), "--budget", f"{max(1.0, limit - 15.0):.0f}"]
    code = run.execute([*command, *(["--dry-run"] if run.dry_run else [])], f"{step}.log", limit, show=True)
    lines = run.out / f"{step}.jsonl"
    measured = lines.read_text().count(f'"kind": "{step}"') if lines.exists() else 0
    return Outcome(step, code == 0 and measured > 0, f"{measured} measurements" + ("" if code == 0 else f", exit code {code}"))


def bench(run: Run, arguments: Sequence[str]) -> Outcome:
    """The benchmark, started again where it died, without what it died of."""
    lines, starts, code = run.out / "bench.jsonl", 0, 0
    lines.unlink(missing_ok=True)
    end = time.monotonic() + run.limit("bench")
    while starts < MOST_STARTS and end - time.monotonic() > 10.0:
        command = [sys.executable, "-m", "bench.gpu", "--out", str(run.out), "--budget", f"{end - time.monotonic() - 5.0:.0f}", *arguments]
        command += ["--dry-run"] if run.dry_run else []
        command += ["--resume"] if starts else []
        watch = Watch(lines)
        code = run.execute(command, "bench.log", end - time.monotonic(), show=True, alive=watch.moves, append=starts > 0)
        starts += 1
        if code in (0, 1, 2):
            break
        print(f"the benchmark ended with {code}; going on without what it was doing", flush=True)
    if code not in (0, 1, 2):  # it had no chance to print it
        run.execute([sys.executable, "-m", "bench.gpu", "--table", str(lines)], "bench.log", 20.0, show=True, append=True)
    measured = lines.read_text().count('"kind": "linear"') if lines.exists() else 0
    again = f", started {starts} times" if starts > 1 else ""
    return Outcome("bench", code == 0 and measured > 0, f"{measured} measurements{again}" + ("" if code == 0 else f", exit code {code}"))


class Watch:
    """Whether a file still grows."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._path, self._clock = path, clock
        self._size, self._since = -1, clock()

    def moves(self) -> bool:
        size = self._path.stat().st_size if self._path.exists() else 0
        if size != self._size:
            self._size, self._since = size, self._clock()
        return self._clock() - self._since < STALL_SECONDS


def sanitizer(run: Run) -> Outcome:
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if run.dry_run or not Path(program).exists():
        code = run.execute(
            [sys.executable, "scripts/gpu_tiny.py", *(["--cpu"] if run.dry_run else [])], "sanitizer.log", run.limit("sanitizer")
        )
        return Outcome("sanitizer", code == 0, "no compute-sanitizer here; " + (run.tail("sanitizer.log", 1) or [""])[0])
    # WHY no caching: memory of its own for each tensor, so that reading past one is seen.
    run.environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    words, shown, ok = [], [], True
    end = time.monotonic() + run.limit("sanitizer")
    for index, tool in enumerate(("memcheck", "racecheck")):
        command = [program, "--tool", tool, "--error-exitcode", "9", "--kernel-name", "kernel_substring=taut", "--print-limit", "20"]
        limit = (end - time.monotonic()) / (2 - index)
        code = run.execute([*command, sys.executable, "scripts/gpu_tiny.py"], "sanitizer.log", limit, append=index > 0)
        last = [
            line
            for line in run.tail("sanitizer.log", 30)
            if "ERROR SUMMARY" in line or "RACECHECK SUMMARY" in line or line.startswith("tiny:")
        ]
        stopped = " (stopped for its time)" if code == -9 else ""
        words.append(f"{tool}: {'; '.join(line.strip('= ') for line in last[-2:]) or f'exit code {code}'}{stopped}")
        if code not in (0, -9):
            ok = False
            shown += [line for line in run.tail("sanitizer.log", 200) if "=========" in line][:LAST_LINES]
    return Outcome("sanitizer", ok, ". ".join(words), shown=shown)


# ---- the command


def summary(run: Run) -> str:
    lines = []
    for outcome in run.outcomes:
        lines.append(f"{'ok    ' if outcome.ok else 'FAILED'} {outcome.step:<9} {outcome.seconds:5.0f} s  {outcome.words}")
        lines += [f"         {line}" for line in outcome.shown]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="scripts/gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path(os.environ.get("OUT") or ROOT / "gpu-out"), help="folder of the results [default: $OUT, gpu-out]"
    )
    parser.add_argument(
        "--budget", type=float, default=DEFAULT_BUDGET, metavar="SECONDS", help=f"for everything [default: {DEFAULT_BUDGET:.0f}]"
    )
    parser.add_argument("--only", metavar="STEP[,STEP]", help=f"of {', '.join(STEPS)} [default: all]")
    parser.add_argument("--installed", action="store_true", help="test the taut that Python finds; build nothing")
    parser.add_argument("--dry-run", action="store_true", help="the same steps without a GPU: on the CPU, with made-up times")
    parser.add_argument(
        "--fetch-wheels", action="store_true", help="download packages into ./wheels, for a machine without network, and stop"
    )
    parser.add_argument("bench", nargs="*", metavar="-- ARGUMENTS", help="arguments of python -m bench.gpu")
    args = parser.parse_args(arguments)
    steps = args.only.split(",") if args.only else list(STEPS)
    if unknown := set(steps) - set(STEPS):
        parser.error(f"--only {sorted(unknown)[0]}: accepted are {', '.join(STEPS)}")
    if args.budget <= 0:
        parser.error("--budget must be above 0")
    if args.fetch_wheels:
        return fetch_wheels(wheels_folder())
    try:
        facts = torch_facts()
    except OSError as error:
        print(f"scripts/gpu: {error}", file=sys.stderr)
        return 2
    if not args.dry_run and "sm" not in facts:
        print("scripts/gpu: torch sees no CUDA device; --dry-run goes through the same steps without one", file=sys.stderr)
        return 2
    run = Run(args.out.absolute(), args.budget, args.dry_run)
    versions = f"torch {facts['torch']} (CUDA {facts['cuda']}), Python {sys.version.split()[0]}"
    print(f"{facts.get('name', 'no GPU')}, {versions}, results in {run.out}", flush=True)
    if args.installed:
        steps = [step for step in steps if step != "build"]
    else:
        run.site.mkdir(parents=True, exist_ok=True)
        if carried := unpack_wheels(wheels_folder(), run.site):
            print(f"carried: {', '.join(carried)}", flush=True)
        run.use_site()
    actions = {
        "build": lambda: build(run, facts),
        "golden": lambda: golden(run, facts),
        "tests": lambda: tests(run),
        "decode": lambda: one_op(run, "decode"),
        "prefill": lambda: one_op(run, "prefill"),
        "sparse": lambda: one_op(run, "sparse"),
        "bench": lambda: bench(run, args.bench),
        "sanitizer": lambda: sanitizer(run),
    }
    for step in STEPS:
        if step not in steps:
            continue
        if run.limit(step) <= 1.0:
            run.outcomes.append(Outcome(step, False, "not run: the time was over"))
            continue
        print(f"==== {step}", flush=True)
        begin = time.monotonic()
        outcome = actions[step]()
        outcome.seconds = time.monotonic() - begin
        run.outcomes.append(outcome)
        print(f"{'ok' if outcome.ok else 'FAILED'}: {outcome.words}", flush=True)
        (run.out / "summary.txt").write_text(summary(run) + "\n")
        if step == "build" and not outcome.ok and not (run.site / "taut").exists():
            break
    if "bench" in steps:  # once more, since logs are cut from their beginning
        print("\n".join(_table(run)))
    print(summary(run))
    return 0 if all(outcome.ok for outcome in run.outcomes) else 1


def _table(run: Run) -> list[str]:
    lines = run.out / "bench.jsonl"
    if not lines.exists():
        return []
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu", "--table", str(lines)],
        cwd=ROOT,
        env=run.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.splitlines()


if __name__ == "__main__":
    sys.exit(main())
