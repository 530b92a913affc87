"""llama.cpp's matrix product: ``ggml_mul_mat`` with Q4_0 and Q8_0 weights, called in the libggml that llama-cpp-python brings.

Weights are given to the buffer type that llama.cpp itself would choose, so they are repacked for this processor where it can.
One graph holds all the copies; a graph runs its nodes one after the other.

A buffer type that repacks is tried in a process of its own first, and passed over, with a warning, where that dies: in gcc 12
``_tile_loadconfig`` says that it reads 8 bytes of the 64 of a tile configuration, the stores to the others are dropped, and
libggml's AMX code faults when that compiler built it. Where it was built with a header that names all 64, it is timed.
"""

from __future__ import annotations

import ctypes
import importlib.util
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from taut.formats import WeightFormat

from ..cases import Case
from ..contenders import Prepared, Skip, copies_for
from ..problem import Problem
from .common import disagreement, prepared

_F32, _Q4_0, _Q8_0 = 0, 2, 8  # enum ggml_type
_Pointer = ctypes.c_void_p
_quiet = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, _Pointer)(lambda level, text, data: None)
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "ggml_log_set": (None, [_Pointer, _Pointer]),
    "ggml_tensor_overhead": (ctypes.c_size_t, []),
    "ggml_graph_overhead_custom": (ctypes.c_size_t, [ctypes.c_size_t, ctypes.c_bool]),
    "ggml_row_size": (ctypes.c_size_t, [ctypes.c_int, ctypes.c_int64]),
    "ggml_quantize_chunk": (
        ctypes.c_size_t,
        [ctypes.c_int, _Pointer, _Pointer, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, _Pointer],
    ),
    "ggml_free": (None, [_Pointer]),
    "ggml_new_tensor_2d": (_Pointer, [_Pointer, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]),
    "ggml_mul_mat": (_Pointer, [_Pointer, _Pointer, _Pointer]),
    "ggml_new_graph_custom": (_Pointer, [_Pointer, ctypes.c_size_t, ctypes.c_bool]),
    "ggml_build_forward_expand": (None, [_Pointer, _Pointer]),
    "ggml_backend_alloc_ctx_tensors_from_buft": (_Pointer, [_Pointer, _Pointer]),
    "ggml_backend_buffer_free": (None, [_Pointer]),
    "ggml_backend_tensor_set": (None, [_Pointer, _Pointer, ctypes.c_size_t, ctypes.c_size_t]),
    "ggml_backend_tensor_get": (None, [_Pointer, _Pointer, ctypes.c_size_t, ctypes.c_size_t]),
    "ggml_backend_graph_compute": (ctypes.c_int, [_Pointer, _Pointer]),
    "ggml_backend_free": (None, [_Pointer]),
    "ggml_backend_cpu_buffer_type": (_Pointer, []),
    "ggml_backend_reg_dev_get": (_Pointer, [_Pointer, ctypes.c_size_t]),
    "ggml_backend_reg_get_proc_address": (_Pointer, [_Pointer, ctypes.c_char_p]),
    "ggml_backend_dev_supports_op": (ctypes.c_bool, [_Pointer, _Pointer]),
    "ggml_backend_cpu_reg": (_Pointer, []),
    "ggml_backend_cpu_init": (_Pointer, []),
    "ggml_backend_cpu_set_n_threads": (None, [_Pointer, ctypes.c_int]),
}


class _InitParams(ctypes.Structure):
    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", _Pointer), ("no_alloc", ctypes.c_bool)]


class _Library:
    """The functions of libggml that are needed here."""

    def __init__(self, folder: Path) -> None:
        loaded = [ctypes.CDLL(str(_newest(folder, name)), mode=ctypes.RTLD_GLOBAL) for name in ("ggml-base", "ggml-cpu")]
        self.ggml_init = loaded[0].ggml_init
        self.ggml_init.restype, self.ggml_init.argtypes = _Pointer, [_InitParams]
        for name, (result, arguments) in _SIGNATURES.items():
            function = next((getattr(library, name) for library in loaded if hasattr(library, name)), None)
            if function is None:
                raise OSError(f"this libggml has no {name}")
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)
        self.ggml_log_set(ctypes.cast(_quiet, _Pointer), None)  # it would announce every tensor that it repacks

    def weight_buffer_types(self) -> list[int]:
        """Where the CPU backend may keep weights, its favourites (those that repack) first, less those whose code crashes here."""
        favourites = self.repacking_buffer_types()
        return [*(kind for index, kind in enumerate(favourites) if _survives(index)), self.ggml_backend_cpu_buffer_type()]

    def repacking_buffer_types(self) -> list[int]:
        registry = self.ggml_backend_cpu_reg()
        address = self.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
        found = []
        if address:
            listing = ctypes.CFUNCTYPE(ctypes.POINTER(_Pointer), _Pointer)(address)(self.ggml_backend_reg_dev_get(registry, 0))
            while listing and listing[len(found)]:
                found.append(listing[len(found)])
        return found


def _folder() -> Path | None:
    spec = importlib.util.find_spec("llama_cpp")
    return Path(spec.origin).parent / "lib" if spec and spec.origin else None


def _newest(folder: Path, name: str) -> Path:
    found = sorted(folder.glob(f"lib{name}.so*")) or sorted(folder.glob(f"lib{name}.dylib"))
    if not found:
        raise OSError(f"llama-cpp-python brings no lib{name}")
    return found[0]


@lru_cache(maxsize=1)
def _library() -> _Library:
    return _Library(_folder())


@cache
def _survives(index: int) -> bool:
    """Whether products of weights in the ``index``-th buffer type that repacks can be computed without the process dying of it."""
    command = [sys.executable, "-m", "bench.peers.ggml", str(index)]
    done = subprocess.run(command, cwd=Path(__file__).resolve().parents[2], capture_output=True, text=True, check=False)
    if done.returncode:
        warnings.warn(
            f"libggml's buffer type {index} is passed over: a product in it ended with code {done.returncode}. "
            "Was libggml built by gcc 12? See bench/peers/ggml.py.",
            stacklevel=2,
        )
    return done.returncode == 0


def _try(index: int) -> None:
    """Computes a product of each kind in one buffer type, for ``_survives``."""
    lib = _library()
    lib.weight_buffer_types = lambda: [lib.repacking_buffer_types()[index]]
    for m in (1, 33):
        problem = Problem(Case("quant_linear", 64, 256, m))
        for peer in PEERS:
            try:
                peer.prepare(problem, 0)
            except Skip:
                pass  # it takes no weights of this kind


def quantize(values: np.ndarray, kind: int) -> np.ndarray:
    """``values fp32 [N, K]`` as llama.cpp stores them in blocks of ``kind``, an ``enum ggml_type``: ``uint8 [N, bytes a row]``."""
    lib, (n, k) = _library(), values.shape
    values = np.ascontiguousarray(values, np.float32)
    blocks = np.empty((n, lib.ggml_row_size(kind, k)), np.uint8)
    lib.ggml_quantize_chunk(kind, values.ctypes.data, blocks.ctypes.data, 0, n, k, None)
    return blocks


@dataclass(frozen=True)
class MulMat:
    name: str
    format: str
    weights: WeightFormat

    def available(self) -> str | None:
        if _folder() is None:
            return "llama-cpp-python not installed"
        try:
            _library()
        except OSError as error:
            return str(error)
        return None

    def prepare(self, problem: Problem, cold_bytes: int) -> Prepared:
        case, lib = problem.case, _library()
        if case.k % 32:
            raise Skip("its blocks must divide K")
        blocks = _blocks(problem, self.weights)
        nodes = copies_for(blocks.nbytes, cold_bytes)
        keep = _Graph(lib, problem, _Q4_0 if self.weights.bits == 4 else _Q8_0, blocks, nodes)
        keep.compute()
        outputs = [keep.result(index) for index in range(nodes)]
        result = prepared(problem, self.weights, "a8", blocks.nbytes, keep.compute, torch.from_numpy(outputs[0]), nodes, keep)
        result.wrong = result.wrong or disagreement(outputs)
        return result


class _Graph:
    """``nodes`` products of one x with copies of the same weights, and the memory behind them."""

    def __init__(self, lib: _Library, problem: Problem, kind: int, blocks: np.ndarray, nodes: int) -> None:
        case = problem.case
        self.lib, self.shape, self.k = lib, (case.m, case.n), case.k
        self.undo: list[tuple[Callable[[int], None], int]] = []
        try:
            tensors = self._context(nodes * 2 + 8, 0)
            weights = [lib.ggml_new_tensor_2d(tensors, kind, case.k, case.n) for _ in range(nodes)]
            work = self._context(nodes * 2 + 8, nodes * 2 + 8)
            x = lib.ggml_new_tensor_2d(work, _F32, case.k, case.m)
            self.outputs = [lib.ggml_mul_mat(work, w, x) for w in weights]
            self.graph = lib.ggml_new_graph_custom(work, nodes * 2 + 8, False)
            for output in self.outputs:
                lib.ggml_build_forward_expand(self.graph, output)
            buffer_type = self._weight_buffer_type(kind)
            self._hold(lib.ggml_backend_alloc_ctx_tensors_from_buft(tensors, buffer_type), lib.ggml_backend_buffer_free)
            self._hold(lib.ggml_backend_alloc_ctx_tensors_from_buft(work, lib.ggml_backend_cpu_buffer_type()), lib.ggml_backend_buffer_free)
            for index, w in enumerate(weights):
                rolled = np.roll(blocks, index, axis=0)
                lib.ggml_backend_tensor_set(w, rolled.ctypes.data, 0, rolled.nbytes)
            values = np.ascontiguousarray(problem.x.numpy())
            lib.ggml_backend_tensor_set(x, values.ctypes.data, 0, values.nbytes)
            self.backend = self._hold(lib.ggml_backend_cpu_init(), lib.ggml_backend_free)
            lib.ggml_backend_cpu_set_n_threads(self.backend, torch.get_num_threads())
        except Skip:
            self.close()
            raise

    def _hold(self, handle: int | None, undo: Callable[[int], None]) -> int:
        if not handle:
            raise Skip("libggml could not allocate what it needs")
        self.undo.append((undo, handle))
        return handle

    def _context(self, tensors: int, graph_nodes: int) -> int:
        size = tensors * self.lib.ggml_tensor_overhead() + (self.lib.ggml_graph_overhead_custom(graph_nodes, False) if graph_nodes else 0)
        return self._hold(self.lib.ggml_init(_InitParams(size, None, True)), self.lib.ggml_free)

    def _weight_buffer_type(self, kind: int) -> int:
        """The first buffer type in which the backend says that it can multiply by such weights, found with one of them."""
        lib, (m, n), k = self.lib, self.shape, self.k
        device = lib.ggml_backend_reg_dev_get(lib.ggml_backend_cpu_reg(), 0)
        for buffer_type in lib.weight_buffer_types():
            before = len(self.undo)
            try:
                tensors, work = self._context(1, 0), self._context(2, 0)
                w = lib.ggml_new_tensor_2d(tensors, kind, k, n)
                self._hold(lib.ggml_backend_alloc_ctx_tensors_from_buft(tensors, buffer_type), lib.ggml_backend_buffer_free)
                product = lib.ggml_mul_mat(work, w, lib.ggml_new_tensor_2d(work, _F32, k, m))
                if lib.ggml_backend_dev_supports_op(device, product):
                    return buffer_type
            finally:
                self.close(before)
        raise Skip("libggml can multiply by such weights in no buffer it has")

    def compute(self) -> None:
        if self.lib.ggml_backend_graph_compute(self.backend, self.graph) != 0:
            raise RuntimeError("ggml_backend_graph_compute failed")

    def result(self, index: int) -> np.ndarray:
        out = np.zeros(self.shape, np.float32)
        self.lib.ggml_backend_tensor_get(self.outputs[index], out.ctypes.data, 0, out.nbytes)
        return out

    def close(self, keep: int = 0) -> None:
        """Frees all but the first ``keep`` things held, the newest first."""
        while len(self.undo) > keep:
            undo, handle = self.undo.pop()
            undo(handle)

    def __del__(self) -> None:
        self.close()


def _blocks(problem: Problem, weights: WeightFormat) -> np.ndarray:
    """The weights as ggml stores them: blocks of 32 with one fp16 scale; Q4_0 pairs element i with element i + 16."""
    n, k = problem.case.n, problem.case.k
    codes, scales, *_ = problem.canonical(weights)
    scale_bytes = scales.reshape(n, k // 32, 1).view(torch.uint8)
    if weights.bits == 8:
        return torch.cat([scale_bytes, codes.view(torch.uint8).reshape(n, k // 32, 32)], dim=-1).numpy()
    q = torch.stack([codes & 15, codes >> 4], dim=-1).reshape(n, k // 32, 32)
    return torch.cat([scale_bytes, q[..., :16] | q[..., 16:] << 4], dim=-1).numpy()


PEERS = [
    MulMat("llama_cpp_q4_0", "int4_g32_a8", WeightFormat("int4", 32)),
    MulMat("llama_cpp_q8_0", "int8_g32_a8", WeightFormat("int8", 32)),
]

if __name__ == "__main__":
    _try(int(sys.argv[1]))
