"""`optimum-cli export expe-edge`: what it writes is a package, which Optimum opens."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from expe_edge.package.directory import read_package
from expe_edge.runtime import Generator

ROOT = Path(__file__).parents[2]


def optimum_cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Optimum's command line, which looks for commands in all of its name space."""
    pytest.importorskip("optimum.onnxruntime", reason="optimum-onnx 0.1 needs transformers 4")
    return subprocess.run(
        [sys.executable, "-m", "optimum.commands.optimum_cli", "export", *arguments],
        capture_output=True,
        text=True,
        timeout=250,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def test_optimum_exports_a_checkpoint_and_opens_what_it_wrote(checkpoint: Path, tmp_path: Path) -> None:
    done = optimum_cli("expe-edge", "--model", str(checkpoint), str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert "against PyTorch over" in done.stdout
    assert read_package(tmp_path / "out").manifest.parity["mean_kl"] < 1e-8
    from optimum.onnxruntime import ORTModelForCausalLM

    ours = Generator.load(tmp_path / "out")
    prompt = ours.encode("The old tree grows").tolist()
    model = ORTModelForCausalLM.from_pretrained(tmp_path / "out")
    output = model.generate(torch.tensor([prompt]), max_new_tokens=40, max_length=None, do_sample=False)
    assert output[0, len(prompt) :].tolist() == ours.generate([prompt], max_new_tokens=40)[0].tokens


def test_what_cannot_be_exported_is_one_line(checkpoint: Path, tmp_path: Path) -> None:
    done = optimum_cli("expe-edge", "--model", str(checkpoint), "--precision", "int3", str(tmp_path / "out"))
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()[-1:]
    assert line.startswith("Error: unknown precision 'int3'")
    assert not (tmp_path / "out").exists()


def test_optimums_own_export_refuses_the_class(checkpoint: Path, tmp_path: Path) -> None:
    """Why there is a command beside it: registered or not, a model's class has to be of transformers itself."""
    pytest.importorskip("optimum.onnxruntime", reason="optimum-onnx 0.1 needs transformers 4")
    from optimum.exporters.onnx import main_export
    from optimum.exporters.onnx.model_configs import LlamaOnnxConfig
    from optimum.exporters.tasks import TasksManager

    import expe_edge.model.decoder  # noqa: F401  # registers the class with transformers

    register = TasksManager.create_register("onnx", overwrite_existing=True)
    register("expe", "text-generation", "text-generation-with-past")(type("ExPEOnnxConfig", (LlamaOnnxConfig,), {}))
    with pytest.raises(ValueError, match="library name could not be automatically inferred"):
        main_export(str(checkpoint), tmp_path, task="text-generation-with-past", library_name="transformers")
