"""What docs/clients.md shows of other clients, run. That they give our tokens: `tests/benchmarks/test_clients.py`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from expe_edge.runtime import Generator
from expe_edge.training.checkpoint import load_checkpoint

PROMPT = "The old tree grows"
NEW_TOKENS = 256
PAGE = (Path(__file__).parents[2] / "docs" / "clients.md").read_text(encoding="utf-8")


def our_tokens(package: Path, prompt: list[int]) -> list[int]:
    """Greedy tokens of our generator, running on past end-of-text as far as it goes."""
    return Generator.load(package).generate([prompt], max_new_tokens=NEW_TOKENS)[0].tokens


def optimum_model(package: Path) -> Any:
    """The package as Optimum opens it; the test is skipped where Optimum is not, as beside transformers 5."""
    client = pytest.importorskip("optimum.onnxruntime", reason="optimum-onnx 0.1 needs transformers 4")
    return client.ORTModelForCausalLM.from_pretrained(package)


def optimum_tokens(package: Path, prompt: list[int]) -> list[int]:
    model = optimum_model(package)
    output = model.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=NEW_TOKENS, max_length=None, do_sample=False,
    )  # fmt: skip
    return [int(token) for token in output[0, len(prompt) :]]


def genai() -> Any:
    """onnxruntime-genai; the test is skipped where it is not, as beside an old onnxruntime."""
    return pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai needs a newer onnxruntime")


def genai_tokens(package: Path, prompt: list[int]) -> list[int]:
    og = genai()
    model = og.Model(str(package))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(do_sample=False, max_length=len(prompt) + NEW_TOKENS)
    generator = og.Generator(model, parameters)
    generator.append_tokens(np.array([prompt], dtype=np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return list(generator.get_sequence(0)[len(prompt) :])


def torch_tokens(checkpoint: Path, prompt: list[int]) -> list[int]:
    model = load_checkpoint(checkpoint).model
    output = model.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=NEW_TOKENS, do_sample=False,
    )  # fmt: skip
    return [int(token) for token in output[0, len(prompt) :]]


@pytest.fixture(scope="module")
def prompt(packages: Path) -> list[int]:
    return [int(token) for token in Generator.load(packages / "float32").encode(PROMPT)]


def test_the_usual_optimum_snippet_runs(packages: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(packages / "int8-dynamic")
    inputs = tokenizer(PROMPT, return_tensors="pt")
    output = optimum_model(packages / "int8-dynamic").generate(
        **inputs, max_new_tokens=20, max_length=None, do_sample=False
    )
    ours = Generator.load(packages / "int8-dynamic").generate(PROMPT, max_new_tokens=20)
    assert output[0, inputs["input_ids"].shape[1] :].tolist() == ours[0].tokens


def test_float32_chooses_the_tokens_pytorch_chooses(packages: Path, checkpoint: Path, prompt: list[int]) -> None:
    assert our_tokens(packages / "float32", prompt) == torch_tokens(checkpoint, prompt)


def test_genai_reads_the_tokenizer_of_the_package(packages: Path, prompt: list[int]) -> None:
    og = genai()
    tokenizer = og.Tokenizer(og.Model(str(packages / "float32")))
    ours = Generator.load(packages / "float32").tokenizer
    assert tokenizer.decode(np.array(prompt[1:], dtype=np.int32)) == ours.decode(prompt[1:])
    assert list(tokenizer.encode(PROMPT))[-(len(prompt) - 1) :] == prompt[1:]


@pytest.mark.parametrize("client", ["onnxruntime_genai", "optimum.onnxruntime"])
def test_the_examples_of_the_page_on_clients_run(
    packages: Path, capsys: pytest.CaptureFixture[str], client: str
) -> None:
    pytest.importorskip(client, reason="needs another onnxruntime or transformers")
    (example,) = (text for text in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL) if client in text)
    exec(example.replace("demo/package/int8-dynamic", str(packages / "int8-dynamic")), {})  # noqa: S102
    assert capsys.readouterr().out.strip()
