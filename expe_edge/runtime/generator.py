"""Text generation from a package: prefill, decode, sample, stream."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from expe_edge.errors import GenerationError, PackageError
from expe_edge.package.tokenizer import open_tokenizer
from expe_edge.runtime.cache import Cache
from expe_edge.runtime.sampling import Sampler, Sampling
from expe_edge.runtime.session import PREFILL_CHUNK, PackageSession, Step
from expe_edge.runtime.streaming import TextStream

#: A prompt is text, or token ids taken as they are.
Prompt = str | Sequence[int]
Ids = npt.NDArray[np.int64]


@dataclass
class Completion:
    """What was generated for one prompt.

    Attributes:
        text: the new text, without the prompt. tokens: the new ids, the closing end-of-text included.
        finish_reason: `length`, `end_of_text` or `stop`.
    """

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    prompt_tokens: int = 0
    finish_reason: str = "length"
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0


class Generator:
    """Generates text from an opened package."""

    def __init__(self, session: PackageSession, *, prefill_chunk: int = PREFILL_CHUNK) -> None:
        self.session, self.prefill_chunk = session, prefill_chunk
        self.tokenizer = _load_tokenizer(session)
        self.end_of_text = session.package.manifest.model.get("eos_token_id")

    @classmethod
    def load(cls, path: str | Path, *, threads: int | None = None, device: str = "cpu") -> Generator:
        """Open the package at `path`; arguments and errors as for `PackageSession.load`."""
        return cls(PackageSession.load(path, threads=threads, device=device))

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
        completion: Completion | None = None,
    ) -> Iterator[str]:
        """Yield the text that follows `prompt`, piece by piece, never part of a character.

        Args:
            stop: a string that ends the text, or several; themselves left out.
            cache_length: tokens to reserve a cache for; None for as many as prompt and new tokens need.
            completion: filled in on the way where given.
        """
        result = completion if completion is not None else Completion()
        ids = self.encode(prompt)
        cache = self.session.new_cache(1, _capacity(ids, max_new_tokens, cache_length))
        row = Row(self, ids, sampling or Sampling(), stop, result)
        yield row.accept(self.prefill(cache, row))
        step, began = Step(self.session, cache, 1), time.perf_counter()
        while not row.finished(max_new_tokens):
            logits = step.run(np.array([[result.tokens[-1]]], dtype=np.int64))
            piece = row.accept(logits[0, -1])
            result.decode_seconds = time.perf_counter() - began
            if piece:
                yield piece
        yield row.close()

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
        one the same prompt gets alone. Arguments as for `stream`; row i samples with seed + i.
        """
        if isinstance(prompts, str):
            prompts = [prompts]
        if not prompts:
            return []
        all_ids = [self.encode(prompt) for prompt in prompts]
        cache = self.session.new_cache(
            len(prompts), max(_capacity(ids, max_new_tokens, cache_length) for ids in all_ids)
        )
        rows = [
            Row(self, ids, _seeded(sampling or Sampling(), index), stop, Completion())
            for index, ids in enumerate(all_ids)
        ]
        for index, row in enumerate(rows):
            row.accept(self.prefill(cache.row(index), row))
        step, began = Step(self.session, cache, 1), time.perf_counter()
        while not all(row.finished(max_new_tokens) for row in rows):
            logits = step.run(np.array([[row.result.tokens[-1]] for row in rows], dtype=np.int64))
            for index, row in enumerate(rows):
                if not row.finished(max_new_tokens):
                    row.accept(logits[index, -1])
                    row.result.decode_seconds = time.perf_counter() - began
        for row in rows:
            row.close()
        return [row.result for row in rows]

    def prefill(self, cache: Cache, row: Row) -> npt.NDArray[np.float32]:
        """Fill a cache of one row with the row's prompt; return the last token's logits (V,)."""
        began = time.perf_counter()
        for logits in self.session.prefill(cache, row.ids, self.prefill_chunk):
            last: npt.NDArray[np.float32] = logits[-1]  # one chunk's logits at a time: all of them could fill memory
        row.result.prefill_seconds = time.perf_counter() - began
        return last


class Row:
    """One sequence being generated: its sampler, its text, its completion."""

    def __init__(
        self, generator: Generator, ids: Ids, sampling: Sampling, stop: str | Sequence[str], result: Completion
    ) -> None:
        self.ids, self.result, self.end_of_text = ids, result, generator.end_of_text
        self.sampler = Sampler(sampling, ids, generator.session.contract.vocab_size)
        self.text = TextStream(generator.tokenizer, stop)
        result.prompt_tokens = len(ids)

    def accept(self, logits: npt.NDArray[np.float32]) -> str:
        """Choose the next token from `logits` (V,); return the text that is now certain."""
        token = self.sampler.choose(logits)
        self.result.tokens.append(token)
        piece = self.text.push(token)
        self.result.text += piece
        return piece

    def finished(self, max_new_tokens: int) -> bool:
        """Tell whether the sequence is complete, and note why."""
        if self.text.stopped:
            self.result.finish_reason = "stop"
        elif self.result.tokens[-1] == self.end_of_text:
            self.result.finish_reason = "end_of_text"
        else:
            return len(self.result.tokens) >= max_new_tokens
        return True

    def close(self) -> str:
        """Return the text held back to the end."""
        piece = self.text.finish()
        self.result.text += piece
        return piece


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
        raise PackageError(f"{path}: not a tokenizer ({error})") from error
    if tokenizer.get_vocab_size() != session.contract.vocab_size:
        raise PackageError(
            f"{path} has {tokenizer.get_vocab_size()} tokens, the model's vocabulary {session.contract.vocab_size}; "
            "they do not belong together, export again"
        )
    return tokenizer
