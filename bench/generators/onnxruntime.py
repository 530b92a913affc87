"""ONNX Runtime: a graph of its fused operators, built here from the model's weights, run with its cache bound in place.

MatMulNBits with int8 activations (accuracy level 4) in blocks of 32, codes and scales as taut makes them; the head in 8 bits.
GroupQueryAttention turns, caches and attends in one node, over one matrix for q, k and v where no norm comes between; past and present
are one buffer. Spinning is left on, the default and its fastest. Llama and Gemma 3 are known.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from transformers import AutoConfig

from bench.language_models import Shape, rope_theta, tensors
from taut.formats import WeightFormat
from taut.ops.quantize_weight import quantize_weight

_CONTEXT = 2048
_BLOCK = 32
_HEAD_BITS = 8


class _Graph:
    """Nodes and weights as they are added. Values are named by strings; a node gives the name of its first output."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.weights: dict[str, np.ndarray] = {}
        self.quantized_bytes = 0
        self._count = 0

    def constant(self, values: np.ndarray | torch.Tensor, name: str | None = None) -> str:
        name = name or f"c{len(self.weights)}"
        self.weights[name] = np.ascontiguousarray(values.numpy() if isinstance(values, torch.Tensor) else values)
        return name

    def node(self, kind: str, *inputs: str, outputs: int | list[str] = 1, domain: str = "", **attributes: Any) -> str:
        if isinstance(outputs, int):
            outputs = [f"v{self._count + index}" for index in range(outputs)]
        self._count += len(outputs)
        self.nodes.append(helper.make_node(kind, list(inputs), outputs, domain=domain, **attributes))
        return outputs[0]

    def contrib(self, kind: str, *inputs: str, **others: Any) -> str:
        return self.node(kind, *inputs, domain="com.microsoft", **others)

    def linear(self, x: str, weight: torch.Tensor, bits: int) -> str:
        n, k = weight.shape
        codes, scales, *_ = quantize_weight(weight.float(), WeightFormat(f"int{bits}", _BLOCK))
        blocks = codes if bits == 4 else (codes.to(torch.int16) + 128).to(torch.uint8)
        blocks = blocks.reshape(n, k // _BLOCK, _BLOCK * bits // 8)
        scale = scales.float().reshape(-1)
        self.quantized_bytes += blocks.nbytes + scale.nbytes
        return self.contrib(
            "MatMulNBits", x, self.constant(blocks), self.constant(scale), K=k, N=n, bits=bits, block_size=_BLOCK, accuracy_level=4
        )

    def norm(self, x: str, weight: torch.Tensor, epsilon: float) -> str:
        return self.node("SimplifiedLayerNormalization", x, self.constant(weight.float()), axis=-1, epsilon=epsilon, stash_type=1)

    def add_norm(self, x: str, y: str, weight: torch.Tensor, epsilon: float) -> tuple[str, str]:
        """The norm of ``x + y``, and the sum, in one node."""
        total = f"sum{len(self.nodes)}"
        normed = f"{total}_normed"
        self.contrib(
            "SkipSimplifiedLayerNormalization", x, y, self.constant(weight.float()), outputs=[normed, "", "", total], epsilon=epsilon
        )
        return normed, total


class Generator:
    cache_element_bytes = 4

    def __init__(self, directory: str, threads: int, bits: int) -> None:
        config = AutoConfig.from_pretrained(directory)
        if config.model_type not in ("llama", "gemma3_text"):
            raise ValueError(f"no graph is known for {config.model_type}")
        self.shape = Shape.of(config)
        graph = _Graph()
        _build(graph, config, self.shape, dict(tensors(Path(directory))), bits)
        self.weight_bytes = graph.quantized_bytes
        self.note = f"head in {_HEAD_BITS} bits"
        self._open(graph, threads)

    def _open(self, graph: _Graph, threads: int) -> None:
        shape = self.shape
        caches = [f"{what}_{layer}_{kind}" for layer in range(shape.layers) for kind in ("k", "v") for what in ("past", "present")]
        pairs = list(zip(caches[::2], caches[1::2], strict=True))
        float_cache = (TensorProto.FLOAT, [1, shape.kv_heads, _CONTEXT, shape.head_dim])
        proto = helper.make_graph(
            graph.nodes,
            "model",
            [
                helper.make_tensor_value_info("ids", TensorProto.INT64, [1, "T"]),
                helper.make_tensor_value_info("last", TensorProto.INT32, [1]),
                helper.make_tensor_value_info("total", TensorProto.INT32, [1]),
                *(helper.make_tensor_value_info(past, *float_cache) for past, _ in pairs),
            ],
            [
                helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 1, shape.vocabulary]),
                *(helper.make_tensor_value_info(present, *float_cache) for _, present in pairs),
            ],
            [_initializer(name, values) for name, values in graph.weights.items()],
        )
        model = helper.make_model(proto, opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)])
        model.ir_version = 10
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3
        given = {name: onnxruntime.OrtValue.ortvalue_from_numpy(values) for name, values in graph.weights.items() if _is_external(values)}
        self.keep = list(given.values())
        options.add_external_initializers(list(given), self.keep)
        self.session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        self.binding = self.session.io_binding()
        self.logits_value = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros((1, 1, shape.vocabulary), np.float32))
        self.binding.bind_ortvalue_output("logits", self.logits_value)
        for past, present in pairs:
            # WHY zeros for each: an OrtValue made of an array shares its memory
            buffer = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(float_cache[1], np.float32))
            self.keep.append(buffer)
            self.binding.bind_ortvalue_input(past, buffer)
            self.binding.bind_ortvalue_output(present, buffer)

    def _read(self, ids: list[int], past: int) -> np.ndarray:
        """Adds ``ids`` to ``past`` ones in the cache; the logits after the last of them, which the next call overwrites."""
        total = past + len(ids)
        self.inputs = (np.array([ids], np.int64), np.array([total - 1], np.int32), np.array([total], np.int32))
        for name, values in zip(("ids", "last", "total"), self.inputs, strict=True):  # WHY kept: it reads their memory at the run
            self.binding.bind_cpu_input(name, values)
        self.session.run_with_iobinding(self.binding)
        return self.logits_value.numpy()[0, 0]

    def prompt(self, ids: list[int]) -> None:
        int(self._read(ids, 0).argmax())

    def decode(self, ids: list[int], steps: int) -> float:
        token = int(self._read(ids, 0).argmax())
        begin = time.perf_counter()
        for step in range(steps):
            token = int(self._read([token], len(ids) + step).argmax())
        return time.perf_counter() - begin

    def logits(self, ids: list[int], forced: list[int]) -> np.ndarray:
        rows = [self._read(ids, 0).copy()]
        for index, token in enumerate(forced):
            rows.append(self._read([token], len(ids) + index).copy())
        return np.stack(rows)


def _is_external(values: np.ndarray) -> bool:
    return values.nbytes > 1024  # shapes must be read while the model is


def _initializer(name: str, values: np.ndarray) -> TensorProto:
    """A weight; all but small ones come from the session options, so that the model stays under 2 GB."""
    if not _is_external(values):
        return numpy_helper.from_array(values, name)
    kind = helper.np_dtype_to_tensor_dtype(values.dtype)
    tensor = TensorProto(name=name, data_type=kind, dims=values.shape, data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=f"{name}.bin")
    return tensor


def _build(graph: _Graph, config: Any, shape: Shape, weights: dict[str, torch.Tensor], bits: int) -> None:
    """Every node from ``ids`` to ``logits``."""
    gemma = config.model_type == "gemma3_text"
    epsilon = config.rms_norm_eps

    def weight(name: str) -> torch.Tensor:
        return weights[f"model.{name}.weight"]

    def scale(name: str) -> torch.Tensor:
        return weight(name).float() + (1.0 if gemma else 0.0)

    tables = {kind: _rotation(graph, config, shape, kind) for kind in (("sliding_attention", "full_attention") if gemma else ("",))}
    x = graph.node("Gather", graph.constant(weight("embed_tokens").float(), "embeddings"), "ids")
    if gemma:
        x = graph.node("Mul", x, graph.constant(np.array(shape.hidden**0.5, np.float32)))
    y = graph.norm(x, scale("layers.0.input_layernorm"), epsilon)
    for layer in range(shape.layers):
        stem = f"layers.{layer}"
        kind = config.layer_types[layer] if gemma else ""
        attention = [weight(f"{stem}.self_attn.{name}_proj") for name in "qkv"]
        if gemma:
            q, k, v = (graph.linear(y, part, bits) for part in attention)
            q = _head_norm(graph, q, weight(f"{stem}.self_attn.q_norm"), shape.heads, shape.head_dim, epsilon)
            k = _head_norm(graph, k, weight(f"{stem}.self_attn.k_norm"), shape.kv_heads, shape.head_dim, epsilon)
        else:
            q, k, v = graph.linear(y, torch.cat(attention), bits), "", ""
        y = graph.contrib(
            "GroupQueryAttention", q, k, v, f"past_{layer}_k", f"past_{layer}_v", "last", "total", *tables[kind],
            outputs=[f"attended_{layer}", f"present_{layer}_k", f"present_{layer}_v"], num_heads=shape.heads,
            kv_num_heads=shape.kv_heads, do_rotary=1, local_window_size=config.sliding_window if kind == "sliding_attention" else -1,
            scale=config.query_pre_attn_scalar**-0.5 if gemma else shape.head_dim**-0.5,
        )  # fmt: skip
        y = graph.linear(y, weight(f"{stem}.self_attn.o_proj"), bits)
        if gemma:
            y = graph.norm(y, scale(f"{stem}.post_attention_layernorm"), epsilon)
        y, x = graph.add_norm(x, y, scale(f"{stem}.{'pre_feedforward' if gemma else 'post_attention'}_layernorm"), epsilon)
        gate = graph.linear(y, weight(f"{stem}.mlp.gate_proj"), bits)
        # SiLU is QuickGelu with alpha 1, in one node
        gate = graph.contrib("FastGelu", gate) if gemma else graph.contrib("QuickGelu", gate, alpha=1.0)
        y = graph.node("Mul", gate, graph.linear(y, weight(f"{stem}.mlp.up_proj"), bits))
        y = graph.linear(y, weight(f"{stem}.mlp.down_proj"), bits)
        if gemma:
            y = graph.norm(y, scale(f"{stem}.post_feedforward_layernorm"), epsilon)
        following = f"layers.{layer + 1}.input_layernorm" if layer + 1 < shape.layers else "norm"
        y, x = graph.add_norm(x, y, scale(following), epsilon)
    end = graph.constant(np.array([-1], np.int64))
    y = graph.node("Gather", y, end, axis=1)  # the head is for the last token alone
    head = weights.get("lm_head.weight", weight("embed_tokens"))
    last = graph.linear(y, head, _HEAD_BITS)
    graph.node("Identity", last, outputs=["logits"])


def _head_norm(graph: _Graph, x: str, weight: torch.Tensor, heads: int, width: int, epsilon: float) -> str:
    """RMSNorm of each head of q or k, in Gemma 3."""
    x = graph.node("Reshape", x, graph.constant(np.array([1, -1, heads, width], np.int64)))
    x = graph.norm(x, weight.float() + 1.0, epsilon)
    return graph.node("Reshape", x, graph.constant(np.array([1, -1, heads * width], np.int64)))


def _rotation(graph: _Graph, config: Any, shape: Shape, kind: str) -> tuple[str, str]:
    """Cosines and sines of every position."""
    theta = rope_theta(config, kind)
    frequency = theta ** -(np.arange(0, shape.head_dim, 2, dtype=np.float64) / shape.head_dim)
    angle = np.arange(_CONTEXT)[:, None] * frequency
    return graph.constant(np.cos(angle).astype(np.float32)), graph.constant(np.sin(angle).astype(np.float32))
