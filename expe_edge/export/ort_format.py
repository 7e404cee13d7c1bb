"""The graph in ORT format, and the operators it has, for builds of onnxruntime with these alone.

https://onnxruntime.ai/docs/performance/model-optimizations/ort-format-models.html
"""

from __future__ import annotations

import io
import logging
import tempfile
import warnings
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from expe_edge.errors import ExportError, reason_of
from expe_edge.graph.run import open_model, run_graph
from expe_edge.package.contract import GraphContract
from expe_edge.package.directory import MODEL_FILE, OPERATORS_FILE, ORT_FILE
from expe_edge.quiet import quiet_onnxruntime

#: Tokens that both graphs are compared on, and decoded of them.
TOKENS, DECODED = 48, 4


def write_ort_format(directory: Path, contract: GraphContract, tokens: npt.NDArray[np.int64]) -> None:
    """Write `ORT_FILE` and `OPERATORS_FILE` beside the graph in `directory`, and compare what both compute.

    tokens: text (T,), the beginning of which is run.

    Raises:
        ExportError: onnxruntime cannot convert the graph, or computes something else with it.
    """
    from onnxruntime.tools.convert_onnx_models_to_ort import OptimizationStyle, convert_onnx_models_to_ort

    logging.getLogger("ort_format_model.utils").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as place:
        try:
            # It reports on standard output, warns of an input that may be left away, and leaves a file to be closed.
            with redirect_stdout(io.StringIO()), quiet_onnxruntime(), warnings.catch_warnings():
                warnings.simplefilter("ignore", ResourceWarning)
                convert_onnx_models_to_ort(
                    directory / MODEL_FILE, Path(place), [OptimizationStyle.Fixed], target_platform="arm"
                )
        except Exception as error:  # the tool raises whatever onnxruntime does
            raise ExportError(
                f"onnxruntime {ort.__version__} cannot write this graph in ORT format ({reason_of(error)}); drop "
                "`ort_format`"
            ) from error
        made = {path.suffix: path for path in Path(place).iterdir()}
        (directory / ORT_FILE).write_bytes(made[".ort"].read_bytes())
        lines = made[".config"].read_text(encoding="utf-8").splitlines()
        operators = [line for line in lines if not line.startswith("#")]  # comments name temporary files
        (directory / OPERATORS_FILE).write_text("\n".join(operators) + "\n", encoding="utf-8")
    text = tokens[:TOKENS]
    expected, found = (
        run_graph(open_model(directory / name), contract, text, DECODED) for name in (MODEL_FILE, ORT_FILE)
    )
    difference = float(np.abs(expected - found).max())
    if not difference <= 1e-4 * max(1.0, float(np.abs(expected).max())):  # NaN is no agreement
        raise ExportError(
            f"onnxruntime {ort.__version__} computes logits in ORT format that differ by {difference:.2g}; drop "
            "`ort_format`, or use another onnxruntime"
        )
