"""Names of the tensors between nodes, for who reads a graph in a viewer."""

from __future__ import annotations

import onnx

from expe_edge.graph.nodes import branches_of, every_node


def name_tensors(model: onnx.ModelProto) -> None:
    """Call every tensor between nodes after the node that makes it, in place; with a number where it makes several."""
    graph = model.graph
    outputs = {value.name for value in graph.output}
    taken = outputs | {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
    renamed: dict[str, str] = {}
    for node in every_node(graph):  # branches are read when what they read has been named
        node.input[:] = [renamed.get(name, name) for name in node.input]
        for index, name in enumerate(node.output):
            if name and name not in outputs:
                called = f"{node.name}.{index}" if len(node.output) > 1 else node.name
                renamed[name] = f"{called}.result" if called in taken else called
                taken.add(renamed[name])
        node.output[:] = [renamed.get(name, name) for name in node.output]
    for node in every_node(graph):
        for branch in branches_of(node):
            for value in branch.output:
                value.name = renamed[value.name]
