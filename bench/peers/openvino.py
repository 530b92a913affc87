"""OpenVINO with compressed weights: u4 and u8, groups of 32, as its own weight compression stores them.

One compiled model, latency hint, one stream: its nodes run one after the other. Each has an input of its own (all bound to the
same memory), so that no pass can fuse two of them. Activations: its dynamic quantization, group 32, where the processor has it.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from taut.formats import WeightFormat

from ..contenders import Prepared, Skip, copies_for
from ..problem import Problem
from .common import disagreement, prepared


@dataclass(frozen=True)
class CompressedMatMul:
    name: str
    format: str
    weights: WeightFormat

    def available(self) -> str | None:
        return "openvino not installed" if importlib.util.find_spec("openvino") is None else None

    def prepare(self, problem: Problem, cold_bytes: int) -> Prepared:
        import openvino

        case = problem.case
        if case.k % 32:
            raise Skip("its groups must divide K")
        codes, scales, *_ = problem.canonical(self.weights)
        blocks = codes.numpy() if self.weights.bits == 4 else (codes.to(torch.int16) + 128).to(torch.uint8).numpy()
        scale = scales.numpy()
        nodes = copies_for(blocks.nbytes + scale.nbytes, cold_bytes)
        config = {
            "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1", "INFERENCE_NUM_THREADS": str(torch.get_num_threads()),
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": "32",
        }  # fmt: skip
        model, memory = _model(case.m, case.n, case.k, self.weights.bits, blocks, scale, nodes)
        compiled = openvino.Core().compile_model(model, "CPU", config)
        request = compiled.create_infer_request()
        x = openvino.Tensor(problem.x.numpy(), shared_memory=True)
        outputs = [np.zeros((case.m, case.n), np.float32) for _ in range(nodes)]
        for index, output in enumerate(outputs):
            request.set_input_tensor(index, x)
            request.set_output_tensor(index, openvino.Tensor(output, shared_memory=True))
        call = request.infer
        call()
        weight_bytes = blocks.nbytes + scale.nbytes
        result = prepared(
            problem, self.weights, "a8", weight_bytes, call, torch.from_numpy(outputs[0]), nodes, (compiled, request, x, outputs, memory)
        )
        result.wrong = result.wrong or disagreement(outputs)
        return result


def _model(m: int, n: int, k: int, bits: int, blocks: np.ndarray, scale: np.ndarray, nodes: int) -> tuple[Any, list[Any]]:
    """The model, and the arrays that its constants only borrow."""
    import openvino
    from openvino import opset13 as ops

    groups = k // 32
    inputs, results, memory = [], [], [np.array([0x08], np.uint8)]
    for i in range(nodes):
        x = ops.parameter([m, k], dtype=np.float32)
        if bits == 4:
            memory.append(np.roll(blocks, i, axis=0).reshape(-1))
            weight = ops.constant(openvino.Tensor(memory[-1], openvino.Shape([n, groups, 32]), openvino.Type.u4))
            zero = ops.constant(openvino.Tensor(memory[0], openvino.Shape([1, 1, 1]), openvino.Type.u4))
        else:
            weight = ops.constant(np.roll(blocks, i, axis=0).reshape(n, groups, 32))
            zero = ops.constant(np.full((1, 1, 1), 128, np.uint8))
        difference = ops.subtract(ops.convert(weight, "f16"), ops.convert(zero, "f16"))
        scaled = ops.multiply(difference, ops.constant(np.roll(scale, i, axis=0).reshape(n, groups, 1)))
        w = ops.convert(ops.reshape(scaled, np.array([n, k], np.int64), False), "f32")
        inputs.append(x)
        results.append(ops.matmul(x, w, False, True))
    return openvino.Model(results, inputs, "bench"), memory


PEERS = [
    CompressedMatMul("openvino_u4", "int4_g32_a8", WeightFormat("int4", 32)),
    CompressedMatMul("openvino_u8", "int8_g32_a8", WeightFormat("int8", 32)),
]
