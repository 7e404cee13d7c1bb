"""Whether this CPU's integer kernels saturate: uint8 × int8 against uint8 × uint8, of the same integers.

python -m benchmarks.saturation
"""

from __future__ import annotations

import json

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper


def product(weights: np.ndarray, zero_point: np.ndarray, activations: np.ndarray) -> np.ndarray:
    """MatMulInteger of uint8 activations around 128 with `weights` around `zero_point`, int32."""
    node = helper.make_node("MatMulInteger", ["x", "w", "x_zero", "w_zero"], ["y"])
    constants = {"w": weights, "x_zero": np.array(128, dtype=np.uint8), "w_zero": zero_point}
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, ["rows", weights.shape[0]])],
        [helper.make_tensor_value_info("y", TensorProto.INT32, ["rows", weights.shape[1]])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    result: np.ndarray = session.run(None, {"x": activations})[0]
    return result


def main() -> None:
    """Print, as JSON, the largest relative error of both kernels for normal activations and weights."""
    random = np.random.default_rng(0)
    values = random.normal(size=(384, 1536))
    weights = np.rint(values / np.abs(values).max(axis=0) * 127)
    activations = np.clip(np.rint(random.normal(size=(256, 384)) * 32) + 128, 0, 255).astype(np.uint8)
    exact = (activations.astype(np.int64) - 128) @ weights.astype(np.int64)
    pairs = {
        "uint8 x int8": (weights.astype(np.int8), np.array(0, dtype=np.int8)),
        "uint8 x uint8": ((weights + 128).astype(np.uint8), np.array(128, dtype=np.uint8)),
    }
    for name, (stored, zero_point) in pairs.items():
        error = np.abs(product(stored, zero_point, activations) - exact).max()
        print(json.dumps({"kernel": name, "largest_error": int(error), "largest_product": int(np.abs(exact).max())}))


if __name__ == "__main__":
    main()
