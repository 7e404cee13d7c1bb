"""`expe-edge reproduce` from study file to report: what it finds, keeps, goes on with and refuses."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import yaml
from click.testing import Result

from expe_edge.quality.comparison import long_documents
from expe_edge.quality.scoring import open_scorer
from expe_edge.study.plan import read_study
from expe_edge.study.report import gather
from expe_edge.study.running import run_alone, stopped_by_file
from expe_edge.study.state import finished
from expe_edge.study.work import carry_out
from expe_edge.training.checkpoint import load_checkpoint
from tests.command_line import invoke, names, refused, tree

LENGTHS, SEEDS = [1, 2], [0, 1]
#: The run that the command makes, and the files of a finished one that must not be made again.
LAST, RESULTS = "alibi-seed1", ("model.safetensors", "losses.json", "probes.json")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory, text_folder: Path) -> Path:
    """A study of seconds: two encodings and an ablation, probes and cost."""
    settings = {
        "data": [str(text_folder)],
        "vocab_size": 257,
        "training_length": 32,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_steps": 6,
        "batch_size": 4,
        "warmup_steps": 2,
        "log_every": 2,
        "save_every": 3,
    }
    content = {
        "title": "A <small> study",
        "settings": settings,
        "variants": {"expe": {"positional": "expe"}, "alibi": {"positional": "alibi"}},
        "against": "alibi",
        "ablations": {"expe": {"positional_parameters": {"dims": [4, 16]}}},
        "seeds": SEEDS,
        "lengths": LENGTHS,
        "documents": 3,
        "probes": {
            "names": ["context-use", "passkey"],
            "lengths": [1, 2],
            "depths": [0, 100],
            "documents": 2,
            "cases": 1,
        },
        "cost": True,
    }
    file = tmp_path_factory.mktemp("study") / "small.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return file


@dataclass(frozen=True)
class Done:
    """A study that was carried out: all but one of its runs beforehand, that one by the command.

    failed: what the command said where that run could not be made, and its report. before: digests of the other runs.
    """

    out: Path
    failed: tuple[Result, dict[str, Any]]
    before: dict[str, bytes]

    @property
    def report(self) -> dict[str, Any]:
        return report_of(self.out)

    def page(self, kind: str) -> str:
        return (self.out / f"report.{kind}").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def done(study: Path) -> Done:
    """The study, whose last run is first kept from its place by a file, then made."""
    out, plan = study.parent / "out", read_study(study)
    out.mkdir()
    for run in plan.runs:
        if run.name != LAST:
            carry_out(plan, out, run)
    before = digests(out)
    (out / LAST).mkdir()
    (out / LAST / "letters.txt").touch()
    failed = invoke("reproduce", study, "--out", out), report_of(out)
    shutil.rmtree(out / LAST)
    result = invoke("reproduce", study, "--out", out, "--jobs", 1)
    assert result.exit_code == 0, result.output
    return Done(out, failed, before)


def digests(out: Path) -> dict[str, bytes]:
    """What the files hold that must not be made again, and when they were written."""
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).digest() + str(path.stat().st_mtime_ns).encode()
        for name in RESULTS
        for path in out.glob(f"*/{name}")
    }


def report_of(out: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return report


def test_finished_runs_are_kept_and_the_missing_one_is_made(done: Done) -> None:
    after = digests(done.out)
    assert {name: after[name] for name in done.before} == done.before
    assert sorted(after.keys() - done.before.keys()) == [f"{LAST}/{name}" for name in sorted(RESULTS)]


def test_a_run_that_fails_is_named_with_its_reason_and_the_others_are_reported(done: Done) -> None:
    result, report = done.failed
    reason = f"{done.out / LAST} holds something else than a training run; `force` will not delete it"
    assert result.exit_code == 1
    assert report["troubles"] == {LAST: reason}
    assert result.stderr.splitlines()[-1] == f"{LAST}: {reason}".replace("`force`", "--force")
    assert report["seeds"] == {"expe": [0, 1], "alibi": [0], "expe, dims=4": [0, 1], "expe, dims=16": [0, 1]}
    assert np.isfinite(report["difference"]["expe"]).all()  # of the seed that both have
    assert done.report["troubles"] == {}


def test_an_interrupted_run_goes_on_from_its_checkpoint(done: Done, study: Path, tmp_path: Path) -> None:
    plan = read_study(study)
    (run,) = (run for run in plan.runs if run.name == "expe-seed0")
    directory = Path(shutil.copytree(done.out / run.name, tmp_path / run.name))
    for name in RESULTS:
        (directory / name).unlink()
    shutil.rmtree(directory / "trainer" / "checkpoint-6")
    first = (directory / "trainer" / "checkpoint-3" / "model.safetensors").stat().st_mtime_ns
    assert not finished(plan, tmp_path, run)

    carry_out(plan, tmp_path, run)

    assert finished(plan, tmp_path, run)
    assert (directory / "trainer" / "checkpoint-3" / "model.safetensors").stat().st_mtime_ns == first
    for name in ("model.safetensors", "losses.json"):
        assert (directory / name).read_bytes() == (done.out / run.name / name).read_bytes()


def test_ctrl_c_is_a_file_that_workers_see_and_a_second_one_an_interrupt(tmp_path: Path) -> None:
    with stopped_by_file(tmp_path) as interrupted:
        assert not interrupted()
        signal.raise_signal(signal.SIGINT)
        assert interrupted()
        run_alone(str(tmp_path), str(tmp_path), "never-begun", os.getpid())
        assert names(tmp_path) == [".stop"]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_losses_are_those_of_the_whole_text_at_once(done: Done) -> None:
    """In one forward pass without a cache, of every document."""
    run = done.out / LAST
    scorer, model = open_scorer(run), load_checkpoint(run).model
    documents, _ = long_documents(scorer, (), "text", 65, 3)
    expected = []
    for document in documents:
        tokens = torch.from_numpy(document[:65])
        with torch.no_grad():
            logits = model(input_ids=tokens[None, :-1]).logits[0]
        losses = torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none")
        expected.append([float(losses[:32].mean()), float(losses[32:].mean())])
    np.testing.assert_allclose(done.report["losses"]["alibi"][1], expected, rtol=1e-4)


def brute_force(difference: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Mean of (seeds, documents), and its standard error by the mean squares of a two-way analysis of variance."""
    seeds, documents = difference.shape
    mean = sum(difference[s, d] for s in range(seeds) for d in range(documents)) / (seeds * documents)
    of_seed = [sum(difference[s]) / documents for s in range(seeds)]
    of_document = [sum(difference[:, d]) / seeds for d in range(documents)]
    between_seeds = documents * sum((each - mean) ** 2 for each in of_seed) / (seeds - 1)
    between_documents = seeds * sum((each - mean) ** 2 for each in of_document) / (documents - 1)
    rest = sum(
        (difference[s, d] - of_seed[s] - of_document[d] + mean) ** 2 for s in range(seeds) for d in range(documents)
    ) / ((seeds - 1) * (documents - 1))
    return mean, max((between_seeds + between_documents - rest) / (seeds * documents), 0) ** 0.5


@pytest.mark.parametrize(("variant", "other"), [("expe", "alibi"), ("expe, dims=4", "expe")])
def test_differences_are_paired_by_document_and_seed(done: Done, variant: str, other: str) -> None:
    out, report = done.out, done.report
    directories = {"expe": "expe", "alibi": "alibi", "expe, dims=4": "expe-dims=4"}
    ours, theirs = (
        np.array([json.loads((out / f"{directories[n]}-seed{s}" / "losses.json").read_text())["losses"] for s in SEEDS])
        for n in (variant, other)
    )
    for bucket in range(len(LENGTHS)):
        mean, error = brute_force((ours - theirs)[:, :, bucket])
        assert report["difference"][variant][bucket] == pytest.approx(mean, abs=1e-12)
        assert report["difference_stderr"][variant][bucket] == pytest.approx(error, abs=1e-9)
        mark = "*" if abs(mean) > 2 * error else ""
        cell = f"{ours[:, :, bucket].mean():.3f} ({mean:+.3f} ± {error:.3f}){mark}"
        assert f"<td>{cell}</td>" in done.page("html")
        assert f" {cell} |".replace("*", "\\*") in done.page("md")
    assert any(report["difference_stderr"][variant])


def test_variants_of_another_text_have_no_difference(done: Done, study: Path, text_folder: Path) -> None:
    """Their held-out documents are others, though as many, of one tokenizer, and as long."""
    plan = read_study(study)
    other = {"positional": "alibi", "data": sorted(map(str, text_folder.iterdir()))}
    changed = dataclasses.replace(plan, variants={**plan.variants, "alibi": other})
    report = gather(changed, done.out, "")
    assert sorted(report["nll"]) == sorted(done.report["nll"])
    assert sorted(report["difference"]) == ["alibi", "expe, dims=16", "expe, dims=4"]


def test_an_ablation_with_the_base_s_value_differs_in_nothing(done: Done) -> None:
    report = done.report
    assert report["difference"]["expe, dims=16"] == report["difference_stderr"]["expe, dims=16"] == [0, 0]
    assert not list(done.out.glob("expe-dims=16*"))


def test_probes_are_means_over_seeds_and_depths(done: Done) -> None:
    out, report = done.out, done.report
    found = [json.loads((out / f"alibi-seed{seed}" / "probes.json").read_text())["report"]["recall"] for seed in SEEDS]
    gained = [np.mean([r["gained"] for r in of_seed if r["length"] == 64]) for of_seed in found]
    (result,) = (r for r in report["probes"] if (r["variant"], r["probe"], r["length"]) == ("alibi", "passkey", 64))
    assert result["gained"] == pytest.approx(np.mean(gained))
    assert result["gained_stderr"] == pytest.approx(abs(gained[0] - gained[1]) / 2)


def test_recall_stands_beside_loss(done: Done) -> None:
    """Beyond N, which is 32: the losses from 1 N on, and what was recalled in the texts of 64 tokens."""
    results = {result["variant"]: result for result in done.report["trade_off"]}
    assert results.keys() == done.report["nll"].keys()
    for name in ("expe", "alibi"):
        runs = [done.out / f"{name}-seed{seed}" for seed in SEEDS]
        losses = [json.loads((run / "losses.json").read_text())["losses"] for run in runs]
        recalled = [
            cell
            for run in runs
            for cell in json.loads((run / "probes.json").read_text())["report"]["recall"]
            if cell["length"] == 64
        ]
        assert results[name]["loss"] == pytest.approx(np.array(losses)[:, :, 1:].mean())
        assert results[name]["gained"] == pytest.approx(np.mean([cell["gained"] for cell in recalled]))
        row = f"<td>{results[name]['loss']:.3f}</td><td>{results[name]['gained']:+.3f}</td>"
        assert row in done.page("html")


def test_what_is_far_is_beyond_the_n_of_the_variant(done: Done, study: Path) -> None:
    """Texts of 64 tokens are what all have been asked of: no longer than N of a variant that trains on as many."""
    plan = read_study(study)
    longer = {"positional": "alibi", "training_length": 64}
    report = gather(dataclasses.replace(plan, variants={**plan.variants, "alibi": longer}), done.out, "")
    assert [result["variant"] for result in report["trade_off"]] == ["expe", "expe, dims=4", "expe, dims=16"]


def test_cost_is_measured_of_every_variant_that_is_trained(done: Done) -> None:
    cost = done.report["cost"]
    assert [(c["precision"], c["length"]) for c in cost] == [
        (precision, length) for precision in ("float32", "int8-dynamic") for length in (32, 64)
    ]
    for cell in cost:
        assert cell["prefill"].keys() == cell["step"].keys() == cell["cache_bytes"].keys() == {"expe", "alibi"}
        ratios = np.divide(cell["step"]["expe"], cell["step"]["alibi"])
        assert cell["step_ratio"]["expe"] == pytest.approx(np.percentile(ratios, [25, 50, 75]).tolist())
        assert cell["prefill_ratio"]["alibi"] == [1, 1, 1]
        # Keys and values of one layer, 32 wide, float32, with room for 40 steps after the text.
        assert cell["cache_bytes"]["alibi"] == 2 * 32 * 4 * (cell["length"] + 40)


def test_the_page_needs_no_other_file_and_holds_the_study(done: Done, study: Path) -> None:
    page = done.page("html")
    assert "<h1>A &lt;small&gt; study</h1>" in page
    assert "num_hidden_layers: 1" in page
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert page.count('src="data:image/svg+xml;base64,') == 6  # losses, the ablation, training, two probes, recall
    markdown = done.page("md")
    images = re.findall(r"\]\((plots/.*?)\)", markdown)
    assert len(images) == 6
    assert all((done.out / image).read_bytes().startswith(b"<?xml") for image in images)
    assert done.report["study"] == study.read_text(encoding="utf-8")


def test_the_report_alone_is_made_again_the_same(done: Done, study: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(done.out, tmp_path / "out"))
    for page in ("report.html", "report.md", "report.json"):
        (out / page).unlink()
    result = invoke("reproduce", study, "--out", out, "--report-only")
    assert result.exit_code == 0, result.output
    for page in ("report.html", "report.md", "report.json"):
        assert (out / page).read_bytes() == (done.out / page).read_bytes()


def test_a_study_whose_settings_have_changed_is_refused(
    done: Done, study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(done.out)
    changed = yaml.safe_load(study.read_text(encoding="utf-8"))
    changed["variants"]["alibi"]["learning_rate"] = 0.5
    file = tmp_path / "changed.yaml"
    file.write_text(yaml.safe_dump(changed, sort_keys=False), encoding="utf-8")
    before = tree(done.out)
    assert refused("reproduce", file, "--out", done.out) == (
        f"learning_rate is 0.5 in the study, but 0.003 in the run of {done.out}/alibi-seed0; change it back, move "
        "the run away, or choose another --out"
    )
    assert tree(done.out) == before


@pytest.mark.usefixtures("elsewhere")
def test_what_the_command_refuses_at_once(study: Path) -> None:
    assert refused("reproduce", study, "--jobs", 0) == "--jobs is 0; at least 1"
    assert refused("reproduce", study, "--backend", "lok").startswith("unknown backend 'lok'; did you mean 'loky'?")
    assert refused("reproduce", study, "--out", "gone", "--report-only") == (
        "gone is not a directory; choose another --out, or drop --report-only"
    )
    assert refused("reproduce", "gone.yaml").startswith("study gone.yaml: not readable as YAML")


@pytest.mark.parametrize(("backend", "package"), [("ray", "ray"), ("dask", "distributed")])
@pytest.mark.usefixtures("elsewhere")
def test_a_backend_that_is_not_installed_is_named(study: Path, backend: str, package: str) -> None:
    try:
        __import__(package)
    except ModuleNotFoundError:
        assert refused("reproduce", study, "--backend", backend) == (
            f"--backend {backend} needs {package}, not installed; pip install {package} on every machine"
        )
    else:
        pytest.skip(f"{package} is installed")
