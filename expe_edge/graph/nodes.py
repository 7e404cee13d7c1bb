"""A thin builder of ONNX graphs: nodes in order, constants stored once, node names that say where they are.

A tensor between two nodes is called t0, t1, …: in a small model long names would be a noticeable part of the file.
`names.py` gives them, where they are asked for.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from expe_edge.package.contract import BATCH, TensorSpec

#: The oldest opset with everything used here, and its format; onnxruntime reads it since 1.17.
OPSET, IR_VERSION = 20, 9
#: The same for graphs with weights in blocks (DequantizeLinear), which onnxruntime reads since 1.20.
OPSET_BLOCKS, IR_VERSION_BLOCKS = 21, 10
#: Domain of onnxruntime's contributed operators, and of functions of our own, which kernels built here know.
MICROSOFT, OWN = "com.microsoft", "expe_edge"

FLOAT, FLOAT16 = int(TensorProto.FLOAT), int(TensorProto.FLOAT16)

Array = npt.NDArray[Any]
#: Appends nodes to a builder: where they are, and the tensors that they take; returns what they make.
Body = Callable[..., str]


class GraphBuilder:
    """Collects the nodes and constants of one graph. Every method returns the name of the tensor it makes.

    weights: whether to keep them; False where the nodes are all that is wanted.
    element: the onnx type that the model computes in, FLOAT or FLOAT16. Positions and what they are multiplied by are
        float32 in any graph: `narrow` and `widen` lead from one to the other.
    functions: whether chains of nodes are functions of the model.
    """

    def __init__(self, *, weights: bool = True, element: int = FLOAT, functions: bool = False) -> None:
        self._weights, self.element, self._functions = weights, element, functions
        self._model = onnx.ModelProto()  # grows in place: weights copied from list to graph to model are held thrice
        self.graph = self._model.graph
        self._shared: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._counts: dict[str, int] = {}
        self._optional: list[TensorSpec] = []
        self._tensors = count()

    def _name(self, name: str) -> str:
        count = self._counts.get(name, 0)
        self._counts[name] = count + 1
        return f"{name}_{count}" if count else name

    def tensor(self) -> str:
        """Return a name for a tensor between two nodes."""
        return f"t{next(self._tensors)}"

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
        names = [self.tensor() for _ in range(outputs)]
        self.emit(kind, inputs, names, name=self._name(name or kind), domain=domain, **attributes)
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
        node = helper.make_node(kind, list(inputs), list(outputs), name=name, domain=domain, **attributes)
        self.graph.node.append(node)

    def function(self, kind: str, inputs: Sequence[str], body: Body, *, name: str, last: str) -> str:
        """Append a chain of nodes with one output, which is the same wherever it is of this kind.

        Where functions are wanted it is one node. A runtime that has no kernel of that name puts the chain in its
        place when it reads the graph. One that has takes it for this chain: another one needs another name.

        body: appends the chain to a builder. name: of where it is, which names of its nodes begin with. last: how that
            of the last node goes on.
        """
        if not self._functions:
            return body(self, name, *inputs)
        if all(function.name != kind for function in self._model.functions):
            self._model.functions.append(_function(kind, len(inputs), body))
        return self.op(kind, *inputs, name=f"{name}.{last}", domain=OWN)

    def branch(self) -> GraphBuilder:
        """Return a builder of one side of `choose`: it reads this graph's tensors, and stores what it stores here."""
        branch = copy.copy(self)
        branch.graph = onnx.GraphProto()
        return branch

    def result(self, tensor: str, dtype: str) -> None:
        """Make a tensor of a branch one of its results. dtype: as NumPy names it."""
        element = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        self.graph.output.append(helper.make_tensor_value_info(tensor, element, None))

    def choose(
        self, condition: str, then: GraphBuilder, otherwise: GraphBuilder, outputs: Sequence[str], *, name: str
    ) -> None:
        """Append a node that runs one of two branches, whose results are its outputs. condition: one bool."""
        for branch, which in ((then, "then"), (otherwise, "otherwise")):
            branch.graph.name = f"{name}.{which}"
        self.emit("If", [condition], outputs, name=name, then_branch=then.graph, else_branch=otherwise.graph)

    def weight(self, name: str, value: Array) -> str:
        """Store a weight under its own name."""
        return self._store(numpy_helper.from_array(np.asarray(value, order="C"), name))

    def floats(self, name: str, value: npt.NDArray[np.float32], element: int) -> str:
        """Store a float32 array rounded to the onnx type `element`."""
        return self._store(_float_tensor(name, value, element))

    def parameter(self, name: str, value: npt.NDArray[np.float32]) -> str:
        """Store a float32 array in the type that is computed in."""
        return self.floats(name, value, self.element)

    def narrow(self, tensor: str, name: str) -> str:
        """Append what takes a float32 tensor to the type that is computed in."""
        return tensor if self.element == FLOAT else self.op("Cast", tensor, name=f"{name}.narrow", to=self.element)

    def widen(self, tensor: str, name: str) -> str:
        """Append what takes a tensor of the type that is computed in to float32."""
        return tensor if self.element == FLOAT else self.op("Cast", tensor, name=f"{name}.wide", to=FLOAT)

    @staticmethod
    def rounded(value: npt.NDArray[np.float32], element: int) -> npt.NDArray[np.float32]:
        """Return a float32 array as `floats` stores it."""
        stored: npt.NDArray[np.float32] = numpy_helper.to_array(_float_tensor("", value, element)).astype(np.float32)
        return stored

    def scales(self, name: str, value: npt.NDArray[np.float32]) -> str:
        """Store scales, in half precision where that is exact, and return them in float32: folded at load."""
        half = value.astype(np.float16)
        if not np.array_equal(half, value):
            return self.weight(name, value)
        return self.op("Cast", self.weight(name, half), name=f"{name}.float", to=FLOAT)

    def four_bits(self, name: str, value: npt.NDArray[np.int8]) -> str:
        """Store integers from −8 to 7 as INT4, two to a byte, the earlier in the low half."""
        low = np.pad(value.reshape(-1), (0, value.size % 2)).view(np.uint8) & 15
        packed = low[0::2] | (low[1::2] << 4)
        return self._store(helper.make_tensor(name, TensorProto.INT4, value.shape, packed.tobytes(), raw=True))

    def _store(self, tensor: TensorProto) -> str:
        if self._weights:
            self._model.graph.initializer.append(tensor)
        return str(tensor.name)

    def constant(self, value: Array) -> str:
        """Store a small constant, once for all uses of the same value."""
        key = (str(value.dtype), value.shape, value.tobytes())
        if key not in self._shared:
            self._shared[key] = self.weight(f"c{len(self._shared)}", value)
        return self._shared[key]

    def optional(self, spec: TensorSpec, value: int) -> str:
        """Make an input that a client may leave away; it is `value` then (an initializer that is an input as well)."""
        self._optional.append(spec)
        return self.weight(spec.name, np.array(value, dtype=spec.dtype))

    def ints(self, *values: int) -> str:
        """A constant vector of int64."""
        return self.constant(np.array(values, dtype=np.int64))

    def scalar(self, value: float, dtype: type[np.generic] = np.float32) -> str:
        """A constant scalar, float32 unless told."""
        return self.constant(np.array(value, dtype=dtype))

    def describe(self, name: str, width: int) -> None:
        """Record that tensor `name` is (batch, tokens, width): shape inference stops at custom operators."""
        described = helper.make_tensor_value_info(name, self.element, [BATCH, None, width])
        self.graph.value_info.append(described)

    def model(self, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], producer: str) -> onnx.ModelProto:
        """Finish the model and return it; nothing can be added after."""
        model, graph = self._model, self.graph
        graph.name = "expe"
        graph.input.extend(map(_value_info, [*inputs, *self._optional]))
        graph.output.extend(map(_value_info, outputs))
        blocks = any(map(_restores_blocks, every_node(graph)))
        opset, model.ir_version = (OPSET_BLOCKS, IR_VERSION_BLOCKS) if blocks else (OPSET, IR_VERSION)
        model.opset_import.append(helper.make_opsetid("", opset))
        for function in model.functions:
            function.opset_import.append(helper.make_opsetid("", opset))
        domains = {node.domain for node in every_node(graph)} & {MICROSOFT, OWN}
        model.opset_import.extend(helper.make_opsetid(domain, 1) for domain in sorted(domains))
        model.producer_name = producer
        return model


class _FunctionBuilder(GraphBuilder):
    """Builds a function, whose constants are nodes."""

    def _store(self, tensor: TensorProto) -> str:
        self.graph.node.append(helper.make_node("Constant", [], [tensor.name], value=tensor))
        return str(tensor.name)


def _function(kind: str, inputs: int, body: Body) -> onnx.FunctionProto:
    builder, names = _FunctionBuilder(), [f"x{index}" for index in range(inputs)]
    output = body(builder, kind, *names)
    return helper.make_function(OWN, kind, names, [output], builder.graph.node, [])


def every_node(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Yield the nodes of a graph, behind each those of its branches."""
    for node in graph.node:
        yield node
        for branch in branches_of(node):
            yield from every_node(branch)


def operators_of(model: onnx.ModelProto) -> Counter[str]:
    """Return how often a model has each operator, those of its functions wherever they stand."""
    chains = {function.name: [node.op_type for node in function.node] for function in model.functions}
    chained = (chains.get(node.op_type, [node.op_type]) for node in every_node(model.graph))
    return Counter(kind for kinds in chained for kind in kinds if kind != "Constant")


def branches_of(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    """Return the branches that a node chooses from; none of most nodes."""
    return [attribute.g for attribute in node.attribute if attribute.type == onnx.AttributeProto.GRAPH]


def _restores_blocks(node: onnx.NodeProto) -> bool:
    return node.op_type == "DequantizeLinear" and any(attribute.name == "block_size" for attribute in node.attribute)


def _float_tensor(name: str, value: npt.NDArray[np.float32], element: int) -> TensorProto:
    dtype = helper.tensor_dtype_to_np_dtype(element)
    return numpy_helper.from_array(np.ascontiguousarray(value.astype(dtype)), name)


def _value_info(spec: TensorSpec) -> onnx.ValueInfoProto:
    element = helper.np_dtype_to_tensor_dtype(np.dtype(spec.dtype))
    return helper.make_tensor_value_info(spec.name, element, list(spec.shape))
