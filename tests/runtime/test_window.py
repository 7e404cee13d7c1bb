"""Windows: exact attention to the first tokens and the last, in memory that does not grow, or a refusal."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from expe_edge.divergence import divergence
from expe_edge.errors import GenerationError
from expe_edge.model.attention import AttentionContext
from expe_edge.runtime import Context, Generator, PackageSession, Window
from expe_edge.runtime.session import Step
from expe_edge.runtime.window import window_refusal
from expe_edge.training.checkpoint import load_checkpoint
from tests.conftest import needs_int8_cache
from tests.runtime.test_generator import LOGITS_TOLERANCE

WINDOWS = [Window(24, 4), Window(7, 0), Window(1, 1), Window(30, 9), Window(3, 2)]


def seen_positions(window: Window, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Each key's position by query, (T, T), −1 where a window hides it, and the query's own.

    A query sees the sinks and the last tokens, of which whole blocks are dropped once there is no room for it. The
    sinks stand right before those that it sees.
    """
    places, own = np.full((length, length), -1), np.zeros(length, dtype=np.int64)
    first = window.sinks
    for query in range(length):
        if window.sinks + query + 1 - first > window.capacity:
            first += window.block
        sinks = np.arange(min(window.sinks, query + 1))
        kept = np.arange(first, query + 1)
        places[query, sinks] = sinks
        places[query, kept] = window.sinks + kept - first
        own[query] = places[query, query]
    return places, own


def masked(window: Window) -> type[AttentionContext]:
    """PyTorch's attention, all scores at once, masked to what the window sees."""

    class Masked(AttentionContext):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            places, own = map(torch.from_numpy, seen_positions(window, self.query_positions.shape[1]))
            self.hidden, self.distances, self.seen = places < 0, (places - own[:, None]).float(), own[None] + 1

        def attend(self, query: Tensor, key: Tensor, value: Tensor, slopes: Tensor | None) -> Tensor:
            groups = query.shape[1] // key.shape[1]
            key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
            assert slopes is not None
            scores = (query @ key.transpose(-1, -2) + slopes * self.distances) / math.sqrt(query.shape[-1])
            return scores.masked_fill(self.hidden, -torch.inf).softmax(dim=-1) @ value

    return Masked


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_a_window_is_attention_masked_to_what_it_sees(
    generator: Generator, checkpoint: Path, text: list[int], monkeypatch: pytest.MonkeyPatch, window: Window
) -> None:
    model, tokens = load_checkpoint(checkpoint).model, np.array(text[:140])
    monkeypatch.setattr("expe_edge.model.decoder.AttentionContext", masked(window))
    with torch.inference_mode():
        expected = model(torch.from_numpy(tokens)[None], use_cache=False).logits[0].numpy()

    session = generator.session
    cache = session.new_cache(1, 0, window)
    found = np.concatenate([logits.copy() for logits in session.prefill(cache, tokens, 50)])

    np.testing.assert_allclose(found, expected, rtol=0, atol=LOGITS_TOLERANCE)
    assert cache.read == 140
    assert window.capacity - window.block < cache.lengths[0] <= window.capacity


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_chunks_and_steps_see_the_same(cached_generator: Generator, text: list[int], window: Window) -> None:
    session, tokens = cached_generator.session, np.array(text[:150])
    logits = []
    for chunk in (1, 5, 256):
        cache = session.new_cache(1, 0, window)
        logits.append(np.concatenate([part.copy() for part in session.prefill(cache, tokens, chunk)]))
        assert cache.histories[0].ids.tolist() == [
            *text[: window.sinks],
            *text[150 - cache.lengths[0] + window.sinks : 150],
        ]

    for found in logits[1:]:
        np.testing.assert_allclose(found, logits[0], rtol=0, atol=LOGITS_TOLERANCE)


@needs_int8_cache
def test_windows_of_an_int8_cache(int8_cache_generator: Generator, generator: Generator, text: list[int]) -> None:
    window, tokens = Window(24, 4), np.array(text[:200])
    found, expected = (
        np.concatenate([part.copy() for part in session.prefill(session.new_cache(1, 0, window), tokens)])
        for session in (int8_cache_generator.session, generator.session)
    )
    assert divergence(expected, found).mean() < 0.002


def test_a_text_that_fits_is_as_without(cached_generator: Generator, text: list[int]) -> None:
    (found,) = cached_generator.generate([text[:60]], max_new_tokens=40, window=Window(96, 4))
    (expected,) = cached_generator.generate([text[:60]], max_new_tokens=40)
    assert found.tokens == expected.tokens


def test_a_stream_beyond_the_window_keeps_its_memory(cached_generator: Generator, text: list[int]) -> None:
    """Memory is what the first windowful took, whatever comes after."""
    window, context = Window(64, 4), cached_generator.context(window=Window(64, 4))
    context.append(text[:100])
    taken, buffers = context.nbytes, len(context.cache.histories[0]._ids)

    for _ in range(8):
        context.append(text)
        for _ in (stream := cached_generator.stream(None, context=context, max_new_tokens=100)):
            pass

    assert len(context) == 100 + 8 * (len(text) + 99)
    assert stream.completion.prompt_tokens == 100 + 8 * len(text) + 7 * 99
    assert context.nbytes == taken
    assert len(context.cache.histories[0]._ids) == buffers
    assert len(context.tokens) <= window.capacity


def test_rows_of_a_batch_have_windows_of_their_own(cached_generator: Generator, text: list[int]) -> None:
    prompts, window = [text[:9], text[50:170], text[:40], text[100:103]], Window(32, 2)

    found = cached_generator.generate(prompts, max_new_tokens=60, window=window, batch_size=3)

    for prompt, completion in zip(prompts, found, strict=True):
        (alone,) = cached_generator.generate([prompt], max_new_tokens=60, window=window)
        assert completion.tokens == alone.tokens


@settings(max_examples=10)
@given(
    steps=st.lists(st.tuples(st.sampled_from(["append", "fork", "reload", "prompt"]), st.integers(1, 60)), max_size=8)
)
def test_contexts_with_windows(
    cached_generator: Generator,
    text: list[int],
    tmp_path_factory: pytest.TempPathFactory,
    steps: list[tuple[str, int]],
) -> None:
    """Forked, saved, loaded and given the whole prompt again, they go on as one that has read all of it."""
    window, ids = Window(28, 3), text[:50]
    context, path = cached_generator.context(ids, window=window), tmp_path_factory.mktemp("window") / "cache"
    for name, count in steps:
        if name == "append":
            context.append(text[count : 2 * count])
            ids = ids + text[count : 2 * count]
        elif name == "fork":
            context, other = context.fork(), context
            other.append(text)
        elif name == "reload":
            context.save(path)
            context = cached_generator.context(window=window)
            context.load(path)
        else:
            stream = cached_generator.stream([*ids, *text[:count]], context=context, max_new_tokens=count)
            for _ in stream:
                pass
            assert stream.completion.reused_tokens == len(ids)
            ids = [*ids, *text[:count], *stream.completion.tokens[:-1]]
        fresh = cached_generator.context(ids, window=window)
        assert context.tokens.tolist() == fresh.tokens.tolist()
        assert len(context) == len(fresh) == len(ids)
        assert following(cached_generator, context) == following(cached_generator, fresh)


def following(generator: Generator, context: Context) -> list[int]:
    for _ in (stream := generator.stream(None, context=context.fork(), max_new_tokens=5)):
        pass
    return stream.completion.tokens


def test_what_a_window_has_dropped_is_told_from_other_text(generator: Generator, text: list[int]) -> None:
    context = generator.context(text[:100], window=Window(28, 3))
    other = [*text[:20], 7 if text[20] != 7 else 8, *text[21:120]]

    for prompt, reused in ((text[:120], 100), (other, 0), (other[:60], 0)):
        for _ in (stream := generator.stream(prompt, context=context.fork(), max_new_tokens=5)):
            pass
        assert stream.completion.reused_tokens == reused
        (expected,) = generator.generate([prompt], max_new_tokens=5, window=Window(28, 3))
        assert stream.completion.tokens == expected.tokens


def test_rewinding_behind_what_a_window_has_dropped_is_refused(generator: Generator, text: list[int]) -> None:
    context = generator.context(text[:100], window=Window(28, 3))
    earliest = context.cache.earliest()
    assert 100 - 7 <= earliest <= 100

    context.rewind(earliest)
    assert following(generator, context) == following(
        generator, generator.context(text[:earliest], window=Window(28, 3))
    )

    with pytest.raises(GenerationError, match=f"^{earliest - 1} tokens are not between {earliest} and {earliest}, "):
        context.rewind(earliest - 1)


# Where it would be wrong


@pytest.mark.parametrize(
    ("positional", "parameters", "positions"),
    [
        ("expe", {"where": "query_key"}, "folded"),
        ("expe", {"where": "query_key_value"}, "folded"),
        ("expe", {"where": "embedding"}, "inline"),
        ("expe", {"where": "key"}, "inline"),
        ("exqpe", {"where": "key"}, "folded"),
        ("rotary", {"theta": 10000.0}, "folded"),
        ("sinusoidal", {}, "folded"),
    ],
)
def test_keys_that_carry_positions_are_refused(
    packages: Path, positional: str, parameters: dict[str, object], positions: str
) -> None:
    session = PackageSession.load(packages / "float32")
    manifest = session.package.manifest
    model = {**manifest.model, "positional": positional, "positional_parameters": parameters}
    session.package = dataclasses.replace(
        session.package, manifest=dataclasses.replace(manifest, model=model, positions=positions)
    )

    with pytest.raises(GenerationError, match=rf"^`window`: tokens of {positional}.* cannot be counted anew"):
        session.new_cache(1, 10, Window(8))
    session.new_cache(1, 10)


@pytest.mark.parametrize("positional", ["alibi", "relative", "none"])
def test_encodings_of_distances_alone_are_taken(packages: Path, positional: str) -> None:
    manifest = PackageSession.load(packages / "float32").package.manifest
    model = {**manifest.model, "positional": positional, "positional_parameters": {}}
    assert window_refusal(dataclasses.replace(manifest, model=model)) is None


@pytest.mark.parametrize(
    ("size", "sinks", "message"), [(0, 4, "`window` is 0; at least 1"), (8, -1, "`sinks` is -1; at least 0")]
)
def test_windows_of_no_size_are_refused(size: int, sinks: int, message: str) -> None:
    with pytest.raises(GenerationError) as caught:
        Window(size, sinks)
    assert str(caught.value) == message


def test_a_run_larger_than_a_block_is_refused(generator: Generator, text: list[int]) -> None:
    cache = generator.session.new_cache(1, 0, Window(8, 2))
    list(generator.session.prefill(cache, np.array(text[:30])))

    with pytest.raises(GenerationError, match=r"^the cache holds 10 tokens; "):
        Step(generator.session, cache, 4).run(np.array([text[:4]]))
