"""Commands without a model: the reference model's, and one line that says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from expe_edge.cli import evaluate
from expe_edge.cli.reference import introduce_reference
from expe_edge.package.reference import reference_package
from expe_edge.quality.comparison import long_documents
from expe_edge.quality.scoring import open_scorer
from expe_edge.runtime import Generator
from expe_edge.text.documents import Document
from expe_edge.text.tokenization import load_tokenizer
from tests.command_line import invoke, refused, succeed, write_text

pytestmark = pytest.mark.usefixtures("elsewhere")

USED = "no model is named: using the reference model, "
PROMPT = "def main("


def test_generate_takes_the_reference_model_where_no_package_is_named() -> None:
    (expected,) = Generator.load().generate([PROMPT], max_new_tokens=6)
    common = ("generate", "--max-new-tokens", "6")

    for result in (succeed(*common, "--prompt", PROMPT), succeed(*common, stdin=PROMPT.encode())):
        assert result.stdout == expected.text + "\n"
        assert result.stderr == f"{USED}int8-dynamic\n"
    named = succeed(*common, "--prompt", PROMPT, reference_package())
    assert (named.stdout, named.stderr) == (expected.text + "\n", "")


def test_a_mistyped_package_and_an_empty_prompt_are_refused_as_ever() -> None:
    assert refused("generate", "pakage", "--prompt", PROMPT) == "pakage: no such package directory"
    assert refused("inspect", "pakage") == "pakage: no such package directory"
    assert refused("generate").startswith("the prompt is empty")


def test_compare_and_probe_take_the_reference_model_and_the_text_that_is_given() -> None:
    text = write_text("text.py", "def first(values):\n    return values[0]\n\n\n" * 150)
    common = ("--data", text, "--lengths", "1", "--threads", "1", "--json", "figures.json")

    compared = succeed("compare", *common)
    assert f"{USED}int8-dynamic and int4-weight" in compared.stderr
    results = json.loads(Path("figures.json").read_text())["results"]
    assert [(result["model"], result["documents"]) for result in results] == [("int8-dynamic", 1), ("int4-weight", 1)]
    assert results[0]["kl"] == 0 < results[1]["kl"]

    probed = succeed("probe", *common, "--probe", "loss-by-position")
    assert f"{USED}int8-dynamic" in probed.stderr
    assert json.loads(Path("figures.json").read_text())["models"] == ["int8-dynamic"]


def test_it_is_measured_on_what_the_standard_library_holds_out() -> None:
    scorer = open_scorer(reference_package(), threads=1)
    introduce_reference([scorer])
    documents, _ = long_documents(scorer, (), "text", 16_385, 2)
    decoded = [load_tokenizer(scorer.path).decode(document.tolist()) for document in documents]
    assert decoded
    assert all(Document("", text).held_out for text in decoded)


def test_inspect_shows_the_reference_model() -> None:
    result = succeed("inspect", "--json", "manifest.json")
    assert result.stderr == f"{USED}int8-dynamic\n"
    assert json.loads(Path("manifest.json").read_text())["manifest"]["precision"] == "int8-dynamic"


def test_evaluate_takes_the_reference_model_before_options(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def absent(path: Path) -> list[str]:
        asked.append(path)
        raise ModuleNotFoundError("No module named 'lm_eval'", name="lm_eval")

    monkeypatch.setattr(evaluate, "_model_options", absent)
    refused("evaluate", "--tasks", "any", "--limit=3")
    refused("evaluate", "package", "--tasks", "any")
    assert asked == [reference_package(), Path("package")]
    nothing = invoke("evaluate")
    assert (nothing.exit_code, nothing.stdout) == (2, "")
