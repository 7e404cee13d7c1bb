"""The runtime: prefill, cached decode, batches and streams, against each other and against PyTorch."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from expe_edge.errors import ExPEEdgeError, GenerationError, PackageError
from expe_edge.package.directory import read_package, seal_package
from expe_edge.package.manifest import MANIFEST_FILE
from expe_edge.runtime import Generator, PackageSession, Sampling
from expe_edge.runtime.cache import Cache
from expe_edge.runtime.session import Step
from expe_edge.runtime.shared import SharedStorage
from expe_edge.text.documents import Document
from expe_edge.text.tokenization import train_tokenizer
from expe_edge.training.checkpoint import Checkpoint, load_checkpoint
from tests.conftest import PRECISIONS
from tests.manifests import edit_manifest, read_manifest

#: Largest difference of float32 logits: the sums are the same, only their order differs.
LOGITS_TOLERANCE = 1e-4
#: 16 training lengths of 32, and a little more, so that chunks do not divide it.
LONG = 530
PROMPTS = ["The old tree grows", "a", "Document 3.\nthe river runs under the bright stone and the tree grows over it."]


@pytest.fixture(scope="module")
def torch_side(checkpoint: Path) -> Checkpoint:
    return load_checkpoint(checkpoint)


@pytest.fixture(scope="module")
def tokens(generator: Generator, text_folder: Path) -> np.ndarray:
    """A long text's ids, (LONG,) int64."""
    return generator.encode((text_folder / "07.txt").read_text(encoding="utf-8"))[:LONG]


def prefill(session: PackageSession, tokens: np.ndarray, chunk: int) -> np.ndarray:
    """Logits (T, V) of all tokens, in chunks."""
    cache = session.new_cache(1, len(tokens))
    return np.concatenate([logits.copy() for logits in session.prefill(cache, tokens, chunk)])


def decode(session: PackageSession, tokens: np.ndarray) -> np.ndarray:
    """Logits (T, V) of all tokens, one step for each."""
    cache = session.new_cache(1, len(tokens))
    step = Step(session, cache, 1)
    return np.concatenate([step.run(token.reshape(1, 1))[0].copy() for token in tokens])


# Prefill and decode


@pytest.mark.parametrize("chunk", [1, 7, 64, 256, LONG, 10_000])
def test_chunk_size_of_the_prefill_does_not_matter(generator: Generator, tokens: np.ndarray, chunk: int) -> None:
    expected = prefill(generator.session, tokens, 128)

    found = prefill(generator.session, tokens, chunk)

    assert found.shape == (LONG, generator.session.contract.vocab_size)
    np.testing.assert_allclose(found, expected, rtol=0, atol=LOGITS_TOLERANCE)


def test_cached_decode_equals_the_full_forward_pass(generator: Generator, tokens: np.ndarray) -> None:
    np.testing.assert_allclose(
        decode(generator.session, tokens),
        prefill(generator.session, tokens, LONG),
        rtol=0,
        atol=LOGITS_TOLERANCE,
    )


def test_logits_are_those_of_pytorch(generator: Generator, torch_side: Checkpoint, tokens: np.ndarray) -> None:
    with torch.inference_mode():
        theirs = torch_side.model(torch.from_numpy(tokens)[None], use_cache=False).logits[0].numpy()

    for ours in (prefill(generator.session, tokens, 256), decode(generator.session, tokens)):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=LOGITS_TOLERANCE)


def test_static_int8_does_not_depend_on_the_chunks_either(packages: Path, tokens: np.ndarray) -> None:
    """With fixed ranges a token is rounded alike in any company; what remains is float's order of sums, which can tip
    a value over to the next level of int8."""
    session = PackageSession.load(packages / "int8-static")
    expected = prefill(session, tokens, LONG)

    for chunk in (1, 64):
        difference = np.abs(prefill(session, tokens, chunk) - expected)
        assert np.median(difference) < 1e-5
        assert difference.max() < 0.5


# The cache


def shared_cache(session: PackageSession, batch: int, capacity: int) -> tuple[Cache, SharedStorage]:
    """A new cache and its memory, which for these packages is past and present in one."""
    cache = session.new_cache(batch, capacity)
    assert isinstance(cache.storage, SharedStorage)
    return cache, cache.storage


@pytest.mark.parametrize("precision", PRECISIONS)
def test_cache_is_updated_in_place(packages: Path, precision: str) -> None:
    session = PackageSession.load(packages / precision)
    cache, storage = shared_cache(session, 1, 40)
    arrays, addresses = list(storage.arrays), [array.ctypes.data for array in storage.arrays]

    list(session.prefill(cache, np.arange(1, 21), 8))
    filled = [array.copy() for array in storage.arrays]
    Step(session, cache, 1).run(np.array([[5]]))

    assert cache.lengths.tolist() == [21]
    assert all(now is before for now, before in zip(storage.arrays, arrays, strict=True))
    assert [array.ctypes.data for array in storage.arrays] == addresses
    for before, after in zip(filled, storage.arrays, strict=True):
        assert np.abs(before[:, :, :20]).sum(axis=(1, 3)).all()  # every token has left something
        np.testing.assert_array_equal(after[:, :, :20], before[:, :, :20])
        assert np.abs(after[:, :, 20]).sum() > 0
        assert not after[:, :, 21:].any()


def test_row_of_a_cache_is_the_same_memory(generator: Generator) -> None:
    cache, storage = shared_cache(generator.session, 3, 12)

    list(generator.session.prefill(cache.row(1), np.arange(1, 6)))

    assert cache.lengths.tolist() == [0, 5, 0]
    for array in storage.arrays:
        assert array[1, :, :5].any()
        assert not array[[0, 2]].any()


def test_prefill_takes_one_row(generator: Generator) -> None:
    with pytest.raises(ValueError, match="one row at a time"):
        next(generator.session.prefill(generator.session.new_cache(2, 8), np.arange(1, 4)))


def test_step_beyond_the_cache_is_refused_and_changes_nothing(generator: Generator) -> None:
    cache, storage = shared_cache(generator.session, 1, 4)
    list(generator.session.prefill(cache, np.arange(1, 5)))
    before = [array.copy() for array in storage.arrays]

    with pytest.raises(GenerationError) as caught:
        Step(generator.session, cache, 1).run(np.array([[1]]))

    assert str(caught.value) == "the cache holds 4 tokens; 5 are needed"
    assert cache.lengths.tolist() == [4]
    for array, old in zip(storage.arrays, before, strict=True):
        np.testing.assert_array_equal(array, old)


def test_cache_beyond_the_encodings_reach_is_refused(generator: Generator) -> None:
    reach = generator.session.reach

    with pytest.raises(GenerationError) as caught:
        generator.session.new_cache(1, reach + 1)

    assert reach == 2**24
    assert str(caught.value) == f"{reach + 1} tokens exceed the {reach} positions of this model's encoding"


# Generation


@pytest.mark.parametrize("penalty", [1.0, 1.05])
@pytest.mark.parametrize("prompt", PROMPTS[::2], ids=["short", "long"])
def test_greedy_tokens_are_those_of_transformers(
    packages: Path, torch_side: Checkpoint, prompt: str, penalty: float
) -> None:
    generator = Generator.load(packages / "float32")
    generator.end_of_text = None  # as far as 300 tokens, whatever they are
    ids = torch.from_numpy(generator.encode(prompt))[None]
    theirs = torch_side.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=300,
        do_sample=False,
        eos_token_id=None,
        repetition_penalty=penalty,
    )[0, ids.shape[1] :].tolist()

    (ours,) = generator.generate([prompt], max_new_tokens=300, sampling=Sampling(repetition_penalty=penalty))

    assert len(theirs) == 300
    assert len(set(theirs)) > 5
    assert ours.tokens == theirs
    assert ours.text == torch_side.tokenizer.decode(theirs, skip_special_tokens=True)


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temperature=1.0, top_k=20, seed=4)], ids=["greedy", "sampled"]
)
def test_batch_equals_one_by_one(generator: Generator, sampling: Sampling) -> None:
    together = generator.generate(PROMPTS, max_new_tokens=60, sampling=sampling)

    for index, (prompt, completion) in enumerate(zip(PROMPTS, together, strict=True)):
        seed = None if sampling.seed is None else sampling.seed + index
        (alone,) = generator.generate([prompt], max_new_tokens=60, sampling=dataclasses.replace(sampling, seed=seed))
        assert completion.tokens == alone.tokens
        assert completion.text == alone.text
        assert completion.prompt_tokens == len(generator.encode(prompt))
    assert len({completion.prompt_tokens for completion in together}) == len(PROMPTS)


def test_rows_of_a_batch_end_by_themselves(generator: Generator) -> None:
    """A row that has met its stop string waits for the others and is not touched again."""
    stop, sampling = " and", Sampling(temperature=0.7, seed=1)
    whole = [found.text for found in generator.generate(PROMPTS, max_new_tokens=60, sampling=sampling)]
    assert len({text.find(stop) for text in whole}) > 1  # they end at different times

    stopped = generator.generate(PROMPTS, max_new_tokens=60, sampling=sampling, stop=[stop])

    for text, completion in zip(whole, stopped, strict=True):
        assert completion.text == text.partition(stop)[0]
        assert completion.finish_reason == ("stop" if stop in text else "length")


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.5, seed=1)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_pieces_of_a_stream_join_to_the_generated_text(
    any_generator: Generator, prompt: str, sampling: Sampling
) -> None:
    (expected,) = any_generator.generate([prompt], max_new_tokens=50, sampling=sampling)

    pieces = list(stream := any_generator.stream(prompt, max_new_tokens=50, sampling=sampling))

    completion = stream.completion
    assert len(pieces) > 10
    assert all(pieces)
    assert "".join(pieces) == expected.text == completion.text
    assert completion.tokens == expected.tokens
    assert expected.text == any_generator.tokenizer.decode(expected.tokens)
    assert (completion.finish_reason, completion.prompt_tokens) == (expected.finish_reason, expected.prompt_tokens)
    assert completion.prefill_seconds > 0
    assert completion.decode_seconds > 0


def test_text_and_its_ids_are_the_same_prompt(generator: Generator) -> None:
    ids = [int(token) for token in generator.encode(PROMPTS[0])]

    by_text, by_ids = generator.generate([PROMPTS[0], ids], max_new_tokens=20)

    assert ids[0] == 0  # text is opened by the separator
    assert by_text.tokens == by_ids.tokens


def test_seed_makes_generation_repeatable(generator: Generator) -> None:
    first, again, other = (
        generator.generate(["the"], max_new_tokens=40, sampling=Sampling(temperature=1.0, seed=seed))[0].tokens
        for seed in (3, 3, 4)
    )

    assert first == again != other


def test_no_prompts_no_completions(generator: Generator) -> None:
    assert generator.generate([]) == []


def test_prompt_longer_than_a_chunk(packages: Path, generator: Generator, tokens: np.ndarray) -> None:
    in_small_chunks = Generator(PackageSession.load(packages / "float32"), prefill_chunk=11)

    (found,) = in_small_chunks.generate([tokens.tolist()], max_new_tokens=20)

    (expected,) = generator.generate([tokens.tolist()], max_new_tokens=20)
    assert found.tokens == expected.tokens


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_do_not_change_the_tokens(packages: Path, generator: Generator, threads: int) -> None:
    (found,) = Generator.load(packages / "float32", threads=threads).generate(["the"], max_new_tokens=30)

    assert found.tokens == generator.generate(["the"], max_new_tokens=30)[0].tokens


# Why it ends


def test_ends_at_the_length_asked_for(any_generator: Generator) -> None:
    (completion,) = any_generator.generate(["the tree"], max_new_tokens=7)

    assert completion.finish_reason == "length"
    assert len(completion.tokens) == 7


def test_ends_before_a_stop_string(any_generator: Generator) -> None:
    (whole,) = any_generator.generate(["the tree"], max_new_tokens=40)
    stop = whole.text[9:14]

    (completion,) = any_generator.generate(["the tree"], max_new_tokens=40, stop=["never seen", stop])
    pieces = list(any_generator.stream("the tree", max_new_tokens=40, stop=["never seen", stop]))

    assert completion.finish_reason == "stop"
    assert completion.text == "".join(pieces) == whole.text.partition(stop)[0]
    assert len(completion.tokens) < 40


def test_one_stop_string_is_not_taken_for_its_letters(any_generator: Generator) -> None:
    whole = any_generator.generate(["the"], max_new_tokens=24)[0].text
    stop = whole[4:9]

    for completion in (
        any_generator.generate(["the"], max_new_tokens=24, stop=stop)[0],
        any_generator.generate(["the"], max_new_tokens=24, stop=[stop])[0],
    ):
        assert completion.text == whole.partition(stop)[0]
    assert "".join(any_generator.stream("the", max_new_tokens=24, stop=stop)) == whole.partition(stop)[0]


def test_the_name_of_a_control_token_is_text(generator: Generator) -> None:
    ids = generator.encode("a<|endoftext|>b")

    assert list(ids).count(0) == 1  # the one that opens every text
    assert generator.tokenizer.decode(list(ids)) == "a<|endoftext|>b"


def test_text_that_might_have_begun_a_stop_string_comes_at_the_end(any_generator: Generator) -> None:
    (whole,) = any_generator.generate(["the tree"], max_new_tokens=40)
    stop = whole.text[-3:] + "!"

    (completion,) = any_generator.generate(["the tree"], max_new_tokens=40, stop=[stop])
    *_, last = any_generator.stream("the tree", max_new_tokens=40, stop=[stop])

    assert completion == dataclasses.replace(
        whole, prefill_seconds=completion.prefill_seconds, decode_seconds=completion.decode_seconds
    )
    assert last == whole.text[-3:]


def test_ends_at_end_of_text(packages: Path, tmp_path: Path) -> None:
    """A package whose closing token is one that this model is known to choose."""
    (whole,) = Generator.load(packages / "float32").generate(["the tree"], max_new_tokens=40)
    closing = whole.tokens[10]
    package = tmp_path / "package"
    shutil.copytree(packages / "float32", package)
    edit_manifest(package, model={**read_manifest(package)["model"], "eos_token_id": closing})

    generator = Generator.load(package)
    for _ in (stream := generator.stream("the tree", max_new_tokens=40)):
        pass

    for found in (stream.completion, *generator.generate(["the tree"], max_new_tokens=40)):
        assert found.finish_reason == "end_of_text"
        assert found.tokens == whole.tokens[: whole.tokens.index(closing) + 1]


# Refusals


def refusal(call: Any, *arguments: Any, kind: type[ExPEEdgeError] = GenerationError, **named: Any) -> str:
    """Return the message of the error that the call raises, a stream's before it is read."""
    with pytest.raises(kind) as caught:
        call(*arguments, **named)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_empty_prompt(generator: Generator) -> None:
    message = "the prompt is empty"

    assert refusal(generator.stream, "") == message
    assert refusal(generator.stream, []) == message
    assert refusal(generator.generate, ["the", ""]) == message


def test_prompt_that_is_no_text(generator: Generator) -> None:
    message = "the prompt holds half a surrogate pair, which is no text"

    assert refusal(generator.stream, "a\ud800") == message
    assert refusal(generator.generate, ["the", "\udfff"]) == message


@pytest.mark.parametrize("token", [300, 10_000, -1, 2**64])
def test_token_outside_the_vocabulary(generator: Generator, token: int) -> None:
    message = f"token id {token} is outside the vocabulary of 300"

    assert refusal(generator.stream, [1, token, 2]) == message
    assert refusal(generator.generate, [[1, 2], [token]]) == message


@pytest.mark.parametrize("new_tokens", [0, -3])
def test_no_new_tokens(generator: Generator, new_tokens: int) -> None:
    message = f"`max_new_tokens` is {new_tokens}; at least 1"

    assert refusal(generator.stream, "the", max_new_tokens=new_tokens) == message
    assert refusal(generator.generate, ["the"], max_new_tokens=new_tokens) == message


@pytest.mark.parametrize("cache_length", [24, 4, 0, -1])
def test_prompt_longer_than_the_cache(generator: Generator, cache_length: int) -> None:
    message = (
        "the prompt's 5 tokens and 20 new ones need a cache of 25, but "
        f"`cache_length` is {cache_length}; raise it, or shorten the prompt"
    )
    prompt = [0, 1, 2, 3, 4]

    assert refusal(generator.stream, prompt, max_new_tokens=20, cache_length=cache_length) == message
    assert refusal(generator.generate, [prompt, [1]], max_new_tokens=20, cache_length=cache_length) == message


@pytest.mark.parametrize("cache_length", [25, 26, 1000])
def test_cache_that_is_just_long_enough(generator: Generator, cache_length: int) -> None:
    prompt = [0, 1, 2, 3, 4]

    (found,) = generator.generate([prompt], max_new_tokens=20, cache_length=cache_length)

    assert found.tokens == generator.generate([prompt], max_new_tokens=20)[0].tokens


def test_prompt_beyond_the_encodings_reach(generator: Generator) -> None:
    assert refusal(generator.stream, "the", cache_length=2**24 + 1) == (
        "16777217 tokens exceed the 16777216 positions of this model's encoding"
    )


def resealed(package: Path, tokenizer: Tokenizer) -> Path:
    """Give a package another tokenizer, with the hash that belongs to it."""
    manifest = read_package(package).manifest
    tokenizer.save(str(package / "tokenizer.json"))
    (package / MANIFEST_FILE).unlink()
    seal_package(package, manifest)
    return package


def test_tokenizer_of_another_vocabulary(packages: Path, tmp_path: Path) -> None:
    tokenizer = train_tokenizer([Document("a", "some text " * 20)], 257)
    package = resealed(Path(shutil.copytree(packages / "float32", tmp_path / "package")), tokenizer)

    with pytest.raises(PackageError) as caught:
        Generator.load(package)

    assert str(caught.value) == (
        f"{package}/tokenizer.json has 257 tokens, the model's vocabulary 300; they do not belong together, "
        "export again"
    )


def test_device_that_is_not_there(packages: Path) -> None:
    with pytest.raises(GenerationError) as caught:
        Generator.load(packages / "float32", device="cuda")

    assert str(caught.value) == (
        "`device` cuda: this onnxruntime has no CUDAExecutionProvider; install onnxruntime-gpu on a machine "
        "with a GPU, or use `device` cpu"
    )


def test_device_of_no_kind(packages: Path) -> None:
    with pytest.raises(GenerationError) as caught:
        Generator.load(packages / "float32", device="abacus")

    assert str(caught.value) == "unknown device 'abacus'; available: cpu, cuda; change `device`"


@pytest.mark.parametrize("threads", [0, -2])
def test_no_threads(packages: Path, threads: int) -> None:
    with pytest.raises(GenerationError) as caught:
        Generator.load(packages / "float32", threads=threads)

    assert str(caught.value) == f"`threads` is {threads}; at least 1"
