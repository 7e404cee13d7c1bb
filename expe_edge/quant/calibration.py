"""Activation ranges for static formats, measured on text by onnxruntime.quantization's calibrators.

Every window is run as a real prefill and, for its last token, as a real cached decode.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping
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
        calibrator.collect_data(_WindowReader(plain, contract, windows))
        # The histogram methods find a threshold per tensor and print what they do.
        logging.getLogger("root").setLevel(logging.WARNING)
        data = calibrator.compute_data().data
    return {linear: _bounds(data[tensor]) for linear, tensor in linear_inputs.items()}


def _bounds(tensor: Any) -> Range:
    low, high = tensor.range_value
    return float(np.asarray(low).item()), float(np.asarray(high).item())


class _WindowReader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime publishes no types
    """Feeds of one prefill and one cached decode for each window."""

    def __init__(self, model: Path, contract: GraphContract, windows: list[Ids]) -> None:
        self.session = ort.InferenceSession(str(model), providers=["CPUExecutionProvider"])
        self.contract, self.windows = contract, windows
        self.feeds = self._make()

    def get_next(self) -> dict[str, npt.NDArray[Any]] | None:
        return next(self.feeds, None)

    def _make(self) -> Iterator[dict[str, npt.NDArray[Any]]]:
        for window in self.windows:
            prefill = graph_feeds(self.contract, window[None])
            yield prefill
            if len(window) > 1:
                before = graph_feeds(self.contract, window[None, :-1])
                cache = self.session.run(list(self.contract.present_names), before)
                yield graph_feeds(self.contract, window[None, -1:], cache)
