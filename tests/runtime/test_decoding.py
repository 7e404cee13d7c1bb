"""Streams: when they decode, what they hold, and that batches give the same."""

from __future__ import annotations

import dataclasses
import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from expe_edge.runtime import Completion, Generator, PackageSession, Sampling, Stream
from expe_edge.runtime.cache import Cache
from expe_edge.runtime.session import Step
from tests.runtime.test_generator import PROMPTS


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of tokens of every run so far."""
    counted: list[int] = []
    run = Step.run

    def counting(step: Step, tokens: np.ndarray) -> np.ndarray:
        counted.append(step.tokens)
        return run(step, tokens)

    monkeypatch.setattr(Step, "run", counting)
    return counted


def test_nothing_is_decoded_before_it_is_asked_for(generator: Generator, runs: list[int]) -> None:
    stream = generator.stream([5, 6, 7], max_new_tokens=20)
    assert runs == []
    assert stream.completion == Completion(prompt_tokens=3)

    for _ in stream:
        assert runs == [3, *[1] * (len(stream.completion.tokens) - 1)]

    assert runs == [3, *[1] * 19]
    assert stream.completion.finish_reason == "length"


@pytest.mark.parametrize("count", [0, 1, 7])
def test_completion_of_a_stream_that_is_left_early(any_generator: Generator, count: int) -> None:
    (whole,) = any_generator.generate(["the tree"], max_new_tokens=40)
    stream = any_generator.stream("the tree", max_new_tokens=40)

    pieces = list(itertools.islice(stream, count))

    found = stream.completion
    assert len(pieces) == count
    assert found.text == "".join(pieces) == any_generator.tokenizer.decode(found.tokens)
    assert found.tokens == whole.tokens[: len(found.tokens)]
    assert found.prompt_tokens == whole.prompt_tokens
    assert found.finish_reason is None
    assert "".join([*pieces, *stream]) == found.text == whole.text  # it can be taken up again
    assert found.finish_reason == "length"


def test_closed_stream_ends(generator: Generator, runs: list[int]) -> None:
    stream = generator.stream("the tree", max_new_tokens=40)
    next(stream)
    kept, count = dataclasses.replace(stream.completion), len(runs)

    stream.close()

    assert list(stream) == []
    assert stream.completion == kept
    assert len(runs) == count


@pytest.mark.parametrize("end", [list, Stream.close], ids=["read to its end", "closed"])
def test_stream_that_has_ended_holds_no_cache(
    generator: Generator, monkeypatch: pytest.MonkeyPatch, end: Callable[[Stream], object]
) -> None:
    caches = []
    new_cache = PackageSession.new_cache

    def remembered(session: PackageSession, *arguments: Any) -> Cache:
        cache = new_cache(session, *arguments)
        caches.append(weakref.ref(cache))
        return cache

    monkeypatch.setattr(PackageSession, "new_cache", remembered)
    stream = generator.stream("the tree", max_new_tokens=4)
    next(stream)
    assert caches[0]() is not None

    end(stream)

    assert caches[0]() is None


@pytest.mark.parametrize("stop", [(), ["the", " and"]], ids=["length", "stop"])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0, seed=4)], ids=["greedy", "sampled"])
def test_streams_and_batches_give_the_same_completions(
    generator: Generator, sampling: Sampling, stop: Sequence[str]
) -> None:
    together = generator.generate(PROMPTS, max_new_tokens=40, sampling=sampling, stop=stop)

    for index, (prompt, expected) in enumerate(zip(PROMPTS, together, strict=True)):
        seeded = dataclasses.replace(sampling, seed=None if sampling.seed is None else sampling.seed + index)
        for _ in (stream := generator.stream(prompt, max_new_tokens=40, sampling=seeded, stop=stop)):
            pass
        found = stream.completion
        assert found == dataclasses.replace(
            expected, prefill_seconds=found.prefill_seconds, decode_seconds=found.decode_seconds
        )
