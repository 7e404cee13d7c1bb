"""Functions of packages' graphs: kernels that are built here compute what the chains do."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from expe_edge.export.kernels import optimized_operators
from expe_edge.graph.nodes import OWN
from expe_edge.package.directory import MODEL_FILE
from tests.alone import open_alone

KINDS = ("SwiGLU", "GatedHeads", "Slopes", "SlopeBias")


class Sizes(NamedTuple):
    """Of a run. size: of a head. width: of the hidden states, and of half of what enters SwiGLU."""

    rows: int
    tokens: int
    heads: int
    size: int
    width: int
    keys: int


SIZES = [
    Sizes(1, 1, 1, 1, 1, 1),
    Sizes(1, 1, 12, 64, 768, 300),
    Sizes(2, 5, 3, 8, 37, 17),
    Sizes(3, 70, 4, 24, 130, 33),
]

Floats = npt.NDArray[np.float32]


@pytest.fixture(scope="module")
def functions(packages: Path) -> dict[str, onnx.FunctionProto]:
    """Those of a package's graph."""
    model = onnx.load(packages / "float32" / MODEL_FILE)
    return {function.name: function for function in model.functions}


def session(function: onnx.FunctionProto, library: Path | None, threads: int = 1) -> ort.InferenceSession:
    """Open a graph of the function alone."""
    node = helper.make_node(function.name, function.input, ["y"], domain=OWN)
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in function.input]
    graph = helper.make_graph([node], "alone", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)])
    opsets = [*function.opset_import, helper.make_opsetid(OWN, 1)]
    model = helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=9)
    return open_alone(model, threads, library)


def shapes(kind: str, of: Sizes) -> list[tuple[int, ...]]:
    """Return the shapes of a function's inputs."""
    hidden, by_head = (of.rows, of.tokens, of.width), (of.heads, of.width)
    joined = of.heads * of.size
    every: dict[str, list[tuple[int, ...]]] = {
        "SwiGLU": [(of.rows, of.tokens, 2 * of.width)],
        "GatedHeads": [(of.rows, of.tokens, joined), hidden, by_head, (of.heads, joined)],
        "Slopes": [hidden, by_head, (of.heads, 1), (of.heads, 1)],
        "SlopeBias": [(of.rows, of.heads, of.tokens), (of.rows, 1, of.tokens, of.keys)],
    }
    return every[kind]


def tensors(kind: str, of: Sizes, scale: float = 1.0) -> list[Floats]:
    """Return random inputs. What spreads gates over columns is ones."""
    random = np.random.default_rng(of.rows)
    made = [scale * random.standard_normal(shape).astype(np.float32) for shape in shapes(kind, of)]
    if kind == "GatedHeads":
        made[-1] = np.repeat(np.eye(of.heads, dtype=np.float32), of.size, axis=1)
    return made


def run(function: onnx.FunctionProto, library: Path | None, inputs: list[Floats], threads: int = 1) -> Floats:
    """Return the function's output."""
    (output,) = session(function, library, threads).run(None, dict(zip(function.input, inputs, strict=True)))
    made: Floats = output
    return made


def test_graphs_have_these_functions(functions: dict[str, onnx.FunctionProto]) -> None:
    assert functions.keys() == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_kernels_compute_what_chains_do(
    library: Path, functions: dict[str, onnx.FunctionProto], kind: str, sizes: Sizes, scale: float
) -> None:
    inputs = tensors(kind, sizes, scale)
    chain = run(functions[kind], None, inputs)
    for threads in (1, 2):
        ours = run(functions[kind], library, inputs, threads)
        assert ours.shape == chain.shape
        np.testing.assert_allclose(ours, chain, rtol=2e-5, atol=2e-6 * float(np.abs(chain).max()))


def test_distances_may_be_shared_by_rows(library: Path, functions: dict[str, onnx.FunctionProto]) -> None:
    slopes, distances = tensors("SlopeBias", Sizes(3, 5, 2, 1, 1, 9))
    found = run(functions["SlopeBias"], library, [slopes, distances[:1]])
    np.testing.assert_array_equal(found, slopes[..., None] * distances[:1])


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_that_do_not_agree_are_refused(
    library: Path, functions: dict[str, onnx.FunctionProto], kind: str
) -> None:
    inputs = tensors(kind, SIZES[2])
    inputs[-1 if kind != "GatedHeads" else 0] = np.zeros((7, 5, 3), dtype=np.float32)
    with pytest.raises(Exception, match=f"{kind}: "):
        run(functions[kind], library, inputs)


def test_onnxruntime_puts_chains_in_their_place(packages: Path) -> None:
    found = optimized_operators(packages / "float32" / MODEL_FILE)
    assert not found.keys() & set(KINDS)
    assert found["QuickGelu"] > 0  # what it fuses of a chain
