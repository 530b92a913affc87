"""Golden vectors: what a GPU answered to each PTX wrapper (golden.cu), read and held against the emulator."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).resolve().parent / "golden"


@dataclass(frozen=True)
class Golden:
    """``inputs [warps, 32, n]`` and ``outputs [warps, 32, n]`` of one wrapper, as 32-bit words."""

    name: str
    sm: int
    kinds: str
    inputs: np.ndarray
    outputs: np.ndarray


def read(path: Path) -> Golden:
    data = path.read_bytes()
    header, _, words = data.partition(b"\n")
    fields = header.decode().split()
    if fields[:3] != ["taut", "golden", "1"] or len(fields) != 9:
        raise ValueError(f"{path} is no file of golden vectors: {header[:80]!r}")
    name, sm, inputs, outputs, warps, kinds = fields[3], *map(int, fields[4:8]), fields[8]
    values = np.frombuffer(words, np.uint32)
    if len(values) != warps * 32 * (inputs + outputs):
        raise ValueError(f"{path} is cut off: {len(values)} words instead of {warps * 32 * (inputs + outputs)}")
    split = warps * 32 * inputs
    return Golden(name, sm, kinds, values[:split].reshape(warps, 32, inputs), values[split:].reshape(warps, 32, outputs))


def run(library: ctypes.CDLL, name: str, inputs: np.ndarray, outputs: int) -> np.ndarray:
    """What the emulator's wrapper gives for ``inputs [warps, 32, n]``: uint32 ``[warps, 32, outputs]``."""
    inputs = np.ascontiguousarray(inputs, np.uint32)
    # The beginning aligned to 16 bytes, as memory from cudaMalloc is.
    room = np.zeros(inputs.size + 4, np.uint32)
    offset = -room.ctypes.data % 16 // 4
    room[offset : offset + inputs.size] = inputs.ravel()
    result = np.zeros((*inputs.shape[:2], outputs), np.uint32)
    library.taut_golden_run.restype = ctypes.c_char_p
    message = library.taut_golden_run(
        name.encode(), ctypes.c_void_p(room.ctypes.data + 4 * offset), ctypes.c_void_p(result.ctypes.data), inputs.shape[0]
    )
    if message:
        raise RuntimeError(message.decode())
    return result


# What a tensor core may lose against one rounding of the exact sum: at most this share of the largest term, for each of the
# terms. 14 bits are kept of float8 sums on sm_89 and sm_90, at least 22 of the others. Results of the exact half of the
# vectors have no such excuse.
@dataclass(frozen=True)
class Sums:
    terms: int
    largest: float
    share: float


TENSOR_CORE_SUMS = {
    "mma_m16n8k16_f16": Sums(16, 4.0**2, 2.0**-20),
    "mma_m16n8k16_bf16": Sums(16, 4.0**2, 2.0**-20),
    "wgmma_m64n64k16_f16": Sums(16, 4.0**2, 2.0**-20),
    "wgmma_m64n64k16_bf16": Sums(16, 4.0**2, 2.0**-20),
    "mma_sp_m16n8k32_f16": Sums(16, 4.0**2, 2.0**-20),
    "mma_sp_m16n8k32_bf16": Sums(16, 4.0**2, 2.0**-20),
    "mma_sp_m16n8k64_e4m3": Sums(32, 448.0**2, 2.0**-12),
    "mma_m16n8k8_f16": Sums(8, 4.0**2, 2.0**-20),
    "mma_m16n8k32_e4m3": Sums(32, 448.0**2, 2.0**-12),
}


# What is approximate in hardware, and by how much of the result: in the inexact half of the vectors.
APPROXIMATE = {"ex2": 2.0**-22}


def differences(library: ctypes.CDLL, golden: Golden) -> list[str]:
    """Where the emulator answers otherwise than the GPU did."""
    found = run(library, golden.name, golden.inputs, golden.outputs.shape[2])
    wrong = found != golden.outputs
    if sums := TENSOR_CORE_SUMS.get(golden.name):
        half = len(found) // 2
        bound = sums.terms * sums.largest * sums.share
        wrong[half:] = ~(np.abs(found[half:].view(np.float32) - golden.outputs[half:].view(np.float32)) <= bound)
    if share := APPROXIMATE.get(golden.name):
        half = len(found) // 2
        theirs = golden.outputs[half:].view(np.float32)
        wrong[half:] = ~(np.abs(found[half:].view(np.float32) - theirs) <= share * np.abs(theirs))
    return [
        f"{golden.name} on sm_{golden.sm}, warp {warp}, lane {lane}, word {word}: {int(golden.outputs[warp, lane, word]):08x} on the GPU, "
        f"{int(found[warp, lane, word]):08x} in the emulator; inputs {' '.join(f'{int(i):08x}' for i in golden.inputs[warp, lane])}"
        for warp, lane, word in np.argwhere(wrong)
    ]
