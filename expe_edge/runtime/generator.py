"""Text generation from a package: prompts to completions, or to a stream of text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from expe_edge.errors import GenerationError, PackageError, reason_of
from expe_edge.package.reference import reference_package
from expe_edge.package.tokenizer import open_tokenizer
from expe_edge.runtime.decoding import Completion, Row, Stream, decode
from expe_edge.runtime.sampling import Sampler, Sampling
from expe_edge.runtime.session import PREFILL_CHUNK, Ids, PackageSession
from expe_edge.runtime.streaming import TextStream

#: A prompt is text, or token ids taken as they are.
Prompt = str | Sequence[int]


class Generator:
    """Generates text from an opened package."""

    def __init__(self, session: PackageSession, *, prefill_chunk: int = PREFILL_CHUNK) -> None:
        self.session, self.prefill_chunk = session, prefill_chunk
        self.tokenizer = _load_tokenizer(session)
        self.end_of_text = session.package.manifest.model.get("eos_token_id")

    @classmethod
    def load(cls, path: str | Path | None = None, *, threads: int | None = None, device: str = "cpu") -> Generator:
        """Open the package at `path`, by default `reference_package()`; the rest as for `PackageSession.load`."""
        chosen = reference_package() if path is None else path
        return cls(PackageSession.load(chosen, threads=threads, device=device))

    def encode(self, prompt: Prompt) -> Ids:
        """Return the ids of a prompt, (T,) int64. Text is opened by the end-of-text token, as documents were.

        A prompt of ids may hold control tokens; one of text that spells them is text.

        Raises:
            GenerationError: an empty prompt, text that is none, or ids outside the vocabulary.
        """
        if isinstance(prompt, str) and any("\ud800" <= character <= "\udfff" for character in prompt):
            raise GenerationError("the prompt holds half a surrogate pair, which is no text")
        ids = self.tokenizer.encode(prompt).ids if isinstance(prompt, str) else prompt
        if len(prompt) == 0 or len(ids) == 0:
            raise GenerationError("the prompt is empty")
        vocab_size = self.session.contract.vocab_size
        outside = [token for token in ids if not 0 <= token < vocab_size]
        if outside:
            raise GenerationError(f"token id {outside[0]} is outside the vocabulary of {vocab_size}")
        return np.array(ids, dtype=np.int64)

    def stream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 256,
        sampling: Sampling | None = None,
        stop: str | Sequence[str] = (),
        cache_length: int | None = None,
    ) -> Stream:
        """Return the text that follows `prompt`, to be read piece by piece, and its completion.

        Args:
            stop: a string that ends the text, or several; themselves left out.
            cache_length: tokens to reserve a cache for; None for as many as prompt and new tokens need.

        Raises:
            GenerationError: a prompt that `encode` refuses, or a cache that cannot hold it and what is to follow.
        """
        rows, steps = self._start([prompt], max_new_tokens, sampling or Sampling(), stop, cache_length)
        return Stream(steps, rows[0].completion)

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int = 256,
        sampling: Sampling | None = None,
        stop: str | Sequence[str] = (),
        cache_length: int | None = None,
    ) -> list[Completion]:
        """Complete all `prompts`: each is prefilled by itself, then all decode together, one step for the batch.

        With int8-dynamic the activations' range is shared by the batch, so that a completion can differ from the
        one the same prompt gets alone. Arguments and errors as for `stream`; row i samples with seed + i.
        """
        if isinstance(prompts, str):
            prompts = [prompts]
        if not prompts:
            return []
        rows, steps = self._start(prompts, max_new_tokens, sampling or Sampling(), stop, cache_length)
        for _ in steps:
            pass
        return [row.completion for row in rows]

    def _start(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        sampling: Sampling,
        stop: str | Sequence[str],
        cache_length: int | None,
    ) -> tuple[list[Row], Iterator[list[str]]]:
        """Return a row for each prompt and the steps that complete them, of which none has run."""
        all_ids = [self.encode(prompt) for prompt in prompts]
        capacity = max(_capacity(ids, max_new_tokens, cache_length) for ids in all_ids)
        cache = self.session.new_cache(len(all_ids), capacity)
        rows = [
            Row(
                ids,
                Sampler(_seeded(sampling, index), ids, self.session.contract.vocab_size),
                TextStream(self.tokenizer, stop),
                max_new_tokens=max_new_tokens,
                end_of_text=self.end_of_text,
            )
            for index, ids in enumerate(all_ids)
        ]
        return rows, decode(self.session, rows, cache, self.prefill_chunk)


def _seeded(sampling: Sampling, index: int) -> Sampling:
    if sampling.seed is None:
        return sampling
    return Sampling(**{**vars(sampling), "seed": sampling.seed + index})


def _capacity(ids: Ids, max_new_tokens: int, cache_length: int | None) -> int:
    if max_new_tokens < 1:
        raise GenerationError(f"`max_new_tokens` is {max_new_tokens}; at least 1")
    needed = len(ids) + max_new_tokens
    if cache_length is not None and needed > cache_length:
        raise GenerationError(
            f"the prompt's {len(ids)} tokens and {max_new_tokens} new ones need a cache of {needed}, but "
            f"`cache_length` is {cache_length}; raise it, or shorten the prompt"
        )
    return cache_length or needed


def _load_tokenizer(session: PackageSession) -> Tokenizer:
    path = session.package.tokenizer_path
    try:
        tokenizer: Tokenizer = open_tokenizer(path, Tokenizer.from_file)
    except Exception as error:  # tokenizers raises nothing narrower
        raise PackageError(f"{path}: not a tokenizer ({reason_of(error)})") from error
    if tokenizer.get_vocab_size() != session.contract.vocab_size:
        raise PackageError(
            f"{path} has {tokenizer.get_vocab_size()} tokens, the model's vocabulary {session.contract.vocab_size}; "
            "they do not belong together, export again"
        )
    return tokenizer
