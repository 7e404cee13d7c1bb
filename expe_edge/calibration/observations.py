"""What quantization needs to know of a model at work, measured on text: inputs of the linears, ranges, the cache.

Every window is run as a real prefill and, for its last token, as a real cached decode.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from onnxruntime.quantization.calibrate import CalibrationDataReader, CalibrationMethod, create_calibrator

from expe_edge.errors import CorpusError, ExportError, unknown_name
from expe_edge.graph.build import BuiltGraph, Linear
from expe_edge.graph.linears import LinearFormat
from expe_edge.graph.run import graph_feeds, open_graph, open_model
from expe_edge.package.contract import GraphContract
from expe_edge.quant.blocks import Double, Float
from expe_edge.quant.channels import CacheScales, Range
from expe_edge.quant.recipe import CALIBRATION_WINDOWS
from expe_edge.spool import Spool

Ids = npt.NDArray[np.int64]
#: Inputs of a graph by name.
Feeds = dict[str, npt.NDArray[Any]]

#: `--calibration-method` to onnxruntime's calibrator; the last is this project's own.
ORT_METHODS = {
    "minmax": CalibrationMethod.MinMax,
    "percentile": CalibrationMethod.Percentile,
    "entropy": CalibrationMethod.Entropy,
}
HISTOGRAM_METHODS = ("percentile", "entropy")
OUTPUT_ERROR = "output-error"
CALIBRATION_METHODS = (*ORT_METHODS, OUTPUT_ERROR)
#: Rows of every linear's input that are kept; its moments and extremes are of all rows.
SAMPLE_ROWS = 2048
#: Bytes of the rows of one linear's input that stay in memory.
SAMPLES_IN_MEMORY = 2**21
#: Tokens of windows that are observed at once.
RUN_TOKENS = 1024
#: How far `output-error` shrinks the widest range.
SHRINKAGE = np.linspace(1.0, 0.4, 25)
#: A histogram of fewer tokens than its bins says nothing of the tails.
LEAST_HISTOGRAM_TOKENS = 128
#: Largest magnitude of a level of an int8 cache.
CACHE_LIMIT = 127


@dataclass(frozen=True)
class Calibration:
    """How ranges are measured. windows: texts of one training length each. seed: which windows."""

    method: str = OUTPUT_ERROR
    windows: int = CALIBRATION_WINDOWS
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in CALIBRATION_METHODS:
            raise ExportError(
                unknown_name("calibration method", self.method, CALIBRATION_METHODS) + "; change `method`"
            )
        if self.windows < 1:
            raise ExportError(f"`windows` is {self.windows}; at least 1")


class Observed(NamedTuple):
    """What entered a linear. moments: (C, C) mean of x·xᵀ · low, high: (C,) extremes · samples: parts of `rows`."""

    moments: Double
    low: Float
    high: Float
    samples: Iterable[Float]

    @property
    def rows(self) -> Float:
        """A sample of the inputs, (n, C)."""
        return np.concatenate([*self.samples])


class Observations(NamedTuple):
    """What calibration text showed: inputs by linear, and the largest magnitudes in the cache of every layer."""

    inputs: dict[str, Observed]
    cache: list[CacheScales]


def sample_windows(stream: npt.NDArray[np.int32], length: int, calibration: Calibration) -> list[Ids]:
    """Return random windows (length,) of the token stream.

    Raises:
        CorpusError: a stream shorter than one window.
    """
    if len(stream) < length:
        raise CorpusError(
            f"the calibration text has {len(stream)} tokens, less than one window of {length}; "
            "give more with `calibration_data`"
        )
    random = np.random.default_rng(calibration.seed)
    begins = random.integers(len(stream) - length + 1, size=calibration.windows)
    return [stream[begin : begin + length].astype(np.int64) for begin in begins]


class Watched(NamedTuple):
    """A float32 graph opened with the inputs of its linears among its outputs. inputs: linear to tensor."""

    session: ort.InferenceSession
    inputs: Mapping[str, str]


def watch(graph: BuiltGraph) -> Watched:
    """Open a graph to `observe` it; `graph` is left as it was, and need not be kept beside the session."""
    inputs = {name: linear.input for name, linear in graph.linears.items()}
    outputs = graph.model.graph.output
    own = len(outputs)
    outputs.extend(onnx.helper.make_empty_tensor_value_info(tensor) for tensor in sorted(set(inputs.values())))
    session = open_graph(graph.model)
    del outputs[own:]
    return Watched(session, inputs)


def observe(watched: Watched, contract: GraphContract, windows: Sequence[Ids]) -> Observations:
    """Run a graph over `windows` (N,), all of one length, and return what its linears and cache saw."""
    tensors = sorted(set(watched.inputs.values()))
    names = [*contract.present_names, *tensors]
    length = len(windows[0])
    watchers = {name: _Watcher(min(SAMPLE_ROWS / (len(windows) * length), 1)) for name in tensors}
    peaks: list[Float] = []
    abreast = max(1, RUN_TOKENS // length)
    for begin in range(0, len(windows), abreast):
        feeds = graph_feeds(contract, np.stack(windows[begin : begin + abreast]))
        outputs = dict(zip(names, watched.session.run(names, feeds), strict=True))
        for name in tensors:
            rows = outputs.pop(name)
            watchers[name].see(rows.reshape(-1, rows.shape[-1]))
        largest = [np.abs(outputs.pop(name)).max(axis=(0, 2)) for name in contract.present_names]  # (Hkv, D)
        peaks = [np.maximum(a, b) for a, b in zip(peaks, largest, strict=True)] if peaks else largest
    seen = {tensor: watchers.pop(tensor).observed() for tensor in tensors}
    inputs = {name: seen[tensor] for name, tensor in watched.inputs.items()}
    layers = [CacheScales(*pair) for pair in zip(peaks[0::2], peaks[1::2], strict=True)]
    return Observations(inputs, layers)


class _Watcher:
    """Gathers what enters one tensor, run by run; keeps this `share` of the rows."""

    def __init__(self, share: float) -> None:
        self.share, self.count = share, 0
        self.moments: Double
        self.low: Float
        self.high: Float
        self.random = np.random.default_rng(0)
        self.samples = Spool(in_memory=SAMPLES_IN_MEMORY)

    def see(self, rows: Float) -> None:
        """Take in rows (n, C)."""
        exact = rows.astype(np.float64)
        moments, low, high = exact.T @ exact, rows.min(axis=0), rows.max(axis=0)
        if self.count:
            moments += self.moments
            low, high = np.minimum(self.low, low), np.maximum(self.high, high)
        self.moments, self.low, self.high = moments, low, high
        kept = round((self.count + len(rows)) * self.share) - round(self.count * self.share)
        self.count += len(rows)
        self.samples.append(rows[self.random.permutation(len(rows))[:kept]])

    def observed(self) -> Observed:
        """Return what was seen; nothing more can be taken in after."""
        self.moments /= self.count
        return Observed(self.moments, self.low, self.high, self.samples)


def cache_scales(peaks: Sequence[CacheScales]) -> list[CacheScales]:
    """Return the int8 scale of every channel from its largest magnitudes."""
    return [
        CacheScales(*(np.where(peak == 0, 1, peak / CACHE_LIMIT).astype(np.float32) for peak in layer))
        for layer in peaks
    ]


def measure_ranges(
    graph: BuiltGraph,
    contract: GraphContract,
    windows: Sequence[Ids],
    calibration: Calibration,
) -> dict[str, Range]:
    """Return the range of every linear's input over `windows` by one of onnxruntime's methods.

    Args:
        graph: the float32 graph.
    """
    with tempfile.TemporaryDirectory() as directory:
        plain, augmented = Path(directory, "plain.onnx"), Path(directory, "augmented.onnx")
        onnx.save(graph.model, plain)
        calibrator = create_calibrator(
            plain,
            op_types_to_calibrate=["MatMul"],
            augmented_model_path=str(augmented),
            calibrate_method=ORT_METHODS[calibration.method],
        )
        session = open_model(plain)
        with redirect_stdout(sys.stderr):  # the histogram methods print what they do
            # They also stack what one call collects, so each call gets feeds of one shape.
            calibrator.collect_data(FeedsReader(graph_feeds(contract, window[None]) for window in windows))
            if len(windows[0]) > 1:
                calibrator.collect_data(FeedsReader(_decode_feeds(session, contract, window) for window in windows))
            data = calibrator.compute_data().data
    return {name: _bounds(data[linear.input]) for name, linear in graph.linears.items()}


def fit_ranges(
    linears: Mapping[str, Linear], observations: Observations, make: Callable[[Mapping[str, Range]], LinearFormat[Any]]
) -> dict[str, Range]:
    """Return the range of every linear's input that minimises the squared error of the linear's output.

    Args:
        make: the static format with given ranges.
    """
    return {name: _fit_range(name, observations.inputs[name], linear.weight, make) for name, linear in linears.items()}


def _fit_range(
    name: str, observed: Observed, weight: Float, make: Callable[[Mapping[str, Range]], LinearFormat[Any]]
) -> Range:
    rows = observed.rows
    expected = rows @ weight
    widest = float(observed.low.min()), float(observed.high.max())
    restored = make({name: widest}).store(name, weight).restored()

    def error(shrunk: float) -> float:
        rounded = make({name: (widest[0] * shrunk, widest[1] * shrunk)}).round_inputs(name, rows)
        return float(((rounded @ restored - expected) ** 2).sum())

    best = min(SHRINKAGE.tolist(), key=error)
    return widest[0] * best, widest[1] * best


def require_enough(calibration: Calibration, length: int, *, histograms: bool, widest: int | None) -> None:
    """Raise `ExportError` where `calibration.windows` of `length` tokens are too few for what is asked of them.

    Args:
        histograms: ranges are taken from histograms. widest: the largest C_in whose moments are inverted, if any.
    """
    tokens = calibration.windows * length
    if histograms and tokens < LEAST_HISTOGRAM_TOKENS:
        raise ExportError(
            f"{calibration.windows} windows of {length} tokens are too few for `method` "
            f"{calibration.method}, which needs {LEAST_HISTOGRAM_TOKENS} tokens; raise `windows` to "
            f"{-(-LEAST_HISTOGRAM_TOKENS // length)}, or use minmax"
        )
    if widest is not None and tokens < widest:
        raise ExportError(
            f"{calibration.windows} windows of {length} tokens are too few for `solver` gptq, which needs {widest}, "
            f"one for each input of the widest linear; raise `windows` to {-(-widest // length)}, or use "
            "`solver` rtn"
        )


def _bounds(tensor: Any) -> Range:
    low, high = tensor.range_value
    return float(np.asarray(low).item()), float(np.asarray(high).item())


def _decode_feeds(session: ort.InferenceSession, contract: GraphContract, window: Ids) -> Feeds:
    """Feeds of the last token of `window` (T,), the others in the cache."""
    cache = session.run(list(contract.present_names), graph_feeds(contract, window[None, :-1]))
    return graph_feeds(contract, window[None, -1:], cache)


class FeedsReader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime publishes no types
    """Feeds through the interface that the calibrators ask for."""

    def __init__(self, feeds: Iterator[Feeds]) -> None:
        self.feeds = feeds

    def get_next(self) -> Feeds | None:
        return next(self.feeds, None)
