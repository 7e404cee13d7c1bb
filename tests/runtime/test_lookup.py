"""Prompt lookup: drafts from the text so far, and tokens that are those of decoding one by one."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expe_edge.runtime import Generator, Sampling, Window
from expe_edge.runtime.lookup import LONGEST_DRAFT, LONGEST_PAUSE, MATCHED, SHORTEST_DRAFT, PromptLookup
from tests.runtime.test_decoding import runs  # noqa: F401

SAMPLINGS = {
    "greedy": Sampling(),
    "penalized": Sampling(repetition_penalty=1.1),
    "sampled": Sampling(temperature=0.5, seed=4),
    "filtered": Sampling(temperature=1.0, top_k=5, top_p=0.9, seed=5),
}


# Drafts


def draft_of(tokens: Sequence[int], most: int) -> list[int]:
    """The definition: what followed the latest place where as many of the last tokens stood as may be."""
    for size in MATCHED:
        for end in range(len(tokens) - 1, size - 1, -1):
            if list(tokens[end - size : end]) == list(tokens[-size:]) and size <= len(tokens):
                copied = list(tokens)
                for place in range(end, end + most):
                    copied.append(copied[place])  # it may be one that was copied
                return copied[len(tokens) :]
    return []


@given(st.lists(st.integers(0, 1), max_size=60), st.integers(0, SHORTEST_DRAFT))
def test_a_draft_is_what_followed_the_last_tokens_where_they_stood_before(tokens: list[int], most: int) -> None:
    assert PromptLookup(np.array(tokens, dtype=np.int64)).draft(most) == draft_of(tokens, most)


def test_drafts_are_as_long_as_they_are_good() -> None:
    lookup = PromptLookup(np.array([1, 2, 3, 4] * 20))
    lengths = []
    for accepted in (8, 16, 31, 31, 20, 12, 5):
        lengths.append(len(lookup.draft(100)))
        lookup.judge(lengths[-1], accepted)
    assert lengths == [SHORTEST_DRAFT, 16, 31, LONGEST_DRAFT, 31, 31, 15]
    assert len(lookup.draft(100)) == SHORTEST_DRAFT
    assert len(lookup.draft(3)) == 3
    assert lookup.draft(0) == []


def test_after_bad_drafts_none_is_made_for_a_while() -> None:
    lookup = PromptLookup(np.array([1, 2, 3, 4] * 20))
    pauses = []
    for _ in range(7):
        lookup.judge(len(lookup.draft(9)), 0)
        pauses.append(0)
        while not (draft := lookup.draft(9)):
            pauses[-1] += 1
    assert pauses == [2, 4, 8, 16, 32, LONGEST_PAUSE, LONGEST_PAUSE]
    lookup.judge(len(draft), 5)
    assert lookup.draft(9)
    lookup.judge(len(draft), 0)
    assert [bool(lookup.draft(9)) for _ in range(3)] == [False, False, True]


# Tokens


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draft wherever a single token stood before, however bad the drafts were."""
    monkeypatch.setattr("expe_edge.runtime.lookup.MATCHED", (3, 2, 1))
    monkeypatch.setattr("expe_edge.runtime.lookup.WORTH", 0)


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize("prompt", [(0, 200), (3, 40), (100, 101)], ids=str)
def test_tokens_are_those_without(
    cached_generator: Generator, text: list[int], sampling: Sampling, prompt: tuple[int, int]
) -> None:
    ids = text[slice(*prompt)]
    (expected,) = cached_generator.generate([ids], max_new_tokens=150, sampling=sampling)

    (found,) = cached_generator.generate([ids], max_new_tokens=150, sampling=sampling, prompt_lookup=True)

    assert found.tokens == expected.tokens
    assert found.text == expected.text
    assert found.finish_reason == expected.finish_reason == "length"
    assert 0 < found.accepted_tokens <= found.drafted_tokens
    assert expected.drafted_tokens == 0


@pytest.mark.parametrize("precision", ["int8-static", "int8-weight", "int4-weight"])
def test_formats_whose_rows_know_nothing_of_each_other(packages: Path, text: list[int], precision: str) -> None:
    """Weights in blocks take an activation's scale from its own row; fixed ranges know no rows."""
    generator = Generator.load(packages / precision)
    expected, found = (
        generator.generate([text[:200]], max_new_tokens=100, prompt_lookup=lookup)[0] for lookup in (False, True)
    )
    assert found.tokens == expected.tokens
    assert found.accepted_tokens > 0


def test_fewer_runs_are_made(generator: Generator, text: list[int], runs: list[int]) -> None:  # noqa: F811
    (found,) = generator.generate([text[:300]], max_new_tokens=100, prompt_lookup=True)

    decoding = runs[runs.index(44) + 1 :]  # the prompt is read in 256 and 44
    assert sum(decoding) == len(decoding) + found.drafted_tokens
    assert len(decoding) == 99 - found.accepted_tokens
    assert max(decoding) <= LONGEST_DRAFT + 1


@pytest.mark.parametrize("count", [1, 2, 3, 17])
def test_no_token_too_many(generator: Generator, text: list[int], count: int) -> None:
    (found,) = generator.generate([text[:300]], max_new_tokens=count, prompt_lookup=True)
    assert len(found.tokens) == count


@pytest.mark.usefixtures("eager")
def test_a_stop_inside_a_draft_ends_the_text_and_the_context(generator: Generator, text: list[int]) -> None:
    (whole,) = generator.generate([text[:200]], max_new_tokens=120)
    for begin in range(10, 60, 7):
        context, stop = generator.context(), whole.text[begin : begin + 4]
        stream = generator.stream(text[:200], max_new_tokens=120, stop=stop, context=context, prompt_lookup=True)

        assert "".join(stream) == whole.text.partition(stop)[0]

        found = stream.completion
        assert found.tokens == whole.tokens[: len(found.tokens)]
        assert context.tokens.tolist() == [*text[:200], *found.tokens[:-1]]


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("window", [Window(40, 4), Window(16, 0), Window(1, 1)], ids=str)
def test_within_a_window(cached_generator: Generator, text: list[int], window: Window) -> None:
    expected, found = (
        cached_generator.generate([text[:150]], max_new_tokens=150, window=window, prompt_lookup=lookup)[0]
        for lookup in (False, True)
    )
    assert found.tokens == expected.tokens


@pytest.mark.usefixtures("eager")
def test_in_a_batch_the_last_row_drafts(generator: Generator, text: list[int]) -> None:
    prompts = [text[:30], text[100:400], text[200:260]]
    expected, found = (
        generator.generate(prompts, max_new_tokens=60, prompt_lookup=lookup, batch_size=2) for lookup in (False, True)
    )
    assert [completion.tokens for completion in found] == [completion.tokens for completion in expected]
    assert sum(completion.accepted_tokens for completion in found) > 0


@pytest.mark.usefixtures("eager")
def test_sampled_tokens_have_the_model_s_distribution(generator: Generator) -> None:
    """Whatever is drafted, the first tokens that it is judged by are distributed as without: over seeds, a χ² test.

    With a seed they are the same tokens, too, which the tests above hold; here every run has seeds of its own.
    """
    prompt, chosen = [5, 6, 7, 8] * 6, random.Random(0)
    counts: list[Counter[tuple[int, ...]]] = []
    for lookup in (False, True):
        found = Counter[tuple[int, ...]]()
        for _ in range(400):
            sampling = Sampling(temperature=0.7, top_k=3, seed=chosen.randrange(2**32))
            (completion,) = generator.generate([prompt], max_new_tokens=2, sampling=sampling, prompt_lookup=lookup)
            found[tuple(completion.tokens)] += 1
        counts.append(found)
    pairs = set(counts[0]) | set(counts[1])
    statistic = sum((counts[0][pair] - counts[1][pair]) ** 2 / (counts[0][pair] + counts[1][pair]) for pair in pairs)
    assert len(pairs) > 3
    assert statistic < len(pairs) - 1 + 4 * (2 * len(pairs)) ** 0.5  # four standard deviations
