"""`export --target`: what is chosen is said and written down, and given options win."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from expe_edge.cli.main import main
from expe_edge.export import ort_format
from expe_edge.graph.run import open_model, run_graph
from expe_edge.package.directory import MODEL_FILE, OPERATORS_FILE, ORT_FILE, read_package
from tests.small import command_runner


def export(*arguments: str | Path) -> str:
    """Run `export`, and return what it says on standard error."""
    result = command_runner().invoke(main, ["export", *map(str, arguments), "--solver", "rtn"])
    assert result.exit_code == 0, result.stderr
    return result.stderr


def test_a_phone_gets_four_bits_in_ort_format_too(checkpoint: Path, tmp_path: Path) -> None:
    said = export(checkpoint, "--target", "android", "--out", tmp_path)
    assert "--target android: --precision int4-weight, since " in said
    assert "--target android: --block-size 32, since " in said
    assert "--target android: --ort-format, since " in said
    package = read_package(tmp_path / "int4-weight")
    assert {ORT_FILE, OPERATORS_FILE} <= set(package.manifest.files)
    recipe = package.manifest.recipe
    assert (recipe["target"], recipe["chosen"]) == ("android", ["precision", "block_size", "ort_format"])
    operators = (package.path / OPERATORS_FILE).read_text(encoding="utf-8")
    assert "MatMulNBits" in operators
    assert "GroupQueryAttention" in operators
    assert "tmp" not in operators
    tokens = np.arange(1, 60)
    expected, found = (
        run_graph(open_model(package.path / name), package.manifest.contract, tokens) for name in (MODEL_FILE, ORT_FILE)
    )
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_given_options_win(checkpoint: Path, tmp_path: Path) -> None:
    said = export(checkpoint, "--target", "ios", "--precision", "int8-weight", "--out", tmp_path)
    assert "--precision" not in said
    assert "--block-size" not in said
    recipe = read_package(tmp_path / "int8-weight").manifest.recipe
    assert recipe["precision"] == "int8-weight"
    assert recipe["block_size"] is None
    assert recipe["chosen"] == ["ort_format"]


def test_a_gpu(checkpoint: Path, tmp_path: Path) -> None:
    result = command_runner().invoke(main, ["export", str(checkpoint), "--target", "cuda", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.stderr
    manifest = read_package(tmp_path / "float16-cuda").manifest
    assert manifest.contract.whole_buffer
    assert manifest.contract.cache_dtype == "float16"
    assert manifest.recipe["device"] == "cuda"


def test_a_graph_that_computes_something_else_in_ort_format(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = iter([np.ones(3), np.full(3, 2.0)])
    monkeypatch.setattr(ort_format, "run_graph", lambda *_: next(logits))
    result = command_runner().invoke(main, ["export", str(checkpoint), "--ort-format", "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert "computes logits in ORT format that differ by 1; drop --ort-format" in result.stderr
    assert not (tmp_path / "float32").exists()
