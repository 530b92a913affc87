"""bench/model.py: arithmetic by hand, limits, and that the committed predictions are its own."""

from __future__ import annotations

import itertools
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench import model
from bench.model import DENSE, EXPANDED, GPUS, KERNELS, ROWS, SHAPES, Format, predict, predict_dense, predict_impl

H200 = GPUS["H200"]
PREDICTED = ROOT / "bench" / "results" / "linear-h200-predicted.json"
KERNEL = {kernel.name: kernel for kernel in KERNELS}


# ---- by hand


def test_the_bound_of_one_token_is_its_bytes() -> None:
    """N = K = 4096, int4 group 128: 8,388,608 bytes of codes, 4096 * 32 scales of 2, x and out 4096 * 2 each, over 4.8 TB/s."""
    found = predict(H200, 1, 4096, 4096, "int4_g128_bf16")
    assert found.nbytes == 8_388_608 + 262_144 + 16_384 == 8_667_136
    assert found.operations == 33_554_432
    assert found.bound_us == pytest.approx(8_667_136 / 4.8e6) == pytest.approx(1.8057, abs=1e-4)


def test_a_large_dense_product_is_its_operations() -> None:
    """2 * 8192 * 28672 * 4096 operations at 80% of 989.4 TFLOP/s, and a launch; its waves are as good as full."""
    found = predict_dense(H200, 8192, 28672, 4096)
    assert found.operations == 1_924_145_348_608
    assert found.us == pytest.approx(1_924_145_348_608 / (989.4e6 * 0.8) + 2.5, rel=1e-3)
    assert found.limit == "tensor"


def test_one_token_on_the_mma_kernel() -> None:
    """N=28672, K=4096, M=1: 448 tiles of 64 columns, 16 steps of 256 k; three blocks on each of 132 multiprocessors: 396."""
    found = predict_impl(H200, "cuda_sm80.mma", 1, 28672, 4096, "int4_g128_bf16")
    assert (found.tile, found.blocks) == ((64, 8), 396)
    # the longest stretch is 19 of 7168 steps, and a multiprocessor has three of them: 57 where 54.3 would be its share
    uneven = 3 * 19 * 132 / 7168
    assert found.memory_us == pytest.approx((28672 * 4096 // 2 + 28672 * 32 * 2 + 2 * (28672 + 4096)) / (4800 * 0.9e3))
    # x for each tile, w once, out, and 396 partial tiles of 64 x 8 fp32 written and read
    assert found.l2_us == pytest.approx((448 * 8192 + 60_555_264 + 57_344 + 396 * 64 * 8 * 8) / 7e6)
    assert found.tensor_us == pytest.approx(2 * 448 * 64 * 8 * 4096 / (989.4e6 * 0.8 * 0.65) * uneven)
    # a warp's 64 k: 176 to convert 128 weights a lane, 22 loads, 16 mma, 16 for the scale, 12 around; 4 warps; 24 copies of 3
    assert model.instructions(KERNEL["cuda_sm80.mma"], Format.parse("int4_g128_bf16"), KERNEL["cuda_sm80.mma"].tiles[0]) == 4 * 242 + 72
    assert found.issue_us == pytest.approx(1040 * 7168 * uneven / (4 * 132 * 1830))
    assert found.limit == "memory"
    rest = found.l2_us + found.tensor_us + found.issue_us
    # a launch, the first and last bytes' way, half of that again for the second kernel, whose launch is hidden on sm_90
    assert found.us == pytest.approx(1.5 + 1.0 + 0.5 + found.memory_us + 0.15 * rest)


@pytest.mark.parametrize(
    ("name", "n", "k", "nbytes"),
    [
        ("int4_g128_bf16", 64, 128, 64 * 64 + 64 * 2),
        ("int4_g32_z_bf16", 64, 128, 64 * 64 + 64 * 4 * 3),
        ("int4_g128_bf16", 65, 130, 128 * 192 // 2 + 128 * 2 * 2),  # padded to 128 x 192
        ("int8_row_bf16", 64, 64, 64 * 64 + 64 * 2),
        ("fp8_g64_bf16", 64, 128, 64 * 128 + 64 * 2 * 2),
    ],
)
def test_packed_bytes(name: str, n: int, k: int, nbytes: int) -> None:
    assert Format.parse(name).packed_bytes(n, k) == nbytes


def test_packed_bytes_are_those_of_the_layout() -> None:
    formats = pytest.importorskip("taut.formats")
    for weights, own in (("int4", "int4"), ("int8", "int8"), ("fp8", "fp8_e4m3")):
        for group, zeros in ((32, False), (64, False), (128, False), (0, False), (32, True)):
            if own not in formats.FORMATS or (zeros and own != "int4"):
                continue
            spec = formats.WeightFormat(own, group, zeros)
            for n, k in ((64, 64), (1, 1), (65, 200), (4096, 14336)):
                assert Format(weights, group, zeros, "bf16").packed_bytes(n, k) == spec.layout_bytes(n, k, 1)


def tiles_in(source: str, template: str, rows_first: bool) -> list[model.Tile]:
    """The tiles that a kernel's host code chooses from, by the template arguments that name their numbers of warps."""
    found = []
    for text in re.findall(rf"{template}<(\d+(?:, \d+){{6}})>", (ROOT / "csrc" / "quant_linear" / source).read_text()):
        first, second, warps_n, warps_m, warps_k, stages, per_sm = map(int, text.split(", "))
        warp = (16 * second, first) if rows_first else (16 * first, second)
        found.append(model.Tile(warp[0] * warps_n, warp[1] * warps_m, 64 * warps_k, warp, stages, per_sm))
    return found


def test_the_tiles_are_those_of_the_kernels() -> None:
    mma = tiles_in("cuda_mma.cuh", "MmaTile", rows_first=True)
    assert mma == [*KERNEL["cuda_sm80.mma"].tiles, *KERNEL["cuda_sm75.mma"].tiles]
    # the last two are its largest tile without scales to multiply in between, and with them
    assert tiles_in("cuda_mma8.cuh", "Mma8Shape", rows_first=False)[:5] == list(KERNEL["cuda_sm80.int8"].tiles)
    wgmma = (ROOT / "csrc" / "quant_linear" / "cuda_sm90a_wgmma.cu").read_text()
    assert "kStages = kTokens == 256 ? 5 : 8" in wgmma
    assert "kHeights[] = {{256, 1140}, {128, 620}, {64, 390}}" in wgmma


# ---- limits


@pytest.mark.parametrize("gpu", GPUS.values(), ids=lambda gpu: gpu.name)
def test_no_prediction_beats_its_bound(gpu: model.Gpu) -> None:
    found = list(model.predictions(gpu))
    assert {(each.case, each.format) for each in found if each.format.startswith("int4")} == {
        (f"N{n}_K{k}_M{m}", name.replace("bf16", "f16") if gpu.sm < 80 else name)
        for n, k in SHAPES for m in ROWS for name in model.FORMATS if name.startswith("int4")
    }  # fmt: skip
    for each in found:
        assert each.us > each.bound_us
        assert each.us >= max(each.memory_us, each.l2_us, each.tensor_us, each.issue_us) + each.fixed_us - 1e-9
        assert each.dense_us > 0


@pytest.mark.parametrize("impl", [*KERNEL, EXPANDED, DENSE])
@pytest.mark.parametrize("shape", [(4096, 4096), (8192, 28672)])
def test_more_work_takes_longer(impl: str, shape: tuple[int, int]) -> None:
    """With M, in multiples of the largest tile, where no tile is left half empty and the kernel keeps its tile."""
    n, k = shape
    gpu = GPUS["T4"] if impl == "cuda_sm75.mma" else H200
    name = {"cuda_sm80.int8": "int8_row_a8row", "cuda_sm89.fp8": "fp8_row_f8row"}.get(impl, "int4_g128_f16")
    times = [predict_impl(gpu, impl, m, n, k, name) for m in range(256, 4097, 256)]
    assert all(later.bound_us > each.bound_us for each, later in itertools.pairwise(times))
    same = [(each, later) for each, later in itertools.pairwise(times) if each.tile == later.tile]
    assert all(later.us > 0.97 * each.us for each, later in same)
    assert times[-1].us > 5 * times[0].us  # 16 times the rows


def test_a_better_device_is_never_slower() -> None:
    for change in ({"hbm_gb_s": 9600.0}, {"tflops_16": 2000.0}, {"l2_gb_s": 20000.0}, {"ghz": 3.0}):
        better = replace(H200, **change)
        for n, k in SHAPES:
            for m in ROWS:
                assert predict(better, m, n, k, "int4_g128_bf16").us <= predict(H200, m, n, k, "int4_g128_bf16").us + 1e-9


def test_with_many_rows_the_weight_format_does_not_matter() -> None:
    """Written out once and multiplied densely, the weight's share of the time goes to nothing."""
    found = predict(H200, 65536, 8192, 8192, "int4_g128_bf16")
    assert found.impl == EXPANDED
    assert 0.99 < found.ratio < 1.0


def test_few_rows_are_bound_by_memory() -> None:
    for name in ("H200", "A100", "RTX 4090", "T4"):
        gpu = GPUS[name]
        found = predict(gpu, 1, 57344, 8192, "int4_g128_f16")
        assert found.limit == "memory"
        assert 3.0 < found.ratio < 4.0  # 16 bits over 4.125


def test_what_a_device_cannot_run() -> None:
    with pytest.raises(ValueError, match="no modelled kernel computes fp8_row_f8row on A100"):
        predict(GPUS["A100"], 1, 64, 64, "fp8_row_f8row")
    assert predict_impl(GPUS["A100"], "cuda_sm90a.wgmma", 64, 4096, 4096, "int4_g128_bf16") is None
    assert predict_impl(H200, "cuda_sm75.simt", 64, 4096, 4096, "int4_g128_bf16") is None
    assert predict(GPUS["B200"], 64, 4096, 4096, "int4_g128_bf16").impl != "cuda_sm90a.wgmma"


@pytest.mark.parametrize("name", ["", "int4", "int4_g33_bf16", "int4_g32_fp32", "fp8_row", "int3_row_bf16"])
def test_unknown_formats_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="unknown format"):
        Format.parse(name)


# ---- the command, and the committed file


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert model.main(["--device", "H200", "--format", "int4_g32_bf16", "--shape", "4096,4096", "--m", "1", "--m", "512"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "H200, int4_g32_bf16, N=4096 K=4096 (Llama 8B o)"
    assert [line.split()[0] for line in lines[2:]] == ["M", "1", "512"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--shape", "4096"], "is not N,K"),
        (["--shape", "0,1"], "is not N,K"),
        (["--m", "0"], "--m must be at least 1"),
        (["--format", "int5_row_bf16"], "unknown format"),
        (["--json", "x.json"], "takes one --device"),
        (["--device", "A100", "--format", "fp8_row_f8row"], "no modelled kernel computes this on A100"),
    ],
)
def test_bad_input(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert model.main(arguments) == 2
    assert words in capsys.readouterr().err


def test_the_committed_predictions_are_what_the_model_says() -> None:
    """After a change of the model: python -m bench.model --device H200 --json bench/results/linear-h200-predicted.json"""
    text = PREDICTED.read_text()
    assert text == model.to_json(list(model.predictions(H200)))
    content = json.loads(text)
    assert content["device"]["name"] == "H200"
    assert content["measured"] is False
    assert len(content["predictions"]) == len(model.FORMATS) * len(SHAPES) * len(ROWS)
