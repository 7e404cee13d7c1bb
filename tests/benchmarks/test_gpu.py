"""What the benchmarks of packages for GPUs rest on: arithmetic of half precision, and a stand-in that compiles."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from onnx.reference import ReferenceEvaluator

from benchmarks.cuda import assignment
from benchmarks.gpu_precision import OPERATORS
from expe_edge.errors import ConfigError
from expe_edge.graph.build import build_graph, graph_contract
from expe_edge.graph.linears import Float16, Float32
from expe_edge.graph.run import open_graph, run_graph
from tests.graphs import random_weights
from tests.strategies import random_tokens, small_config

CONFIG = small_config(
    positional_parameters={"softplus": True, "content_heads": 1, "temperature": 0.3}, output_gate=True
)


@pytest.mark.parametrize(("gpu", "least", "most"), [("float32", 0.0, 1e-4), ("float16", 1e-4, 0.2)])
def test_the_evaluator_computes_what_onnxruntime_does_but_for_rounding(gpu: str, least: float, most: float) -> None:
    weights, tokens = random_weights(CONFIG), random_tokens(CONFIG, 40)[0]
    exact = build_graph(weights, Float32(), gpu="float32").model
    expected = run_graph(open_graph(exact), graph_contract(CONFIG, gpu="float32"), tokens)
    model = build_graph(weights, Float16() if gpu == "float16" else Float32(), gpu=gpu).model
    found = run_graph(ReferenceEvaluator(model, new_ops=OPERATORS), graph_contract(CONFIG, gpu=gpu), tokens)
    assert least <= np.abs(found - expected).max() < most


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_the_stand_in_is_c_without_warnings(tmp_path: Path) -> None:
    command = ["cc", "-std=c11", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", str(assignment.SOURCE)]
    subprocess.run([*command, "-o", str(tmp_path / "stand_in.so")], check=True)


@pytest.mark.skipif("CUDAExecutionProvider" in ort.get_available_providers(), reason="onnxruntime-gpu is here")
def test_an_onnxruntime_without_the_provider_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no CUDA provider; run this where onnxruntime-gpu is"):
        assignment.build(tmp_path)
