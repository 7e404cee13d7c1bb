"""Quality by length: figures against a plain computation in PyTorch, and what cannot be compared."""

from __future__ import annotations

import io
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from expe_edge.cli.plots import plot_comparison
from expe_edge.cli.tables import comparison_table, print_whole, short
from expe_edge.errors import ConfigError
from expe_edge.quality.comparison import (
    Comparison,
    compare,
    long_documents,
    require_rising,
    require_same_vocabulary,
    unique_names,
)
from expe_edge.quality.scoring import Scorer, open_scorer
from expe_edge.runtime.memory import PREFILL_CHUNK
from expe_edge.text.documents import Document
from expe_edge.text.tokenization import train_tokenizer
from expe_edge.training.checkpoint import load_checkpoint

N = 32
LENGTHS = (1, 2, 4, 8, 16)
FIELDS = {
    *("model", "bucket_start", "bucket_end", "documents", "tokens"),
    *("nll", "perplexity", "bits_per_byte", "kl", "top1"),
    *("perplexity_change", "perplexity_change_stderr", "top1_clear", "top1_clear_stderr", "near_ties"),
    *("nll_stderr", "perplexity_stderr", "bits_per_byte_stderr", "kl_stderr", "top1_stderr"),
}


@pytest.fixture(scope="module")
def scored(scorers: list[Scorer]) -> tuple[Comparison, list[np.ndarray], np.ndarray]:
    """A comparison of them, with the documents and the byte lengths that it is made of."""
    documents, byte_lengths = long_documents(scorers[0], (), "text", LENGTHS[-1] * N + 1, 3)
    return compare(scorers, documents, byte_lengths, LENGTHS), documents, byte_lengths


@pytest.fixture(scope="module")
def torch_logits(checkpoint: Path, scored: tuple[Comparison, list[np.ndarray], np.ndarray]) -> list[torch.Tensor]:
    """PyTorch's logits (T, V) of every document, float64, in one uncached pass."""
    model = load_checkpoint(checkpoint).model
    with torch.inference_mode():
        return [
            model(torch.from_numpy(document[: 16 * N])[None], use_cache=False).logits[0].double()
            for document in scored[1]
        ]


# Figures


def test_every_model_has_every_bucket(scored: tuple[Comparison, list[np.ndarray], np.ndarray]) -> None:
    comparison, documents, _ = scored

    assert comparison.models == ("model", "float32", "int8-dynamic")
    assert comparison.training_length == N
    for model in comparison.models:
        results = comparison.of(model)
        assert [(result.bucket_start, result.bucket_end) for result in results] == [
            (0, 32), (32, 64), (64, 128), (128, 256), (256, 512),
        ]  # fmt: skip
        assert [result.tokens for result in results] == [3 * size for size in (32, 32, 64, 128, 256)]
        assert {result.documents for result in results} == {len(documents)} == {3}


def test_reference_agrees_with_itself(scored: tuple[Comparison, list[np.ndarray], np.ndarray]) -> None:
    for result in scored[0].of("model"):
        assert (result.kl, result.kl_stderr, result.top1, result.top1_stderr) == (0, 0, 1, 0)


def test_losses_are_those_of_pytorch(
    scored: tuple[Comparison, list[np.ndarray], np.ndarray], torch_logits: list[torch.Tensor]
) -> None:
    comparison, documents, byte_lengths = scored
    for result in comparison.of("model"):
        bucket = slice(result.bucket_start, result.bucket_end)
        targets = [torch.from_numpy(document[1:])[bucket] for document in documents]
        theirs = torch.nn.functional.cross_entropy(
            torch.cat([logits[bucket] for logits in torch_logits]), torch.cat(targets)
        ).item()
        text_bytes = sum(int(byte_lengths[target.numpy()].sum()) for target in targets)

        assert result.nll == pytest.approx(theirs, abs=1e-5)
        assert result.perplexity == pytest.approx(math.exp(theirs), rel=1e-5)
        assert result.bits_per_byte == pytest.approx(theirs * result.tokens / math.log(2) / text_bytes, rel=1e-5)


def test_divergence_and_agreement_are_those_of_pytorch(
    scored: tuple[Comparison, list[np.ndarray], np.ndarray],
    scorers: list[Scorer],
    torch_logits: list[torch.Tensor],
) -> None:
    comparison, documents, _ = scored
    theirs = [
        torch.from_numpy(np.concatenate([chunk.copy() for chunk in scorers[2].logits(document[: 16 * N])])).double()
        for document in documents
    ]
    for result in comparison.of("int8-dynamic"):
        bucket = slice(result.bucket_start, result.bucket_end)
        reference = torch.cat([logits[bucket] for logits in torch_logits])
        other = torch.cat([logits[bucket] for logits in theirs])
        kl = torch.nn.functional.kl_div(
            other.log_softmax(-1), reference.log_softmax(-1), log_target=True, reduction="batchmean"
        ).item()

        assert result.kl == pytest.approx(kl, rel=1e-3)
        assert result.kl > 1e-8  # int8 is not float
        assert result.top1 == pytest.approx((reference.argmax(-1) == other.argmax(-1)).double().mean().item(), abs=0.02)


def test_float32_package_is_the_checkpoint(scored: tuple[Comparison, list[np.ndarray], np.ndarray]) -> None:
    comparison, _, _ = scored

    for ours, theirs in zip(comparison.of("float32"), comparison.of("model"), strict=True):
        assert abs(ours.kl) < 1e-9
        assert ours.top1 > 0.99
        assert ours.nll == pytest.approx(theirs.nll, abs=1e-5)


def test_side_by_side_is_one_after_another(
    scored: tuple[Comparison, list[np.ndarray], np.ndarray], scorers: list[Scorer]
) -> None:
    comparison, documents, byte_lengths = scored

    assert compare(scorers, documents, byte_lengths, LENGTHS, at_once=3) == comparison


def test_order_decides_the_reference(scorers: list[Scorer]) -> None:
    documents, byte_lengths = long_documents(scorers[0], (), "text", 2 * N + 1, 2)

    turned = compare(scorers[::-1], documents, byte_lengths, [2])

    assert turned.models[0] == "int8-dynamic"
    assert turned.of("int8-dynamic")[0].kl == 0
    assert turned.of("model")[0].kl > 0


def test_advance_counts_the_tokens_of_all_documents(scorers: list[Scorer]) -> None:
    documents, byte_lengths = long_documents(scorers[0], (), "text", N + 1, 3)
    calls: list[int] = []

    compare(scorers[:2], documents, byte_lengths, [1], advance=calls.append)

    assert sum(calls) == 3 * N


@pytest.mark.parametrize("length", [1, PREFILL_CHUNK - 1, PREFILL_CHUNK, 2 * PREFILL_CHUNK + 3])
def test_scorers_chunk_alike(scorers: list[Scorer], length: int) -> None:
    tokens = np.arange(1, length + 1) % 300
    shapes = [[chunk.shape for chunk in scorer.logits(tokens)] for scorer in scorers]

    assert shapes[0] == shapes[1] == shapes[2]
    assert sum(shape[0] for shape in shapes[0]) == length


# Standard errors


def test_standard_errors_are_of_documents_as_units(
    scored: tuple[Comparison, list[np.ndarray], np.ndarray], torch_logits: list[torch.Tensor]
) -> None:
    """All documents give a bucket as many tokens, so that the ratio's error is the plain error of a mean."""
    comparison, documents, _ = scored
    for result in comparison.of("model"):
        bucket = slice(result.bucket_start, result.bucket_end)
        means = [
            torch.nn.functional.cross_entropy(logits[bucket], torch.from_numpy(document[1:])[bucket]).item()
            for logits, document in zip(torch_logits, documents, strict=True)
        ]
        assert result.nll_stderr == pytest.approx(np.std(means, ddof=1) / math.sqrt(len(means)), rel=1e-3)
        assert result.perplexity_stderr == pytest.approx(result.perplexity * result.nll_stderr)
        assert result.bits_per_byte_stderr > 0


def test_one_document_has_no_standard_error(scorers: list[Scorer]) -> None:
    documents, byte_lengths = long_documents(scorers[0], (), "text", N + 1, 1)

    (result,) = compare(scorers[:1], documents, byte_lengths, [1]).results

    assert math.isnan(result.nll_stderr)
    assert result.to_dict()["nll_stderr"] is None  # JSON has no NaN
    assert "NaN" not in json.dumps(result.to_dict())


class Fixed(Scorer):
    """A scorer whose logits are given."""

    training_length = 4

    def __init__(self, name: str, logits: np.ndarray) -> None:
        self.path, self.values = Path(name), logits.astype(np.float32)
        self.corpus: dict[str, Any] = {}

    def logits(self, tokens: np.ndarray) -> Iterator[np.ndarray]:
        yield self.values[: len(tokens)]


def test_near_ties_and_the_change_of_perplexity_by_hand() -> None:
    """Four tokens: two are clear, one of them kept; two are nearly tied, one of them kept."""
    reference = np.log([[0.8, 0.1, 0.1], [0.8, 0.1, 0.1], [0.405, 0.395, 0.2], [0.405, 0.395, 0.2]])
    other = np.log([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.405, 0.395, 0.2], [0.395, 0.405, 0.2]])
    documents = [np.zeros(5, dtype=np.int64)]

    result = compare([Fixed("a", reference), Fixed("b", other)], documents, np.ones(3, dtype=np.int64), [1]).of("b")[0]

    assert result.top1 == pytest.approx(2 / 4)
    assert result.top1_clear == pytest.approx(1 / 2)
    assert result.near_ties == pytest.approx(2 / 4)
    assert result.perplexity_change == pytest.approx(((0.8 / 0.1) * (0.405 / 0.395)) ** (1 / 4) - 1, rel=1e-5)


@pytest.mark.parametrize("which", [0, 1])
def test_perplexity_too_large_for_a_number_is_infinity(tmp_path: Path, which: int) -> None:
    """A head that is a hundred thousand times too large is sure of itself and wrong."""
    logits = [np.eye(4, 3, k=1), np.eye(4, 3, k=1)]
    logits[which] = logits[which] * 1e5
    documents = [np.zeros(5, dtype=np.int64), np.zeros(5, dtype=np.int64)]

    comparison = compare([Fixed("a", logits[0]), Fixed("b", logits[1])], documents, np.ones(3, dtype=np.int64), [1])

    found, change = comparison.of("ab"[which])[0], comparison.of("b")[0].perplexity_change
    assert found.perplexity == math.inf
    assert found.nll > 1e4
    assert change == (math.inf if which == 1 else -1)
    assert found.to_dict()["perplexity"] is None
    assert json.loads(json.dumps(comparison.to_dict(), allow_nan=False))["results"][which]["nll"] == found.nll
    page = io.StringIO()
    console = Console(file=page, width=200)
    print_whole(comparison_table(comparison), console)
    assert " inf " in page.getvalue()
    assert "nan" not in page.getvalue()
    plot_comparison(comparison, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


# JSON, table, plot


def test_json_has_the_agreed_names(scored: tuple[Comparison, list[np.ndarray], np.ndarray]) -> None:
    values = json.loads(json.dumps(scored[0].to_dict()))

    assert set(values) == {"models", "training_length", "lengths", "results"}
    assert values["models"] == ["model", "float32", "int8-dynamic"]
    assert values["lengths"] == list(LENGTHS)
    assert len(values["results"]) == 3 * len(LENGTHS)
    assert all(set(result) == FIELDS for result in values["results"])


def test_table_shows_every_model_and_bucket(scored: tuple[Comparison, list[np.ndarray], np.ndarray]) -> None:
    page = io.StringIO()
    console = Console(width=40, file=page)
    print_whole(comparison_table(scored[0]), console)
    text = page.getvalue()

    assert "…" not in text
    assert all(f"{begin}–{end} N" in text for begin, end in pairwise([0, *LENGTHS]))
    assert "N = 32 tokens" in text
    assert "KL divergence and top-1 agreement against model" in text
    assert [text.count(f"  {model} ") for model in scored[0].models] == [3, 6, 6]  # the reference has no KL
    first = scored[0].of("int8-dynamic")[0]
    assert f"{first.perplexity:.2f} ± {first.perplexity_stderr:.2f}" in text
    assert f"{short(first.kl, 1)} ± {short(first.kl_stderr, 0)}" in text


@pytest.mark.parametrize("models", [1, 3])
def test_plot_is_a_png(tmp_path: Path, scored: tuple[Comparison, list[np.ndarray], np.ndarray], models: int) -> None:
    comparison = scored[0]
    kept = comparison.models[:models]
    part = Comparison(kept, N, LENGTHS, tuple(result for result in comparison.results if result.model in kept))

    plot_comparison(part, tmp_path / "plot.png")

    data = (tmp_path / "plot.png").read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(data) > 10_000


# Names and refusals


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["/a/b/float32"], ["float32"]),
        (["/a/folded/int8", "/a/folded/float32"], ["int8", "float32"]),
        (["/a/folded/int8", "/a/inline/int8"], ["folded/int8", "inline/int8"]),
        (["/a/x/int8", "/b/x/int8", "/b/x/float32"], ["a/x/int8", "b/x/int8", "b/x/float32"]),
    ],
)
def test_names_are_as_short_as_tells_them_apart(paths: list[str], names: list[str]) -> None:
    assert unique_names([Path(path) for path in paths]) == names


def test_same_model_twice(packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = packages / "float32"
    link = tmp_path / "link"
    link.symlink_to(path)
    monkeypatch.chdir(packages)

    for again in (path, Path("float32"), packages / "int8-static" / ".." / "float32", link):
        with pytest.raises(ConfigError) as caught:
            unique_names([path, again])
        assert str(caught.value) == "the same model is given twice"


@pytest.mark.parametrize("lengths", [[1], [1, 2, 4], [3, 100]])
def test_rising_lengths(lengths: list[int]) -> None:
    require_rising(lengths)


@pytest.mark.parametrize("lengths", [[], [0], [-1, 2], [1, 1], [2, 1], [1, 2, 4, 3]])
def test_lengths_that_do_not_rise(lengths: Sequence[int]) -> None:
    with pytest.raises(ConfigError) as caught:
        require_rising(lengths)

    given = ",".join(map(str, lengths))
    assert str(caught.value) == f"`lengths` {given}: expected rising positive integers, as 1,2,4,8,16"


def test_models_of_one_tokenizer(scorers: list[Scorer]) -> None:
    require_same_vocabulary(scorers)


def test_models_of_different_tokenizers(scorers: list[Scorer], checkpoint: Path, tmp_path: Path) -> None:
    """A tokenizer of the same size with other merges: the same ids, but other text."""
    other = tmp_path / "other"
    shutil.copytree(checkpoint, other, ignore=shutil.ignore_patterns("trainer"))
    train_tokenizer([Document("code", Path(__file__).read_text("utf-8"))], 300).save(str(other / "tokenizer.json"))

    with pytest.raises(ConfigError) as caught:
        require_same_vocabulary([*scorers, open_scorer(other)])

    assert str(caught.value) == (
        f"{other} has another tokenizer than {checkpoint}; only models of one vocabulary compare"
    )


@pytest.mark.parametrize(("value", "digits", "text"), [(0.00038, 1, "3.8e-4"), (0.00001, 0, "1e-5"), (1.2, 1, "1.2e0")])
def test_small_numbers_are_written_short(value: float, digits: int, text: str) -> None:
    assert short(value, digits) == text
