"""Embeddings: how a matrix (V, C) is stored, and how the rows of some ids are looked up.

A head tied to the embedding computes with the same stored tensors. Standard operators only.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from onnx import TensorProto

from expe_edge.graph.nodes import GraphBuilder
from expe_edge.quant.blocks import BLOCK_SIZE, BlockCodes, Float, midpoint, round_to_nearest
from expe_edge.quant.channels import ChannelCodes, quantize_channels

#: Names of the stored tensors.
WEIGHT, SCALE = "embedding.weight", "embedding.scale"
FLOAT = int(TensorProto.FLOAT)


@dataclass
class Table(ABC):
    """A stored embedding. weight, scale: the tensors' names once `lookup` has stored them."""

    weight: str = field(default="", init=False)
    scale: str = field(default="", init=False)

    @abstractmethod
    def lookup(self, graph: GraphBuilder, ids: str) -> str:
        """Store the matrix; append the nodes that turn `ids` (B, T) into rows (B, T, C) float32."""

    @abstractmethod
    def restored(self) -> Float:
        """Return the matrix as looked up, (V, C)."""

    def dequantize(self, graph: GraphBuilder, codes: str, ids: str, zero_point: int, name: str) -> str:
        """Append the nodes that turn `codes` (B, T, …, n) of `ids` into floats, by the scales (…) of their rows."""
        levels = graph.op("Cast", codes, name="embedding.codes", to=FLOAT)
        levels = graph.op("Sub", levels, graph.scalar(zero_point), name="embedding.levels")
        steps = graph.op("Gather", self.scale, ids, name="embedding.steps")
        steps = graph.op("Unsqueeze", steps, graph.ints(-1), name="embedding.steps")
        return graph.op("Mul", levels, steps, name=name)


@dataclass
class FloatTable(Table):
    """Floats: float32, float16, or bfloat16 (as onnx element types)."""

    matrix: Float
    element: int = FLOAT

    def lookup(self, graph: GraphBuilder, ids: str) -> str:
        self.weight = graph.floats(WEIGHT, self.matrix, self.element)
        rows = graph.op("Gather", self.weight, ids, name="embedding")
        return rows if self.element == FLOAT else graph.op("Cast", rows, name="embedding.float", to=FLOAT)

    def restored(self) -> Float:
        return GraphBuilder.rounded(self.matrix, self.element)


@dataclass
class ChannelTable(Table):
    """8 bits, one scale for each row."""

    matrix: ChannelCodes

    def lookup(self, graph: GraphBuilder, ids: str) -> str:
        self.weight = graph.weight(WEIGHT, self.matrix.values.T)
        self.scale = graph.scales(SCALE, self.matrix.scale)
        codes = graph.op("Gather", self.weight, ids, name="embedding")
        return self.dequantize(graph, codes, ids, self.matrix.zero_point, "embedding.restored")

    def restored(self) -> Float:
        return self.matrix.restored().T


@dataclass
class BlockTable(Table):
    """Few bits, a scale for each block of a row; the bytes are as MatMulNBits has them."""

    matrix: BlockCodes

    def lookup(self, graph: GraphBuilder, ids: str) -> str:
        matrix = self.matrix
        self.weight = graph.weight(WEIGHT, matrix.packed())
        self.scale = graph.scales(SCALE, matrix.scale)
        codes = graph.op("Gather", self.weight, ids, name="embedding")  # (B, T, blocks, bytes)
        if matrix.bits == 4:
            codes = self._unpack(graph, codes, 0, 0, 0, matrix.block_size)
        blocks = self.dequantize(graph, codes, ids, midpoint(matrix.bits), "embedding.blocks")
        rows = graph.op("Reshape", blocks, graph.ints(0, 0, -1), name="embedding.restored")
        if matrix.columns % matrix.block_size == 0:
            return rows
        bounds = graph.ints(0), graph.ints(matrix.columns), graph.ints(2)
        return graph.op("Slice", rows, *bounds, name="embedding.columns")

    def columns(self, graph: GraphBuilder, linear: str) -> list[str]:
        """Append codes (C, V), a byte each, scales and zero points (blocks, V), for a head in standard operators.

        They are made of what is stored: by onnxruntime once, at load, by other engines perhaps at every run.
        """
        matrix = self.matrix
        rows, blocks = matrix.scale.shape
        name = f"{linear}.columns"
        if matrix.bits == 4:
            codes = self._unpack(graph, self.weight, rows, -1)
        else:
            codes = graph.op("Reshape", self.weight, graph.ints(rows, -1), name=name)
        codes = graph.op("Transpose", codes, name=name, perm=[1, 0])
        if matrix.columns % matrix.block_size:
            codes = graph.op("Slice", codes, graph.ints(0), graph.ints(matrix.columns), name=name)
        zero = graph.scalar(midpoint(matrix.bits), np.uint8)
        zeros = graph.op("Expand", zero, graph.ints(blocks, rows), name=f"{linear}.zeros")
        return [codes, graph.op("Transpose", self.scale, name=f"{linear}.steps", perm=[1, 0]), zeros]

    @staticmethod
    def _unpack(graph: GraphBuilder, codes: str, *shape: int) -> str:
        """Bytes (…) to twice as many 4-bit codes in `shape`."""
        low = graph.op("BitwiseAnd", codes, graph.scalar(15, np.uint8), name="embedding.low")
        high = graph.op("BitShift", codes, graph.scalar(4, np.uint8), name="embedding.high", direction="RIGHT")
        halves = [graph.op("Unsqueeze", half, graph.ints(-1), name="embedding.halves") for half in (low, high)]
        pairs = graph.op("Concat", *halves, name="embedding.pairs", axis=-1)
        return graph.op("Reshape", pairs, graph.ints(*shape), name="embedding.unpacked")

    def restored(self) -> Float:
        return self.matrix.restored()


#: `--embedding` to the table of a matrix (V, C), given the block size or None.
EMBEDDING_FORMATS: dict[str, Callable[[Float, int | None], Table]] = {
    "float32": lambda matrix, _: FloatTable(matrix),
    "float16": lambda matrix, _: FloatTable(matrix, int(TensorProto.FLOAT16)),
    "bfloat16": lambda matrix, _: FloatTable(matrix, int(TensorProto.BFLOAT16)),
    "int8": lambda matrix, _: ChannelTable(quantize_channels(matrix.T)),
    "int4": lambda matrix, block_size: BlockTable(round_to_nearest(matrix, 4, block_size or BLOCK_SIZE[4])),
}
