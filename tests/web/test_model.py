"""The page's model in Node.js: the tokens of our generator, of every kind of package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from expe_edge.package.directory import open_manifest
from expe_edge.runtime import Generator, memory
from expe_edge.web.listing import package_info
from tests import node
from tests.conftest import HAS_WINDOWS, PRECISIONS, needs_int8_cache

#: Characters of several bytes, control tokens as text, and more tokens than are read at once.
PROMPTS = ["The old tree grows", "Ünïcode 日本語 🌳 <|endoftext|>\n\t x", "The river runs under the stone. " * 40]
NEW_TOKENS = 48
KINDS = (
    *PRECISIONS,
    "int8-dynamic-portable",
    "int4-weight-portable",
    *(["float32-windowed"] if HAS_WINDOWS else []),
)
#: Formats that WebAssembly has no integer kernels for: weights are restored, and no activation is rounded.
RESTORED = ("int8-weight", "int4-weight", "int4-weight-portable")


def page_answer(package: Path, prompts: list[Any], new_tokens: int = NEW_TOKENS, **order: Any) -> dict[str, Any]:
    """What the page's model writes."""
    settings = {"directory": str(package), "info": package_info(package), "prompts": prompts}
    return node.run_page({**settings, "maxNewTokens": new_tokens, **order})


def is_tie(generator: Generator, tokens: list[int], others: list[int], prompt: list[int], within: float) -> bool:
    """Whether two texts are equal, or part where our model takes both tokens for as good within so many logits."""
    pairs = zip(tokens, others, strict=False)
    at = next((index for index, (ours, theirs) in enumerate(pairs) if ours != theirs), None)
    if at is None:
        return len(tokens) == len(others)
    read = np.array([*prompt, *tokens[:at]], dtype=np.int64)
    logits = generator.session.forward([read])[0][-1]
    return bool(abs(logits[tokens[at]] - logits[others[at]]) <= within)


@pytest.mark.parametrize("kind", [*KINDS, pytest.param("int8-static-int8-cache", marks=needs_int8_cache)])
def test_the_page_writes_our_tokens_and_agrees_with_the_exporter(every_package: dict[str, Path], kind: str) -> None:
    package = every_package[kind]
    answer = page_answer(package, PROMPTS)
    generator = Generator.load(package, threads=1)
    for prompt, found in zip(PROMPTS, answer["completions"], strict=True):
        ours = generator.generate(prompt, max_new_tokens=NEW_TOKENS)[0]
        assert found["prompt"] == generator.encode(prompt).tolist()
        if kind in RESTORED:
            assert is_tie(generator, ours.tokens, found["tokens"], found["prompt"], within=0.1)
        else:
            assert found["tokens"] == ours.tokens
            assert found["text"] == ours.text
        assert found["finish"] in (ours.finish_reason, "end_of_text")
    assert answer["selfTest"]["agrees"]
    assert answer["selfTest"]["equal"] == answer["selfTest"]["of"] == 24


@pytest.mark.parametrize("kind", RESTORED)
def test_restored_weights_compute_what_onnxruntime_restores_at_every_run(
    every_package: dict[str, Path], kind: str
) -> None:
    package = every_package[kind]
    info = package_info(package)
    assert info["floatWeights"]
    once = page_answer(package, PROMPTS)
    always = page_answer(package, PROMPTS, info={**info, "floatWeights": False})
    linears = open_manifest(package).manifest.linears
    assert (once["restored"], always["restored"]) == (0 if "portable" in kind else len(linears), 0)
    assert [one["tokens"] for one in once["completions"]] == [one["tokens"] for one in always["completions"]]
    assert once["selfTest"]["difference"] == pytest.approx(always["selfTest"]["difference"], abs=1e-4)


def test_four_thousand_tokens(every_package: dict[str, Path]) -> None:
    """Room grows on the way, and a prompt is read in chunks that shorten."""
    package = every_package["float32"]
    generator = Generator.load(package, threads=1)
    prompt = generator.encode("The bright river runs over a stone. " * 150).tolist()[:2000]
    ours = generator.generate([prompt], max_new_tokens=2000)[0].tokens
    found = page_answer(package, [prompt], 2000)
    assert found["completions"][0]["tokens"] == ours
    assert found["memory"]["total"] < 2**26
    assert page_answer(package, [prompt], 40, threads=2)["completions"][0]["tokens"] == ours[:40]


def test_heads_with_a_window_keep_it_alone(every_package: dict[str, Path]) -> None:
    """Our tokens behind many windows, and memory that does not grow by those heads."""
    package = every_package["float32-windowed"]
    contract = open_manifest(package).manifest.contract
    generator = Generator.load(package, threads=1)
    prompt = generator.encode("The bright river runs over a stone. " * 100).tolist()[:900]
    ours = generator.generate([prompt], max_new_tokens=500)[0].tokens
    found = page_answer(package, [prompt], 500)
    assert found["completions"][0]["tokens"] == ours
    assert found["memory"]["cache"] == contract.row_bytes(1536, memory.PREFILL_CHUNK) < contract.row_bytes(1536, 1536)


@pytest.mark.parametrize("kind", ["float32-windowed", "int8-static"])
def test_a_text_goes_on_in_more_room(every_package: dict[str, Path], kind: str) -> None:
    """What has been read moves to larger buffers."""
    package = every_package[kind]
    generator = Generator.load(package, threads=1)
    prompt = generator.encode(PROMPTS[2]).tolist()[:250]
    ours = generator.generate([prompt], max_new_tokens=100)[0].tokens
    found = page_answer(package, [prompt, [*prompt, *ours[:60]]], 40)
    assert found["completions"][1]["tokens"] == ours[60:]
