"""All probes together: what is chosen, what comes out, as data, tables and a plot."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from expe_edge.cli.probe_plots import plot_probes
from expe_edge.cli.probe_tables import probe_tables
from expe_edge.cli.tables import print_whole
from expe_edge.errors import ConfigError, CorpusError
from expe_edge.quality.needles import PUZZLES
from expe_edge.quality.probing import PROBES, ProbeReport, ProbeSettings, probe
from expe_edge.quality.scoring import Scorer, open_scorer
from expe_edge.text.documents import Document
from expe_edge.text.tokenization import train_tokenizer
from tests.command_line import succeed
from tests.quality.test_definitions import module

N = 32
LENGTHS = (2, 8, 10)


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Six modules, whose names are referred to after some hundred tokens of more than five hundred."""
    folder = tmp_path_factory.mktemp("code")
    for number in range(6):
        (folder / f"{number}.py").write_text(module(number, 10 + number) + "old = the.river\n" * 60, "utf-8")
    return str(folder)


@pytest.fixture(scope="module")
def report(scorers: list[Scorer], code: str) -> ProbeReport:
    settings = ProbeSettings(LENGTHS, documents=3, depths=(0.0, 1.0), cases=2, seed=4)
    return probe(scorers[:2], settings, sources=[code], at_once=2)


def test_every_probe_of_every_model(report: ProbeReport) -> None:
    assert report.models == ("model", "float32")
    assert (report.training_length, report.lengths, report.seed) == (N, LENGTHS, 4)
    assert [(r.model, r.length) for r in report.context_use] == [
        (model, n * N) for model in report.models for n in LENGTHS
    ]
    assert {r.probe for r in report.recall} == {*PUZZLES, "code-definition"}
    copies = [(r.model, r.length, r.depth) for r in report.recall if r.probe == "copying"]
    assert copies == [(m, n * N, d) for m in report.models for n in (8, 10) for d in (0, 1)]  # it does not fit in 2 N
    assert report.loss_by_position[-1].bin_end == 10 * N


def test_models_of_the_same_weights_agree(report: ProbeReport) -> None:
    ours, theirs = ([r for r in report.recall if r.model == model] for model in report.models)
    assert [(r.probe, r.length, r.depth, r.distance) for r in ours] == [
        (r.probe, r.length, r.depth, r.distance) for r in theirs
    ]
    assert [r.gained for r in ours] == pytest.approx([r.gained for r in theirs], abs=1e-3)


def test_json_holds_it_all(report: ProbeReport) -> None:
    values = json.loads(json.dumps(report.to_dict(), allow_nan=False))

    assert len(values["recall"]) == len(report.recall)
    assert len(values["context_use"]) == len(report.context_use)
    assert len(values["loss_by_position"]) == len(report.loss_by_position)


def test_tables_show_every_figure(report: ProbeReport) -> None:
    page = io.StringIO()
    for table in probe_tables(report):
        print_whole(table, Console(width=40, file=page))
    text = page.getvalue()

    assert "…" not in text
    assert all(name in text for name in (*PUZZLES, "code-definition", "Context use", "Loss by position"))
    for result in report.recall:
        assert f"{result.exact_match:.0%} {result.gained:+.2f} ± {result.gained_stderr:.2f}" in text
    for use in report.context_use:
        assert f"{use.gained:+.3f} ± {use.gained_stderr:.3f}" in text
    for loss in report.loss_by_position:
        assert f"{loss.loss:.3f} ± {loss.loss_stderr:.3f}" in text


@pytest.mark.parametrize("kept", [("context_use", "recall", "loss_by_position"), ("recall",), ("context_use",)])
def test_plot_is_a_png(report: ProbeReport, tmp_path: Path, kept: tuple[str, ...]) -> None:
    part = ProbeReport(
        report.models,
        N,
        LENGTHS,
        0,
        **{name: getattr(report, name) for name in kept},
    )

    plot_probes(part, tmp_path / "plot.png")

    data = (tmp_path / "plot.png").read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(data) > 10_000


@pytest.mark.parametrize("name", PROBES)
def test_one_probe_alone(scorers: list[Scorer], code: str, name: str) -> None:
    report = probe(
        scorers[1:2], ProbeSettings((8,), documents=3, probes=(name,), depths=(0.5,), cases=1), sources=[code]
    )

    kinds = {"context-use": report.context_use, "loss-by-position": report.loss_by_position}
    assert bool(report.recall) == (name not in kinds)
    assert {kind for kind, results in kinds.items() if results} == {name} & set(kinds)
    assert {r.probe for r in report.recall} <= {name}


def test_text_without_definitions(scorers: list[Scorer], capfd: pytest.CaptureFixture[str]) -> None:
    both = ProbeSettings((4,), documents=2, probes=("code-definition", "loss-by-position"))

    assert probe(scorers[1:2], both).recall == ()
    assert (
        "code-definition: the text has no name that is defined and referred to within 128 tokens"
        in capfd.readouterr().err
    )
    with pytest.raises(CorpusError, match="within 128 tokens; give Python code with `sources`"):
        probe(scorers[1:2], ProbeSettings((4,), documents=2, probes=("code-definition",)))


def test_help_lists_every_probe() -> None:
    page = "".join(succeed("probe", "--help").stdout.split())  # a line may break at a hyphen

    assert f"Oneof{','.join(PROBES)};" in page


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": (2, 1)}, "`lengths` 2,1: expected rising positive integers, as 1,2,4,8,16"),
        ({"documents": 0}, "`documents` is 0; at least 1"),
        ({"cases": 0}, "`cases` is 0; at least 1"),
        ({"seed": -1}, "`seed` is -1; at least 0"),
        ({"depths": (0.5, 0.2)}, "`depths` 50,20: expected rising percentages from 0 to 100, as 0,25,50,75,100"),
        ({"probes": ()}, f"no `probe` is chosen; available: {', '.join(PROBES)}"),
    ],
)
def test_settings_out_of_range(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ProbeSettings(**changes)  # type: ignore[arg-type]

    assert str(caught.value) == message


def test_models_of_different_tokenizers(scorers: list[Scorer], checkpoint: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(checkpoint, other, ignore=shutil.ignore_patterns("trainer"))
    train_tokenizer([Document("code", Path(__file__).read_text("utf-8"))], 300).save(str(other / "tokenizer.json"))

    with pytest.raises(ConfigError, match="has another tokenizer than"):
        probe([scorers[0], open_scorer(other)], ProbeSettings((2,)))
