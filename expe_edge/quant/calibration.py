"""Activation ranges for static formats, measured on text by onnxruntime.quantization's calibrators.

Every window is run as a real prefill and, for its last token, as a real cached decode.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from onnxruntime.quantization.calibrate import CalibrationDataReader, CalibrationMethod, create_calibrator

from expe_edge.errors import CorpusError, ExportError, unknown_name
from expe_edge.export.contract import graph_feeds
from expe_edge.package import GraphContract
from expe_edge.quant.formats import Range

Ids = npt.NDArray[np.int64]
#: Inputs of a graph by name.
Feeds = dict[str, npt.NDArray[Any]]

#: `--calibration-method` to onnxruntime's calibrator.
CALIBRATION_METHODS = {
    "minmax": CalibrationMethod.MinMax,
    "percentile": CalibrationMethod.Percentile,
    "entropy": CalibrationMethod.Entropy,
}


@dataclass(frozen=True)
class Calibration:
    """How ranges are measured. windows: texts of one training length each. seed: which windows."""

    method: str = "minmax"
    windows: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in CALIBRATION_METHODS:
            raise ExportError(
                unknown_name("calibration method", self.method, CALIBRATION_METHODS) + "; change --calibration-method"
            )
        if self.windows < 1:
            raise ExportError(f"--calibration-windows is {self.windows}; at least 1")


def sample_windows(stream: npt.NDArray[np.int32], length: int, calibration: Calibration) -> list[Ids]:
    """Return random windows (length,) of the token stream.

    Raises:
        CorpusError: a stream shorter than one window.
    """
    if len(stream) < length:
        raise CorpusError(
            f"the calibration text has {len(stream)} tokens, less than one window of {length}; "
            "give more with --calibration-data"
        )
    random = np.random.default_rng(calibration.seed)
    begins = random.integers(len(stream) - length + 1, size=calibration.windows)
    return [stream[begin : begin + length].astype(np.int64) for begin in begins]


def measure_ranges(
    model: onnx.ModelProto,
    contract: GraphContract,
    linear_inputs: Mapping[str, str],
    windows: list[Ids],
    calibration: Calibration,
) -> dict[str, Range]:
    """Return the range of every linear's input over `windows`, by the linear's name.

    Args:
        model: the float32 graph. linear_inputs: linear to the tensor that enters it, both of that graph.
    """
    with tempfile.TemporaryDirectory() as directory:
        plain, augmented = Path(directory, "plain.onnx"), Path(directory, "augmented.onnx")
        onnx.save(model, plain)
        calibrator = create_calibrator(
            plain,
            op_types_to_calibrate=["MatMul"],
            augmented_model_path=str(augmented),
            calibrate_method=CALIBRATION_METHODS[calibration.method],
        )
        session = ort.InferenceSession(str(plain), providers=["CPUExecutionProvider"])
        with redirect_stdout(sys.stderr):  # the histogram methods print what they do
            # They also stack what one call collects, so each call gets feeds of one shape.
            calibrator.collect_data(_Reader(graph_feeds(contract, window[None]) for window in windows))
            if len(windows[0]) > 1:
                calibrator.collect_data(_Reader(_decode_feeds(session, contract, window) for window in windows))
            data = calibrator.compute_data().data
    return {linear: _bounds(data[tensor]) for linear, tensor in linear_inputs.items()}


def _bounds(tensor: Any) -> Range:
    low, high = tensor.range_value
    return float(np.asarray(low).item()), float(np.asarray(high).item())


def _decode_feeds(session: ort.InferenceSession, contract: GraphContract, window: Ids) -> Feeds:
    """Feeds of the last token of `window` (T,), the others in the cache."""
    cache = session.run(list(contract.present_names), graph_feeds(contract, window[None, :-1]))
    return graph_feeds(contract, window[None, -1:], cache)


class _Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime publishes no types
    """Feeds through the interface that the calibrators ask for."""

    def __init__(self, feeds: Iterator[Feeds]) -> None:
        self.feeds = feeds

    def get_next(self) -> Feeds | None:
        return next(self.feeds, None)
