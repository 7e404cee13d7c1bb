"""Linear formats: the stored bytes, the arithmetic of the kernels that run them, and the ranges static ones need."""

from __future__ import annotations

import functools
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from onnx import numpy_helper

from expe_edge.errors import ConfigError, CorpusError, ExportError
from expe_edge.export.contract import graph_feeds
from expe_edge.export.graph import BuiltGraph, build_graph, graph_contract
from expe_edge.export.nodes import GraphBuilder
from expe_edge.package import TensorSpec
from expe_edge.quant.calibration import CALIBRATION_METHODS, Calibration, measure_ranges, sample_windows
from expe_edge.quant.formats import (
    LINEAR_FORMATS,
    DynamicInt8,
    Float32,
    LinearFormat,
    Range,
    StaticInt8,
    activation_scale,
    make_format,
    quantize_weight,
)
from tests.strategies import random_model, random_tokens, seeds, small_config

# Weights.


def test_quantized_bytes_by_hand() -> None:
    """Columns whose largest magnitudes are 127/64, 0 and 254: scales 1/64, 1 and 2. Halves go to the even level."""
    weight = np.array(
        [
            [127 / 64, 0.0, -254.0],
            [-127 / 64, 0.0, 2.0],
            [0.5, 0.0, 3.0],
            [-1 / 128, 0.0, 100.9],
            [3 / 128, 0.0, 0.0],
        ],
        dtype=np.float32,
    )
    quantized = quantize_weight(weight)
    assert quantized.values.dtype == np.uint8
    assert quantized.scale.dtype == np.float32
    assert quantized.scale.tolist() == [1 / 64, 1.0, 2.0]
    assert quantized.values.T.tolist() == [
        [128 + 127, 128 - 127, 128 + 32, 128 + 0, 128 + 2],
        [128, 128, 128, 128, 128],
        [128 - 127, 128 + 1, 128 + 2, 128 + 50, 128],
    ]
    assert quantized.zero_point.tolist() == [128, 128, 128]


#: Magnitudes that a float32 scale of a 127th still holds to full precision, and 0.
magnitudes = st.floats(2.0**-60, 2.0**60, width=32)
signed = st.builds(lambda sign, value: sign * value, st.sampled_from((-1, 0, 1)), magnitudes)


@given(arrays.arrays(np.float32, st.tuples(st.integers(1, 6), st.integers(1, 4)), elements=signed))
def test_a_weight_is_restored_to_half_a_step_of_its_own_channel(weight: np.ndarray) -> None:
    values, scale = quantize_weight(weight)
    restored = (values.astype(np.float64) - 128) * scale
    assert values.min() >= 1  # −128 is not used: the levels are symmetric
    assert (np.abs(restored - weight) <= scale * (0.5 + 1e-4)).all()  # 127 steps of a scale rounded to float32
    assert (restored[weight == 0] == 0).all()


# Activations.


@pytest.mark.parametrize(
    ("low", "high", "scale", "zero"),
    [
        (0.0, 255.0, 1.0, 0),
        (-255.0, 0.0, 1.0, 255),
        (-1.0, 3.0, 4 / 255, 64),  # 63.75
        (-127.0, 128.0, 1.0, 127),
        (5.0, 510.0, 2.0, 0),  # widened down to 0
        (-510.0, -5.0, 2.0, 255),
        (0.0, 0.0, 1.0, 0),
    ],
)
def test_activation_scales_by_hand(low: float, high: float, scale: float, zero: int) -> None:
    found = activation_scale(low, high)
    assert found == (np.float32(scale), zero)
    assert (found[0].dtype, found[1].dtype) == (np.float32, np.uint8)


@given(signed, signed, st.floats(0, 1))
def test_a_range_holds_zero_exactly_and_everything_within_to_half_a_step(one: float, other: float, part: float) -> None:
    low, high = min(one, other), max(one, other)
    scale, zero = activation_scale(low, high)
    low, high = min(low, 0.0), max(high, 0.0)
    value = low + part * (high - low)
    level = np.clip(np.rint(value / np.float64(scale)) + zero, 0, 255)
    assert abs((level - zero) * np.float64(scale) - value) <= scale * (0.5 + 1e-4)
    assert 0 <= zero <= 255  # so that the level of 0 is the zero point itself
    assert np.clip(np.rint(0 / scale) + zero, 0, 255) == zero


# One linear at a time, as onnxruntime runs it.


class Rounding(Float32):
    """Float32 under the row scaling that rounding formats get."""

    rounds_activations = True


def run_linear(linear: LinearFormat, hidden: np.ndarray, weight: np.ndarray, *, peaked: bool = False) -> np.ndarray:
    """The product of (T, C_in) with (C_in, C_out) in one format."""
    builder = GraphBuilder()
    name = linear.emit(builder, "linear", "hidden", weight, peaked=peaked)
    builder.emit("Identity", [name], ["product"], name="product")
    inputs = TensorSpec("hidden", "float32", ("rows", weight.shape[0]))
    outputs = TensorSpec("product", "float32", ("rows", weight.shape[1]))
    model = builder.model([inputs], [outputs], "test")
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"hidden": hidden})[0]


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


#: Weights with scale 1/128 and activations with scale 1/256 and zero point 0, so that every rescaling is exact in
#: float32 and a product equals its integers.
WEIGHT_STEP, ACTIVATION_STEP = 1 / 128, 1 / 256
EXACT_RANGE: Range = (0.0, 255 / 256)


@pytest.mark.parametrize("linear", [DynamicInt8(), StaticInt8({"linear": EXACT_RANGE})], ids=lambda kind: kind.name)
@pytest.mark.parametrize("signs", ["all positive", "all negative", "pairs", "random"])
def test_extreme_weights_and_activations_do_not_saturate(linear: LinearFormat, signs: str) -> None:
    """Pairs of 255·127 overflow 16 bits twice over, which is where kernels for uint8 by int8 saturate without VNNI."""
    random = np.random.default_rng(0)
    weights = random.integers(-127, 128, size=(64, 48))
    codes = random.integers(0, 256, size=(9, 64))
    if signs != "random":
        codes[:] = 255
        pattern = {"all positive": [1, 1, 1, 1], "all negative": [-1, -1, -1, -1], "pairs": [1, 1, -1, -1]}[signs]
        weights[:] = 127 * np.tile(pattern, 16)[:, None]
    codes[0, 0], weights[0] = 255, 127  # each range and each channel reaches its end
    found = run_linear(linear, (codes * ACTIVATION_STEP).astype(np.float32), (weights * WEIGHT_STEP).astype(np.float32))
    np.testing.assert_array_equal(found, (codes @ weights) * WEIGHT_STEP * ACTIVATION_STEP)


@given(seeds)
def test_both_int8_formats_compute_the_product_of_their_rounded_factors(seed: int) -> None:
    hidden, weight = normal(seed, 5, 24), normal(seed + 1, 24, 16)
    bounds = float(hidden.min()), float(hidden.max())
    scale, zero = activation_scale(*bounds)
    codes = np.clip(np.rint(hidden / scale) + zero, 0, 255)
    values, steps = quantize_weight(weight)
    expected = (codes - zero) @ (values.astype(np.float64) - 128) * scale * steps
    for linear in (DynamicInt8(), StaticInt8({"linear": bounds})):
        np.testing.assert_allclose(run_linear(linear, hidden, weight), expected, rtol=1e-5, atol=1e-5)


@given(seeds)
def test_row_scaling_is_exact_for_float(seed: int) -> None:
    """W·x = m·(W·(x/m)) for rows of very different size."""
    hidden, weight = normal(seed, 6, 16) * 10.0 ** np.arange(-3, 3)[:, None].astype(np.float32), normal(seed, 16, 8)
    plain, scaled = (run_linear(Rounding(), hidden, weight, peaked=peaked) for peaked in (False, True))
    largest = np.abs(plain).max(axis=1, keepdims=True)
    assert (np.abs(scaled - plain) <= 1e-6 * largest).all()


def test_float32_has_no_use_for_row_scaling() -> None:
    builder = GraphBuilder()
    Float32().emit(builder, "linear", "hidden", normal(0, 4, 4), peaked=True)
    assert [node.op_type for node in builder.nodes] == ["MatMul"]


INT8 = [DynamicInt8(), StaticInt8({"linear": (-4e4, 4e4)})]


@pytest.mark.parametrize("linear", INT8, ids=lambda kind: kind.name)
def test_row_scaling_keeps_a_small_token_as_it_is_whatever_another_tokens_peak(linear: LinearFormat) -> None:
    hidden, weight = normal(0, 2, 32), normal(1, 32, 16)
    hidden[1] /= np.abs(hidden[1]).max()
    exact = hidden[0] @ weight

    def small_token(peak: float, *, peaked: bool) -> np.ndarray:
        rows = np.stack([hidden[0], hidden[1] * np.float32(peak)])
        return run_linear(linear, rows, weight, peaked=peaked)[0]

    beside_small, beside_large = (small_token(peak, peaked=True) for peak in (1.0, 2.0**15))
    np.testing.assert_array_equal(beside_large, beside_small)
    error = np.abs(beside_large - exact).max()
    assert 0 < error < 0.02 * np.abs(exact).max()
    assert np.abs(small_token(2.0**15, peaked=False) - exact).max() > 20 * error  # what it is for


@pytest.mark.parametrize("linear", [Rounding(), *INT8], ids=lambda kind: type(kind).__name__)
def test_row_scaling_leaves_rows_of_zeros_zero_and_others_as_they_are(linear: LinearFormat) -> None:
    hidden, weight = np.zeros((2, 8), dtype=np.float32), normal(0, 8, 4)
    hidden[1] = normal(1, 8)
    found = run_linear(linear, hidden, weight, peaked=True)
    np.testing.assert_array_equal(found[0], 0)
    np.testing.assert_array_equal(found[1:], run_linear(linear, hidden[1:], weight, peaked=True))
    np.testing.assert_allclose(found[1], hidden[1] @ weight, atol=0.1)


def test_an_unknown_precision_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(ConfigError) as raised:
        make_format("int8-dinamic")
    assert str(raised.value) == (
        "unknown precision 'int8-dinamic'; did you mean 'int8-dynamic'? "
        "available: float32, int8-dynamic, int8-static; change --precision"
    )


def test_a_static_linear_without_a_range_is_refused_by_name() -> None:
    with pytest.raises(ExportError, match=r"^calibration measured no range for 'layers\.0\.attention\.out'$"):
        make_format("int8-static", {}).emit(
            GraphBuilder(), "layers.0.attention.out", "hidden", np.ones((2, 2), dtype=np.float32)
        )


# Whole graphs: what onnxruntime makes of the nodes, on which speed rests.

CONFIG = small_config()
LINEARS = {
    *(
        f"layers.{layer}.{part}"
        for layer in range(2)
        for part in ("attention.qkv", "attention.out", "feed_forward.up", "feed_forward.down")
    ),
    "head",
}
#: The one kernel that computes a linear of each format.
KERNELS = {"float32": "MatMul", "int8-dynamic": "DynamicQuantizeMatMul", "int8-static": "MatMulIntegerToFloat"}


@functools.cache
def plain_graph() -> BuiltGraph:
    return build_graph(random_model(CONFIG), Float32())


def token_stream(tokens: int) -> np.ndarray:
    return random_tokens(CONFIG, tokens, seed=1)[0].astype(np.int32)


def ranges_of(calibration: Calibration, stream: np.ndarray) -> dict[str, Range]:
    windows = sample_windows(stream, CONFIG.training_length, calibration)
    return measure_ranges(
        plain_graph().model, graph_contract(CONFIG), plain_graph().linear_inputs, windows, calibration
    )


def optimized(precision: str, path: Path) -> onnx.GraphProto:
    """The graph as onnxruntime rewrites it before running."""
    graph = build_graph(
        random_model(CONFIG), make_format(precision, ranges_of(Calibration(windows=2), token_stream(200)))
    )
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(path / "optimized.onnx")
    options.log_severity_level = 3  # it warns that such a file is for this machine alone
    ort.InferenceSession(graph.model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return onnx.load(path / "optimized.onnx").graph


@pytest.mark.parametrize("precision", LINEAR_FORMATS)
def test_every_linear_of_the_optimised_graph_is_one_kernel_on_its_stored_weight(precision: str, tmp_path: Path) -> None:
    graph = optimized(precision, tmp_path)
    weights = {tensor.name: numpy_helper.to_array(tensor).dtype for tensor in graph.initializer}
    for linear in LINEARS:
        users = [node.op_type for node in graph.node if f"{linear}.weight" in node.input]
        assert users == [KERNELS[precision]], linear
        assert weights[f"{linear}.weight"] == (np.float32 if precision == "float32" else np.uint8)


@pytest.mark.parametrize("precision", LINEAR_FORMATS)
def test_the_optimised_graph_fuses_norms_and_attention_and_leaves_no_loose_quantization(
    precision: str, tmp_path: Path
) -> None:
    kinds = Counter(node.op_type for node in optimized(precision, tmp_path).node)
    assert kinds["SimplifiedLayerNormalization"] == 2 * CONFIG.num_hidden_layers + 1
    assert kinds["GroupQueryAttention"] == CONFIG.num_hidden_layers
    assert not kinds.keys() & {"DynamicQuantizeLinear", "MatMulInteger", "DequantizeLinear", "Pow", "Sqrt"}
    assert kinds["QuantizeLinear"] == (len(LINEARS) if precision == "int8-static" else 0)


def activations(graph: BuiltGraph, windows: list[np.ndarray]) -> dict[str, np.ndarray]:
    """Every row that enters each linear over the windows, (tokens, C_in): those tensors asked for as outputs."""
    contract, model = graph_contract(CONFIG), onnx.ModelProto()
    model.CopyFrom(graph.model)
    names = sorted(set(graph.linear_inputs.values()))
    model.graph.output.extend(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    runs = [session.run(names, graph_feeds(contract, window[None])) for window in windows]
    values = {name: np.concatenate([run[index][0] for run in runs]) for index, name in enumerate(names)}
    return {linear: values[name] for linear, name in graph.linear_inputs.items()}


def test_only_what_stands_behind_a_gate_is_scaled_by_row() -> None:
    graph = build_graph(random_model(CONFIG), DynamicInt8())
    seen = activations(graph, sample_windows(token_stream(100), CONFIG.training_length, Calibration(windows=2)))
    for linear, rows in seen.items():
        peaks = np.abs(rows).max(axis=1)
        if linear.endswith("feed_forward.down"):
            np.testing.assert_array_equal(peaks, 1)
        else:
            assert len(np.unique(peaks)) > 1


# Calibration.


@pytest.mark.parametrize("method", CALIBRATION_METHODS)
def test_every_calibration_method_measures_every_linear(method: str) -> None:
    calibration, stream = Calibration(method, windows=6), token_stream(300)
    found = ranges_of(calibration, stream)
    assert found.keys() == LINEARS
    seen = activations(plain_graph(), sample_windows(stream, CONFIG.training_length, calibration))
    for linear, (low, high) in found.items():
        values = seen[linear]
        extent = np.abs(values).max()
        covered = np.mean((values >= low - 1e-5 * extent) & (values <= high + 1e-5 * extent))
        # Histogram methods may leave out rare values, and no method goes beyond the largest magnitude it has seen.
        assert covered == 1 if method == "minmax" else covered > 0.99, linear
        assert -1.01 * extent <= low < 0 < high <= 1.01 * extent, linear


def test_minmax_ranges_are_the_extremes_of_what_was_seen() -> None:
    calibration, stream = Calibration(windows=5, seed=3), token_stream(300)
    found = ranges_of(calibration, stream)
    windows = sample_windows(stream, CONFIG.training_length, calibration)
    for linear, values in activations(plain_graph(), windows).items():
        np.testing.assert_allclose(found[linear], (values.min(), values.max()), rtol=1e-5)


def test_percentile_leaves_out_the_rarest_values() -> None:
    """It keeps 99.999 %, so with a hundred thousand values the most extreme ones fall outside."""
    stream = token_stream(8000)
    minmax, percentile = (ranges_of(Calibration(method, windows=300), stream) for method in ("minmax", "percentile"))
    for linear in LINEARS:
        assert percentile[linear][0] > minmax[linear][0] or percentile[linear][1] < minmax[linear][1]


@pytest.mark.parametrize("method", CALIBRATION_METHODS)
def test_windows_of_one_token_have_nothing_to_decode_and_are_measured_all_the_same(method: str) -> None:
    windows = sample_windows(token_stream(50), 1, Calibration(windows=3))
    graph, contract = plain_graph(), graph_contract(CONFIG)
    found = measure_ranges(graph.model, contract, graph.linear_inputs, windows, Calibration(method))
    for linear, rows in activations(graph, windows).items():
        np.testing.assert_allclose(found[linear], (rows.min(), rows.max()), rtol=0.05)


@given(st.integers(1, 40), st.integers(0, 30), seeds)
def test_windows_are_pieces_of_the_stream_chosen_by_the_seed(length: int, more: int, seed: int) -> None:
    stream = np.arange(length + more, dtype=np.int32)
    calibration = Calibration(windows=7, seed=seed)
    windows = sample_windows(stream, length, calibration)
    assert len(windows) == 7
    for window in windows:
        assert window.dtype == np.int64
        np.testing.assert_array_equal(window, np.arange(window[0], window[0] + length))
    np.testing.assert_array_equal(windows, sample_windows(stream, length, calibration))


def test_both_ends_of_the_stream_can_be_drawn() -> None:
    firsts = {int(window[0]) for window in sample_windows(np.arange(6, dtype=np.int32), 4, Calibration(windows=50))}
    assert firsts == {0, 1, 2}


def test_text_shorter_than_a_window_is_refused() -> None:
    with pytest.raises(CorpusError) as raised:
        sample_windows(token_stream(15), 16, Calibration())
    assert str(raised.value) == (
        "the calibration text has 15 tokens, less than one window of 16; give more with --calibration-data"
    )


def test_an_unknown_calibration_method_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(ExportError) as raised:
        Calibration("minimax")
    assert str(raised.value) == (
        "unknown calibration method 'minimax'; did you mean 'minmax'? "
        "available: entropy, minmax, percentile; change --calibration-method"
    )


def test_calibrating_on_no_windows_is_refused() -> None:
    with pytest.raises(ExportError, match=r"^--calibration-windows is 0; at least 1$"):
        Calibration(windows=0)
