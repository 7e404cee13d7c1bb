"""The page in the system's Chromium, as a person uses it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from expe_edge.runtime import Generator
from expe_edge.web.site import LIST, PACKAGES
from tests.web.conftest import Scenario
from tests.web.test_model import RESTORED, page_answer

PROMPT = "The old tree grows"
NEW_TOKENS = 32


def our_text(package: Path, prompt: str = PROMPT, new_tokens: int = NEW_TOKENS) -> str:
    return Generator.load(package, threads=1).generate(prompt, max_new_tokens=new_tokens)[0].text


def right_text(name: str, package: Path) -> str:
    """Our text; of formats whose activations the page does not round, its model's in Node.js, where ties are told."""
    if name in RESTORED:
        return str(page_answer(package, [PROMPT], NEW_TOKENS)["completions"][0]["text"])
    return our_text(package)


def test_every_package_writes_our_text(every_package: dict[str, Path], scenario: Scenario) -> None:
    found = scenario("texts", packages=list(every_package), prompt=PROMPT, maxNewTokens=NEW_TOKENS)
    for name, package in every_package.items():
        assert found["texts"][name]["test"].startswith("Yes: 24 of 24 tokens, logits within ")
        assert found["texts"][name]["text"] == right_text(name, package), name
    assert found["errors"] == []
    assert found["figures"]["title"] == "Every package"
    assert " N; N = 32" in found["figures"]["position-text"]


def test_four_thousand_tokens_in_the_browser(every_package: dict[str, Path], scenario: Scenario) -> None:
    found = scenario("texts", packages=["float32"], prompt=PROMPT, maxNewTokens=4000)
    assert found["texts"]["float32"]["text"] == our_text(every_package["float32"], new_tokens=4000)


def test_writing_is_stopped_gone_on_with_and_done_again(every_package: dict[str, Path], scenario: Scenario) -> None:
    found = scenario("stopped", package="float32", prompt=PROMPT)
    assert found["errors"] == []
    assert found["whole"] == found["again"] == our_text(every_package["float32"], new_tokens=64)
    assert found["stopped"]["status"].endswith("; stopped.")
    assert found["goneOn"].startswith(found["stopped"]["text"])
    written = our_text(every_package["float32"], new_tokens=int(found["stopped"]["status"].split()[0].replace(",", "")))
    assert found["stopped"]["text"] == written


def test_loading_is_cancelled(every_package: dict[str, Path], site: Path, scenario: Scenario) -> None:
    found = scenario("cancelled", prompt=PROMPT, maxNewTokens=NEW_TOKENS)
    assert found["status"] == "Loading was cancelled."
    first = json.loads((site / PACKAGES / LIST).read_text())["packages"][0]["name"]
    assert found["text"] == right_text(first, every_package[first])


def test_what_was_loaded_once_is_there_without_a_network(scenario: Scenario) -> None:
    found = scenario("offline", package="float32", prompt=PROMPT, maxNewTokens=NEW_TOKENS)
    assert found["before"] == found["after"] != ""


def test_axe_finds_nothing_serious(scenario: Scenario) -> None:
    found = scenario("accessible", package="float32", prompt=PROMPT, maxNewTokens=NEW_TOKENS)
    assert [one for one in found["found"] if one["impact"] in ("serious", "critical")] == []
    assert found["overflow"] == 0


def test_it_is_used_by_keys_alone(scenario: Scenario) -> None:
    found = scenario("keyboard", prompt=PROMPT)
    assert found["given"] == PROMPT
    assert found["test"].startswith("Yes: 24 of 24 tokens")


def test_what_differs_is_seen(site: Path, tmp_path: Path, scenario: Scenario) -> None:
    """A logit, a token, nothing to compare with; and a file that is not the exporter's is not run."""
    changed = Path(shutil.copytree(site, tmp_path / "site"))
    listed = json.loads((changed / PACKAGES / LIST).read_text())
    infos = {info["name"]: info for info in listed["packages"]}
    infos["float32"]["selfTest"]["logits"][3] = 1000.0
    infos["float16"]["selfTest"]["tokens"][0] = 5
    infos["bfloat16"]["selfTest"] = None
    (changed / PACKAGES / LIST).write_text(json.dumps(listed))
    graph = changed / PACKAGES / "int8-static" / "model.onnx"
    graph.write_bytes(graph.read_bytes()[:-1] + b"\0")

    found = scenario("loads", directory=changed, packages=["float32", "float16", "bfloat16", "int8-static"])["loads"]

    assert found["float32"]["test"].startswith("No: 24 of 24 tokens, logits within 9")
    assert found["float16"]["test"].startswith("No: ")
    assert found["bfloat16"]["test"].startswith("This package holds no tokens to compare with")
    assert found["int8-static"]["status"].endswith("model.onnx is not the file that the exporter wrote")


def test_a_server_without_headers(every_package: dict[str, Path], scenario: Scenario) -> None:
    """One thread at first; the page's service worker has isolated the second visit."""
    found = scenario("plain", isolated=False, package="float32", prompt=PROMPT, maxNewTokens=NEW_TOKENS)
    assert not found["first"]["isolated"]
    assert found["second"]["isolated"]
    assert "WebAssembly, 1 thread." in found["first"]["status"]
    assert found["first"]["text"] == found["second"]["text"] == our_text(every_package["float32"])


def test_webgpu_is_taken_where_it_agrees_alone(every_package: dict[str, Path], scenario: Scenario) -> None:
    """onnxruntime's attention there leaves the positions' bias out of long runs; a portable graph has none of it."""
    names = ["int8-dynamic-portable", "float32"]
    found = scenario("webgpu", packages=names, prompt=PROMPT, maxNewTokens=4)
    if "missing" in found:
        pytest.skip("this Chromium has no WebGPU, not even in software")
    portable, ordinary = (found["said"][name] for name in names)
    assert portable["status"] == "int8-dynamic-portable is ready, in WebGPU."
    assert "in WebAssembly" in ordinary["status"]
    assert "WebGPU was not taken: " in ordinary["status"]
    assert ordinary["test"].startswith("Yes: ")
    for name in names:
        assert found["said"][name]["text"] == our_text(every_package[name], new_tokens=4)
