"""What may be asked of a generator beside the text: samples, log probabilities, other ends, and looking on."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from expe_edge.errors import GenerationError
from expe_edge.export.exporter import export
from expe_edge.quant.recipe import Recipe
from expe_edge.runtime import Completion, Constraint, Generator, PackageSession, Sampling
from expe_edge.runtime.session import Step
from expe_edge.training.checkpoint import load_checkpoint
from tests.runtime.test_generator import PROMPTS, refusal

WARM = Sampling(temperature=1.0, seed=3)


def ended_by(generator: Generator, end_of_text: int | None) -> Generator:
    """The same generator with another closing token."""
    other = copy.copy(generator)
    other.end_of_text = end_of_text
    return other


# Log probabilities


def test_logprobs_are_those_of_the_models_own_logits(generator: Generator) -> None:
    """Whatever the sampling: of the logits as one uncached run over the whole text gives them."""
    sampling = Sampling(temperature=0.7, top_k=5, repetition_penalty=1.3, frequency_penalty=0.4, seed=1)
    (found,) = generator.generate([PROMPTS[0]], max_new_tokens=12, sampling=sampling, logprobs=4)
    ids = [*generator.encode(PROMPTS[0]).tolist(), *found.tokens]
    (logits,) = generator.session.forward([np.array(ids)])
    expected = torch.from_numpy(logits).double().log_softmax(-1)[found.prompt_tokens - 1 : -1]
    best = expected.topk(4)

    assert found.logprobs is not None
    assert [each.token for each in found.logprobs] == found.tokens
    for step, each in enumerate(found.logprobs):
        assert each.text == generator.tokenizer.decode([each.token])
        assert each.logprob == pytest.approx(float(expected[step, each.token]), abs=1e-4)
        assert [one.token for one in each.top] == best.indices[step].tolist()
        np.testing.assert_allclose([one.logprob for one in each.top], best.values[step], atol=1e-4)


def test_greedy_choices_are_the_likeliest(generator: Generator) -> None:
    for _ in (stream := generator.stream("the", max_new_tokens=9, logprobs=1)):
        pass

    assert stream.completion.logprobs is not None
    assert [each.top[0].token for each in stream.completion.logprobs] == stream.completion.tokens


def test_no_alternatives_and_all_of_them(generator: Generator) -> None:
    chosen, everything = (
        generator.generate(["the"], max_new_tokens=1, logprobs=count)[0].logprobs for count in (0, 300)
    )
    assert chosen is not None
    assert everything is not None

    assert chosen[0].top == ()
    assert sorted(each.token for each in everything[0].top) == list(range(300))
    assert sum(np.exp([each.logprob for each in everything[0].top])) == pytest.approx(1, abs=1e-5)
    assert generator.generate(["the"], max_new_tokens=1)[0].logprobs is None


# Samples


@pytest.mark.parametrize("batch_size", [1, 4, 16])
@pytest.mark.parametrize("portable", [False, True])
def test_samples_of_a_prompt_are_what_each_seed_gives_alone(
    generator: Generator, checkpoint: Path, tmp_path: Path, portable: bool, batch_size: int
) -> None:
    """In both kinds of cache."""
    if portable:
        (package,) = export(checkpoint, tmp_path, [Recipe("float32", portable=True)])
        generator = Generator.load(package.path)

    samples = generator.generate(PROMPTS[:2], n=3, batch_size=batch_size, max_new_tokens=25, sampling=WARM)

    assert len(samples) == 6
    for index, found in enumerate(samples):
        seeded = dataclasses.replace(WARM, seed=3 + index)
        (alone,) = generator.generate([PROMPTS[index // 3]], max_new_tokens=25, sampling=seeded)
        assert (found.tokens, found.text) == (alone.tokens, alone.text)
        assert found.reused_tokens == (0 if index % 3 == 0 else found.prompt_tokens - 1)
    assert len({found.text for found in samples}) > 4


def test_the_prompt_of_several_samples_is_read_once(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[tuple[int, int]] = []
    run = Step.run

    def counting(step: Step, tokens: np.ndarray) -> np.ndarray:
        lengths.append(tokens.shape)
        return run(step, tokens)

    monkeypatch.setattr(Step, "run", counting)

    generator.generate([[5, 6, 7, 8]], n=4, max_new_tokens=3, sampling=WARM)

    assert [shape for shape in lengths if shape[1] > 1] == [(1, 3)]  # the last token is read for each sample's logits
    assert lengths.count((1, 1)) >= 4


# Other ends


def test_stop_tokens_end_the_text_and_leave_theirs_out(any_generator: Generator) -> None:
    (whole,) = any_generator.generate(["the tree"], max_new_tokens=40)
    closing = whole.tokens[12]
    place = whole.tokens.index(closing)

    found = any_generator.generate(["the tree"], max_new_tokens=40, stop_tokens=[299, closing])[0]
    pieces = list(any_generator.stream("the tree", max_new_tokens=40, stop_tokens=[299, closing]))

    assert found.finish_reason == "stop"
    assert found.tokens == whole.tokens[: place + 1]
    assert found.text == "".join(pieces) == any_generator.tokenizer.decode(whole.tokens[:place])


@pytest.mark.parametrize("least", [0, 5, 11, 40])
def test_min_new_tokens_is_that_of_transformers(packages: Path, checkpoint: Path, least: int) -> None:
    """Greedy, with closing tokens that the model is known to choose."""
    generator = Generator.load(packages / "float32")
    (whole,) = generator.generate(["the tree"], max_new_tokens=40)
    closing = [whole.tokens[3], whole.tokens[10]]
    generator = ended_by(generator, closing[0])
    ids = torch.from_numpy(generator.encode("the tree"))[None]
    theirs = (
        load_checkpoint(checkpoint)
        .model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=40,
            min_new_tokens=least,
            do_sample=False,
            eos_token_id=closing,
            pad_token_id=0,
        )[0, ids.shape[1] :]
        .tolist()
    )

    (ours,) = generator.generate(
        ["the tree"], max_new_tokens=40, min_new_tokens=least, stop_tokens=[closing[1]], sampling=Sampling()
    )

    assert ours.tokens == theirs
    assert len(ours.tokens) >= max(least, 1)
    assert not set(closing) & set(ours.tokens[:least])


def test_callback_sees_every_token_of_every_row_and_ends_one(generator: Generator) -> None:
    seen: list[tuple[int, int, str]] = []

    def callback(row: int, completion: Completion) -> bool:
        seen.append((row, len(completion.tokens), completion.text))
        return row == 1 and len(completion.tokens) == 4

    whole = generator.generate(PROMPTS[:2], max_new_tokens=9)
    found = generator.generate(PROMPTS[:2], max_new_tokens=9, callback=callback)

    assert [each.finish_reason for each in found] == ["length", "callback"]
    assert (found[0].tokens, found[1].tokens) == (whole[0].tokens, whole[1].tokens[:4])
    assert [count for row, count, _ in seen if row == 0] == list(range(1, 10))
    assert [count for row, count, _ in seen if row == 1] == list(range(1, 5))
    assert all(whole[row].text.startswith(text) for row, _, text in seen)


def test_callback_that_raises_ends_the_generation(generator: Generator) -> None:
    def callback(row: int, completion: Completion) -> None:
        raise RuntimeError(f"enough of {row}: {len(completion.tokens)}")

    with pytest.raises(RuntimeError, match="enough of 0: 1"):
        next(generator.stream("the", callback=callback))


def test_what_ends_a_text_goes_before_the_callback(generator: Generator) -> None:
    (found,) = generator.generate(["the"], max_new_tokens=1, callback=lambda *seen: bool(seen))

    assert found.finish_reason == "length"


# Looking on


@pytest.mark.parametrize(
    ("n", "expected"),
    [
        (1, [(4, 10), (8, 10), (10, 10), (3, 3)]),
        (2, [(4, 10), (8, 10), (9, 10), (2, 3), (10, 10), (3, 3)]),  # last tokens when the samples begin
    ],
)
def test_progress_counts_the_tokens_of_every_prompt_that_is_read(
    packages: Path, n: int, expected: list[tuple[int, int]]
) -> None:
    generator = Generator(PackageSession.load(packages / "float32"), prefill_chunk=4)
    seen: list[tuple[int, int]] = []

    generator.generate(
        [list(range(1, 11)), [1, 2, 3]],
        n=n,
        max_new_tokens=1,
        sampling=WARM,
        on_prefill=lambda done, total: seen.append((done, total)),
    )

    assert seen == expected


def test_speeds_are_tokens_over_seconds() -> None:
    done = Completion(tokens=[1] * 11, prompt_tokens=30, prefill_seconds=2.0, decode_seconds=5.0)

    assert (done.prefill_speed, done.decode_speed) == (15.0, 2.0)
    assert (Completion().prefill_speed, Completion().decode_speed) == (0.0, 0.0)


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_new_tokens": -1}, "`min_new_tokens` is -1; from 0 to `max_new_tokens`, 20"),
        ({"min_new_tokens": 21}, "`min_new_tokens` is 21; from 0 to `max_new_tokens`, 20"),
        ({"stop_tokens": [1, 300]}, "`stop_tokens`: token id 300 is outside the vocabulary of 300"),
        ({"stop_tokens": [-1]}, "`stop_tokens`: token id -1 is outside the vocabulary of 300"),
        ({"logprobs": -1}, "`logprobs` is -1; from 0 to 300, the vocabulary's tokens"),
        ({"logprobs": 301}, "`logprobs` is 301; from 0 to 300, the vocabulary's tokens"),
        (
            {"sampling": Sampling(logit_bias={300: 1.0})},
            "`logit_bias`: token id 300 is outside the vocabulary of 300",
        ),
        (
            {"min_new_tokens": 1, "stop_tokens": range(300)},
            "`stop_tokens` leave no other token to choose, and `min_new_tokens` is 1; take some out",
        ),
        (
            {"min_new_tokens": 1, "stop_tokens": range(1, 300)},
            "`stop_tokens` leave no other token to choose, and `min_new_tokens` is 1; take some out",
        ),
    ],
    ids=str,
)
def test_what_is_out_of_range(generator: Generator, options: dict[str, Any], message: str) -> None:
    assert refusal(generator.stream, "the", max_new_tokens=20, **options) == message
    assert refusal(generator.generate, ["the"], max_new_tokens=20, **options) == message


@pytest.mark.parametrize("count", [0, -2])
def test_no_samples(generator: Generator, count: int) -> None:
    assert refusal(generator.generate, ["the"], n=count) == f"`n` is {count}; at least 1"


def test_several_greedy_samples_would_be_the_same(generator: Generator) -> None:
    with pytest.raises(GenerationError) as caught:
        generator.generate(["the"], n=2)

    assert str(caught.value) == "`n` is 2, but `temperature` is 0, which gives the same text every time; raise it"


def test_samples_go_on_from_a_context_which_stays_as_it_is(generator: Generator) -> None:
    context = generator.context(PROMPTS[0])
    read = len(context)

    samples = generator.generate([PROMPTS[0] + " and"], n=2, max_new_tokens=9, sampling=WARM, context=context)

    assert len(context) == read
    expected = generator.generate([PROMPTS[0] + " and"], n=2, max_new_tokens=9, sampling=WARM)
    assert [each.tokens for each in samples] == [each.tokens for each in expected]


@pytest.mark.parametrize("sampling", [Sampling(), WARM], ids=["greedy", "sampled"])
def test_drafts_change_nothing_of_what_is_asked(generator: Generator, sampling: Sampling) -> None:
    """Prompt lookup beside penalties, log probabilities, a constraint, and stop tokens."""
    asked: dict[str, Any] = {
        "sampling": dataclasses.replace(sampling, presence_penalty=0.5, logit_bias={7: 1.0}),
        "logprobs": 2,
        "constraint": Constraint(regex="(one, two, (three|four), ){1,60}"),
        "stop_tokens": [299],
    }
    (plain,), (drafted,) = (
        generator.generate(["one, two, three, one, two, three, "], max_new_tokens=60, prompt_lookup=lookup, **asked)
        for lookup in (False, True)
    )

    assert drafted.drafted_tokens > 0
    assert (drafted.tokens, drafted.text, drafted.finish_reason) == (plain.tokens, plain.text, plain.finish_reason)
    assert drafted.logprobs is not None
    assert plain.logprobs is not None
    for one, other in zip(drafted.logprobs, plain.logprobs, strict=True):
        assert one.token == other.token
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
