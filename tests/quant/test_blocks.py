"""Weights of few bits in blocks: the bytes, the rounding, and the storage without padding."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from onnx import numpy_helper

from expe_edge.graph.matrices import BlockMatrix
from expe_edge.graph.nodes import FLOAT, GraphBuilder
from expe_edge.quant.blocks import LARGEST_HALF, SMALLEST_HALF, BlockCodes, encode, midpoint, round_to_nearest, storable
from tests.graphs import normal, run_nodes
from tests.strategies import seeds

# Bytes.


def test_four_bits_by_hand() -> None:
    """Code 8 is zero; the largest magnitude is code 0, −8 steps of a scale of the other sign; halves go to even."""
    matrix = np.array([[-8.0, 3.5, 1.0, 0.0, 2.0], [4.0, -1.0, 0.5, 0.2, 0.0]], dtype=np.float32)
    found = round_to_nearest(matrix, 4, 4)
    assert found.scale.tolist() == [[1.0, -0.25], [-0.5, 1.0]]
    assert found.codes.tolist() == [[[0, 12, 9, 8], [0, 8, 8, 8]], [[0, 10, 7, 8], [8, 8, 8, 8]]]
    assert found.packed().tolist() == [[[0xC0, 0x89], [0x80, 0x88]], [[0xA0, 0x87], [0x88, 0x88]]]  # earlier is low
    assert found.packed().dtype == np.uint8
    assert found.restored().tolist() == [[-8.0, 4.0, 1.0, 0.0, 2.0], [4.0, -1.0, 0.5, 0.0, 0.0]]


def test_eight_bits_by_hand() -> None:
    """±127 steps around 128; halves go to even."""
    matrix = np.array([[127.0, -127.0, 62.5, 0.4, 254.0, -3.0]], dtype=np.float32)
    found = round_to_nearest(matrix, 8, 4)
    assert found.scale.tolist() == [[1.0, 2.0]]
    assert found.codes.tolist() == [[[255, 1, 190, 128], [255, 126, 128, 128]]]
    assert found.packed().tolist() == found.codes.tolist()
    assert found.restored().tolist() == [[127.0, -127.0, 62.0, 0.0, 254.0, -4.0]]


@pytest.mark.parametrize(("bits", "ends"), [(4, [0, 15]), (8, [1, 255])])
def test_what_is_out_of_range_gets_the_last_code(bits: int, ends: list[int]) -> None:
    assert encode(np.array([[-1e9, 1e9]]), np.array([0.5]), bits).tolist() == [ends]


@given(seeds, st.sampled_from([4, 8]), st.integers(1, 70), st.sampled_from([16, 32, 64]))
def test_the_last_block_is_padded_with_zeros_that_cost_nothing(seed: int, bits: int, columns: int, block: int) -> None:
    matrix = normal(seed, 3, columns)
    found = round_to_nearest(matrix, bits, block)
    flat = found.codes.reshape(3, -1)
    assert flat.shape[1] % block == 0
    assert (flat[:, columns:] == midpoint(bits)).all()
    assert found.restored().shape == matrix.shape


# Rounding.

#: Magnitudes that a float32 scale of a 127th still holds to full precision, of both signs, and 0.
magnitudes = st.floats(2.0**-60, 2.0**60, width=32)
values = st.builds(lambda sign, value: sign * value, st.sampled_from((-1, 0, 1)), magnitudes)
matrices = arrays.arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 40)), elements=values)
small = st.floats(-8, 8, width=32)
ordinary = arrays.arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 40)), elements=small)


@given(matrices | ordinary, st.sampled_from([4, 8]))
def test_a_value_is_restored_to_half_a_step_of_its_own_block(matrix: np.ndarray, bits: int) -> None:
    """4 bits reach 8 steps to one side and 7 to the other: what lies beyond the seventh is off by up to a whole one."""
    found = round_to_nearest(matrix, bits, 16)
    steps = found.scale.astype(np.float64).repeat(16, axis=1)[:, : matrix.shape[1]]
    error, levels = np.abs(found.restored() - matrix.astype(np.float64)), matrix / steps
    reached = (levels >= -8) & (levels <= 7.5) if bits == 4 else np.full(matrix.shape, True)
    assert (error <= np.abs(steps) * (np.where(reached, 0.5, 1) + 1e-4)).all()  # float32 rounds scale and product
    assert (found.restored()[matrix == 0] == 0).all()


scales = arrays.arrays(np.float64, st.integers(1, 5), elements=st.floats(SMALLEST_HALF, LARGEST_HALF))


@given(scales, seeds)
def test_storable_scales_are_half_precision_rounded_away_from_zero_by_less_than_a_step(
    sizes: np.ndarray, seed: int
) -> None:
    scale = sizes * np.random.default_rng(seed).choice([-1, 1], size=sizes.shape)
    found = storable(scale)
    half = np.abs(found).astype(np.float16)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(half.astype(np.float32), np.abs(found))
    np.testing.assert_array_equal(np.sign(found), np.sign(scale))
    assert (np.abs(found) >= np.abs(scale)).all()
    assert (np.nextafter(half, np.float16(0)).astype(np.float64) < np.abs(scale)).all()


@pytest.mark.parametrize("odd", [2.0**-15, 65505.0, 1e-30, 1e30])
def test_scales_of_which_half_precision_has_no_normal_number_stay_as_they_are(odd: float) -> None:
    """One is enough: a tensor has one type."""
    scale = np.array([0.3, -odd], dtype=np.float64)
    np.testing.assert_array_equal(storable(scale), scale.astype(np.float32))
    assert storable(scale[:1]) > np.float32(0.3)


@given(st.floats(SMALLEST_HALF, LARGEST_HALF))
def test_rounding_up_keeps_the_largest_value_of_a_block_in_range(scale: float) -> None:
    largest = np.float32(scale * 8)
    for signed in (largest, -largest):
        found = round_to_nearest(np.array([[signed]]), 4, 16)
        assert found.codes[0, 0, 0] == 0
        assert abs(found.restored()[0, 0] - signed) <= 2.0**-10 * largest


# Storage.


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("columns", "block"), [(100, 64), (101, 64), (64, 64), (16, 128), (200, 32), (1, 16)])
def test_what_is_stored_without_padding_is_padded_again_at_load(columns: int, block: int, bits: int) -> None:
    codes = round_to_nearest(normal(0, 5, columns), bits, block)
    builder = GraphBuilder()
    BlockMatrix(codes).packed(builder, "linear")
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in builder.graph.initializer}["linear.weight"]
    whole_bytes = columns * bits % 8 == 0
    assert stored.nbytes == 5 * columns * bits // 8 if whole_bytes else stored.nbytes == codes.packed().nbytes

    found = run_nodes(
        lambda graph: graph.op("Cast", BlockMatrix(codes).packed(graph, "linear")[0], to=FLOAT), codes.packed().shape
    )
    np.testing.assert_array_equal(found, codes.packed())


@pytest.mark.parametrize(("scale", "element"), [([0.5, 1.25], np.float16), ([0.5, 1e-9], np.float32)])
def test_scales_are_stored_in_two_bytes_where_that_is_exact(scale: list[float], element: type) -> None:
    exact = np.array(scale, dtype=np.float32)
    builder = GraphBuilder()
    builder.scales("linear.scale", exact)
    (stored,) = map(numpy_helper.to_array, builder.graph.initializer)
    assert stored.dtype == element
    np.testing.assert_array_equal(run_nodes(lambda graph: graph.scales("linear.scale", exact), (2,)), exact)


def test_restored_values_are_codes_around_the_midpoint_times_the_scale() -> None:
    codes = np.arange(16, dtype=np.uint8).reshape(1, 1, 16)
    found = BlockCodes(codes, np.array([[-0.5]], dtype=np.float32), 4, 15).restored()
    assert found.tolist() == [[(code - 8) * -0.5 for code in range(15)]]
