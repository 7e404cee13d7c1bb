"""What a portable graph promises: standard operators alone, and the results that the standard defines.

The reference evaluator is the ONNX standard as code: https://onnx.ai/onnx/api/reference.html
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from expe_edge.divergence import divergence
from expe_edge.errors import ExportError
from expe_edge.export.parity import float_tolerance
from expe_edge.graph.linears import LINEAR_FORMATS, Float32
from expe_edge.graph.run import open_graph, run_graph
from expe_edge.package.contract import GraphContract

#: Tokens prefilled, and decoded after them: the evaluator is slow.
PREFILLED, DECODED = 24, 2
#: Most nats per token between the two where a product rounds its activations. A value in the middle between two levels
#: of int8 goes either way with the last bit of float32, and MatMulNBits rounds activations that the standard does not.
LARGEST_KL = 0.02


class Softplus(OpRun):  # type: ignore[misc]  # onnx publishes no types
    """That of onnx itself overflows above 88 before release 1.23."""

    def _run(self, x: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.float32]]:
        return (np.logaddexp(0, x).astype(x.dtype),)


def reference_evaluator(model: onnx.ModelProto) -> ReferenceEvaluator:
    """Return what computes a graph as the ONNX standard says."""
    return ReferenceEvaluator(model, new_ops=[Softplus])


def require_portable(
    model: onnx.ModelProto,
    contract: GraphContract,
    tokens: npt.NDArray[np.int64],
    linears: Mapping[str, str],
    *,
    folded: bool,
) -> None:
    """Raise `ExportError` unless `model` is portable, and onnxruntime computes what the standard says it should.

    Args:
        tokens: text (T,), the beginning of which is run. linears: the format of every linear. folded: positions.
    """
    require_standard_operators(model)
    text = tokens[: PREFILLED + DECODED]
    runners = reference_evaluator(model), open_graph(model)
    expected, actual = (run_graph(runner, contract, text, DECODED) for runner in runners)
    if {LINEAR_FORMATS[name].kernel for name in linears.values()} == {Float32.kernel}:
        measure, distance = "logits differ by up to", float(np.abs(expected - actual).max())
        allowed = float_tolerance(float(np.abs(expected).max()), folded=folded)
    else:
        measure, distance = "predictions differ by a mean KL divergence of", float(divergence(expected, actual).mean())
        allowed = LARGEST_KL
    if not distance <= allowed:  # NaN is no agreement
        raise ExportError(
            f"onnxruntime {ort.__version__} does not compute this portable graph as the ONNX reference does: {measure} "
            f"{distance:.2g}, more than {allowed:.2g}; use another onnxruntime, or drop `portable`"
        )


def require_standard_operators(model: onnx.ModelProto) -> None:
    """Raise `ExportError` where `model` has operators outside the standard domain, or is no valid ONNX."""
    foreign = sorted({f"{node.domain}::{node.op_type}" for node in model.graph.node if node.domain})
    if foreign:
        raise ExportError(f"`portable` has standard operators alone, but this graph has {', '.join(foreign)}")
    onnx.checker.check_model(model, full_check=True)
