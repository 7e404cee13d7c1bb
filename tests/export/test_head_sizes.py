"""Heads that onnxruntime's attention does not take: portable packages of every format, and no others."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from expe_edge.errors import ExportError
from expe_edge.export.exporter import export
from expe_edge.export.fold import extract_weights
from expe_edge.graph.build import build_graph, graph_contract
from expe_edge.graph.linears import Float32
from expe_edge.graph.run import run_graph
from expe_edge.package.directory import read_package
from expe_edge.quant.recipe import Recipe
from expe_edge.runtime import Generator
from expe_edge.training.checkpoint import load_checkpoint
from expe_edge.training.run import train
from tests.command_line import refused, succeed
from tests.conftest import PORTABLE_PRECISIONS, PRECISIONS
from tests.graphs import open_session
from tests.small import small_settings
from tests.strategies import random_model, random_tokens, small_config

pytestmark = pytest.mark.usefixtures("elsewhere")


@pytest.fixture(scope="module")
def nines(tmp_path_factory: pytest.TempPathFactory, text_folder: Path) -> Path:
    """A checkpoint of heads of nine."""
    out = tmp_path_factory.mktemp("nines") / "model"
    train(small_settings(text_folder, hidden_size=36, max_steps=20), out)
    return out


def test_every_format_has_a_portable_package(nines: Path, tmp_path: Path) -> None:
    recipes = [Recipe(precision, portable=True) for precision in PORTABLE_PRECISIONS]
    recipes += [Recipe("int8-static", portable=True, smoothing=True, solver="rtn")]

    for recipe in recipes:
        (package,) = export(nines, tmp_path / "out", [recipe], force=True)
        assert read_package(package.path).manifest.contract.head_size == 9

    assert len(Generator.load(package.path).generate(["the", "a tree"], max_new_tokens=4)[0].tokens) == 4


def test_predictions_are_those_of_pytorch(nines: Path, tmp_path: Path) -> None:
    (package,) = export(nines, tmp_path, [Recipe(portable=True)])
    generator = Generator.load(package.path)
    ids = generator.encode("the old tree grows under the river")
    with torch.inference_mode():
        expected = load_checkpoint(nines).model(torch.from_numpy(ids)[None]).logits[0]

    found = np.concatenate(list(generator.session.prefill(generator.session.new_cache(1, len(ids)), ids, chunk=5)))

    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("method", ["minmax", "percentile"])
def test_every_way_to_calibrate_works(nines: Path, method: str) -> None:
    succeed(
        *("export", nines, "--out", "out", "--portable", "--precision", "int8-static", "--solver", "rtn"),
        *("--calibration-method", method),
    )


def test_formats_can_be_measured(nines: Path) -> None:
    succeed("sensitivity", nines, "--documents", "2", "--precision", "int8-dynamic", "--solver", "rtn", "--json", "s")
    measured = {result["weight"] for result in json.loads(Path("s").read_text())["results"]}
    assert {"embedding", "head", "layers.0.attention.qkv"} <= measured
    assert "cache" not in measured  # which has an int8 form in that attention alone


@pytest.mark.skipif(PORTABLE_PRECISIONS != PRECISIONS, reason="onnxruntime makes no one kernel of some of them")
def test_formats_can_be_chosen(nines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On little text: how well is not the question here."""
    monkeypatch.setattr("expe_edge.export.exporter.LONGER", (1,))
    monkeypatch.setattr("expe_edge.export.exporter.LEAST_TEXTS", 2)
    monkeypatch.setattr("expe_edge.export.exporter.TOKENS", 64)
    monkeypatch.setattr("expe_edge.export.exporter.LONGER_TOKENS", 64)
    succeed("export", nines, "--out", "out", "--portable", "--precision", "auto", "--max-size", "1MB")

    assert read_package(Path("out/auto-portable")).manifest.contract.growing_cache


def test_a_float32_package_is_a_source_of_others(nines: Path) -> None:
    succeed("export", nines, "--out", "out", "--portable")
    succeed("quantize", "out/float32-portable", "--out", "out", "--portable", "--precision", "int8-dynamic")


@pytest.mark.parametrize("size", [1, 7])
def test_heads_of_any_size(text_folder: Path, tmp_path: Path, size: int) -> None:
    settings = small_settings(
        text_folder, hidden_size=4 * size, max_steps=1, positional_parameters={"dims": 2}, training_length=64
    )
    train(settings, tmp_path / "model")

    export(tmp_path / "model", tmp_path, [Recipe(portable=True), Recipe("int8-static", portable=True, solver="rtn")])


def test_sinusoidal_waves_fit_an_odd_width() -> None:
    """One sine more than cosines: of a width that only heads of an odd size make."""
    config = small_config(positional="sinusoidal", hidden_size=27, num_attention_heads=3, num_key_value_heads=3)
    model, tokens = random_model(config), random_tokens(config, 12)
    graph = build_graph(extract_weights(model, folded=True), Float32(), portable=True).model
    with torch.inference_mode():
        expected = model(torch.from_numpy(tokens)).logits[0]

    found = run_graph(open_session(graph), graph_contract(config, portable=True), tokens[0], 3)

    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-4)


def test_an_ordinary_package_is_refused_before_anything_is_made(nines: Path) -> None:
    message = (
        "head size 9 is not a multiple of 8, which onnxruntime's attention needs; export with --portable, or train "
        "with another --num-attention-heads or --hidden-size"
    )
    for options in ((), ("--precision", "auto", "--budget-kl", "1"), ("--cache", "int8")):
        assert refused("export", nines, "--out", "out", *options) == message
    with pytest.raises(ExportError) as caught:
        export(nines, Path("out"), [Recipe(portable=True), "float32"])
    for name in ("portable", "num_attention_heads", "hidden_size"):
        message = message.replace(f"--{name.replace('_', '-')}", f"`{name}`")
    assert str(caught.value) == message
    assert not Path("out").exists()
