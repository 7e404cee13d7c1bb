"""Linear formats: the stored bytes of int8 channels, activations, and the arithmetic of the kernels that run them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from onnx import numpy_helper

from expe_edge.errors import ConfigError, ExportError
from expe_edge.graph.linears import (
    LINEAR_FORMATS,
    BlockWeight,
    DynamicInt8,
    Float32,
    FormatOptions,
    LinearFormat,
    make_format,
)
from expe_edge.graph.matrices import FloatMatrix
from expe_edge.graph.nodes import GraphBuilder
from expe_edge.quant.blocks import into_blocks
from expe_edge.quant.channels import Range, activation_scale, quantize_channels
from tests.graphs import normal, run_linear, static
from tests.strategies import seeds

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
    quantized = quantize_channels(weight)
    assert quantized.values.dtype == np.uint8
    assert quantized.scale.dtype == np.float32
    assert quantized.scale.tolist() == [1 / 64, 1.0, 2.0]
    assert quantized.values.T.tolist() == [
        [128 + 127, 128 - 127, 128 + 32, 128 + 0, 128 + 2],
        [128, 128, 128, 128, 128],
        [128 - 127, 128 + 1, 128 + 2, 128 + 50, 128],
    ]
    assert quantized.zero_points.tolist() == [128, 128, 128]


def test_seven_bits_by_hand() -> None:
    """Scales 1/64 and 1 of a largest magnitude of 63; int8 around 0, whose kernel is the faster one without VNNI."""
    weight = np.array([[63 / 64, 0.0], [-63 / 64, 2.5], [1.5 / 64, -63.0]], dtype=np.float32)
    quantized = quantize_channels(weight, 7)
    assert quantized.values.dtype == np.int8
    assert quantized.scale.tolist() == [1 / 64, 1.0]
    assert quantized.values.T.tolist() == [[63, -63, 2], [0, 2, -63]]
    assert quantized.zero_points.tolist() == [0, 0]
    assert quantized.zero_points.dtype == np.int8
    np.testing.assert_array_equal(quantized.restored(), [[63 / 64, 0], [-63 / 64, 2], [2 / 64, -63]])


def test_half_precision_is_stored_as_the_nearest_of_its_numbers() -> None:
    """float16 keeps 10 bits after the first, bfloat16 7: 1 + 2^-11 and 1 + 2^-8 are halves, which go to even."""
    weight = np.array([[1 + 2**-11, 1 + 3 * 2**-11, -3.0], [1 + 2**-8, 1 + 3 * 2**-8, 2.0**-20]], dtype=np.float32)
    stored = {}
    for precision in ("float16", "bfloat16"):
        builder = GraphBuilder()
        format_ = make_format(precision)
        format_.emit(builder, "linear", "hidden", format_.store("linear", weight))
        (tensor,) = builder.graph.initializer
        assert tensor.name == "linear.weight"
        stored[precision] = numpy_helper.to_array(tensor).view(np.uint16).tolist()
    assert stored["float16"] == [[0x3C00, 0x3C02, 0xC200], [0x3C04, 0x3C0C, 0x0010]]
    assert stored["bfloat16"] == [[0x3F80, 0x3F80, 0xC040], [0x3F80, 0x3F82, 0x3580]]
    np.testing.assert_array_equal(
        make_format("bfloat16").store("linear", weight).restored(), [[1, 1, -3], [1, 1 + 2**-6, 2**-20]]
    )


#: Magnitudes that a float32 scale of a 127th still holds to full precision, and 0.
magnitudes = st.floats(2.0**-60, 2.0**60, width=32)
signed = st.builds(lambda sign, value: sign * value, st.sampled_from((-1, 0, 1)), magnitudes)


@given(arrays.arrays(np.float32, st.tuples(st.integers(1, 6), st.integers(1, 4)), elements=signed), st.booleans())
def test_a_weight_is_restored_to_half_a_step_of_its_own_channel(weight: np.ndarray, reduce_range: bool) -> None:
    values, scale, zero_point = quantize_channels(weight, 7 if reduce_range else 8)
    levels = values.astype(np.float64) - zero_point
    restored = levels * scale
    assert np.abs(levels).max() <= (63 if reduce_range else 127)  # the levels are symmetric
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
    assert found == (np.float32(scale), np.uint8(zero))
    assert (found[0].dtype, found[1].dtype) == (np.dtype(np.float32), np.dtype(np.uint8))


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


#: Weights with scale 1/128 and activations with scale 1/256 and zero point 0, so that every rescaling is exact in
#: float32 and a product equals its integers.
WEIGHT_STEP, ACTIVATION_STEP = 1 / 128, 1 / 256
EXACT_RANGE: Range = (0.0, 255 / 256)


@pytest.mark.parametrize("reduce_range", [False, True], ids=["8 bits", "7 bits"])
@pytest.mark.parametrize("precision", ["int8-dynamic", "int8-static"])
@pytest.mark.parametrize("signs", ["all positive", "all negative", "pairs", "random"])
def test_extreme_weights_and_activations_do_not_saturate(precision: str, signs: str, reduce_range: bool) -> None:
    """Pairs of 255·127 overflow 16 bits twice over, which is where kernels for uint8 by int8 saturate without VNNI.

    Pairs of 255·63 do not, so 7 bits may use those kernels.
    """
    linear = make_format(precision, FormatOptions(reduce_range, ranges={"linear": EXACT_RANGE}))
    random, limit = np.random.default_rng(0), 63 if reduce_range else 127
    weights = random.integers(-limit, limit + 1, size=(64, 48))
    codes = random.integers(0, 256, size=(9, 64))
    if signs != "random":
        codes[:] = 255
        pattern = {"all positive": [1, 1, 1, 1], "all negative": [-1, -1, -1, -1], "pairs": [1, 1, -1, -1]}[signs]
        weights[:] = limit * np.tile(pattern, 16)[:, None]
    codes[0, 0], weights[0] = 255, limit  # each range and each channel reaches its end
    found = run_linear(linear, (codes * ACTIVATION_STEP).astype(np.float32), (weights * WEIGHT_STEP).astype(np.float32))
    np.testing.assert_array_equal(found, (codes @ weights) * WEIGHT_STEP * ACTIVATION_STEP)


#: Every format, the int8 ones with weights of 8 and of 7 bits.
VARIANTS = [*((precision, False) for precision in LINEAR_FORMATS), ("int8-dynamic", True), ("int8-static", True)]


def either_side(linear: LinearFormat[Any], hidden: np.ndarray, *, peaked: bool) -> np.ndarray:
    """How far a value on the boundary of two levels may fall to the other side in another order of float32, (T, C)."""
    slack = 1e-6 * np.abs(hidden).max(axis=1, keepdims=True)
    ends = hidden.min(axis=1, keepdims=True), hidden.max(axis=1, keepdims=True)
    up, down = (
        linear.round_inputs("linear", np.clip(hidden + shift, *ends), peaked=peaked) for shift in (slack, -slack)
    )
    apart: np.ndarray = np.abs(up - down)
    return apart


def kernel_error(linear: LinearFormat[Any], hidden: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """What the kernel's own rounding may add to the product, (T, C_out).

    MatMulNBits rounds each block of the inputs to ±127 levels of the block's largest magnitude.
    """
    float_sums: np.ndarray = 1e-5 * (np.abs(hidden) @ np.abs(weight))
    if not isinstance(linear, BlockWeight):
        return float_sums
    size = linear.store("linear", weight).codes.block_size
    steps = np.abs(into_blocks(hidden, size)).max(axis=2) / 127  # (T, blocks)
    error: np.ndarray = float_sums + steps / 2 @ np.abs(into_blocks(weight.T, size)).sum(axis=2).T * 1.01
    return error


@pytest.mark.parametrize("peaked", [False, True], ids=["", "peaked"])
@pytest.mark.parametrize(("precision", "reduce_range"), VARIANTS)
@settings(max_examples=15)
@given(seeds, st.sampled_from([1, 5]), st.sampled_from([24, 64, 130]))
def test_onnxruntime_computes_the_product_of_the_factors_as_numpy_rounds_them(
    precision: str, reduce_range: bool, peaked: bool, seed: int, tokens: int, width: int
) -> None:
    """One token and several run in different kernels."""
    hidden, weight = normal(seed, tokens, width), normal(seed + 1, width, 16)
    ranges = {"linear": (float(hidden.min()), float(hidden.max()))}
    linear = make_format(precision, FormatOptions(reduce_range, ranges=ranges))
    rounded, restored = linear.round_inputs("linear", hidden, peaked=peaked), linear.store("linear", weight).restored()
    expected = rounded.astype(np.float64) @ restored
    found = run_linear(linear, hidden, weight, peaked=peaked)
    allowed = kernel_error(linear, rounded, restored) + either_side(linear, hidden, peaked=peaked) @ np.abs(restored)
    assert (np.abs(found - expected) <= allowed).all()
    if precision != "float32":
        assert not np.array_equal(restored, weight)


@given(seeds)
def test_row_scaling_is_exact_for_float(seed: int) -> None:
    """W·x = m·(W·(x/m)) for rows of very different size."""
    hidden, weight = normal(seed, 6, 16) * 10.0 ** np.arange(-3, 3)[:, None].astype(np.float32), normal(seed, 16, 8)
    plain, scaled = (run_linear(Rounding(), hidden, weight, peaked=peaked) for peaked in (False, True))
    largest = np.abs(plain).max(axis=1, keepdims=True)
    assert (np.abs(scaled - plain) <= 1e-6 * largest).all()


def test_float32_has_no_use_for_row_scaling() -> None:
    builder = GraphBuilder()
    Float32().emit(builder, "linear", "hidden", FloatMatrix(normal(0, 4, 4)), peaked=True)
    assert [node.op_type for node in builder.graph.node] == ["MatMul"]


INT8 = [DynamicInt8(), static((-4e4, 4e4))]


@pytest.mark.parametrize("linear", INT8, ids=lambda kind: kind.name)
def test_row_scaling_keeps_a_small_token_as_it_is_whatever_another_tokens_peak(linear: LinearFormat[Any]) -> None:
    hidden, weight = normal(0, 2, 32), normal(1, 32, 16)
    hidden[1] /= np.abs(hidden[1]).max()
    exact = hidden[0] @ weight

    def small_token(peak: float, *, peaked: bool) -> np.ndarray:
        rows = np.stack([hidden[0], hidden[1] * np.float32(peak)])
        first: np.ndarray = run_linear(linear, rows, weight, peaked=peaked)[0]
        return first

    beside_small, beside_large = (small_token(peak, peaked=True) for peak in (1.0, 2.0**15))
    np.testing.assert_array_equal(beside_large, beside_small)
    error = np.abs(beside_large - exact).max()
    assert 0 < error < 0.02 * np.abs(exact).max()
    assert np.abs(small_token(2.0**15, peaked=False) - exact).max() > 20 * error  # what it is for


@pytest.mark.parametrize("linear", [Rounding(), *INT8], ids=lambda kind: type(kind).__name__)
def test_row_scaling_leaves_rows_of_zeros_zero_and_others_as_they_are(linear: LinearFormat[Any]) -> None:
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
        "unknown precision 'int8-dinamic'; did you mean 'int8-dynamic'? available: bfloat16, float16, float32, "
        "int4-weight, int8-dynamic, int8-static, int8-weight; change `precision`"
    )


def test_a_static_linear_without_a_range_is_refused_by_name() -> None:
    name, linear = "layers.0.attention.out", make_format("int8-static")
    matrix = linear.store(name, normal(0, 2, 2))
    with pytest.raises(ExportError, match=r"^calibration measured no range for 'layers\.0\.attention\.out'$"):
        linear.emit(GraphBuilder(), name, "hidden", matrix)
