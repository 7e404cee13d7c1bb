"""A thin builder of ONNX graphs: nodes in order, constants stored once, names that say where they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from expe_edge.package import TensorSpec

#: The oldest opset with everything used here; onnxruntime reads it since 1.17.
OPSET = 20
IR_VERSION = 9
#: Domain of onnxruntime's contributed operators.
MICROSOFT = "com.microsoft"

Array = npt.NDArray[Any]


class GraphBuilder:
    """Collects the nodes and constants of one graph. Every method returns the name of the tensor it makes."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[TensorProto] = []
        self.value_infos: list[onnx.ValueInfoProto] = []
        self._shared: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._counts: dict[str, int] = {}

    def _name(self, name: str) -> str:
        count = self._counts.get(name, 0)
        self._counts[name] = count + 1
        return f"{name}_{count}" if count else name

    def op(self, kind: str, *inputs: str, name: str = "", domain: str = "", **attributes: Any) -> str:
        """Append a node with one output."""
        return self.multi(kind, inputs, 1, name=name, domain=domain, **attributes)[0]

    def multi(
        self,
        kind: str,
        inputs: Sequence[str],
        outputs: int,
        *,
        name: str = "",
        domain: str = "",
        **attributes: Any,
    ) -> list[str]:
        """Append a node with several outputs."""
        base = self._name(name or kind)
        names = [base] if outputs == 1 else [f"{base}.{index}" for index in range(outputs)]
        self.emit(kind, inputs, names, name=base, domain=domain, **attributes)
        return names

    def emit(
        self,
        kind: str,
        inputs: Sequence[str],
        outputs: Sequence[str],
        *,
        name: str,
        domain: str = "",
        **attributes: Any,
    ) -> None:
        """Append a node whose outputs have given names."""
        self.nodes.append(helper.make_node(kind, list(inputs), list(outputs), name=name, domain=domain, **attributes))

    def weight(self, name: str, value: Array) -> str:
        """Store a weight under its own name."""
        self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def constant(self, value: Array, name: str = "constant") -> str:
        """Store a small constant, once for all uses of the same value."""
        key = (str(value.dtype), value.shape, value.tobytes())
        if key not in self._shared:
            self._shared[key] = self.weight(self._name(name), value)
        return self._shared[key]

    def ints(self, *values: int) -> str:
        """A constant vector of int64."""
        return self.constant(np.array(values, dtype=np.int64))

    def scalar(self, value: float, dtype: type[np.generic] = np.float32) -> str:
        """A constant scalar, float32 unless told."""
        return self.constant(np.array(value, dtype=dtype))

    def describe(self, name: str, width: int) -> None:
        """Record that tensor `name` is float32 (batch, sequence, width): shape inference stops at custom operators."""
        self.value_infos.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", "sequence", width]))

    def model(self, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], producer: str) -> onnx.ModelProto:
        """Return the finished model."""
        graph = helper.make_graph(
            self.nodes,
            "expe",
            [_value_info(spec) for spec in inputs],
            [_value_info(spec) for spec in outputs],
            self.initializers,
            value_info=self.value_infos,
        )
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name=producer)


def _value_info(spec: TensorSpec) -> onnx.ValueInfoProto:
    element = helper.np_dtype_to_tensor_dtype(np.dtype(spec.dtype))
    return helper.make_tensor_value_info(spec.name, element, list(spec.shape))
