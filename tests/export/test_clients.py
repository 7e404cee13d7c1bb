"""The exported directory, unmodified, in the clients that users would pick: same greedy tokens everywhere."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from expe_edge.runtime import Generator, PackageSession
from expe_edge.training.checkpoint import load_checkpoint
from tests.conftest import PRECISIONS

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


def genai_generator(package: Path, prompt: list[int]) -> Any:
    """A greedy generator that has been given the prompt."""
    og = genai()
    model = og.Model(str(package))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(do_sample=False, max_length=len(prompt) + NEW_TOKENS)
    generator = og.Generator(model, parameters)
    generator.append_tokens(np.array([prompt], dtype=np.int32))
    return generator


def genai_tokens(package: Path, prompt: list[int]) -> list[int]:
    generator = genai_generator(package, prompt)
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


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("theirs", [optimum_tokens, genai_tokens], ids=["optimum", "genai"])
def test_other_clients_choose_the_tokens_our_generator_chooses(
    packages: Path, prompt: list[int], precision: str, theirs: Callable[[Path, list[int]], list[int]]
) -> None:
    ours = our_tokens(packages / precision, prompt)
    assert len(ours) == NEW_TOKENS
    assert theirs(packages / precision, prompt) == ours


def test_the_usual_optimum_snippet_runs(packages: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(packages / "int8-dynamic")
    inputs = tokenizer(PROMPT, return_tensors="pt")
    output = optimum_model(packages / "int8-dynamic").generate(
        **inputs, max_new_tokens=20, max_length=None, do_sample=False
    )
    ours = Generator.load(packages / "int8-dynamic").generate(PROMPT, max_new_tokens=20)
    assert output[0, inputs["input_ids"].shape[1] :].tolist() == ours[0].tokens


@pytest.mark.parametrize("precision", ["float32", "int8-static", "int4-weight"])
def test_optimum_generates_from_batches_padded_on_the_left(packages: Path, precision: str) -> None:
    """Formats of fixed ranges: int8-dynamic has one range for the whole batch."""
    prompts = [PROMPT, "A", "The stream under the hill is cold and the"]
    tokenizer = AutoTokenizer.from_pretrained(packages / precision, padding_side="left")
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    output = optimum_model(packages / precision).generate(**inputs, max_new_tokens=20, max_length=None, do_sample=False)
    ours = [Generator.load(packages / precision).generate(prompt, max_new_tokens=20)[0] for prompt in prompts]
    assert output[:, inputs["input_ids"].shape[1] :].tolist() == [completion.tokens for completion in ours]


def test_float32_chooses_the_tokens_pytorch_chooses(packages: Path, checkpoint: Path, prompt: list[int]) -> None:
    assert our_tokens(packages / "float32", prompt) == torch_tokens(checkpoint, prompt)


def test_genai_reads_the_tokenizer_of_the_package(packages: Path, prompt: list[int]) -> None:
    og = genai()
    tokenizer = og.Tokenizer(og.Model(str(packages / "float32")))
    ours = Generator.load(packages / "float32").tokenizer
    assert tokenizer.decode(np.array(prompt[1:], dtype=np.int32)) == ours.decode(prompt[1:])
    assert list(tokenizer.encode(PROMPT))[-(len(prompt) - 1) :] == prompt[1:]


def test_genai_goes_on_after_what_it_generated_once_rewound(packages: Path, prompt: list[int]) -> None:
    """Without rewinding, the last token is missing from its cache."""
    session, more = PackageSession.load(packages / "float32"), prompt[1:]

    def logits(*, rewound: bool) -> np.ndarray:
        generator = genai_generator(packages / "float32", prompt)
        generator.generate_next_token()
        sequence = [int(token) for token in generator.get_sequence(0)]
        if rewound:
            generator.rewind_to(len(sequence) - 1)
        generator.append_tokens(np.array([[*sequence[-1:], *more] if rewound else more], dtype=np.int32))
        last: np.ndarray = np.asarray(generator.get_logits())[0, -1]
        return last

    tokens = np.array([*prompt, *our_tokens(packages / "float32", prompt)[:1], *more], dtype=np.int64)
    expected = session.forward([tokens])[0][-1]
    np.testing.assert_allclose(logits(rewound=True), expected, atol=1e-4)
    assert np.abs(logits(rewound=False) - expected).max() > 1e-3


@pytest.mark.parametrize("client", ["onnxruntime_genai", "optimum.onnxruntime"])
def test_the_examples_of_the_page_on_clients_run(
    packages: Path, capsys: pytest.CaptureFixture[str], client: str
) -> None:
    pytest.importorskip(client, reason="needs another onnxruntime or transformers")
    (example,) = (text for text in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL) if client in text)
    exec(example.replace("demo/package/int8-dynamic", str(packages / "int8-dynamic")), {})  # noqa: S102
    assert capsys.readouterr().out.strip()
