"""Calibration: what linears and cache see on text, and the ranges that static formats take from it."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expe_edge.calibration.evidence import Evidence
from expe_edge.calibration.observations import (
    CALIBRATION_METHODS,
    ORT_METHODS,
    RUN_TOKENS,
    SAMPLE_ROWS,
    Calibration,
    Observations,
    Observed,
    cache_scales,
    fit_ranges,
    measure_ranges,
    observe,
    require_enough,
    sample_windows,
    watch,
)
from expe_edge.errors import CorpusError, ExportError
from expe_edge.graph.build import graph_contract
from expe_edge.graph.linears import FormatOptions, StaticInt8
from expe_edge.quant.blocks import BLOCK_SIZE
from expe_edge.quant.channels import CacheScales, Range
from expe_edge.quant.recipe import Recipe
from expe_edge.quant.solvers import refined_gptq
from tests.graphs import CONFIG, LINEARS, inputs_of, plain_graph, random_weights, run_linear, run_text, token_stream
from tests.strategies import seeds

N = CONFIG.training_length


def evidence(calibration: Calibration, stream: np.ndarray) -> Evidence:
    """What a text shows of the random model."""
    return Evidence(random_weights(), calibration, lambda: sample_windows(stream, N, calibration))


# What is observed.


@functools.cache
def observed() -> tuple[list[np.ndarray], Observations]:
    """Windows, more than are run at once, and what they show."""
    windows = sample_windows(token_stream(900), 40, Calibration(windows=1 + RUN_TOKENS // 40))
    return windows, observe(watch(plain_graph()), graph_contract(CONFIG), windows)


def test_moments_and_extremes_are_those_of_every_token_of_the_text() -> None:
    windows, found = observed()
    assert found.inputs.keys() == LINEARS
    for linear, rows in inputs_of(plain_graph(), windows).items():
        exact, seen = rows.astype(np.float64), found.inputs[linear]
        moments, power = exact.T @ exact / len(rows), (exact**2).mean()
        assert seen.moments.dtype == np.float64
        np.testing.assert_allclose(seen.moments, moments, rtol=0, atol=1e-4 * power, err_msg=linear)
        np.testing.assert_allclose(seen.low, rows.min(axis=0), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(seen.high, rows.max(axis=0), rtol=1e-4, atol=1e-4)


def test_of_a_short_text_every_row_is_kept() -> None:
    windows, found = observed()
    kept, rows = found.inputs["head"].rows, inputs_of(plain_graph(), windows)["head"]
    assert len(rows) <= SAMPLE_ROWS
    kept, rows = (array[np.lexsort(array.round(2).T)] for array in (kept, rows))
    np.testing.assert_allclose(kept, rows, rtol=0, atol=0.02)


def test_of_a_long_text_a_sample_is_kept_from_every_window_and_every_place_in_it() -> None:
    windows = sample_windows(token_stream(3000), 80, Calibration(windows=40))
    found = observe(watch(plain_graph()), graph_contract(CONFIG), windows).inputs["head"].rows
    rows = inputs_of(plain_graph(), windows)["head"]
    assert len(found) == SAMPLE_ROWS < len(rows)
    origins = [np.abs(rows - row).max(axis=1).argmin() for row in found]
    assert {origin // 80 for origin in origins} == set(range(40))
    assert {origin % 80 for origin in origins} == set(range(80))


def test_cache_peaks_are_the_largest_keys_and_values_of_each_channel() -> None:
    windows, found = observed()
    caches = [run_text(plain_graph().model, graph_contract(CONFIG), window)[1] for window in windows]
    for index, peaks in enumerate(peaks for layer in found.cache for peaks in layer):
        largest = np.max([np.abs(cache[index][0]).max(axis=1) for cache in caches], axis=0)
        assert peaks.shape == (CONFIG.num_key_value_heads, CONFIG.head_dim)
        np.testing.assert_allclose(peaks, largest, rtol=1e-4)


def test_a_level_of_the_cache_is_a_127th_of_its_channels_peak() -> None:
    peaks = CacheScales(np.array([[127.0, 0.0]], dtype=np.float32), np.array([[1.0, 2.54]], dtype=np.float32))
    (scales,) = cache_scales([peaks])
    np.testing.assert_array_equal(scales.key, [[1.0, 1.0]])  # of a channel of zeros any scale is right, but 0
    np.testing.assert_allclose(scales.value, [[1 / 127, 0.02]], rtol=1e-6)
    assert scales.key.dtype == np.float32


def test_gptq_sees_the_moments_of_its_own_linear() -> None:
    found = evidence(Calibration(windows=8), token_stream(300))
    formats = found.formats(Recipe("int4-weight", solver="gptq"), dict.fromkeys(LINEARS, "int4-weight"))
    for name, linear in plain_graph().linears.items():
        expected = refined_gptq(linear.weight.T, 4, BLOCK_SIZE[4], found.observations.inputs[name].moments)
        np.testing.assert_array_equal(formats[name].store(name, linear.weight).restored(), expected.restored().T)


# Ranges.


@pytest.mark.parametrize("method", CALIBRATION_METHODS)
def test_every_calibration_method_measures_every_linear(method: str) -> None:
    calibration, stream = Calibration(method, windows=8), token_stream(300)
    found = evidence(calibration, stream).ranges
    assert found.keys() == LINEARS
    for linear, values in inputs_of(plain_graph(), sample_windows(stream, N, calibration)).items():
        (low, high), extent = found[linear], np.abs(values).max()
        covered = np.mean((values >= low - 1e-5 * extent) & (values <= high + 1e-5 * extent))
        # The others may leave out rare values, and no method goes beyond the largest magnitude it has seen.
        assert covered == 1 if method == "minmax" else covered > 0.98, linear
        assert -1.01 * extent <= low < 0 < high <= 1.01 * extent, linear


def test_minmax_ranges_are_the_extremes_of_what_was_seen() -> None:
    calibration, stream = Calibration("minmax", windows=5, seed=3), token_stream(300)
    found = evidence(calibration, stream).ranges
    for linear, values in inputs_of(plain_graph(), sample_windows(stream, N, calibration)).items():
        np.testing.assert_allclose(found[linear], (values.min(), values.max()), rtol=1e-5)


def test_percentile_leaves_out_the_rarest_values() -> None:
    """It keeps 99.999 %, so with a hundred thousand values the most extreme ones fall outside."""
    stream = token_stream(8000)
    minmax, percentile = (
        evidence(Calibration(method, windows=300), stream).ranges for method in ("minmax", "percentile")
    )
    for linear in LINEARS:
        assert percentile[linear][0] > minmax[linear][0] or percentile[linear][1] < minmax[linear][1]


@pytest.mark.parametrize("method", ORT_METHODS)
def test_windows_of_one_token_have_nothing_to_decode_and_are_measured_all_the_same(method: str) -> None:
    windows = sample_windows(token_stream(50), 1, Calibration(windows=3))
    graph, contract = plain_graph(), graph_contract(CONFIG)
    found = measure_ranges(graph, contract, windows, Calibration(method))
    for linear, rows in inputs_of(graph, windows).items():
        np.testing.assert_allclose(found[linear], (rows.min(), rows.max()), rtol=0.05)


def static_error(bounds: Range, rows: np.ndarray, weight: np.ndarray) -> float:
    """The squared error of a static product as onnxruntime computes it, in units of the product's own square."""
    exact = rows @ weight
    found = run_linear(StaticInt8(FormatOptions(ranges={"linear": bounds})), rows, weight)
    return float(((found - exact) ** 2).sum() / (exact**2).sum())


def with_spikes(seen: Observed) -> Observed:
    """The same with one value in ten thousand eight times too large."""
    rows = seen.rows
    rows.flat[::10_000] *= 8
    return seen._replace(samples=[rows], low=rows.min(axis=0), high=rows.max(axis=0))


@pytest.mark.parametrize("spiked", [False, True])
def test_ranges_fitted_to_the_output_are_never_worse_than_the_extremes(spiked: bool) -> None:
    observations = observe(
        watch(plain_graph()), graph_contract(CONFIG), sample_windows(token_stream(900), 40, Calibration())
    )
    if spiked:
        observations = observations._replace(inputs={k: with_spikes(v) for k, v in observations.inputs.items()})
    found = fit_ranges(plain_graph().linears, observations, lambda ranges: StaticInt8(FormatOptions(ranges=ranges)))
    assert found.keys() == LINEARS
    for name, bounds in found.items():
        seen, weight = observations.inputs[name], plain_graph().linears[name].weight
        widest = float(seen.low.min()), float(seen.high.max())
        fitted, plain = (static_error(each, seen.rows, weight) for each in (bounds, widest))
        assert fitted <= plain * 1.001, name
        if spiked:
            assert fitted < plain, name


# Text.


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
        "the calibration text has 15 tokens, less than one window of 16; give more with `calibration_data`"
    )


def test_an_unknown_calibration_method_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(ExportError) as raised:
        Calibration("minimax")
    assert str(raised.value) == (
        "unknown calibration method 'minimax'; did you mean 'minmax'? "
        "available: entropy, minmax, output-error, percentile; change `method`"
    )


def test_calibrating_on_no_windows_is_refused() -> None:
    with pytest.raises(ExportError, match=r"^`windows` is 0; at least 1$"):
        Calibration(windows=0)


def test_a_histogram_of_fewer_tokens_than_bins_is_refused_with_the_number_that_would_do() -> None:
    calibration = Calibration("entropy", windows=4)
    require_enough(calibration, 32, histograms=True, widest=None)
    require_enough(calibration, 31, histograms=False, widest=None)
    with pytest.raises(ExportError) as raised:
        require_enough(calibration, 31, histograms=True, widest=None)
    assert str(raised.value) == (
        "4 windows of 31 tokens are too few for `method` entropy, which needs 128 tokens; "
        "raise `windows` to 5, or use minmax"
    )


def test_moments_of_fewer_tokens_than_the_widest_input_are_refused_with_the_number_that_would_do() -> None:
    calibration = Calibration(windows=5)
    require_enough(calibration, 16, histograms=False, widest=80)
    with pytest.raises(ExportError) as raised:
        require_enough(calibration, 16, histograms=False, widest=97)
    assert str(raised.value) == (
        "5 windows of 16 tokens are too few for `solver` gptq, which needs 97, one for each input of the widest "
        "linear; raise `windows` to 7, or use `solver` rtn"
    )


@pytest.mark.parametrize("method", ["percentile", "entropy"])
def test_ranges_from_too_few_windows_are_refused(method: str) -> None:
    with pytest.raises(ExportError, match=f"too few for `method` {method}, "):
        _ = evidence(Calibration(method, windows=7), token_stream(300)).ranges


def test_moments_from_too_few_windows_are_refused() -> None:
    with pytest.raises(ExportError, match=r"^5 windows of 16 tokens are too few for `solver` gptq, which needs 88, "):
        _ = evidence(Calibration(windows=5), token_stream(300)).moments
