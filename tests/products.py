"""Graphs of a single MatMulNBits, as onnxruntime documents the operator."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from tests.alone import open_alone


@dataclass(frozen=True)
class Product:
    """The product of (…, k) with a random weight (n, k) of so many bits in blocks of so many values."""

    k: int
    n: int
    bits: int
    block: int
    bias: bool = False
    zero_points: bool = False
    order: bool = False
    accuracy_level: int = 4
    axes: int = 3

    def session(self, threads: int = 1, library: Path | None = None) -> ort.InferenceSession:
        """Open it, with a library of kernels or onnxruntime's own."""
        return open_alone(self.model(), threads, library)

    def model(self) -> onnx.ModelProto:
        random, blocks = np.random.default_rng(0), -(-self.k // self.block)
        codes = random.integers(0, 256, (self.n, blocks, self.block * self.bits // 8), dtype=np.uint8)
        scales = (random.random((self.n, blocks), dtype=np.float32) + 0.5) * 0.01
        tensors: dict[str, npt.NDArray[Any]] = {"codes": codes, "scales": scales}
        if self.zero_points:
            tensors["zeros"] = np.full((self.n, -(-blocks * self.bits // 8)), 0x77, dtype=np.uint8)
        if self.order:
            tensors["order"] = np.arange(blocks * self.block, dtype=np.int32) // self.block
        if self.bias:
            tensors["bias"] = random.standard_normal(self.n).astype(np.float32)
        inputs = ["x", *(name if name in tensors else "" for name in ("codes", "scales", "zeros", "order", "bias"))]
        node = helper.make_node(
            "MatMulNBits",
            inputs,
            ["y"],
            domain="com.microsoft",
            K=self.k,
            N=self.n,
            bits=self.bits,
            block_size=self.block,
            accuracy_level=self.accuracy_level,
        )
        names: list[str | int] = [f"axis_{axis}" for axis in range(self.axes - 1)]
        graph = helper.make_graph(
            [node],
            "product",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [*names, self.k])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [*names, self.n])],
            [numpy_helper.from_array(tensor, name) for name, tensor in tensors.items()],
        )
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=9)
