"""How many bytes each part of a graph takes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import onnx

#: Endings of the tensors that hold what positions add.
POSITION_TENSOR = re.compile(r"\.(limbs|start|slope\.\w+)$|^positions\.|^relative\.")


def measure_parts(model: onnx.ModelProto, linears: Mapping[str, str], embedding: str) -> list[dict[str, Any]]:
    """Return part, format and bytes of everything in `model`, in the order of the graph; the bytes add up to the file.

    Args:
        linears: the format of every linear. embedding: of the embedding.
    """
    sizes: dict[tuple[str, str], int] = {}
    for tensor in model.graph.initializer:
        part = _part(tensor, linears, embedding)
        sizes[part] = sizes.get(part, 0) + len(tensor.raw_data)
    sizes["graph", "protobuf"] = model.ByteSize() - sum(sizes.values())
    return [{"part": part, "format": kind, "bytes": size} for (part, kind), size in sizes.items()]


def _part(tensor: onnx.TensorProto, linears: Mapping[str, str], embedding: str) -> tuple[str, str]:
    """Name the part that a tensor belongs to, and the part's format."""
    name = tensor.name
    owner = name.rpartition(".")[0]
    if owner == "embedding":
        return "embedding", embedding
    if owner in linears:
        return owner, linears[owner]
    if POSITION_TENSOR.search(name):
        return "positions", "float32"
    if name.endswith(".gain"):
        return "norms", "float16" if tensor.data_type == onnx.TensorProto.FLOAT16 else "float32"
    if name.endswith((".key.scale", ".value.scale")):
        return "cache scales", "float32"
    return "constants", "mixed"
