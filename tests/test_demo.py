"""scripts/demo: its JSON, the text it reads, and the shell functions that set it up."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import subprocess
import tarfile
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from tiny_models import write_checkpoint, write_gguf

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
ROW_KEYS = {
    "name", "prompt_tok_s", "decode_tok_s", "weight_bytes", "swapped_weight_bytes", "peak_bytes", "kl_mean", "kl_stderr", "top1",
    "core_s_per_token", "text",
}  # fmt: skip
PROSE = "Librarians and scholars met for two days to speak of texts that a machine can read, and of who would read them. " * 3


@pytest.fixture
def demo(tmp_path, monkeypatch):
    """The script as a module, with a cache of its own and less work to do."""
    spec = importlib.util.spec_from_file_location("demo", SCRIPTS / "demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "CACHE", tmp_path / "cache")
    for name, value in {"WINDOW": 48, "WINDOWS": 3, "BF16_WINDOWS": 1, "STEPS": 4, "ROUNDS": 2}.items():
        monkeypatch.setattr(module, name, value)
    return module


@pytest.mark.parametrize("kind", ["checkpoint", "gguf"])
def test_demo_measures_four_variants(demo, tmp_path, monkeypatch, capsys, kind):
    monkeypatch.setattr(demo, "english", lambda: PROSE)
    model = write_checkpoint(tmp_path / "model") if kind == "checkpoint" else write_gguf(tmp_path / "tiny.gguf")
    path = tmp_path / "demo.json"
    monkeypatch.setattr("sys.argv", ["demo", "--model", str(model), "--json", str(path)])
    assert demo.main() == 0
    found = json.loads(path.read_text())
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows) == ["fp32", "bf16", "int8", "int4"]
    for row in rows.values():
        assert set(row) >= ROW_KEYS
        for key in ROW_KEYS - {"name", "text", "kl_mean", "kl_stderr"}:
            assert row[key] > 0, key
    assert {"processor", "threads", "torch", "taut"} <= set(found["machine"])
    fp32, bf16, int8, int4 = rows.values()
    assert (fp32["kl_mean"], fp32["top1"]) == (0, 1)
    assert bf16["swapped_weight_bytes"] * 2 == fp32["swapped_weight_bytes"]
    assert int4["swapped_weight_bytes"] < int8["swapped_weight_bytes"] < bf16["swapped_weight_bytes"]
    assert 0 < int8["kl_mean"] < int4["kl_mean"]
    assert (bf16["compared_tokens"], int8["compared_tokens"]) == (47, 3 * 47)
    out = capsys.readouterr().out
    for word in ("fp32", "bf16", "int8", "int4", "same top token", demo.QUESTION):
        assert word in out
    cached = list((tmp_path / "cache").glob("models/*"))
    assert len(cached) == (1 if kind == "gguf" else 0)
    if cached:  # the second run reads the cache: the file itself is not opened any more
        before = cached[0].stat().st_mtime_ns
        assert demo.as_floats(demo.models.find_source(model)).name == str(cached[0])
        assert cached[0].stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("arguments", "expected"), [(["--model", "no/such/model"], "no such file"), (["--json", "no/such/folder/x.json"], "no such directory")]
)
def test_bad_input_is_one_line(demo, monkeypatch, capsys, arguments, expected):
    monkeypatch.setattr("sys.argv", ["demo", *arguments])
    assert demo.main() == 2
    err = capsys.readouterr().err
    assert expected in err
    assert len(err.splitlines()) == 1


def test_text_comes_out_of_the_archive_once(demo, monkeypatch, tmp_path):
    calls = []
    lines = "\n".join(f"line {index} of a paragraph that is long enough to count as one, and not as a heading," for index in range(3))
    content = (f"{lines}\n\nHEADING\n\n***   ***   ***\n\n" * 200).encode("latin-1")

    def download(command, **options):
        calls.append(command)
        with tarfile.open(Path(command[command.index("--dest") + 1]) / "brotli-1.tar.gz", "w:gz") as archive:
            member = tarfile.TarInfo(f"brotli-1/{demo.TEXT_FILE}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(demo.subprocess, "run", download)
    text = demo.english()
    assert demo.english() == text
    assert len(calls) == 1
    assert demo.TEXT_PACKAGE in calls[0]
    assert "HEADING" not in text
    assert "***" not in text
    assert "\n\nline 0 of a paragraph" in text
    assert "line 0 of a paragraph that is long enough to count as one, and not as a heading, line 1" in text
    assert [path.name for path in (tmp_path / "cache" / "text").iterdir()] == ["lcet10.txt"]


def test_a_download_that_fails_says_so(demo, monkeypatch, tmp_path):
    monkeypatch.setattr(demo.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1, "", "ERROR: no network\n"))
    with pytest.raises(OSError, match="cannot download brotli.*no network"):
        demo.english()
    assert not list((tmp_path / "cache" / "text").iterdir())


def bash(script: str, **environment: str) -> subprocess.CompletedProcess:
    ours = {name: value for name, value in os.environ.items() if not name.startswith("TAUT_")}
    return subprocess.run(["bash", "-euo", "pipefail", "-c", script], capture_output=True, text=True, env=ours | environment, check=False)


def test_setup_runs_once_for_the_same_sources(tmp_path):
    """setup_taut with an interpreter that only writes down how it was called."""
    root = tmp_path / "checkout"
    for name in ("scripts", "cmake", "csrc", "python", ".venv/bin"):
        (root / name).mkdir(parents=True)
    (root / "scripts" / "setup.sh").write_text((SCRIPTS / "setup.sh").read_text())
    for name in ("CMakeLists.txt", "pyproject.toml", "csrc/a.cpp"):
        (root / name).write_text(name)
    log = tmp_path / "log"
    python = root / ".venv" / "bin" / "python"
    python.write_text(f'#!/bin/sh\necho "$*" >> "{log}"\ntest "$1" != -\n')  # the question whether taut is editable: no
    python.chmod(0o755)
    script = f'source "{root}/scripts/setup.sh"; setup_taut demo transformers a-package==1'
    done = bash(script)
    assert done.returncode == 0, done.stderr
    calls = log.read_text()
    assert "--no-build-isolation" in calls and f" {root}[transformers]" in calls
    assert "--no-deps a-package==1" in calls
    assert "torch==2.13.0" not in calls, "the torch that is there was kept"

    assert bash(script).returncode == 0
    assert log.read_text() == calls, "nothing changed, so nothing runs"
    (root / "csrc" / "a.cpp").write_text("changed")
    assert bash(script).returncode == 0
    assert log.read_text() == calls * 2
    assert bash(script, TAUT_CUDA="OFF").returncode == 0
    assert log.read_text().count("TAUT_CUDA=OFF") == 1, "other kernels are wanted: built again"
    assert bash(script).returncode == 0
    assert log.read_text().count("TAUT_CUDA=AUTO") == 3, "and again, since what was built last is without them"


def test_setup_that_fails_is_not_remembered(tmp_path):
    root = tmp_path / "checkout"
    for name in ("scripts", "cmake", "csrc", "python", ".venv/bin"):
        (root / name).mkdir(parents=True)
    (root / "scripts" / "setup.sh").write_text((SCRIPTS / "setup.sh").read_text())
    for name in ("CMakeLists.txt", "pyproject.toml"):
        (root / name).write_text(name)
    python = root / ".venv" / "bin" / "python"
    python.write_text("#!/bin/sh\nexit 3\n")
    python.chmod(0o755)
    done = bash(f'source "{root}/scripts/setup.sh"; setup_taut demo transformers; echo went on')
    assert done.returncode != 0
    assert "went on" not in done.stdout
    assert not list((root / ".venv").glob("taut-setup-*"))
