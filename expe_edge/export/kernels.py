"""Which kernels onnxruntime really runs: read from the graph as it rewrites it before running."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import onnx
import onnxruntime as ort
from onnxruntime.capi.onnxruntime_pybind11_state import Fail

from expe_edge.errors import ExportError
from expe_edge.graph.linears import LINEAR_FORMATS, Float32
from expe_edge.graph.nodes import operators_of
from expe_edge.quiet import ERRORS

#: Kernels of quantized linears; none of them computes anything else.
QUANTIZED_KERNELS = sorted({kind.kernel for kind in LINEAR_FORMATS.values()} - {Float32.kernel})


def optimized_operators(model: Path) -> Counter[str]:
    """Return how often each operator occurs in the graph that onnxruntime makes of the one in a file."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "optimized.onnx")
        try:
            _optimize(model, path, weights_apart=True)
        except Fail:  # onnxruntime 1.22 cannot write apart what it has fused
            _optimize(model, path, weights_apart=False)
        return operators_of(onnx.load(path, load_external_data=False))


def _optimize(model: Path, path: Path, *, weights_apart: bool) -> None:
    """Have onnxruntime write the graph that it would run."""
    options = ort.SessionOptions()
    options.log_severity_level = ERRORS  # it warns that an optimised graph is for this machine alone
    options.optimized_model_filepath = str(path)
    if weights_apart:  # they are not looked at
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights")
    ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])


def require_kernels(operators: Mapping[str, int], linears: Mapping[str, str]) -> None:
    """Raise `ExportError` unless every quantized linear runs as the kernel of its format.

    Args:
        operators: of the optimised graph. linears: name to name of its format.
    """
    promised = Counter(LINEAR_FORMATS[name].kernel for name in linears.values())
    for kernel in QUANTIZED_KERNELS:
        count = operators.get(kernel, 0)
        if count != promised[kernel]:
            raise ExportError(
                f"onnxruntime {ort.__version__} runs {count} linears as {kernel}, not {promised[kernel]}; "
                "others would run in float32. Choose another `precision`, or another onnxruntime"
            )
