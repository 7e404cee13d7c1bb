"""Contexts: read on, taken back, copied, saved and loaded, always as if the text had been read from its beginning."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expe_edge.errors import GenerationError
from expe_edge.runtime import Context, Generator, Sampling, Window
from tests.conftest import needs_int8_cache
from tests.runtime.test_generator import LOGITS_TOLERANCE

#: What a context may go through: its name, and a number that says how far.
OPERATIONS = st.tuples(
    st.sampled_from(["append", "rewind", "fork", "generate", "edit", "reload"]), st.integers(0, 2**16)
)


def require_fresh(generator: Generator, context: Context, ids: Sequence[int]) -> None:
    """Hold what a context holds to what reading `ids` at once gives: tokens, keys and values, and what follows."""
    assert context.tokens.tolist() == list(ids)
    assert len(context) == len(ids)
    if not ids:
        return
    fresh = generator.context(ids)
    for found, expected in zip(context.cache.tensors(), fresh.cache.tensors(), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=LOGITS_TOLERANCE)
    assert following(generator, context.fork(), None) == following(generator, None, ids)


def following(generator: Generator, context: Context | None, prompt: Sequence[int] | None, count: int = 4) -> list[int]:
    """Return the tokens that follow."""
    for _ in (stream := generator.stream(prompt, context=context, max_new_tokens=count)):
        pass
    return stream.completion.tokens


@settings(max_examples=12)
@given(operations=st.lists(OPERATIONS, min_size=1, max_size=7))
def test_any_sequence_of_operations_leaves_what_reading_from_the_beginning_does(
    cached_generator: Generator,
    text: list[int],
    tmp_path_factory: pytest.TempPathFactory,
    operations: list[tuple[str, int]],
) -> None:
    generator, ids, context = cached_generator, list[int](), cached_generator.context()
    file = tmp_path_factory.mktemp("caches") / "cache"
    for name, number in operations:
        if name == "append":
            more = text[number % 100 :][: 1 + number % 97]
            context.append(more)
            ids = ids + more
        elif name == "rewind":
            ids = ids[: number % (len(ids) + 1)]
            context.rewind(len(ids))
        elif name == "fork":
            other, context = context, context.fork()
            other.append([5, 6, 7])  # which the copy does not see
        elif name == "generate" and ids:
            ids = ids + following(generator, context, None)[:-1]
        elif name == "edit":  # a whole prompt that departs from what was read
            prompt = [*ids[: number % (len(ids) + 1)], *text[number % 50 :][: 1 + number % 31]]
            ids = prompt + following(generator, context, prompt)[:-1]
        elif name == "reload":
            context.save(file)
            context = generator.context([1, 2, 3])
            context.load(file)
        require_fresh(generator, context, ids)


def test_a_prompt_is_read_once(generator: Generator, text: list[int]) -> None:
    context = generator.context(text[:300])

    reused = []
    for count in (300, 310, 100):
        for _ in (stream := generator.stream(text[:count], context=context, max_new_tokens=5)):
            pass
        assert stream.completion.tokens == following(generator, None, text[:count], 5)
        reused.append(stream.completion.reused_tokens)

    assert reused[0] == 299  # the last is run again, for the logits behind it
    assert reused[1] >= 300
    assert reused[2] == 99


def test_text_goes_on_without_being_opened_again(generator: Generator) -> None:
    context = generator.context("The old tree")
    context.append(" grows")

    assert context.tokens.tolist().count(0) == 1
    assert context.tokens[0] == 0
    assert generator.tokenizer.decode(context.tokens.tolist()) == "The old tree grows"


def test_memory_grows_with_what_is_read(cached_generator: Generator, text: list[int]) -> None:
    context = cached_generator.context()
    token = cached_generator.session.contract.cache_bytes
    assert context.cache.capacity == cached_generator.session.reach
    assert context.nbytes <= 256 * token

    context.append(text[:400])

    sides = 2 if cached_generator.session.contract.growing_cache else 1
    assert 400 * token <= context.nbytes <= sides * 768 * token


def test_many_prompts_begin_with_what_a_context_has_read(cached_generator: Generator, text: list[int]) -> None:
    context = cached_generator.context(text[:200])
    prompts = [[*text[:200], *text[begin : begin + 20]] for begin in (300, 350, 400)]

    found = cached_generator.generate(prompts, max_new_tokens=20, context=context)

    expected = cached_generator.generate(prompts, max_new_tokens=20)
    assert [completion.tokens for completion in found] == [completion.tokens for completion in expected]
    assert {completion.reused_tokens for completion in found} == {200}
    assert {completion.reused_tokens for completion in expected} == {0}
    require_fresh(cached_generator, context, text[:200])


def test_prompts_may_share_but_the_beginning_of_a_longer_context(cached_generator: Generator, text: list[int]) -> None:
    """Of 500 tokens that were read, rows with room for 60 take what they share."""
    context = cached_generator.context(text[:500])
    prompts = [text[:40], [*text[:30], *text[200:220]], text[100:120]]

    found = cached_generator.generate(prompts, max_new_tokens=10, context=context)

    expected = cached_generator.generate(prompts, max_new_tokens=10)
    assert [completion.tokens for completion in found] == [completion.tokens for completion in expected]
    assert found[0].reused_tokens == 39
    assert 30 <= found[1].reused_tokens < 40
    samples, plain = (
        cached_generator.generate(
            prompts, n=2, sampling=Sampling(temperature=1.0, seed=3), max_new_tokens=10, context=given_context
        )
        for given_context in (context, None)
    )
    assert [completion.tokens for completion in samples] == [completion.tokens for completion in plain]
    assert len(context) == 500


@needs_int8_cache
def test_contexts_of_an_int8_cache(int8_cache_generator: Generator, text: list[int], tmp_path: Path) -> None:
    """Copies hold the same bytes and go on alike; what is read in other parts may differ by a level of int8."""
    generator, whole = int8_cache_generator, int8_cache_generator.context(text[:300])
    whole.save(tmp_path / "cache")
    loaded = generator.context()
    loaded.load(tmp_path / "cache")
    parts = generator.context(text[:200])
    parts.append(text[250:290])
    parts.rewind(150)
    parts.append(text[150:300])

    for copy in (loaded, whole.fork()):
        for found, expected in zip(copy.cache.tensors(), whole.cache.tensors(), strict=True):
            assert found.dtype == np.int8
            np.testing.assert_array_equal(found, expected)
        assert following(generator, copy, None, 30) == following(generator, whole.fork(), None, 30)
    for found, expected in zip(parts.cache.tensors(), whole.cache.tensors(), strict=True):
        difference = np.abs(found.astype(int) - expected)
        assert difference.max() <= 1
        assert difference.mean() < 0.01


# Bad input


@pytest.mark.parametrize("length", [-1, 4, 10**9])
def test_rewinding_beyond_what_was_read_is_refused(generator: Generator, length: int) -> None:
    context = generator.context([1, 2, 3])

    with pytest.raises(GenerationError, match=rf"^{length} tokens are not between 0 and 3, those that can be kept$"):
        context.rewind(length)

    assert len(context) == 3


def test_nothing_to_go_on_from(generator: Generator) -> None:
    with pytest.raises(GenerationError, match=r"^there is nothing to go on from; give a `prompt` or a `context`$"):
        generator.stream(None)
    with pytest.raises(GenerationError, match=r"^the context has read nothing; give a `prompt`$"):
        generator.stream(None, context=generator.context())


def test_a_context_of_another_generator_is_refused(packages: Path, generator: Generator) -> None:
    other = Generator.load(packages / "int8-static").context("the")
    for use in (generator.stream, lambda prompt, context: generator.generate([prompt], context=context)):
        with pytest.raises(GenerationError, match=r"^the context is another generator's; "):
            use("the", context=other)


def test_a_window_that_is_not_the_context_s_is_refused(generator: Generator) -> None:
    for own, given_window in ((None, Window(8)), (Window(9), Window(8))):
        context = generator.context("the", window=own)
        with pytest.raises(GenerationError, match=r"^`window` is not the context's; "):
            generator.stream("the tree", context=context, window=given_window)
        with pytest.raises(GenerationError, match=r"^`window` is not the context's; "):
            generator.generate(["the tree"], context=context, window=given_window)
    generator.stream("the tree", context=context, window=Window(9)).close()


def test_a_context_serves_one_stream_at_a_time(generator: Generator) -> None:
    context = generator.context("the tree")
    stream = generator.stream(None, context=context, max_new_tokens=50)
    next(stream)

    uses: list[Callable[[], object]] = [
        lambda: context.append("more"),
        lambda: context.rewind(1),
        context.fork,
        lambda: context.save("never"),
        lambda: list(generator.stream("the", context=context)),
        lambda: generator.generate(["the"], context=context),
    ]
    for use in uses:
        with pytest.raises(GenerationError, match=r"^the context is in use by a stream or another thread; "):
            use()
    assert not Path("never").exists()
    stream.close()
    context.append("more")


def test_a_context_serves_one_thread_at_a_time(generator: Generator, text: list[int]) -> None:
    """Of two that read into one context at once, one is refused and the other undisturbed."""
    context, gate, refused = generator.context(), threading.Barrier(2), list[str]()

    def read() -> None:
        gate.wait()
        try:
            context.append(text * 4)
        except GenerationError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(refused) == 1
    assert refused[0].startswith("the context is in use")
    require_fresh(generator, context, text * 4)
