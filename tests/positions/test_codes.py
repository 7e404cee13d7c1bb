"""Integer codes of positions, and which positions float32 holds exactly."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from expe_edge.errors import ConfigError
from expe_edge.export.fold import extract_weights
from expe_edge.graph.expe import ExPENodes
from expe_edge.graph.nodes import GraphBuilder
from expe_edge.model.config import ExPEConfig
from expe_edge.package.contract import TensorSpec
from expe_edge.positions.codes import FLOAT32_EXACT, STORAGE, WHOLE, PositionCode, exact_below, is_exact, require_exact
from tests import reference, strategies

LAST = FLOAT32_EXACT - 1


def in_float32(value: Fraction) -> bool:
    return Fraction(float(np.float32(float(value)))) == value


@given(strategies.codes(), st.lists(strategies.positions, min_size=1, max_size=20))
def test_decoding_a_code_gives_its_position_back(code: PositionCode, positions: list[int]) -> None:
    numbers = np.array(positions, dtype=np.int64)
    limbs = code.split(numbers)
    assert [limb.dtype for limb in limbs] == [np.int64] * code.limbs
    np.testing.assert_array_equal(code.join(limbs), numbers)


@given(strategies.codes(), strategies.positions)
def test_a_code_is_the_digits_of_the_position_low_limb_first(code: PositionCode, position: int) -> None:
    assert code.split(position) == reference.digits(position, code.bits, code.limbs)


@given(strategies.codes(), st.lists(strategies.positions, min_size=1, max_size=20))
def test_ints_arrays_and_tensors_have_the_same_code(code: PositionCode, positions: list[int]) -> None:
    expected = [list(limb) for limb in zip(*(code.split(position) for position in positions), strict=True)]
    assert [limb.tolist() for limb in code.split(np.array(positions, dtype=np.int64))] == expected
    assert [limb.tolist() for limb in code.split(torch.tensor(positions))] == expected


def test_the_last_limb_grows_without_wrapping() -> None:
    code = PositionCode(bits=4, limbs=2)
    assert [code.split(n) for n in (255, 256, 4096)] == [[15, 15], [0, 16], [0, 256]]


def test_one_limb_is_the_position_itself_whatever_its_bits() -> None:
    assert [PositionCode(bits=3, limbs=1).split(n) for n in (0, 7, 8, LAST)] == [[0], [7], [8], [LAST]]


def test_three_bytes_store_a_whole_number_and_several_limbs_store_themselves() -> None:
    assert WHOLE.stored == STORAGE
    assert PositionCode(bits=4, limbs=3).stored == PositionCode(bits=4, limbs=3)
    assert STORAGE.weights == (1, 256, 65536)
    assert STORAGE.split(LAST) == [255, 255, 255]


@given(strategies.codes(widest=7))
@example(PositionCode(bits=4, limbs=3))
@example(PositionCode(bits=7, limbs=1))
def test_int8_reach_is_the_first_position_with_a_limb_that_int8_cannot_hold(code: PositionCode) -> None:
    reach = code.int8_reach
    for below in (reach - 1, *(n for n in strategies.BOUNDARIES if n < reach)):
        assert max(code.split(below)) <= 127
    assert max(code.split(reach)) == 128


@pytest.mark.parametrize("bits", [8, 12, 24])
def test_a_code_with_limbs_wider_than_int8_has_no_reach(bits: int) -> None:
    code = PositionCode(bits, limbs=2)
    assert code.int8_reach == 0
    assert max(code.split(128)) > 127


@pytest.mark.parametrize(
    ("bits", "limbs", "message"),
    [
        (0, 1, "limb_bits is 0; allowed: 1 to 24"),
        (25, 1, "limb_bits is 25; allowed: 1 to 24"),
        (4, 0, "limbs is 0; allowed: 1 to 24"),
        (4, 25, "limbs is 25; allowed: 1 to 24"),
    ],
)
def test_codes_refuse_impossible_widths(bits: int, limbs: int, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        PositionCode(bits, limbs)


# Bit for bit: p_n as the exact rational, rounded once, against every way in which it is computed.

#: Encodings with their reach: `start` a multiple of a power of two, scalar and for each dimension.
BITWISE = {
    "defaults": {},
    "tiny step": {"positional_parameters": {"step": 2.0**-20, "dims": 4}},
    "huge step": {"positional_parameters": {"step": 1024.0, "dims": 4}},
    "negative step": {"positional_parameters": {"step": -0.0078125, "dims": 4}},
    "each dimension its own": {
        "positional_parameters": {"dims": 3, "start": (-1.0, 0.0, 2.5), "step": (0.5, 2.0**-9, 0.125)},
        "max_position_embeddings": 2**23,
    },
    "exqpe": {"positional": "exqpe", "max_position_embeddings": 2**15},
    "exqpe with a start": {
        "positional": "exqpe",
        "positional_parameters": {"limb_bits": 7, "limbs": 3, "start": -1.5},
        "max_position_embeddings": 2**21,
    },
}


def sampled_positions(reach: int) -> np.ndarray:
    near = np.arange(600)
    edges = np.array([n for n in strategies.BOUNDARIES if n < reach])
    drawn = np.random.default_rng(0).integers(reach, size=4000)
    return np.unique(np.concatenate([near[near < reach], edges, drawn, [reach - 2, reach - 1]]))


def exact_vectors(config: ExPEConfig, positions: np.ndarray) -> np.ndarray:
    """p_n as float32; float64 has room for every sum here, so the one rounding is the last."""
    vectors = reference.position_vectors(config, positions)
    single = vectors.astype(np.float32)
    np.testing.assert_array_equal(single.astype(np.float64), vectors)
    return single


def graph_vectors(config: ExPEConfig, positions: np.ndarray) -> np.ndarray:
    """What the nodes of an exported graph that leaves positions in place compute."""
    builder = GraphBuilder()
    weights = extract_weights(strategies.random_model(config), folded=False)
    nodes = ExPENodes(builder, weights, lambda *_, **__: pytest.fail("position vectors take no product with a weight"))
    nodes.begin()
    builder.emit("Identity", [nodes.vectors()], ["vectors"], name="vectors")
    axes = ("batch", "sequence")
    dims = config.positional_parameters["dims"]
    inputs, outputs = TensorSpec("position_ids", "int64", axes), TensorSpec("vectors", "float32", (*axes, dims))
    model = builder.model([inputs], [outputs], "test")
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    vectors: np.ndarray = session.run(None, {"position_ids": positions[None]})[0][0]
    return vectors


@pytest.mark.parametrize("changes", BITWISE.values(), ids=BITWISE)
def test_torch_computes_position_vectors_bit_for_bit(changes: dict[str, Any]) -> None:
    config = strategies.small_config(**changes)
    positions = sampled_positions(config.max_position_embeddings)
    found = strategies.expe_of(strategies.random_model(config)).vectors(torch.from_numpy(positions)).numpy()
    np.testing.assert_array_equal(found, exact_vectors(config, positions), strict=True)


@pytest.mark.parametrize("changes", BITWISE.values(), ids=BITWISE)
def test_the_exported_integer_codes_reproduce_position_vectors_bit_for_bit(changes: dict[str, Any]) -> None:
    config = strategies.small_config(**changes)
    positions = sampled_positions(config.max_position_embeddings)
    np.testing.assert_array_equal(graph_vectors(config, positions), exact_vectors(config, positions), strict=True)


@given(strategies.positions, st.integers(-40, 40))
def test_three_bytes_times_power_of_two_steps_add_up_to_the_position_in_float32(position: int, power: int) -> None:
    step = np.float32(2.0**power)
    scales = np.array(STORAGE.weights, dtype=np.float32) * step
    total = np.float32(0)
    for byte, scale in zip(STORAGE.split(position), scales, strict=True):
        total = np.float32(total + np.float32(byte) * scale)
    assert Fraction(float(total)) == position * Fraction(2) ** power


# Which settings are exact.

#: Numbers m·2^e with few and with many bits, so that sums both fit and overflow 24 bits.
dyadic = st.builds(lambda m, e: m * 2.0**e, st.integers(-(2**24), 2**24) | st.integers(-40, 40), st.integers(-12, 3))


@given(dyadic, dyadic, st.integers(1, 40))
@example(0.0, 0.0, 1)
@example(float(2**24 - 1), 1.0, 2)
@example(float(2**24 - 1), 1.0, 3)
@example(-float(2**24), 1.0, 40)
@example(1.0, float(2**24), 2)
def test_is_exact_agrees_with_rounding_every_position(start: float, step: float, count: int) -> None:
    exact = [in_float32(Fraction(start) + Fraction(step) * n) for n in range(-1, count + 1)]
    if is_exact(start, step, count):
        assert all(exact[1:-1])
    else:  # the rule counts bits alone: it may refuse one position too early, where parity happens to help
        assert not all(exact)


@pytest.mark.parametrize(
    ("start", "step", "count", "exact"),
    [
        (0.0, 2.0**-7, FLOAT32_EXACT + 1, True),
        (0.0, 2.0**-7, FLOAT32_EXACT + 2, False),
        (0.5, 2.0**-7, FLOAT32_EXACT - 63, True),
        (0.5, 2.0**-7, FLOAT32_EXACT - 62, False),
        (0.0, 3 * 2.0**-7, FLOAT32_EXACT // 3 + 1, True),
        (0.0, 3 * 2.0**-7, FLOAT32_EXACT // 3 + 2, False),
        (0.0, 0.001, 2, False),
        (0.1, 1.0, 2, False),
    ],
)
def test_is_exact_at_its_limits(start: float, step: float, count: int, exact: bool) -> None:
    assert is_exact(start, step, count) is exact


def test_require_exact_names_the_values_the_dimension_and_the_way_out() -> None:
    with pytest.raises(ConfigError) as raised:
        require_exact([0.0, 0.5], [0.25, 0.001], 100)
    assert str(raised.value) == (
        "positions start + step·n with start=0.5, step=0.001 (dimension 1) are not exact in float32 for every n < 100; "
        "use a step that is a power of two, such as 0.0078125, and start=0"
    )


@pytest.mark.parametrize(
    ("start", "step", "reach"),
    [
        (1.0, 2.0**-7, FLOAT32_EXACT - 127),
        (-1.0, 2.0**-7, FLOAT32_EXACT),
        (0.0, 3.0 * 2.0**-7, FLOAT32_EXACT // 3 + 1),
        (0.0, 0.001, 1),
        (0.1, 0.0, 0),
    ],
)
def test_the_way_out_is_one(start: float, step: float, reach: int) -> None:
    """What a refusal says to lower the number of positions to is accepted, and one more is not."""
    assert exact_below(start, step, FLOAT32_EXACT) == reach
    if reach < FLOAT32_EXACT:
        with pytest.raises(ConfigError) as raised:
            require_exact([start], [step], FLOAT32_EXACT)
        assert (f"; lower max_position_embeddings to {reach}, or use " in str(raised.value)) is (reach > 1)
    if reach > 1:
        require_exact([start], [step], reach)


def test_a_start_that_is_not_exact_is_told_what_is() -> None:
    with pytest.raises(ConfigError, match=r"start=0\.1, step=0\.0 .* n < 100; use a start such as 1 or 0\.5$"):
        require_exact([0.1], [0.0], 100)
    with pytest.raises(ConfigError, match=r"n < 128; use a step that is a power of two, such as 0\.0078125, and st"):
        require_exact([1000.0], [2.0**-15], 128, positions=False)


def test_require_exact_accepts_exact_positions() -> None:
    require_exact([0.0, -0.5], [0.25, 0.0078125], 2**16)
    with pytest.raises(ConfigError):  # the same values, once too far
        require_exact([0.0, -0.5], [0.25, 0.0078125], 2**25)


def test_a_step_of_a_thousandth_is_refused_by_the_config() -> None:
    with pytest.raises(ConfigError) as raised:
        ExPEConfig(positional_parameters={"step": 0.001, "where": "query_key"})
    assert str(raised.value) == (
        "positions start + step·n with start=0.0, step=0.001 (dimension 0) are not exact in float32 "
        "for every n < 16777216; use a step that is a power of two, such as 0.0078125, and start=0"
    )


def test_no_encoding_reaches_beyond_what_float32_counts() -> None:
    for positional in ("rotary", "alibi", "none"):
        with pytest.raises(ConfigError) as raised:
            ExPEConfig(positional=positional, max_position_embeddings=2**24 + 1)
        assert str(raised.value) == (
            "max_position_embeddings is 16777217, but positions are exact in float32 only below 16777216; lower it"
        )


@pytest.mark.parametrize(
    ("training_length", "step"), [(1, 1.0), (2, 0.5), (100, 1 / 128), (128, 1 / 128), (129, 1 / 256), (512, 1 / 512)]
)
def test_by_default_the_positions_of_training_span_at_most_one(training_length: int, step: float) -> None:
    config = ExPEConfig(training_length=training_length)
    assert config.positional_parameters["step"] == step
    assert ExPEConfig.from_dict(config.to_dict()).positional_parameters["step"] == step


def test_a_given_step_and_that_of_exqpe_are_the_same_at_every_training_length() -> None:
    given_step = ExPEConfig(training_length=512, positional_parameters={"step": 0.25})
    assert given_step.positional_parameters["step"] == 0.25
    exqpe = [ExPEConfig(training_length=length, positional="exqpe") for length in (128, 512)]
    assert exqpe[0].positional_parameters == exqpe[1].positional_parameters


def test_exqpe_is_refused_beyond_its_reach_and_accepted_at_it() -> None:
    assert ExPEConfig(positional="exqpe", max_position_embeddings=32768).max_position_embeddings == 32768
    with pytest.raises(ConfigError) as raised:
        ExPEConfig(positional="exqpe", max_position_embeddings=32769)
    assert str(raised.value) == (
        "max_position_embeddings is 32769, but 3 limbs of 4 bits are exact in int8 only below 32768; "
        "add limbs or lower max_position_embeddings"
    )


def test_by_default_a_config_reaches_as_far_as_its_encoding() -> None:
    assert ExPEConfig(positional="expe").max_position_embeddings == FLOAT32_EXACT
    assert ExPEConfig(positional="exqpe").max_position_embeddings == 32768
    seven = {"dims": 24, "limb_bits": 7, "limbs": 4}  # reaches 2^28, more than float32 counts
    assert ExPEConfig(positional="exqpe", positional_parameters=seven).max_position_embeddings == FLOAT32_EXACT


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"dims": 23}, "dims is 23, which 3 limbs do not divide; change dims or limbs"),
        ({"limb_bits": 8}, "limb_bits is 8; limbs must stay below 128, so allowed: 1 to 7"),
        ({"dims": 129, "limbs": 3}, "dims is 129, above hidden_size 128; lower dims"),
        ({"step": [0.125] * 3}, "step has 3 values; give one number, or one for each of the 24 dims"),
    ],
)
def test_exqpe_refuses_settings_that_do_not_fit(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        ExPEConfig(positional="exqpe", positional_parameters=parameters)
