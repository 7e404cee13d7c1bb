"""Model cards: what the Hub reads of them, figures by length, and packages that lie in the Hub's cache."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import ModelCard, snapshot_download

from expe_edge.cli.main import main
from expe_edge.errors import ExportError
from expe_edge.export.exporter import export
from expe_edge.hub.card import CardOptions
from expe_edge.package.directory import CARD_FILE, read_package
from expe_edge.package.reference import REFERENCE_PRECISIONS, reference_package
from expe_edge.quant.recipe import Recipe
from expe_edge.runtime import Generator
from reference.card import FIGURES
from tests.command_line import refused
from tests.conftest import needs_int8_cache
from tests.small import command_runner

pytestmark = pytest.mark.usefixtures("elsewhere")

N = 32


def card_of(package: Path) -> Any:
    """The card as the Hub's library reads it, which publishes part of its types."""
    return ModelCard.load(package / CARD_FILE)


def figures(card: Any, metric: str) -> list[float]:
    """The values of one metric in a card's metadata, shortest length first."""
    return [result.metric_value for result in card.data.eval_results if result.metric_type == metric]


def python_of(card: Any, client: str) -> str:
    (code,) = [code for code in re.findall(r"```python\n(.*?)```", card.text, flags=re.DOTALL) if client in code]
    return str(code)


@pytest.fixture
def own(packages: Path, tmp_path: Path) -> Path:
    """A copy of the int8-dynamic package."""
    return Path(shutil.copytree(packages / "int8-dynamic", tmp_path / "int8-dynamic"))


@pytest.fixture
def snapshot(packages: Path, tmp_path: Path) -> Path:
    """The package as the Hub's client lays it out: links into files that are named by their contents."""
    repository = tmp_path / "cache" / "models--someone--int8-dynamic"
    place, revision = repository / "blobs", "0" * 40
    folder = repository / "snapshots" / revision
    for directory in (place, folder, repository / "refs"):
        directory.mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    for file in (packages / "int8-dynamic").iterdir():
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copyfile(file, place / digest)
        (folder / file.name).symlink_to(Path("../../blobs") / digest)
    return Path(snapshot_download("someone/int8-dynamic", cache_dir=tmp_path / "cache", local_files_only=True))


def test_the_hub_reads_a_packages_metadata(packages: Path) -> None:
    data = card_of(packages / "int8-dynamic").data.to_dict()
    assert data["library_name"] == "expe-edge"
    assert data["pipeline_tag"] == "text-generation"
    assert {"onnx", "int8-dynamic"} <= set(data["tags"])
    assert not {"license", "base_model", "datasets", "language"} & set(data)  # nobody has said, and nothing tells
    assert data["model-index"][0]["name"] == "int8-dynamic"


def test_figures_are_those_of_the_validation(packages: Path) -> None:
    """Its text is long enough for 16 N, so that all counts: weighted by tokens, parts make the manifest's mean."""
    for name in ("float32", "int8-dynamic"):
        card, parity = card_of(packages / name), read_package(packages / name).manifest.parity
        widths = np.diff([1, N, 2 * N, 4 * N, 8 * N, 16 * N])
        divergence = np.average(figures(card, "kl_divergence"), weights=widths)
        assert divergence == pytest.approx(parity["mean_kl"], rel=0.02, abs=1e-9)
    perplexities = figures(card_of(packages / "float32"), "perplexity")
    assert len(perplexities) == 5
    assert all(1 < value < 300 for value in perplexities)
    assert "| position | 0–1 N | 1–2 N | 2–4 N | 4–8 N | 8–16 N |" in card_of(packages / "float32").text


def test_licence_and_base_are_the_users_to_say(checkpoint: Path, tmp_path: Path) -> None:
    options = ["--license", "cc-by-4.0", "--base-model", "someone/model"]
    command_runner().invoke(main, ["export", str(checkpoint), "--out", str(tmp_path), *options], catch_exceptions=False)
    data = card_of(tmp_path / "float32").data.to_dict()
    assert (data["license"], data["base_model"]) == ("cc-by-4.0", "someone/model")


def test_a_package_for_gpus_names_the_clients_that_run_it(checkpoint: Path, tmp_path: Path) -> None:
    (package,) = export(checkpoint, tmp_path, [Recipe("float16", device="cuda")])
    card, config = card_of(package.path).text, json.loads((package.path / "config.json").read_text())
    assert "expe-edge generate model --device cuda" in card
    assert "import onnxruntime_genai" in card
    assert "which Optimum and transformers.js have not; they refuse it" in card
    assert "`llama`" not in card
    assert config["model_type"] != "llama"
    assert not any(client in card for client in ("ORTModelForCausalLM", "@huggingface/transformers"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"license": "Apache 2.0"}, "`license` is 'Apache 2.0'; expected an identifier in small letters"),
        ({"base_model": "model"}, "`base_model` is 'model'; expected a repository of the Hub, as OWNER/NAME"),
    ],
)
def test_what_is_no_identifier_is_refused(options: dict[str, str], message: str) -> None:
    with pytest.raises(ExportError, match=re.escape(message)):
        CardOptions(**options)


def test_the_command_names_the_flag(checkpoint: Path, tmp_path: Path) -> None:
    line = refused("export", checkpoint, "--out", tmp_path / "out", "--license", "My licence")
    assert "--license is 'My licence'" in line


def test_an_edited_card_breaks_no_package(own: Path) -> None:
    (own / CARD_FILE).write_text("Mine alone.")
    read_package(own)
    (own / CARD_FILE).unlink()
    assert Generator.load(own).generate(["the"], max_new_tokens=2)[0].tokens


def test_compare_brings_cards_up_to_date_and_leaves_all_else(packages: Path, own: Path, tmp_path: Path) -> None:
    card = card_of(own)
    card.data.license = "mit"
    card.text += "\nWhat I have to say of it."
    (own / CARD_FILE).write_text(str(card), encoding="utf-8")
    float32 = Path(shutil.copytree(packages / "float32", tmp_path / "float32"))
    (float32 / CARD_FILE).write_text("# Mine\n", encoding="utf-8")
    asked = ["compare", str(float32), str(own), "--lengths", "1,2", "--documents", "3", "--card"]
    done = command_runner().invoke(main, [*asked, "--json", str(tmp_path / "figures.json")], catch_exceptions=False)
    assert done.exit_code == 0, done.stderr
    results = json.loads((tmp_path / "figures.json").read_text())["results"]
    measured = {model: [row for row in results if row["model"] == model] for model in ("float32", "int8-dynamic")}
    after = card_of(own)
    assert figures(after, "perplexity") == pytest.approx(
        [row["perplexity"] for row in measured["int8-dynamic"]], abs=1e-4
    )
    assert figures(after, "kl_divergence") == pytest.approx([row["kl"] for row in measured["int8-dynamic"]], rel=0.01)
    assert "Measured on 3 held-out documents" in after.text
    assert "KL divergence to float32, nats per token" in after.text
    assert after.data.license == "mit"
    assert after.text.rstrip().endswith("What I have to say of it.")
    of_reference = card_of(float32)
    assert of_reference.text.lstrip().startswith("# Mine")
    assert "## Quality by length" in of_reference.text
    assert figures(of_reference, "kl_divergence") == []
    read_package(own)


def test_a_card_that_is_damaged_is_refused_before_the_work(own: Path) -> None:
    (own / CARD_FILE).write_text("---\n- no mapping\n---\n")
    assert "its metadata cannot be read" in refused("compare", own, "--card")


def test_cards_are_for_packages_that_are_named(checkpoint: Path) -> None:
    for models in ([], [checkpoint]):
        assert "name one among the models" in refused("compare", *models, "--card")


def test_a_snapshot_of_the_hub_generates_as_the_package_does(packages: Path, snapshot: Path) -> None:
    assert (snapshot / "model.onnx").is_symlink()
    read_package(snapshot)
    done = command_runner().invoke(
        main, ["generate", str(snapshot), "--prompt", "The old tree", "--max-new-tokens", "8", "--json"],
        catch_exceptions=False,
    )  # fmt: skip
    expected = Generator.load(packages / "int8-dynamic").generate(["The old tree"], max_new_tokens=8)[0].tokens
    assert json.loads(done.stdout)["tokens"] == expected


def test_a_snapshot_whose_file_was_changed_is_refused(snapshot: Path) -> None:
    (snapshot / "model.onnx").resolve().write_bytes(b"something else")
    assert "model.onnx differs from its hash" in refused("generate", snapshot, "--prompt", "The")


def test_a_snapshot_whose_link_leads_nowhere_is_refused(snapshot: Path) -> None:
    (snapshot / "model.onnx").resolve().unlink()
    assert "model.onnx is missing" in refused("generate", snapshot, "--prompt", "The")


def test_no_card_is_written_into_the_hubs_cache(snapshot: Path) -> None:
    before = (snapshot / CARD_FILE).read_bytes()
    assert "is a link into a cache" in refused("compare", snapshot, "--card")
    assert (snapshot / CARD_FILE).read_bytes() == before


@pytest.mark.parametrize("client", ["onnxruntime_genai", "optimum.onnxruntime"])
def test_what_a_card_shows_runs(
    own: Path, client: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(client, reason="needs another onnxruntime or transformers")
    own.rename(own.with_name("model"))
    monkeypatch.chdir(own.parent)
    exec(python_of(card_of(Path("model")), client), {})  # noqa: S102
    assert "Once upon a time" in capsys.readouterr().out


@needs_int8_cache
def test_a_card_shows_no_client_that_refuses_the_package(checkpoint: Path, tmp_path: Path) -> None:
    windowed, int8 = Recipe(head_window=N, head_window_cost=9.0), Recipe(cache="int8")
    export(checkpoint, tmp_path, [windowed, int8])
    shown = {recipe.name: card_of(tmp_path / recipe.name).text for recipe in (windowed, int8)}
    assert "expe-edge generate" in shown[windowed.name]
    assert "```" not in shown[windowed.name]
    assert "onnxruntime_genai" in shown[int8.name]
    assert "optimum" not in shown[int8.name]


@pytest.mark.parametrize("precision", REFERENCE_PRECISIONS)
def test_the_reference_packages_cards_have_the_measured_figures(precision: str) -> None:
    quality = json.loads(FIGURES.read_text(encoding="utf-8"))["quality"]
    measured = [row["perplexity"] for row in quality["results"] if row["model"] == precision]
    card = card_of(reference_package(precision))
    assert figures(card, "perplexity") == pytest.approx(measured, abs=1e-4), "run `python -m reference.card`"
    assert card.data.license == "apache-2.0"
