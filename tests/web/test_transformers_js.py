"""A package as it was exported, in transformers.js: the tokens of our generator."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from expe_edge.package.directory import CARD_FILE
from expe_edge.runtime import Generator
from tests import node
from tests.conftest import needs_int8_cache

PROMPTS = ["The old tree grows", "A", "The stream under the hill is cold and the"]
NEW_TOKENS = 24


@pytest.mark.parametrize("kind", ["float32", "int8-static", "int4-weight", "int8-dynamic-portable"])
def test_the_pipeline_writes_what_our_generator_writes(every_package: dict[str, Path], kind: str) -> None:
    """In one batch, padded on the left. One prompt at a time where rows of a batch share the range of activations."""
    generator = Generator.load(every_package[kind], threads=1)
    for prompts in [PROMPTS] if "dynamic" not in kind else [[prompt] for prompt in PROMPTS]:
        order = {"directory": str(every_package[kind]), "prompts": prompts, "maxNewTokens": NEW_TOKENS}
        found = node.run_script("pipeline.mjs", order)
        ours = [generator.generate(prompt, max_new_tokens=NEW_TOKENS)[0] for prompt in prompts]
        assert [tokens[: len(one.tokens)] for tokens, one in zip(found["tokens"], ours, strict=True)] == [
            one.tokens for one in ours
        ]
        assert found["texts"] == [one.text for one in ours]


def test_what_a_card_shows_runs(every_package: dict[str, Path], tmp_path: Path) -> None:
    package = every_package["int8-static"]
    (code,) = re.findall(r"```js\n(.*?)```", (package / CARD_FILE).read_text(encoding="utf-8"), flags=re.DOTALL)
    (tmp_path / "node_modules").symlink_to(node.node_programs().parent / "node_modules")
    (tmp_path / "model").symlink_to(package)
    (tmp_path / "card.mjs").write_text(code, encoding="utf-8")

    done = subprocess.run(["node", "card.mjs"], cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False)

    prompt = "Once upon a time"
    (ours,) = Generator.load(package, threads=1).generate([prompt], max_new_tokens=32)
    assert done.stdout.rstrip("\n") == (prompt + ours.text).rstrip("\n"), done.stderr


@needs_int8_cache
def test_what_it_cannot_run_is_refused_by_name(every_package: dict[str, Path]) -> None:
    order = {"directory": str(every_package["int8-static-int8-cache"]), "prompts": PROMPTS, "maxNewTokens": 4}
    with pytest.raises(RuntimeError, match="expe-with-int8-cache-for-expe-edge-or-onnxruntime-genai"):
        node.run_script("pipeline.mjs", order)
