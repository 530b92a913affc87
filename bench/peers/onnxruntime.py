"""ONNX Runtime's MatMulNBits, accuracy level 4 (int8 activations), blocks of 32, 4 and 8 bits.

Spinning is left on, the default and its fastest. One session holds all the copies of the weights as nodes of one graph;
a session runs its nodes one after the other, and each has an output of its own, so that none is merged with another or dropped.
Outputs are bound to memory given in advance.
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
class MatMulNBits:
    name: str
    format: str
    weights: WeightFormat

    def available(self) -> str | None:
        missing = [package for package in ("onnx", "onnxruntime") if importlib.util.find_spec(package) is None]
        return f"{' and '.join(missing)} not installed" if missing else None

    def prepare(self, problem: Problem, cold_bytes: int) -> Prepared:
        import onnxruntime

        case = problem.case
        if case.k % 32:
            raise Skip("its result is not checked for a K that is no multiple of 32")
        codes, scales, *_ = problem.canonical(self.weights)
        blocks = codes if self.weights.bits == 4 else (codes.to(torch.int16) + 128).to(torch.uint8)
        blocks = blocks.reshape(case.n, case.k // 32, 32 * self.weights.bits // 8).numpy()
        scale = scales.float().numpy().reshape(-1)
        nodes = copies_for(blocks.nbytes + scale.nbytes, cold_bytes)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        options.log_severity_level = 3
        try:
            model = _model(case.n, case.k, self.weights.bits, nodes)
            keep = _give_weights(options, blocks, scale, nodes)
            session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # WHY broad: its errors are pybind11 types, one a status code
            raise Skip(" ".join(str(error).split())[:200]) from None
        x = onnxruntime.OrtValue.ortvalue_from_numpy(problem.x.numpy())
        outputs = [onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros((case.m, case.n), np.float32)) for _ in range(nodes)]
        binding = session.io_binding()
        binding.bind_ortvalue_input("x", x)
        for index, output in enumerate(outputs):
            binding.bind_ortvalue_output(f"y{index}", output)

        def call() -> None:
            session.run_with_iobinding(binding)

        call()
        weight_bytes = blocks.nbytes + scale.nbytes
        result = prepared(problem, self.weights, "a8", weight_bytes, call, torch.from_numpy(outputs[0].numpy()), nodes, (keep, outputs, x))
        result.wrong = result.wrong or disagreement([output.numpy() for output in outputs])
        return result


def _model(n: int, k: int, bits: int, nodes: int) -> bytes:
    """A graph of ``nodes`` MatMulNBits; the weights come from the session options, so that the file stays under 2 GB."""
    from onnx import TensorProto, helper

    def initializer(name: str, kind: int, shape: tuple[int, ...]) -> Any:
        tensor = TensorProto(name=name, data_type=kind, dims=shape, data_location=TensorProto.EXTERNAL)
        tensor.external_data.add(key="location", value=f"{name}.bin")
        return tensor

    group = 32 * bits // 8
    graph = helper.make_graph(
        [
            helper.make_node(
                "MatMulNBits",
                ["x", f"b{i}", f"s{i}"],
                [f"y{i}"],
                domain="com.microsoft",
                K=k,
                N=n,
                bits=bits,
                block_size=32,
                accuracy_level=4,
            )
            for i in range(nodes)
        ],
        "bench",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["M", k])],
        [helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, ["M", n]) for i in range(nodes)],
        [
            tensor
            for i in range(nodes)
            for tensor in (
                initializer(f"b{i}", TensorProto.UINT8, (n, k // 32, group)),
                initializer(f"s{i}", TensorProto.FLOAT, (n * (k // 32),)),
            )
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)])
    model.ir_version = 10
    return model.SerializeToString()


def _give_weights(options: Any, blocks: np.ndarray, scale: np.ndarray, nodes: int) -> list[Any]:
    import onnxruntime

    values = []
    for i in range(nodes):
        values.append((f"b{i}", onnxruntime.OrtValue.ortvalue_from_numpy(np.roll(blocks, i, axis=0))))
        values.append((f"s{i}", onnxruntime.OrtValue.ortvalue_from_numpy(np.roll(scale, i * blocks.shape[1]))))
    options.add_external_initializers([name for name, _ in values], [value for _, value in values])
    return values


PEERS = [
    MatMulNBits("onnxruntime_4bit", "int4_g32_a8", WeightFormat("int4", 32)),
    MatMulNBits("onnxruntime_8bit", "int8_g32_a8", WeightFormat("int8", 32)),
]
