"""Continuous batching: rows that join and leave while others go on get the tokens that each gets alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expe_edge.divergence import log_softmax
from expe_edge.errors import GenerationError
from expe_edge.runtime import Batch, Constraint, Generator, Sampling
from expe_edge.runtime.decoding import Row
from expe_edge.runtime.prefixes import Prefixes
from expe_edge.runtime.request import Request
from expe_edge.runtime.session import Step
from tests.conftest import PRECISIONS
from tests.runtime.test_decoding import runs  # noqa: F401

#: Formats whose rows share something when they run together: a range of activations, a kernel other than one row's.
SHARING = {"int8-dynamic", "int8-weight"}


def alone(generator: Generator, prompt: list[int], count: int, sampling: Sampling) -> list[int]:
    """Return the tokens that a prompt gets by itself."""
    return generator.generate([prompt], max_new_tokens=count, sampling=sampling)[0].tokens


def make_row(generator: Generator, prompt: list[int], count: int, sampling: Sampling | None = None) -> Row:
    return generator.row(prompt, Request(max_new_tokens=count, sampling=sampling or Sampling()))


#: When a row is added (in steps after the one before), where its prompt begins and how long it is, and how many tokens
#: follow before it ends or is removed.
ARRIVALS = st.tuples(
    st.integers(0, 6), st.integers(0, 400), st.integers(1, 90), st.integers(1, 25), st.booleans(), st.booleans()
)


@settings(max_examples=15)
@given(arrivals=st.lists(ARRIVALS, min_size=1, max_size=7), places=st.integers(1, 4))
def test_rows_that_come_and_go_get_the_tokens_of_rows_alone(
    cached_generator: Generator, text: list[int], arrivals: list[tuple[int, int, int, int, bool, bool]], places: int
) -> None:
    generator = cached_generator
    batch = Batch(generator.session, generator.session.new_cache(places, 120), prefill_chunk=16)
    rows, removed, texts = list[Row](), dict[Row, int](), dict[Row, str]()
    for pause, begin, length, count, sampled, leaves in arrivals:
        for _ in range(pause):
            collect(batch, texts, removed)
        sampling = Sampling(temperature=1.0, seed=begin) if sampled else Sampling()
        rows.append(make_row(generator, text[begin : begin + length], count, sampling))
        if leaves:
            removed[rows[-1]] = count // 2
        batch.add(rows[-1])
    while not batch.idle:
        collect(batch, texts, removed)

    for row, (_, begin, length, count, _, leaves) in zip(rows, arrivals, strict=True):
        expected = alone(generator, text[begin : begin + length], count, row.sampler.sampling)
        found = row.completion
        assert found.tokens == expected[: len(found.tokens)]
        assert found.text == texts.get(row, "")
        if not leaves:
            assert found.tokens == expected
            assert found.finish_reason == "length"
            assert found.text == generator.tokenizer.decode(expected)


def collect(batch: Batch, texts: dict[Row, str], removed: dict[Row, int]) -> None:
    """Run a step, and let rows leave that have what they came for."""
    for row, piece in batch.step():
        texts[row] = texts.get(row, "") + piece
    for row, count in removed.items():
        if len(row.completion.tokens) >= count:
            batch.remove(row)


def test_a_row_that_waits_or_is_being_read_can_be_removed(generator: Generator, text: list[int]) -> None:
    batch = Batch(generator.session, generator.session.new_cache(1, 400), prefill_chunk=16)
    first, second = make_row(generator, text[:100], 9), make_row(generator, text[:50], 9)
    batch.add(first)
    batch.add(second)
    batch.step()

    batch.remove(first)
    while not batch.idle:
        batch.step()

    assert first.completion.tokens == []
    assert second.completion.tokens == alone(generator, text[:50], 9, Sampling())
    batch.remove(second)  # which has ended: nothing to do


def test_a_long_prompt_does_not_make_others_wait(
    generator: Generator,
    text: list[int],
    runs: list[int],  # noqa: F811
) -> None:
    batch = Batch(generator.session, generator.session.new_cache(2, 600), prefill_chunk=50)
    batch.add(make_row(generator, text[:5], 40))
    batch.step()
    batch.add(make_row(generator, text[:200], 40))

    for _ in range(4):
        batch.step()

    assert runs == [5, 1, 50, 1, 50, 1, 50, 1, 50]


def test_rows_that_end_free_their_place(generator: Generator, text: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve prompts with three places: never more than three run, and no run is made for a row that has ended."""
    sizes, run = list[tuple[int, int]](), Step.run

    def counting(step: Step, tokens: np.ndarray) -> np.ndarray:
        sizes.append((len(tokens), tokens.shape[1]))
        return run(step, tokens)

    monkeypatch.setattr(Step, "run", counting)
    prompts = [text[20 * index :][: 5 + index] for index in range(12)]

    found = generator.generate(prompts, max_new_tokens=10, batch_size=3)

    decoded = [rows for rows, tokens in sizes if tokens == 1]
    assert max(decoded) == 3
    assert sum(decoded) == 12 * 9
    for prompt, completion in zip(prompts, found, strict=True):
        assert completion.tokens == alone(generator, prompt, 10, Sampling())


def test_seeds_go_with_prompts_and_not_with_places(generator: Generator, text: list[int]) -> None:
    prompts, sampling = [text[20 * index :][:9] for index in range(7)], Sampling(temperature=1.0, seed=3)

    wide, narrow = (
        generator.generate(prompts, max_new_tokens=8, sampling=sampling, batch_size=size) for size in (7, 2)
    )

    assert [completion.tokens for completion in wide] == [completion.tokens for completion in narrow]
    assert len({tuple(completion.tokens) for completion in wide}) > 1


@pytest.mark.parametrize("size", [0, -1])
def test_a_batch_of_none_is_refused(generator: Generator, size: int) -> None:
    with pytest.raises(GenerationError, match=rf"^`batch_size` is {size}; at least 1$"):
        generator.generate(["the"], batch_size=size)


SAMPLED = Sampling(temperature=1.0, seed=3)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_rows_have_the_very_bits_of_rows_alone(packages: Path, text: list[int], precision: str) -> None:
    """Log probabilities, whose last bits show any other order of sums; rows one after another where runs share."""
    generator = Generator.load(packages / precision, threads=1)
    generator.end_of_text, generator.prefill_chunk = None, 16
    request = Request(max_new_tokens=20, sampling=SAMPLED, logprobs=1)
    batch = Batch(generator.session, generator.session.new_cache(9, 120), 16, together=precision not in SHARING)
    prompts = [text[30 * index :][: 3 + 9 * index] for index in range(9)]
    rows = [generator.row(prompt, request) for prompt in prompts]
    for row in rows:
        batch.add(row)
    while not batch.idle:
        batch.step()

    for prompt, row in zip(prompts, rows, strict=True):
        (expected,) = generator.generate([prompt], max_new_tokens=20, sampling=SAMPLED, logprobs=1)
        assert row.completion.tokens == expected.tokens
        assert row.completion.logprobs == expected.logprobs


@pytest.mark.parametrize("precision", ["float32", "int8-dynamic"])
def test_beginnings_that_were_read_before_change_no_bit(packages: Path, text: list[int], precision: str) -> None:
    generator = Generator.load(packages / precision, threads=1)
    generator.end_of_text, generator.prefill_chunk = None, 16
    prefixes = Prefixes(16, most_tokens=128)
    batch = Batch(generator.session, generator.session.new_cache(2, 200), 16, together=False, prefixes=prefixes)
    prompts = [text[:100], text[:90] + text[300:330], text[:17], text[:16], text[:100], text[200:300], text[:100]]
    rows = [make_row(generator, prompt, 9, SAMPLED) for prompt in prompts]
    for row in rows:
        batch.add(row)
        while not batch.idle:
            batch.step()
        assert prefixes.tokens <= 128

    for prompt, row in zip(prompts, rows, strict=True):
        assert row.completion.tokens == alone(generator, prompt, 9, SAMPLED)
    reused = [row.completion.reused_tokens for row in rows]
    assert reused == [0, 80, 16, 0, 96, 0, 32]  # of the first prompt's six pieces, four made room for another's
    assert prefixes.nbytes == prefixes.tokens * generator.session.contract.row_bytes(1, 0)


def test_a_row_that_fails_ends_alone(generator: Generator, text: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llguidance")
    batch = Batch(generator.session, generator.session.new_cache(3, 200))
    rows = [make_row(generator, text[:9], 12), make_row(generator, text[40:60], 12)]
    doomed = generator.row(text[:5], Request(constraint=Constraint(regex="[a-z ]{40}")))
    for row in (rows[0], doomed, rows[1]):
        batch.add(row)
    matcher = doomed.matcher
    assert matcher is not None
    accept = matcher.accept

    def fail_at_third(token: int) -> None:
        if len(doomed.completion.tokens) == 3:
            raise GenerationError("no text can meet it")
        accept(token)

    monkeypatch.setattr(matcher, "accept", fail_at_third)
    while not batch.idle:
        batch.step()

    assert str(doomed.failure) == "no text can meet it"
    assert len(doomed.completion.tokens) == 3
    for row, prompt in zip(rows, (text[:9], text[40:60]), strict=True):
        assert row.completion.tokens == alone(generator, prompt, 12, Sampling())


@pytest.mark.parametrize("chunk", [7, 64])
def test_log_probabilities_of_a_prompt(any_generator: Generator, text: list[int], chunk: int) -> None:
    generator, prompt = any_generator, text[:40]
    batch = Batch(generator.session, generator.session.new_cache(1, 100), chunk, prefixes=Prefixes(chunk, 640))
    for _ in range(2):  # the second time all of it could be taken from what was read before
        row = generator.row(prompt, Request(max_new_tokens=5, prompt_logprobs=2))
        batch.add(row)
        while not batch.idle:
            batch.step()
        scored = row.completion.prompt_logprobs
        assert scored is not None
        assert scored[0] is None
        found = [(each.token, each.logprob, len(each.top)) for each in scored[1:] if each is not None]
        logits = np.concatenate(
            list(generator.session.prefill(generator.session.new_cache(1, 100), np.array(prompt), chunk))
        )
        expected = [(token, log_softmax(row)[token], 2) for row, token in zip(logits, prompt[1:], strict=False)]
        assert found == expected
        generator.prefill_chunk = chunk
        assert row.completion.tokens == alone(generator, prompt, 5, Sampling())
        generator.prefill_chunk = None
