"""A whole analysis of trained checkpoints: what comes out, as data, tables and a plot."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from expe_edge.cli.analyze_plots import plot_analysis
from expe_edge.cli.analyze_tables import analysis_tables
from expe_edge.cli.tables import print_whole
from expe_edge.quality.analysis import AnalysisReport, AnalysisSettings, analyze
from expe_edge.quality.analysis.observing import observe
from expe_edge.quality.analysis.reach import first_query, head_reaches, reached
from expe_edge.quality.comparison import long_documents
from expe_edge.quality.scoring import CheckpointScorer
from expe_edge.training.checkpoint import load_checkpoint
from expe_edge.training.run import train
from tests.quality.analysis.test_observing import Recorder
from tests.small import small_settings

N, LAYERS, HEADS, DIMS, DOCUMENTS = 32, 2, 4, 16, 3


@pytest.fixture(scope="module")
def paths(checkpoint: Path, text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The session's checkpoint, in the relative form, beside barely trained ones of ALiBi and ExQPE."""
    folder, paths = tmp_path_factory.mktemp("others"), {"model": checkpoint}
    for name in ("alibi", "exqpe"):
        paths[name] = folder / name
        train(small_settings(text_folder, positional=name, position_offset=0, max_steps=2), paths[name])
    return paths


@pytest.fixture(scope="module")
def report(paths: dict[str, Path]) -> AnalysisReport:
    return analyze(list(paths.values()), AnalysisSettings(length=3, documents=DOCUMENTS))


def test_every_figure_of_every_model(report: AnalysisReport) -> None:
    assert (report.training_length, report.length, report.documents, report.seed) == (N, 3 * N, DOCUMENTS, 0)
    assert [(model.model, model.dims) for model in report.models] == [("model", DIMS), ("alibi", 0), ("exqpe", 24)]
    heads = [(layer, head) for layer in range(1, LAYERS + 1) for head in range(1, HEADS + 1)]
    for model in report.models:
        assert [(spread.place, spread.layer) for spread in model.spreads] == [
            ("embedding", 0),
            *((place, layer) for place in ("residual", "normed") for layer in (1, 2)),
        ]
        assert [probe.layer for probe in model.positions] == [0, 1, 2]
        assert [(reach.layer, reach.head) for reach in model.reaches] == heads
        assert {reach.queries for reach in model.reaches} == {DOCUMENTS * 3 * N // 2}
        limbs = (0, 1, 2) if model.model == "exqpe" else (None,)
        assert [(s.layer, s.head, s.limb) for s in model.slopes] == [
            (*place, limb) for place in heads for limb in limbs
        ]
        assert (model.neighbours is None) == (model.dims == 0)
    assert all(slope.constant for slope in report.models[1].slopes)
    assert all(slope.constant is (slope.head == HEADS) for slope in report.models[0].slopes)  # a content head


def test_a_models_figures_do_not_depend_on_its_company(paths: dict[str, Path], report: AnalysisReport) -> None:
    alone = analyze([paths["exqpe"]], AnalysisSettings(length=3, documents=DOCUMENTS))

    assert json.dumps(alone.models[0].to_dict()) == json.dumps(report.models[2].to_dict())


def test_every_layer_has_its_own_figures(paths: dict[str, Path], report: AnalysisReport) -> None:
    """The stream that enters a layer, what is behind its norm, and its heads, of all documents."""
    scorer = CheckpointScorer(load_checkpoint(paths["model"]))
    documents, _ = long_documents(scorer, (), "text", 3 * N, DOCUMENTS)
    seen = [Recorder(first_query(3 * N)) for _ in documents]
    for tokens, recorder in zip(documents, seen, strict=True):
        observe(scorer.model, tokens[: 3 * N], recorder)
    model = report.models[0]
    spreads = {(spread.place, spread.layer): spread for spread in model.spreads}

    for layer in (1, 2):
        residual = torch.cat([recorder.residuals[layer - 1] for recorder in seen])
        normed = torch.cat([recorder.views[layer].normed for recorder in seen])
        for place, states in (("residual", residual), ("normed", normed)):
            squares, spread = states.double() ** 2, spreads[place, layer]
            assert spread.rms_first == pytest.approx(float(squares[:, :DIMS].mean().sqrt()))
            assert spread.rms_others == pytest.approx(float(squares[:, DIMS:].mean().sqrt()))
        reaches = head_reaches(layer, [reached(recorder.weights[layer]) for recorder in seen])
        assert [reach for reach in model.reaches if reach.layer == layer] == reaches


def test_texts_are_as_long_as_asked_for(paths: dict[str, Path], tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text(f"{number} the stone " + "and the river runs over a tree " * 40)

    found = analyze([paths["alibi"]], AnalysisSettings(length=2), sources=[str(tmp_path)])

    assert (found.documents, found.length) == (3, 2 * N)
    assert found.models[0].reaches[0].queries == 3 * N


def test_json_holds_it_all(report: AnalysisReport) -> None:
    values = json.loads(json.dumps(report.to_dict(), allow_nan=False))

    for of_json, model in zip(values["models"], report.models, strict=True):
        for name in ("spreads", "positions", "slopes", "reaches"):
            assert len(of_json[name]) == len(getattr(model, name))
    assert len(values["models"][0]["neighbours"]["examples"][0]["by_all"]) == 10
    assert values["models"][1]["neighbours"] is None


def test_tables_show_every_figure(report: AnalysisReport) -> None:
    page = io.StringIO()
    for table in analysis_tables(report):
        print_whole(table, Console(width=40, file=page))
    text = page.getvalue()

    for model in report.models:
        for probe in model.positions:
            assert f"{probe.position_within:.3f}" in text
            assert f"{probe.log_position_beyond:.3f}" in text
        for reach in model.reaches:
            assert f"{reach.reach_median}/{reach.reach_90}, {reach.sinks:.1%}, {reach.entropy:.2f}" in text
        for slope in model.slopes:
            assert f"{slope.quantiles[2]:{'.4g' if slope.constant else '.3g'}}" in text
        for spread in model.spreads if model.dims else ():
            assert f"{spread.rms_first:.4g}" in text
            assert f"{spread.share:.2%}" in text
        if model.neighbours is not None:
            assert f"{model.neighbours.overlap:.1%} ± {model.neighbours.overlap_stderr:.1%}" in text
            assert repr(model.neighbours.examples[0].token) in text
    assert "nan" not in text


@pytest.mark.parametrize("models", [slice(None), slice(1, 2)], ids=["all", "without dimensions"])
def test_plot_is_a_png(report: AnalysisReport, tmp_path: Path, models: slice) -> None:
    plot_analysis(dataclasses.replace(report, models=report.models[models]), tmp_path / "plot.png")

    data = (tmp_path / "plot.png").read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(data) > 20_000


def test_texts_of_n_tokens(text_folder: Path, tmp_path: Path) -> None:
    """Where nothing lies beyond N there is nothing to report of it."""
    train(small_settings(text_folder, training_length=48, max_steps=1, positional="rotary"), tmp_path / "rotary")
    report = analyze([tmp_path / "rotary"], AnalysisSettings(length=1, documents=3))
    plot_analysis(report, tmp_path / "plot.png")
    page = io.StringIO()
    for table in analysis_tables(report):
        print_whole(table, Console(file=page))

    (model,) = report.models
    assert (model.slopes, model.neighbours) == ((), None)
    assert {probe.to_dict()["position_beyond"] for probe in model.positions} == {None}
    assert "nan" not in page.getvalue()
