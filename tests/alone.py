"""Graphs of one operator or function, opened with kernels built here or onnxruntime's own."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnxruntime as ort

from expe_edge.runtime.opening import session_options


def open_alone(model: onnx.ModelProto, threads: int = 1, library: Path | None = None) -> ort.InferenceSession:
    """Open a graph, with a library of kernels where one is given."""
    options = session_options(threads, library)
    options.add_session_config_entry("session.force_spinning_stop", "1")  # threads leave the next session alone
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
