"""Packages some of whose heads keep a window: the runtime over them, and what they take."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expe_edge.cli.main import main
from expe_edge.errors import ExportError, GenerationError
from expe_edge.export.exporter import export
from expe_edge.graph.run import logits_of, open_model
from expe_edge.quant.recipe import Recipe
from expe_edge.runtime import Generator, PackageSession, Sampling
from expe_edge.runtime.cache import Cache
from expe_edge.runtime.memory import PREFILL_CHUNK, SPARE, bounded_chunk, far_heads
from expe_edge.runtime.shared import SharedStorage
from expe_edge.runtime.window import Window
from expe_edge.training.run import train
from tests.conftest import needs_windows
from tests.small import command_runner, small_settings

pytestmark = needs_windows
WINDOW = 16
#: More than a window's buffers hold, so that they are moved several times.
LENGTH = 3 * (WINDOW + SPARE + PREFILL_CHUNK)


@pytest.fixture(scope="module")
def checkpoint(text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four heads, a key/value head each, the last of which sees content alone."""
    out = tmp_path_factory.mktemp("recipe") / "model"
    recipe = {"softplus": True, "content_heads": 1, "temperature": 0.3}
    train(small_settings(text_folder, positional_parameters=recipe, num_key_value_heads=4), out)
    return out


@pytest.fixture(scope="module")
def packages(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("windowed")
    plain = Recipe(head_window=WINDOW, head_window_cost=10.0)  # it has learnt little: whatever windows cost
    recipes = [plain, replace(plain, precision="int8-static"), replace(plain, cache="int8")]
    export(checkpoint, out, recipes)
    return out


def windowed(packages: Path, name: str = "float32") -> Generator:
    return Generator.load(packages / f"{name}-windowed", threads=1)


def text(generator: Generator, length: int = LENGTH) -> np.ndarray:
    ids: np.ndarray = np.random.default_rng(0).integers(1, generator.session.contract.vocab_size, length)
    return ids


def read(session: PackageSession, cache: Cache, tokens: np.ndarray, chunk: int) -> np.ndarray:
    return np.concatenate([logits.copy() for logits in session.prefill(cache, tokens, chunk)])


@pytest.mark.parametrize("chunk", [1, 50, 256, 700])
def test_the_runtime_computes_what_the_graph_does(packages: Path, chunk: int) -> None:
    """Whatever is moved: the oracle gets a cache that is cut to the window before every run."""
    generator = windowed(packages)
    session, tokens = generator.session, text(generator, LENGTH if chunk > 1 else 500)
    expected = np.concatenate([*logits_of(open_model(session.package.model_path), session.contract, tokens, 0)])
    found = read(session, session.new_cache(1, len(tokens)), tokens, chunk)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_memory_of_windows_does_not_grow(packages: Path) -> None:
    session = windowed(packages).session
    cache = session.new_cache(1, 8 * LENGTH)
    sizes = []
    for _ in range(8):
        read(session, cache, text(windowed(packages)), 256)
        sizes.append(cache.nbytes)
    assert isinstance(cache.storage, SharedStorage)
    columns = cache.storage.columns
    contract = session.contract
    assert sizes[-1] == contract.row_bytes(columns, SPARE + PREFILL_CHUNK)
    assert sizes[-1] < 0.4 * columns * 4 * contract.cache_bytes  # three of four heads keep little


@settings(max_examples=15, deadline=None)
@given(steps=st.lists(st.tuples(st.sampled_from(["read", "rewind"]), st.integers(1, 300)), min_size=2, max_size=8))
def test_reading_and_taking_back(packages: Path, steps: list[tuple[str, int]]) -> None:
    generator = windowed(packages)
    session, tokens = generator.session, text(generator, 3000)
    cache, held, logits = session.new_cache(1, 3000), np.zeros(0, dtype=np.int64), None
    for number, (step, count) in enumerate(steps):
        if step == "read":
            part = tokens[100 * number : 100 * number + count]
            logits, held = read(session, cache, part, 64)[-1], np.concatenate([held, part])
        elif cache.earliest() <= len(held) - count:
            cache.truncate(len(held) - count)
            logits, held = None, held[: len(held) - count]
        elif len(held) > count:
            with pytest.raises(GenerationError, match="tokens are not between"):
                cache.truncate(len(held) - count)
    if logits is not None:
        fresh = read(session, session.new_cache(1, 3000), held, 64)[-1]
        np.testing.assert_allclose(logits, fresh, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["float32", "int8-static", "float32-int8-cache"])
def test_batches_streams_and_single_prompts_agree(packages: Path, name: str) -> None:
    generator = windowed(packages, name)
    prompts = [text(generator, length).tolist() for length in (3, 40, 400)]
    together = generator.generate(prompts, max_new_tokens=30)
    for prompt, found in zip(prompts, together, strict=True):
        (alone,) = generator.generate([prompt], max_new_tokens=30)
        stream = generator.stream(prompt, max_new_tokens=30)
        assert "".join(stream) == stream.completion.text
        assert found.tokens == alone.tokens == stream.completion.tokens


def test_prefill_reads_as_much_at_once_as_the_heads_that_see_all_allow(packages: Path) -> None:
    session = windowed(packages).session
    assert far_heads(session.package.manifest) == 1  # of four
    assert session.chunk_at(60_000) == PREFILL_CHUNK > bounded_chunk(4, 60_000)


def test_a_context_is_copied_and_saved(packages: Path, tmp_path: Path) -> None:
    generator = windowed(packages)
    sampling = Sampling(temperature=0.8, seed=3)
    context = generator.context()
    context.append(text(generator, 900).tolist())
    copy = context.fork()
    context.save(tmp_path / "cache")
    loaded = generator.context()
    loaded.load(tmp_path / "cache")
    texts = []
    for each in (context, copy, loaded):
        stream = generator.stream([5, 7], context=each, max_new_tokens=40, sampling=sampling)
        "".join(stream)
        texts.append(stream.completion.tokens)
    assert texts[0] == texts[1] == texts[2]


def test_rows_kept_apart_run_without_a_cache(packages: Path) -> None:
    session = windowed(packages).session
    rows = [text(windowed(packages), length) for length in (5, 60)]
    for row, logits in zip(rows, session.forward(rows), strict=True):
        expected = read(session, session.new_cache(1, len(row)), row, 256)
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)


def test_a_window_of_the_text_must_be_wider_than_those_of_heads(packages: Path) -> None:
    session = windowed(packages).session
    with pytest.raises(GenerationError, match=r"^`window` is 100, but heads .* keep 336 tokens .*; give at least 452$"):
        session.new_cache(1, 0, Window(100))
    cache = session.new_cache(1, 0, Window(452))
    logits = read(session, cache, text(windowed(packages), 1500), 256)
    assert np.isfinite(logits).all()
    assert cache.dropped > 0


def test_the_manifest_says_what_windows_cost(packages: Path) -> None:
    record = windowed(packages).session.package.manifest.calibration
    assert record is not None
    assert record["head_windows"]["windows"] == [WINDOW] * 3 + [0]
    assert record["head_windows"]["kl"] > 0


def test_inspect_says_it_too(packages: Path) -> None:
    package = windowed(packages).session.package
    shown = command_runner().invoke(main, ["inspect", str(package.path)], catch_exceptions=False).stdout
    assert f"; 3 of 4 heads keep {WINDOW} tokens, for " in " ".join(shown.split())


def test_other_clients_are_told(packages: Path) -> None:
    package = windowed(packages).session.package
    for name in ("config.json", "genai_config.json"):
        assert "expe-with-windows-for-expe-edge-alone" in (package.path / name).read_text()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"head_window": 0}, "`head_window` is 0; at least 1"),
        ({"head_window": 2**24 + 1}, "no package holds this model: windows"),
        ({"head_window": 8, "portable": True}, "`portable` has no windows"),
        ({"head_window": 1, "head_window_cost": -10.0}, r"`head_window` 1 costs .* more than `head_window_cost` -10"),
    ],
)
def test_windows_that_are_refused(checkpoint: Path, tmp_path: Path, settings: dict[str, object], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        export(checkpoint, tmp_path / "out", [Recipe(**settings)])  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"positional": "rotary"}, "`head_window` is for the relative form of expe, not rotary"),
        ({"positional_parameters": {"content_heads": 0}}, "no head of this model sees content at any distance"),
        ({"num_key_value_heads": 1}, "every key/value head of this model sees content"),
    ],
)
def test_models_without_such_heads(text_folder: Path, tmp_path: Path, changes: dict[str, object], message: str) -> None:
    train(small_settings(text_folder, max_steps=1, **changes), tmp_path / "model")
    with pytest.raises(ExportError, match=message):
        export(tmp_path / "model", tmp_path / "out", [Recipe(head_window=8)])
