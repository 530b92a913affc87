"""bench/gpu.py and scripts/gpu without a GPU: what is wrong is never timed, what is cut off is still worth something."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench import gpu, gpu_table, model
from bench.contenders import Skip
from bench.gpu_device import DryDevice, model_of
from bench.gpu_problem import Layer, Weight, max_error, norm_error, own_layer, own_packed, rows_of_x
from bench.peers import cuda_peers

from emulator import build, emulated
from on_gpu import bytes_of, moved, on_gpu
from taut.ops.pack_weight import dequantize_weight
from taut.ops.quant_linear import quant_linear

SPEC = importlib.util.spec_from_file_location("scripts_gpu", ROOT / "scripts" / "gpu.py")
script = importlib.util.module_from_spec(SPEC)
sys.modules[SPEC.name] = script
SPEC.loader.exec_module(script)

CPU = torch.device("cpu")
FORMATS = ("int4_g128_bf16", "int4_g32_z_bf16", "int8_row_bf16", "fp8_g64_bf16", "int8_row_a8row", "fp8_row_f8row")


def weight_of(name: str, n: int = 96, k: int = 256) -> Weight:
    try:
        return Weight(n, k, name, CPU, torch.bfloat16)
    except Skip as reason:
        pytest.skip(str(reason))


class FakeClock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


# ---- the problem


@pytest.mark.parametrize("name", FORMATS)
def test_a_weight_is_what_taut_says_it_is(name: str) -> None:
    weight = weight_of(name)
    packed = own_packed(weight, 0)
    assert len(packed) == 1
    assert torch.equal(dequantize_weight(packed[0], weight.n, weight.k, weight.spec), weight.dense)
    assert weight.dense.std() > 0


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("m", [1, 9])
def test_taut_is_within_the_tolerance_that_it_is_held_to(name: str, m: int) -> None:
    weight = weight_of(name)
    x = rows_of_x(weight, m)
    try:
        layer = own_layer(weight, own_packed(weight, 0), "any")
    except Skip as reason:
        pytest.skip(str(reason))
    error = max_error(layer.call(x, 0), x, weight.dense)
    assert 0 < error <= gpu.TOLERANCES[weight.format.activations]
    assert norm_error(layer.call(x, 0), x.float() @ weight.dense.T) <= gpu._NORM_TOLERANCES[weight.format.activations]


def test_copies_exceed_three_caches() -> None:
    weight = weight_of("int4_g128_bf16")
    packed = own_packed(weight, 100_000)
    assert len(packed) * packed[0].nbytes > 100_000
    assert len({each.data_ptr() for each in packed}) == len(packed)
    assert all(torch.equal(each, packed[0]) for each in packed)


def test_errors_are_seen_wherever_they_are() -> None:
    x, w = torch.randn(300, 64), torch.randn(5000, 64)
    exact = (x.double() @ w.double().T).float()
    assert max_error(exact, x, w) < 1e-5
    assert norm_error(exact, exact) == 0
    for row, column in ((0, 2500), (299, 4999), (150, 0), (150, 4999)):
        broken = exact.clone()
        broken[row, column] += float(exact.abs().max())
        assert max_error(broken, x, w) > 0.99
    broken = exact.clone()
    broken[150, 2500] = float("nan")  # only the norm looks there
    assert norm_error(broken, exact) == float("inf")
    exact[0, 0] = float("nan")
    assert max_error(exact, x, w) == float("inf")


def test_peers_that_need_no_other_package_say_what_they_can_do() -> None:
    names = [peer.name for peer in cuda_peers()]
    assert names == ["cublas", "torch_int4pack", "bitsandbytes_nf4", "gemlite"]
    weight = weight_of("int4_g128_bf16")
    x = rows_of_x(weight, 5)
    dense = cuda_peers()[0].layer(weight, 0)
    assert max_error(dense.call(x, 0), x, weight.dense) < 1e-2
    for peer in cuda_peers()[1:]:
        with pytest.raises(Skip):
            peer.layer(weight_of("int8_row_bf16"), 0)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("NVIDIA H200", "H200"), ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA A100-SXM4-80GB", "A100"), ("NVIDIA L4", "L4"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"), ("NVIDIA GeForce RTX 2080 Ti", "RTX 2080 Ti"), ("Tesla T4", "T4"), ("NVIDIA L40S", None),
    ],
)  # fmt: skip
def test_devices_are_found_by_their_names(name: str, found: str | None) -> None:
    device = model_of(name)
    assert (device.name if device else None) == found


# ---- the benchmark


def dry(tmp_path: Path, *arguments: str) -> tuple[int, list[dict]]:
    code = gpu.main(["--dry-run", "--out", str(tmp_path), *arguments])
    return code, gpu_table.read_lines(tmp_path / gpu.FILE)


def test_a_dry_run_writes_lines_in_order_of_importance(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, lines = dry(tmp_path)
    assert code == 0
    kinds = [line["kind"] for line in lines]
    assert kinds[0] == "run" and kinds[-1] == "facts"
    assert set(kinds) <= set(gpu_table.KINDS)
    linear = [line for line in lines if line["kind"] == "linear"]
    assert linear[0]["beside"] == model.FORMATS[0]
    assert [line["beside"] for line in linear] == sorted((line["beside"] for line in linear), key=model.FORMATS.index)
    for line in linear:
        assert line["median_us"] > 0 and line["p10_us"] <= line["median_us"] <= line["p90_us"]
        assert line["nbytes"] / line["median_us"] / 1e3 == pytest.approx(line["gb_s"])
        assert 0 <= line["max_error"] < 0.06
        assert line["copies"] * line["nbytes"] > 3 * 1024
        assert line["dense_ratio"] > 0
    for case in {line["case"] for line in linear}:
        chosen = [line for line in linear if line["case"] == case and line["chosen"] and line["beside"] == "int4_g128_bf16"]
        assert len(chosen) == 1
    out = capsys.readouterr().out
    assert "-- goals" in out
    assert len(gpu_table.render(lines).splitlines()) < 60


def test_lines_are_on_disk_as_they_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    race = gpu.Bench.race

    def watched(self, *arguments) -> None:
        race(self, *arguments)
        seen.append((tmp_path / gpu.FILE).read_text().count('"kind": "linear"'))

    monkeypatch.setattr(gpu.Bench, "race", watched)
    dry(tmp_path, "--format", "int4_g32_bf16", "--no-peers")
    assert seen == sorted(seen) and len(set(seen)) == len(seen) == 6
    assert seen[0] > 0


def test_the_budget_ends_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock()

    def slow(self, weight, layers, chosen, m) -> None:
        clock.now += 30.0

    budget = gpu.Budget
    monkeypatch.setattr(gpu.Bench, "race", slow)
    monkeypatch.setattr(gpu, "Budget", lambda seconds: budget(seconds, clock))
    code, lines = dry(tmp_path, "--budget", "70", "--format", "int4_g32_bf16")
    skipped = [line for line in lines if line["kind"] == "skipped" and line["reason"] == "the time was over"]
    assert code == 0
    # of six races of 30 s, two fit; the third of the first layer and the whole second layer do not
    assert [line["id"] for line in skipped] == ["int4_g32_bf16/N256_K512_M40", "int4_g32_bf16/N384_K128"]


def test_budget_keeps_room_for_the_longest_so_far() -> None:
    clock = FakeClock()
    budget = gpu.Budget(10.0, clock)
    assert budget.allows_another()
    with budget.counted():
        clock.now += 4.0
    assert budget.left() == 6.0 and budget.allows_another()
    with budget.counted():
        clock.now += 3.0
    assert budget.left() == 3.0 and not budget.allows_another()


def test_a_wrong_result_is_never_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(weight, packed, impl) -> Layer:
        layer = own_layer(weight, packed, impl)
        return Layer(impl, False, layer.format, layer.unit, lambda x, copy: layer.call(x, copy) + 1.0, layer.copies, layer.weight_bytes)

    monkeypatch.setattr(gpu, "own_layer", broken)
    code, lines = dry(tmp_path, "--format", "int4_g128_bf16")
    assert code == 1
    assert not any(line["kind"] == "linear" and not line["peer"] for line in lines)
    wrong = [line for line in lines if line["kind"] == "wrong"]
    assert wrong and all("of the largest result from float64" in line["reason"] or "cuBLAS" in line["reason"] for line in wrong)
    assert "-- wrong or failed" in capsys.readouterr().out


def test_a_result_that_changes_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter(range(1, 10**6))

    def shaky(weight, packed, impl) -> Layer:
        layer = own_layer(weight, packed, impl)

        def call(x, copy):
            out = layer.call(x, copy)
            out[0, 0] *= 1.0 + 1e-2 * (next(calls) % 2)
            return out

        return Layer(impl, False, layer.format, layer.unit, call, layer.copies, layer.weight_bytes)

    monkeypatch.setattr(gpu, "own_layer", shaky)
    code, lines = dry(tmp_path, "--format", "int4_g128_bf16")
    assert code == 1
    assert {line["reason"] for line in lines if line["kind"] == "wrong"} == {"two runs differ"}


def test_what_fails_is_left_out_and_the_rest_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(weight, packed, impl) -> Layer:
        def call(x, copy):
            raise RuntimeError("no such kernel\nsecond line")

        layer = own_layer(weight, packed, impl)
        return Layer(impl, False, layer.format, layer.unit, call, layer.copies, layer.weight_bytes)

    monkeypatch.setattr(gpu, "own_layer", failing)
    code, lines = dry(tmp_path, "--format", "int4_g128_bf16")
    assert code == 1
    assert {line["reason"] for line in lines if line["kind"] == "failed"} == {"no such kernel"}
    assert any(line["kind"] == "linear" and line["impl"] == "cublas" for line in lines)


def test_resuming_leaves_out_what_the_run_died_of_and_what_is_done(tmp_path: Path) -> None:
    _, lines = dry(tmp_path, "--format", "int4_g128_bf16", "--no-peers")
    begun = [index for index, line in enumerate(lines) if line["kind"] == "begin" and "cublas" not in line["id"]]
    died = begun[2]  # in its third race, say
    text = "".join(json.dumps(line) + "\n" for line in lines[: died + 1])
    (tmp_path / gpu.FILE).write_text(text + '{"kind": "line')  # and its last line was cut off
    code, again = dry(tmp_path, "--format", "int4_g128_bf16", "--no-peers", "--resume")
    assert code == 1
    failed = [line for line in again if line["kind"] == "failed"]
    assert [line["id"] for line in failed] == [lines[died]["id"]]
    ends = [line["id"] for line in again if line["kind"] == "end"]
    assert len(ends) == len(set(ends)) == 6
    code, third = dry(tmp_path, "--format", "int4_g128_bf16", "--no-peers", "--resume")  # nothing is left to do
    assert sum(line["kind"] == "linear" for line in third) == sum(line["kind"] == "linear" for line in again)
    assert not any(line["kind"] == "linear" and line["id"] == lines[died]["id"] for line in again)


def test_a_weight_too_large_for_the_device_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DryDevice, "free_bytes", lambda self: 1000)
    code, lines = dry(tmp_path, "--format", "int4_g128_bf16")
    assert code == 0
    assert any("are free" in line["reason"] for line in lines if line["kind"] == "skipped")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--dry-run", "--m", "0"], "must be at least 1"),
        (["--dry-run", "--budget", "0"], "must be at least 1"),
        (["--dry-run", "--format", "int5_row_bf16"], "unknown format"),
        (["--dry-run", "--shape", "12"], "is not N,K"),
        (["--table", "no/such/file.jsonl"], "no/such/file.jsonl"),
    ],
)
def test_bad_input(arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([*arguments, "--out", str(tmp_path)]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--out", str(tmp_path)]) == 2
    assert "--dry-run" in capsys.readouterr().err


def test_the_emulated_kernels_take_part(tmp_path: Path) -> None:
    """The CUDA impls, through the checks and the table, with the emulator as the device."""
    if reason := build.unavailable():
        pytest.skip(reason)
    log = gpu.Log(tmp_path / gpu.FILE, resume=False)
    with emulated.emulated("fast", 90, sm_count=4):
        bench = gpu.Bench(DryDevice(model.GPUS["H200"], "emulated fast"), log, 1, peers=True)
        bench.measure_ceilings()
        gpu.run(bench, ["int4_g128_bf16", "int8_row_a8row"], [(192, 256)], [1, 70], gpu.Budget(120.0))
    log.close()
    assert not [line for line in log.lines if line["kind"] in ("wrong", "failed")]
    impls = {line["impl"] for line in log.lines if line["kind"] == "linear"}
    assert {"cublas", "cuda_sm80.mma"} <= impls


# ---- the table


def line(m: int, us: float, **fields) -> dict:
    base = {
        "kind": "linear", "op": "quant_linear", "case": f"N4096_K4096_M{m}", "format": "int4_g128_bf16", "beside": "int4_g128_bf16",
        "impl": "cuda_sm80.mma", "chosen": True, "peer": False, "m": m, "n": 4096, "k": 4096, "median_us": us, "dense_ratio": 20.0 / us,
        "hbm_share": 2.0 / us, "bound_share": 2.0 / us, "predicted_us": 5.0,
    }  # fmt: skip
    base.update(fields)
    return {**base, "id": f"quant_linear/{base['case']}/{base['format']}/{base['impl']}"}


def test_the_table_names_the_worst_case_of_each_goal() -> None:
    lines = [line(1, 4.0), line(16, 2.1), line(2048, 25.0)]
    text = gpu_table.render([{"kind": "run", "id": "now", "device": "X", "torch": "2", "commit": "c"}, *lines])
    assert "85% of the measured bandwidth at M up to 16: 1 of 2; worst 0.50 at N4096_K4096_M1 int4_g128_bf16 (cuda_sm80.mma)" in text
    assert "1.0x cuBLAS at any M: 2 of 3; worst 0.80 at N4096_K4096_M2048" in text
    assert "0.9x cuBLAS from M=1024: 0 of 1" in text


def test_the_table_says_where_another_impl_was_faster_and_how_far_the_model_was_off() -> None:
    lines = [
        line(64, 10.0),
        line(64, 5.0, impl="cuda_sm90a.wgmma", chosen=False),
        line(64, 30.0, impl="gemlite", peer=True, chosen=False, predicted_us=None),
    ]
    text = gpu_table.render(lines)
    assert "the table picks a slower impl in 1 of 1 cases" in text
    assert "cuda_sm90a.wgmma 2.00x faster than cuda_sm80.mma" in text
    assert "cuda_sm80.mma    2.00" in text
    assert "gemlite" in text and "3.00" in text


def test_the_table_of_a_full_run_with_every_trouble_fits_a_screen() -> None:
    lines: list[dict] = [{"kind": "run", "id": "now", "device": "X", "torch": "2", "commit": "c"}]
    for name in model.FORMATS:
        for n, k in model.SHAPES:
            for m in model.ROWS:
                place = {"case": f"N{n}_K{k}_M{m}", "n": n, "k": k, "format": name, "beside": name}
                lines.append(line(m, 10.0, **place))
                lines += [
                    line(m, 5.0, **place, impl=kernel.name, chosen=False) for kernel in model.KERNELS if kernel.name != "cuda_sm80.mma"
                ]
                lines += [line(m, 5.0, **place, impl=peer.name, peer=True, chosen=False) for peer in cuda_peers()]
    for index in range(50):
        lines += [{"kind": kind, "id": f"{index}", "reason": "why " * 100} for kind in ("wrong", "failed", "skipped")]
    table = gpu_table.render(lines).splitlines()
    assert len(table) < 60
    assert max(map(len, table)) < 160


def test_an_empty_file_has_a_table(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("")
    assert gpu_table.render(gpu_table.read_lines(tmp_path / "a.jsonl")) == "nothing was measured"


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"kind": "end", "id": "a"}\n{\n{"kind": "end", "id": "b"}\n')
    with pytest.raises(ValueError, match=r"a.jsonl:2"):
        gpu_table.read_lines(path)
    path.write_text('{"a": 1}\n')
    with pytest.raises(ValueError, match="not a line of a GPU benchmark"):
        gpu_table.read_lines(path)


# ---- tensors on their way to the GPU


def test_a_moved_view_keeps_its_strides_and_neighbours() -> None:
    base = torch.randn(6, 40)
    for view in (base[:, 5:20], base[::2], base[:, ::2], base.t(), base[2:3].expand(6, 40), torch.randn(0, 3), base[1, 7]):
        there = moved(view, CPU)
        assert torch.equal(there, view)
        assert (there.shape, there.stride(), there.storage_offset()) == (view.shape, view.stride(), view.storage_offset())
        assert there.untyped_storage().data_ptr() != view.untyped_storage().data_ptr()
        assert torch.equal(bytes_of(there)[: len(bytes_of(view))], bytes_of(view))


def test_ops_reach_a_device_and_come_back() -> None:
    """The way CPU tensors of the impl tests take to the GPU, with the CPU in its place."""
    weight = weight_of("int8_row_bf16")
    packed, x = own_packed(weight, 0)[0], rows_of_x(weight, 6)
    wide = torch.full((6, 300), float("nan"), dtype=x.dtype)
    wide[:, 20 : 20 + weight.k] = x
    expected = quant_linear(x, packed, None, weight.n, weight.spec, "float")
    with on_gpu("cpu"):
        assert torch.equal(quant_linear(wide[:, 20 : 20 + weight.k], packed, None, weight.n, weight.spec, "float"), expected)
        again = own_packed(weight, 0)[0]
        assert torch.equal(dequantize_weight(again, weight.n, weight.k, weight.spec), weight.dense)
    assert torch.equal(again, packed)


def test_an_op_that_writes_to_its_input_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = weight_of("int8_row_bf16")
    packed, x = own_packed(weight, 0)[0], rows_of_x(weight, 2)
    right = torch.ops.taut.quant_linear

    def careless(x, *others):
        out = right(x, *others)
        x[0, 0] = 7
        return out

    with on_gpu("cpu"):
        monkeypatch.setattr(torch.ops.taut, "quant_linear", careless)
        with pytest.raises(AssertionError, match="quant_linear wrote to an input"):
            quant_linear(x, packed, None, weight.n, weight.spec, "float")


# ---- scripts/gpu


@pytest.mark.parametrize(("sm", "arch"), [(75, "75-real"), (80, "80-real"), (90, "90a-real"), (120, "120-real")])
def test_the_build_is_for_one_gpu(sm: int, arch: str, tmp_path: Path) -> None:
    assert script.arch_of(sm) == arch
    command = script.configure_command(tmp_path / "b", tmp_path / "s", tmp_path / "p", arch)
    assert {"-DTAUT_CUDA=ON", f"-DTAUT_CUDA_ARCHS={arch}"} <= set(command)


def test_cmake_accepts_the_pybind11_of_torch(tmp_path: Path) -> None:
    include = Path(torch.__file__).parent / "include"
    try:
        command = script.configure_command(tmp_path / "b", tmp_path / "s", script.write_pybind11(tmp_path / "p", include), None)
    except OSError as error:
        pytest.skip(str(error))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "p" / "include" / "pybind11" / "stl.h").exists()


def test_wheels_are_unpacked_without_pip(tmp_path: Path) -> None:
    wheels, site = tmp_path / "wheels", tmp_path / "site"
    wheels.mkdir()
    site.mkdir()
    for name in ("some-1.0-py3-none-any.whl", "taut-0.1.0-cp312-cp312-linux_x86_64.whl", "torch-9.0-py3-none-any.whl"):
        with zipfile.ZipFile(wheels / name, "w") as archive:
            archive.writestr(f"{name.split('-')[0]}/__init__.py", "")
            archive.writestr(f"{name.split('-')[0]}.dist-info/METADATA", "")
    source = tmp_path / "other-2.0"
    (source / "other").mkdir(parents=True)
    (source / "other" / "core.py").write_text("")
    (source / "setup.py").write_text("")
    with tarfile.open(wheels / "other-2.0.tar.gz", "w:gz") as archive:
        archive.add(source, arcname="other-2.0")
    assert script.unpack_wheels(wheels, site) == ["other", "some"]  # torch is here already
    assert (site / "some" / "__init__.py").exists()
    assert (site / "other" / "core.py").exists()
    assert not any((site / name).exists() for name in ("taut", "torch", "setup.py"))
    assert script.unpack_wheels(tmp_path / "nothing", site) == []


def test_time_is_kept_for_the_steps_that_follow(tmp_path: Path) -> None:
    clock = FakeClock()
    run = script.Run(tmp_path, 460.0, True, clock)
    assert [run.limit(step) for step in script.STEPS] == [240.0, 40.0, 100.0, 40.0, 40.0, 40.0, 300.0, 120.0]
    clock.now += 240.0  # a build that took all it may
    assert [run.limit(step) for step in script.STEPS[1:]] == [40.0, 100.0, 40.0, 40.0, 40.0, 175.0, 120.0]
    clock.now += 200.0
    assert [run.limit(step) for step in script.STEPS[1:]] == [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 15.0]


def test_a_command_is_interrupted_first_and_its_output_kept(tmp_path: Path) -> None:
    run = script.Run(tmp_path, 460.0, True)
    # WHY the handler: a shell that put us in the background made us, and our children, ignore interrupts
    handler = "import signal, time\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    program = handler + "print('begun', flush=True)\ntry:\n time.sleep(60)\nexcept KeyboardInterrupt:\n print('ends', flush=True)"
    assert run.execute([sys.executable, "-c", program], "log", 1.0) == -9
    assert run.tail("log", 2) == ["begun", "ends"]


def test_a_process_that_ignores_the_interrupt_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = script.Run(tmp_path, 460.0, True)
    program = "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nprint('begun', flush=True)\ntime.sleep(60)"
    waits: list[int] = []
    killpg = os.killpg
    monkeypatch.setattr(os, "killpg", lambda pid, signum: (waits.append(signum), killpg(pid, signum)))
    stop = script.Run._stop
    monkeypatch.setattr(script.Run, "_stop", staticmethod(lambda process: _hasty(process, stop)))
    assert run.execute([sys.executable, "-c", program], "log", 1.0) == -9
    assert waits == [signal.SIGINT, signal.SIGKILL]


def _hasty(process: subprocess.Popen, stop) -> None:
    wait = process.wait
    process.wait = lambda patience: wait(min(patience, 0.5))
    stop(process)


def test_watch_sees_a_file_that_no_longer_grows(tmp_path: Path) -> None:
    clock = FakeClock()
    path = tmp_path / "lines"
    watch = script.Watch(path, clock)
    clock.now += script.STALL_SECONDS - 1
    assert watch.moves()
    path.write_text("a")
    clock.now += 2
    assert watch.moves()
    clock.now += script.STALL_SECONDS + 1
    assert not watch.moves()


def test_the_benchmark_is_started_again_without_what_it_died_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = script.Run(tmp_path, 460.0, True)
    commands = []

    def execute(command, log, limit, **others) -> int:
        commands.append(command)
        with (tmp_path / "bench.jsonl").open("a") as file:
            file.write('{"kind": "linear"}\n')
        return -11 if len(commands) < 3 else 0

    monkeypatch.setattr(run, "execute", execute)
    outcome = script.bench(run, ["--m", "1"])
    assert outcome.ok and outcome.words == "3 measurements, started 3 times"
    assert [("--resume" in command) for command in commands] == [False, True, True]
    assert all("--m" in command for command in commands)


def test_a_benchmark_that_keeps_dying_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = script.Run(tmp_path, 460.0, True)
    starts = []
    monkeypatch.setattr(run, "execute", lambda command, *rest, **others: starts.append(command) or 3)
    outcome = script.bench(run, [])
    assert not outcome.ok
    assert len(starts) == script.MOST_STARTS + 1  # and once for the table


def test_dry_run_of_everything_but_the_build(tmp_path: Path) -> None:
    command = [
        str(ROOT / "scripts" / "gpu"),
        "--dry-run",
        "--installed",
        "--out",
        str(tmp_path),
        "--",
        "--format",
        "int4_g128_bf16",
        "--m",
        "1",
    ]
    environment = {**os.environ, "PYTHON": sys.executable, "TAUT_WHEELS": str(tmp_path / "no wheels")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    last = done.stdout.splitlines()[-7:]
    assert [text.split()[:2] for text in last] == [["ok", step] for step in script.STEPS[1:]]
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        "tests.log",
        "decode.jsonl",
        "decode.log",
        "prefill.jsonl",
        "prefill.log",
        "sparse.jsonl",
        "sparse.log",
        "bench.jsonl",
        "bench.log",
        "sanitizer.log",
        "summary.txt",
    }
    assert "passed" in last[1]
    assert all("measurements" in line for line in last[2:6])
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "prefill.jsonl").read_text().splitlines()]
    assert "prefill" in kinds and "training" in kinds


@pytest.mark.parametrize(("arguments", "words"), [(["--only", "sleep"], "--only sleep"), (["--budget", "0"], "--budget must be above 0")])
def test_bad_arguments(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        script.main(arguments)
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_the_script_without_a_gpu_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["--out", str(tmp_path)]) == 2
    assert "torch sees no CUDA device" in capsys.readouterr().err
