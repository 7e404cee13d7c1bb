"""Stored matrices: the bytes a weight is held in, as floats, by channel or by block; and what a graph makes of them.

An embedding is a stored matrix whose rows are looked up. A head tied to it computes with the same stored tensors.
Lookups are in standard operators only.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from onnx import TensorProto

from expe_edge.graph.nodes import FLOAT, GraphBuilder
from expe_edge.quant.blocks import BLOCK_SIZE, BlockCodes, Float, midpoint, round_to_nearest
from expe_edge.quant.channels import ChannelCodes, quantize_channels


class Table(NamedTuple):
    """The tensors of a matrix that is stored as an embedding, a row for each token. scale: of integers alone."""

    weight: str
    scale: str = ""


class StoredMatrix(ABC):
    """A weight (C_in, C_out) of one graph; as an embedding (V, C) it is the transpose. table: once it is looked up."""

    table: Table | None = None

    @abstractmethod
    def lookup(self, graph: GraphBuilder, ids: str) -> str:
        """Store the matrix as an embedding; append the nodes that turn `ids` (B, T) into rows (B, T, C)."""

    @abstractmethod
    def floats(self, graph: GraphBuilder, linear: str) -> str:
        """Append the nodes of the restored matrix (C_in, C_out), stored for `linear` unless it is a table."""

    @abstractmethod
    def restored(self) -> Float:
        """Return the matrix as stored, (C_in, C_out)."""


class FloatMatrix(StoredMatrix):
    """Floats: float32, float16, or bfloat16 (as onnx element types)."""

    def __init__(self, weight: Float, element: int = FLOAT) -> None:
        self.weight, self.element = weight, element

    def lookup(self, graph: GraphBuilder, ids: str) -> str:
        self.table = Table(graph.floats("embedding.weight", self.weight.T, self.element))
        rows = graph.op("Gather", self.table.weight, ids, name="embedding")
        return self._computed(graph, rows, "embedding.float")

    def floats(self, graph: GraphBuilder, linear: str) -> str:
        if self.table is not None:
            matrix = graph.op("Transpose", self.table.weight, name=f"{linear}.tied", perm=[1, 0])
        else:
            matrix = graph.floats(f"{linear}.weight", self.weight, self.element)
        return self._computed(graph, matrix, f"{linear}.float")

    def _computed(self, graph: GraphBuilder, tensor: str, name: str) -> str:
        """Append what takes it to the type that is computed in."""
        return tensor if self.element == graph.element else graph.op("Cast", tensor, name=name, to=graph.element)

    def restored(self) -> Float:
        return GraphBuilder.rounded(self.weight, self.element)


class ChannelMatrix(StoredMatrix):
    """8 or 7 bits, one scale for each output channel, or row of an embedding."""

    def __init__(self, codes: ChannelCodes) -> None:
        self.codes = codes

    def lookup(self, graph: GraphBuilder, ids: str) -> str:
        weight = graph.weight("embedding.weight", self.codes.values.T)
        self.table = Table(weight, graph.scales("embedding.scale", self.codes.scale))
        codes = graph.op("Gather", weight, ids, name="embedding")
        return _dequantize(graph, self.table, codes, ids, self.codes.zero_point, "embedding.restored")

    def integers(self, graph: GraphBuilder, linear: str) -> tuple[str, str, str]:
        """Return the tensors of the codes (C_in, C_out), their scales and zero points (C_out,)."""
        zero_points = graph.constant(self.codes.zero_points)
        if self.table is not None:
            weight = graph.op("Transpose", self.table.weight, name=f"{linear}.tied", perm=[1, 0])
            return weight, self.table.scale, zero_points
        weight = graph.weight(f"{linear}.weight", self.codes.values)
        return weight, graph.scales(f"{linear}.scale", self.codes.scale), zero_points

    def floats(self, graph: GraphBuilder, linear: str) -> str:
        return graph.op("DequantizeLinear", *self.integers(graph, linear), name=f"{linear}.matrix", axis=1)

    def restored(self) -> Float:
        return self.codes.restored()


class BlockMatrix(StoredMatrix):
    """Few bits, a scale for each block of an output channel's column, or of an embedding's row."""

    def __init__(self, codes: BlockCodes) -> None:
        self.codes = codes

    def lookup(self, graph: GraphBuilder, ids: str) -> str:
        matrix = self.codes
        weight = graph.weight("embedding.weight", matrix.packed())
        self.table = Table(weight, graph.scales("embedding.scale", matrix.scale))
        codes = graph.op("Gather", weight, ids, name="embedding")  # (B, T, blocks, bytes)
        if matrix.bits == 4:
            codes = _unpack(graph, codes, 0, 0, 0, matrix.block_size)
        blocks = _dequantize(graph, self.table, codes, ids, midpoint(matrix.bits), "embedding.blocks")
        rows = graph.op("Reshape", blocks, graph.ints(0, 0, -1), name="embedding.restored")
        if matrix.columns % matrix.block_size == 0:
            return rows
        bounds = graph.ints(0), graph.ints(matrix.columns), graph.ints(2)
        return graph.op("Slice", rows, *bounds, name="embedding.columns")

    def packed(self, graph: GraphBuilder, linear: str) -> tuple[str, str]:
        """Return the tensors of codes (C_out, blocks, bytes) and scales (C_out, blocks), as MatMulNBits has them."""
        if self.table is not None:
            return self.table.weight, graph.narrow(self.table.scale, f"{linear}.scale")
        scale = graph.scales(f"{linear}.scale", self.codes.scale)
        return self._store_packed(graph, linear), graph.narrow(scale, f"{linear}.scale")

    def _store_packed(self, graph: GraphBuilder, linear: str) -> str:
        """Store packed codes without the padding of the last block, which is made at load."""
        codes = self.codes
        packed, bits = codes.packed(), codes.columns * codes.bits
        if codes.columns % codes.block_size == 0 or bits % 8:
            return graph.weight(f"{linear}.weight", packed)
        flat = packed.reshape(len(packed), -1)
        stored = graph.weight(f"{linear}.weight", flat[:, : bits // 8])
        zero = midpoint(codes.bits) * (17 if codes.bits == 4 else 1)  # one byte of zeros
        ends = graph.ints(0, 0, 0, flat.shape[1] - bits // 8)
        padded = graph.op("Pad", stored, ends, graph.scalar(zero, np.uint8), name=f"{linear}.padded")
        return graph.op("Reshape", padded, graph.ints(*packed.shape), name=f"{linear}.blocks")

    def floats(self, graph: GraphBuilder, linear: str) -> str:
        """As the base; stored that way round, without which onnxruntime fuses nothing.

        Codes are signed, so that no zero points are stored; an embedding's are its bytes, rearranged.
        """
        codes = self.codes
        if self.table is not None:
            stored = self._columns(graph, self.table, linear)
        else:
            store = graph.four_bits if codes.bits == 4 else graph.weight
            stored = [store(f"{linear}.weight", codes.levels()), graph.scales(f"{linear}.scale", codes.scale.T)]
        return graph.op("DequantizeLinear", *stored, name=f"{linear}.matrix", axis=0, block_size=codes.block_size)

    def _columns(self, graph: GraphBuilder, table: Table, linear: str) -> list[str]:
        """Append codes (C, V), a byte each, scales and zero points (blocks, V), made of an embedding.

        By onnxruntime that is done once, at load, by other engines perhaps at every run.
        """
        matrix = self.codes
        rows, blocks = matrix.scale.shape
        name = f"{linear}.columns"
        if matrix.bits == 4:
            codes = _unpack(graph, table.weight, rows, -1)
        else:
            codes = graph.op("Reshape", table.weight, graph.ints(rows, -1), name=name)
        codes = graph.op("Transpose", codes, name=name, perm=[1, 0])
        if matrix.columns % matrix.block_size:
            codes = graph.op("Slice", codes, graph.ints(0), graph.ints(matrix.columns), name=name)
        zero = graph.scalar(midpoint(matrix.bits), np.uint8)
        zeros = graph.op("Expand", zero, graph.ints(blocks, rows), name=f"{linear}.zeros")
        return [codes, graph.op("Transpose", table.scale, name=f"{linear}.steps", perm=[1, 0]), zeros]

    def restored(self) -> Float:
        return self.codes.restored().T


def _dequantize(graph: GraphBuilder, table: Table, codes: str, ids: str, zero_point: int, name: str) -> str:
    """Append the nodes that turn `codes` (B, T, …, n) of `ids` into floats, by the scales (…) of their rows."""
    levels = graph.op("Cast", codes, name="embedding.codes", to=FLOAT)
    levels = graph.op("Sub", levels, graph.scalar(zero_point), name="embedding.levels")
    steps = graph.op("Gather", table.scale, ids, name="embedding.steps")
    steps = graph.op("Unsqueeze", steps, graph.ints(-1), name="embedding.steps")
    return graph.narrow(graph.op("Mul", levels, steps, name=name), name)


def _unpack(graph: GraphBuilder, codes: str, *shape: int) -> str:
    """Append the nodes that turn bytes (…) into twice as many 4-bit codes in `shape`."""
    low = graph.op("BitwiseAnd", codes, graph.scalar(15, np.uint8), name="embedding.low")
    high = graph.op("BitShift", codes, graph.scalar(4, np.uint8), name="embedding.high", direction="RIGHT")
    halves = [graph.op("Unsqueeze", half, graph.ints(-1), name="embedding.halves") for half in (low, high)]
    pairs = graph.op("Concat", *halves, name="embedding.pairs", axis=-1)
    return graph.op("Reshape", pairs, graph.ints(*shape), name="embedding.unpacked")


#: `--embedding` to the stored matrix of an embedding (V, C), given the block size or None.
EMBEDDING_FORMATS: dict[str, Callable[[Float, int | None], StoredMatrix]] = {
    "float32": lambda rows, _: FloatMatrix(rows.T),
    "float16": lambda rows, _: FloatMatrix(rows.T, int(TensorProto.FLOAT16)),
    "bfloat16": lambda rows, _: FloatMatrix(rows.T, int(TensorProto.BFLOAT16)),
    "int8": lambda rows, _: ChannelMatrix(quantize_channels(rows.T)),
    "int4": lambda rows, block_size: BlockMatrix(round_to_nearest(rows, 4, block_size or BLOCK_SIZE[4])),
}
