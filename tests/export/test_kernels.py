"""What onnxruntime makes of the nodes, on which speed rests: one kernel for each linear, and the check that says so."""

from __future__ import annotations

import functools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto

from expe_edge.calibration.evidence import Evidence
from expe_edge.calibration.observations import Calibration, sample_windows
from expe_edge.errors import ExportError
from expe_edge.export.kernels import require_kernels
from expe_edge.graph.build import BuiltGraph, build_graph
from expe_edge.graph.linears import LINEAR_FORMATS, DynamicInt8, LinearFormat, StaticInt8
from expe_edge.graph.matrices import ChannelMatrix
from expe_edge.graph.nodes import FLOAT, GraphBuilder, every_node
from expe_edge.quant.channels import Range
from expe_edge.quant.formats import Formats
from expe_edge.quant.recipe import CACHES, EMBEDDINGS, Recipe
from tests.conftest import HAS_INT8_CACHE
from tests.graphs import CONFIG, LINEARS, operators_of, random_weights, rows_of, token_stream
from tests.strategies import small_config

#: The one kernel that computes a linear of each format, and the element that its weight is stored in.
KERNELS = {
    "float32": ("MatMul", TensorProto.FLOAT),
    "float16": ("MatMul", TensorProto.FLOAT16),
    "bfloat16": ("MatMul", TensorProto.BFLOAT16),
    "int8-dynamic": ("DynamicQuantizeMatMul", TensorProto.UINT8),
    "int8-static": ("MatMulIntegerToFloat", TensorProto.UINT8),
    "int8-weight": ("MatMulNBits", TensorProto.UINT8),
    "int4-weight": ("MatMulNBits", TensorProto.UINT8),
}
SEVEN_BIT = [Recipe(precision, reduce_range=True) for precision in ("int8-dynamic", "int8-static")]
#: Every precision, with every embedding and cache, and int8 of 7 bits.
RECIPES = [
    *map(Recipe, LINEAR_FORMATS),
    *SEVEN_BIT,
    *(Recipe("int8-static", embedding=embedding) for embedding in EMBEDDINGS),
    *(Recipe("int4-weight", cache=cache, embedding="int4") for cache in CACHES if cache == "float32" or HAS_INT8_CACHE),
]
every_precision = pytest.mark.parametrize("precision", LINEAR_FORMATS)
every_recipe = pytest.mark.parametrize(
    "recipe", RECIPES, ids=lambda recipe: "-".join(filter(None, (recipe.name, recipe.embedding)))
)


@functools.cache
def evidence(*, tied: bool = False) -> Evidence:
    calibration, config = Calibration(windows=8), small_config(tie_word_embeddings=tied)
    windows = sample_windows(token_stream(200, config), config.training_length, calibration)
    return Evidence(random_weights(config), calibration, lambda: windows)


def built(recipe: Recipe, *, tied: bool = False) -> BuiltGraph:
    """The graph of a recipe, as the exporter asks for it."""
    formats = Formats(dict.fromkeys(LINEARS, recipe.precision), recipe.embedding or "float32", recipe.cache)
    return evidence(tied=tied).build(recipe, formats)


def optimized(model: onnx.ModelProto, path: Path) -> onnx.GraphProto:
    """The graph as onnxruntime rewrites it before running."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(path / "optimized.onnx")
    options.log_severity_level = 3  # it warns that such a file is for this machine alone
    ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return onnx.load(path / "optimized.onnx").graph


def held_weight(graph: onnx.GraphProto, linear: str) -> str:
    """What a linear's stored weight is called once it is unpacked, which is done at load."""
    users = {name: node for node in graph.node for name in node.input}
    name = f"{linear}.weight"
    while users[name].op_type in ("Cast", "Pad", "Reshape"):
        name = users[name].output[0]
    return name


# What runs.


@every_precision
def test_every_linear_of_the_optimised_graph_is_one_kernel_on_its_stored_weight(precision: str, tmp_path: Path) -> None:
    graph = built(Recipe(precision)).model
    stored = {tensor.name: tensor.data_type for tensor in graph.graph.initializer}
    found = optimized(graph, tmp_path)
    kernel, element = KERNELS[precision]
    for linear in LINEARS:
        users = [node.op_type for node in found.node if held_weight(graph.graph, linear) in node.input]
        assert users == [kernel], linear
        assert stored[f"{linear}.weight"] == element


@every_recipe
def test_the_optimised_graph_fuses_norms_and_attention_and_leaves_no_loose_quantization(
    recipe: Recipe, tmp_path: Path
) -> None:
    graph = optimized(built(recipe).model, tmp_path)
    kinds = Counter(node.op_type for node in graph.node if not node.name.startswith("embedding"))
    attention = Counter(node.op_type for node in every_node(graph))  # over an int8 cache one of two, in branches
    kernel = KERNELS[recipe.precision][0]
    assert kinds["SimplifiedLayerNormalization"] == 1
    assert kinds["SkipSimplifiedLayerNormalization"] == 2 * CONFIG.num_hidden_layers
    assert not kinds["Transpose"]
    assert attention["GroupQueryAttention"] == CONFIG.num_hidden_layers
    assert attention["MultiHeadAttention"] == (CONFIG.num_hidden_layers if recipe.cache == "int8" else 0)
    assert kinds[kernel] >= len(LINEARS)
    assert not kinds.keys() & {"DynamicQuantizeLinear", "MatMulInteger", "DequantizeLinear", "Pow", "Sqrt", "Pad"}
    assert kinds["QuantizeLinear"] == (len(LINEARS) if recipe.precision == "int8-static" else 0)


@every_recipe
def test_every_recipe_runs_the_kernels_it_promises(recipe: Recipe) -> None:
    require_kernels(operators_of(built(recipe).model), dict.fromkeys(LINEARS, recipe.precision))


@pytest.mark.parametrize("recipe", [*map(Recipe, LINEAR_FORMATS), *SEVEN_BIT], ids=lambda recipe: recipe.name)
def test_a_head_tied_to_the_embedding_runs_in_its_kernel_too(recipe: Recipe) -> None:
    require_kernels(operators_of(built(recipe, tied=True).model), dict.fromkeys(LINEARS, recipe.precision))


def test_linears_of_different_formats_run_each_in_its_own_kernel() -> None:
    formats = dict(zip(sorted(LINEARS), [*LINEAR_FORMATS, "int8-static", "int4-weight"], strict=True))
    operators = operators_of(evidence().build(Recipe(), Formats(formats)).model)
    require_kernels(operators, formats)
    assert (operators["MatMulNBits"], operators["MatMulIntegerToFloat"], operators["DynamicQuantizeMatMul"]) == (
        3,
        2,
        1,
    )


@pytest.mark.parametrize("kind", [DynamicInt8, StaticInt8], ids=lambda kind: kind.name)
def test_only_what_stands_behind_a_gate_is_scaled_by_row(kind: type[LinearFormat[Any]]) -> None:
    graph = built(Recipe(kind.name))
    assert {name for name, linear in graph.linears.items() if linear.peaked} == {
        f"layers.{layer}.feed_forward.down" for layer in range(CONFIG.num_hidden_layers)
    }
    quantized = {
        node.name.removesuffix(".quantize"): node.input[0]
        for node in graph.model.graph.node
        if node.name.endswith(".quantize")
    }
    assert quantized.keys() == LINEARS
    seen = rows_of(graph.model, quantized, sample_windows(token_stream(100), 16, Calibration(windows=2)))
    for linear, rows in seen.items():
        peaks = np.abs(rows).max(axis=1)
        if graph.linears[linear].peaked:
            np.testing.assert_array_equal(peaks, 1)
        else:
            assert len(np.unique(peaks)) > 1


# The check.


class Unfused(DynamicInt8):
    """The same arithmetic with the two rescalings one after the other, which onnxruntime does not fuse."""

    def product(
        self, graph: GraphBuilder, linear: str, hidden: str, matrix: ChannelMatrix, *, within: Range | None = None
    ) -> str:
        values, scale, zero_points = matrix.integers(graph, linear)
        codes, step, zero = graph.multi("DynamicQuantizeLinear", [hidden], 3, name=f"{linear}.quantize")
        product = graph.op("MatMulInteger", codes, values, zero, zero_points, name=f"{linear}.integer")
        product = graph.op("Cast", product, name=f"{linear}.cast", to=FLOAT)
        return graph.op("Mul", graph.op("Mul", product, step), scale, name=linear)


def test_a_linear_that_does_not_fuse_is_noticed() -> None:
    formats: dict[str, LinearFormat[Any]] = {
        **dict.fromkeys(LINEARS, DynamicInt8()),
        "layers.1.attention.out": Unfused(),
    }
    operators = operators_of(build_graph(random_weights(), formats).model)
    assert operators["MatMulInteger"] == 1
    with pytest.raises(ExportError) as raised:
        require_kernels(operators, dict.fromkeys(LINEARS, "int8-dynamic"))
    assert str(raised.value) == (
        f"onnxruntime {ort.__version__} runs 8 linears as DynamicQuantizeMatMul, not 9; others would run in float32. "
        "Choose another `precision`, or another onnxruntime"
    )


@pytest.mark.parametrize("precision", [name for name in LINEAR_FORMATS if KERNELS[name][0] != "MatMul"])
@pytest.mark.parametrize("found", [len(LINEARS) - 1, len(LINEARS) + 1])
def test_one_kernel_too_few_or_too_many_is_noticed(precision: str, found: int) -> None:
    linears, kernel = dict.fromkeys(LINEARS, precision), KERNELS[precision][0]
    require_kernels({kernel: len(LINEARS)}, linears)
    with pytest.raises(ExportError, match=f" runs {found} linears as {kernel}, not {len(LINEARS)}; "):
        require_kernels({kernel: found}, linears)


@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
def test_float_linears_promise_no_more_than_that_none_is_quantized(precision: str) -> None:
    """Positions use the float kernel too, so its number tells nothing."""
    linears = dict.fromkeys(LINEARS, precision)
    require_kernels({"MatMul": 20}, linears)
    with pytest.raises(ExportError, match=" runs 1 linears as MatMulNBits, not 0; "):
        require_kernels({"MatMul": 20, "MatMulNBits": 1}, linears)
