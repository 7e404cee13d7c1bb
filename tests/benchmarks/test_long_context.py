"""`benchmarks.long_context`: the figures are those of `compare` and `probe`, and nothing is measured twice."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import long_context
from benchmarks.long_context_reading import BranchingScorer, Reader, in_order, work
from benchmarks.long_context_records import Records, digest_of
from expe_edge.quality.comparison import compare, long_documents
from expe_edge.quality.losses import Panel
from expe_edge.quality.needles import COPIED, CUE
from expe_edge.quality.recall import Grid, needle_cases, recall
from expe_edge.quality.scoring import PackageScorer
from expe_edge.runtime import PackageSession
from expe_edge.speed.measuring import peak_bytes, quartiles
from expe_edge.text.tokenization import load_tokenizer
from tests.small import command_runner

LENGTHS = (512, 1024)


@pytest.fixture(scope="module")
def scorers(packages: Path) -> list[PackageScorer]:
    return [PackageScorer(PackageSession.load(packages / name, threads=1)) for name in ("float32", "int8-dynamic")]


@pytest.fixture(scope="module")
def text_file(text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three documents as one."""
    file = tmp_path_factory.mktemp("long") / "text.txt"
    file.write_text("".join((text_folder / f"0{number}.txt").read_text() for number in range(3)), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def text(scorers: list[PackageScorer], text_file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Its tokens, and the byte lengths of the vocabulary."""
    (found,), byte_lengths = long_documents(scorers[0], [str(text_file)], "text", LENGTHS[-1] + CUE + COPIED, 1)
    return found, byte_lengths


def test_the_report_is_of_the_figures_of_compare_and_probe(
    scorers: list[PackageScorer], text: tuple[np.ndarray, np.ndarray], text_file: Path, tmp_path: Path
) -> None:
    grid = Grid(("passkey",), LENGTHS, (0.0, 1.0), 1)
    options = ["--lengths", "512,1024", "--probe", "passkey", "--depths", "0,100", "--decoded", "3", "--threads", "1"]
    command = [*(str(s.path) for s in scorers), "--text", str(text_file), "--out", str(tmp_path), *options]

    done = command_runner().invoke(long_context.main, command, catch_exceptions=False)

    assert done.exit_code == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    # Of int8-dynamic, tokens that are read one by one have activations' ranges of their own.
    tolerance = {"float32": 1e-6, "int8-dynamic": 1e-3}
    compared = compare(scorers, [text[0]], text[1], [length // 32 for length in LENGTHS])
    for row in report["rows"]:
        (expected,) = [r for r in compared.of(row["package"]) if r.bucket_end == row["end"]]
        assert row["perplexity"] == pytest.approx(expected.perplexity, rel=tolerance[row["package"]])
        assert row["kl"] == pytest.approx(expected.kl, rel=0.3, abs=1e-9)
        assert (row["begin"], row["texts"]) == (expected.bucket_start, 1)
        assert row["peak"] > row["opened"] > 10e6
        assert row["decode_ms"] > 0 < row["tokens_per_second"]
        assert row["cache"] == scorers[0].session.contract.cache_bytes * row["end"]
        assert row["bias"] == 4 * 256 * row["end"] * 4
    cases = list(needle_cases(grid, [text[0]], load_tokenizer(scorers[0].path)))
    assert report["recall"] == [r.to_dict() for r in recall(Panel(scorers), cases)]
    assert (tmp_path / "report.md").read_text(encoding="utf-8").strip() in done.stdout
    assert (tmp_path / "report.png").stat().st_size > 1000

    records = (tmp_path / "records.json").read_bytes()
    again = command_runner().invoke(long_context.main, command, catch_exceptions=False)
    assert (again.stdout, (tmp_path / "records.json").read_bytes()) == (done.stdout, records)  # seconds and all


def test_what_is_missing_alone_is_measured(
    scorers: list[PackageScorer], text: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    settings = long_context.make_settings(
        "512,1024", None, "0", ("passkey",), decoded=2, threads=1, chunk=128, cases=1, seed=0
    )
    records = Records(tmp_path / "records.json")
    long_context.read_missing(scorers[:1], text[0], settings, records)
    (run,) = records.reading
    first = records.reading[run][digest_of(text[0])].pop("512-1024")  # as where it was interrupted
    kept = json.dumps(records.reading)
    records.save()

    records = Records(tmp_path / "records.json")
    long_context.read_missing(scorers, text[0], settings, records)

    again = records.reading[run][digest_of(text[0])]
    assert json.dumps({"0-512": again["0-512"]}) in kept
    assert again["512-1024"]["sums"] == pytest.approx(first["sums"])
    assert len(records.reading) == 2
    (other,) = records.reading.keys() - {run}
    assert {len(of["decode_ratio"]) for of in records.reading[other].popitem()[1].values()} == {2}


def test_a_reader_reads_as_the_session_does(scorers: list[PackageScorer], text: tuple[np.ndarray, np.ndarray]) -> None:
    with Reader(scorers[0].path, 512, 1, 128) as reader:
        parts = [reader.read(text[0][:256], 0), reader.read(text[0][256:512], 5)]
    assert [len(part.decode) for part in parts] == [0, 5]
    assert parts[1].peak >= parts[0].peak > reader.opened
    whole = np.concatenate(list(scorers[0].logits(text[0][:512])))
    np.testing.assert_allclose(np.concatenate([part.logits for part in parts]), whole, atol=2e-4)


@pytest.mark.parametrize("index", [0, 1])
def test_texts_that_begin_alike_are_read_once_to_the_same_bits(scorers: list[PackageScorer], index: int) -> None:
    whole = np.random.default_rng(0).integers(1, 200, 1000)
    begun, ended, other = whole[:700], whole.copy(), whole.copy()
    ended[600:], other[1] = 250, 250
    branching = BranchingScorer(scorers[index].session, 1000)

    computed = []
    texts = in_order({each.tobytes() for each in (other, whole, whole[:1], ended, begun)})
    for tokens in texts:
        logits = np.concatenate(list(branching.logits(tokens)))
        rows = ~np.isnan(logits).any(axis=-1)
        np.testing.assert_array_equal(logits[rows], np.concatenate(list(scorers[index].logits(tokens)))[rows])
        computed.append((len(tokens), int(rows.sum())))

    assert computed == [(1, 1), (700, 700), (1000, 1000 - 512), (1000, 1000 - 512), (1000, 1000)]
    assert work(texts, 1000) == pytest.approx(1e-6 + 0.7**2 + 2 * (1 - 0.512**2) + 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lengths", "512,700"], "expected multiples of 256, two of them apart or more"),
        (["--lengths", "512,768"], "expected multiples of 256, two of them apart or more"),
        (["--lengths", "512", "--recall-lengths", "1024"], "at most the longest of --lengths, 512"),
        (["--chunk", "100"], "--chunk is 100; a divisor of 256"),
        (["--decoded", "256"], "256 is not in the range 1<=x<=255"),
        (["--lengths", "512,256"], "--lengths 512,256: expected rising positive integers"),
        (["--probe", "pass"], "unknown probe 'pass'"),
        (["--threads", "1"], "nowhere: no such package directory"),
    ],
)
def test_options_that_it_refuses(options: list[str], message: str, tmp_path: Path) -> None:
    done = command_runner().invoke(long_context.main, ["nowhere", "--out", str(tmp_path / "out"), *options])
    assert (done.exit_code, message in done.stderr) == (2, True), done.stderr
    assert not (tmp_path / "out").exists()


def test_text_that_is_too_short_is_refused(packages: Path, text_file: Path, tmp_path: Path) -> None:
    options = ["--text", str(text_file), "--lengths", "8192", "--out", str(tmp_path / "out")]
    done = command_runner().invoke(long_context.main, [str(packages / "float32"), *options])
    assert done.exit_code == 2
    assert "lower --lengths, or give longer text with --text" in done.stderr
    assert not (tmp_path / "out").exists()


def test_quartiles_and_the_peak_of_memory() -> None:
    assert quartiles([4, 1, 2, 3, 5]) == [2, 3, 4]
    before = peak_bytes()
    held = np.ones(2**22)
    assert peak_bytes() >= max(before, held.nbytes)
