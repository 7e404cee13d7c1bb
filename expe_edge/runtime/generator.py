"""Text generation from a package: prompts to completions, or to a stream of text."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from expe_edge.errors import GenerationError, PackageError, reason_of
from expe_edge.package.reference import reference_package
from expe_edge.package.tokenizer import open_tokenizer
from expe_edge.runtime.batch import Batch, run_row
from expe_edge.runtime.context import Context
from expe_edge.runtime.decoding import Completion, Row, Stream
from expe_edge.runtime.history import Ids, Window
from expe_edge.runtime.lookup import PromptLookup
from expe_edge.runtime.prompts import Prompt, encode_prompt
from expe_edge.runtime.sampling import Sampler, Sampling
from expe_edge.runtime.session import PackageSession
from expe_edge.runtime.streaming import TextStream

#: Prompts that `generate` completes at once, where it is not told how many.
BATCH_SIZE = 16


class Generator:
    """Generates text from an opened package."""

    def __init__(self, session: PackageSession, *, prefill_chunk: int | None = None) -> None:
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
        return encode_prompt(self.tokenizer, prompt)

    def context(self, prompt: Prompt | None = None, *, window: Window | None = None) -> Context:
        """Return a context that has read `prompt`, or nothing yet, for streams to go on from.

        Args:
            window: what is kept of text of any length; None for all of it.

        Raises:
            GenerationError: a prompt that `encode` refuses, or a window for keys that carry positions.
        """
        context = Context(self.session, self.tokenizer, window=window, prefill_chunk=self.prefill_chunk)
        if prompt is not None:
            context.append(prompt)
        return context

    def stream(
        self,
        prompt: Prompt | None,
        *,
        max_new_tokens: int = 256,
        sampling: Sampling | None = None,
        stop: str | Sequence[str] = (),
        cache_length: int | None = None,
        context: Context | None = None,
        window: Window | None = None,
        prompt_lookup: bool = False,
    ) -> Stream:
        """Return the text that follows `prompt`, to be read piece by piece, and its completion.

        Args:
            prompt: all of the text, whatever a context has read of it; None to go on behind what it has read.
            stop: a string that ends the text, or several; themselves left out.
            cache_length: tokens that the cache may hold; None for as many as prompt and new tokens need.
            context: what was read before. What it shares with the beginning of the prompt is not read again; what
                differs is taken back. Then it holds all but the last token of prompt and completion.
            window: what is kept of text of any length; None for all of it, or as the context has it, whose it must be.
            prompt_lookup: whether to verify several tokens at once where text repeats itself. The tokens are the same;
                with int8-dynamic, whose runs share one range of activations, nearly.

        Raises:
            GenerationError: a prompt that `encode` refuses, a cache that cannot hold it and what is to follow, a window
                for keys that carry positions, or a context in use.
        """
        if context is None:
            if prompt is None:
                raise GenerationError("there is nothing to go on from; give a `prompt` or a `context`")
            ids = self.encode(prompt)
            capacity = _capacity(ids, max_new_tokens, cache_length, window)
            cache = self.session.new_cache(1, capacity, window)
        else:
            self._require_own(context, window)
            ids, cache = self._going_on(prompt, context), context.cache
            capacity = _capacity(ids, max_new_tokens, cache_length, cache.window)
            self.session.require_within_reach(capacity)
        self.session.require_memory(capacity, chunk=self.prefill_chunk, held=cache.nbytes)
        row = self.row(ids, max_new_tokens=max_new_tokens, sampling=sampling, stop=stop, prompt_lookup=prompt_lookup)
        if context is not None:
            row.prefix, row.goes_on = cache, prompt is None
            row.completion.prompt_tokens = len(context) if prompt is None else len(ids)
        return Stream(run_row(Batch(self.session, cache, self.prefill_chunk), row, context), row.completion)

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int = 256,
        sampling: Sampling | None = None,
        stop: str | Sequence[str] = (),
        cache_length: int | None = None,
        context: Context | None = None,
        window: Window | None = None,
        prompt_lookup: bool = False,
        batch_size: int = BATCH_SIZE,
    ) -> list[Completion]:
        """Complete all `prompts`: each is read by itself, then they decode together, one step for all.

        With int8-dynamic the activations' range is shared by the batch, so that a completion can differ from the
        one the same prompt gets alone. Arguments and errors as for `stream`; row i samples with seed + i.

        Args:
            context: whose beginning prompts may share; it stays as it is. prompt_lookup: used by the last one left.
            batch_size: the most that run at once; the next joins where one has ended.
        """
        if isinstance(prompts, str):
            prompts = [prompts]
        if not prompts:
            return []
        if batch_size < 1:
            raise GenerationError(f"`batch_size` is {batch_size}; at least 1")
        if context is not None:
            self._require_own(context, window)
            window = context.cache.window
        all_ids = [self.encode(prompt) for prompt in prompts]
        capacity = max(_capacity(ids, max_new_tokens, cache_length, window) for ids in all_ids)
        places = min(batch_size, len(all_ids))
        cache = self.session.new_cache(places, capacity, window)
        self.session.require_memory(capacity, rows=places, chunk=self.prefill_chunk, held=cache.nbytes)
        batch = Batch(self.session, cache, self.prefill_chunk)
        rows = [
            self.row(
                ids,
                max_new_tokens=max_new_tokens,
                sampling=_seeded(sampling or Sampling(), index),
                stop=stop,
                prompt_lookup=prompt_lookup,
            )
            for index, ids in enumerate(all_ids)
        ]
        for row in rows:
            row.prefix = None if context is None else context.cache
            batch.add(row)
        with nullcontext() if context is None else context.used():
            while not batch.idle:
                batch.step()
        return [row.completion for row in rows]

    def row(
        self,
        ids: Sequence[int] | Ids,
        *,
        max_new_tokens: int = 256,
        sampling: Sampling | None = None,
        stop: str | Sequence[str] = (),
        prompt_lookup: bool = False,
    ) -> Row:
        """Return a row that completes `ids` (T,) once a `Batch` runs it. Arguments as for `stream`."""
        ids = np.asarray(ids, dtype=np.int64)
        return Row(
            ids,
            Sampler(sampling or Sampling(), ids, self.session.contract.vocab_size),
            TextStream(self.tokenizer, stop),
            max_new_tokens=max_new_tokens,
            end_of_text=self.end_of_text,
            lookup=PromptLookup(ids) if prompt_lookup else None,
        )

    def _require_own(self, context: Context, window: Window | None) -> None:
        """Raise `GenerationError` for a context that another package has read, or that another window has cut."""
        if context.session is not self.session:
            raise GenerationError("the context is another generator's; make one with `context` of this one")
        if window not in (None, context.cache.window):
            raise GenerationError("`window` is not the context's; leave it out, or give it where the context is made")

    def _going_on(self, prompt: Prompt | None, context: Context) -> Ids:
        """Return all tokens of the text that a context's stream begins with."""
        if prompt is not None:
            return self.encode(prompt)
        with context.used():
            ids = context.tokens
        if not len(ids):
            raise GenerationError("the context has read nothing; give a `prompt`")
        return ids


def _seeded(sampling: Sampling, index: int) -> Sampling:
    if sampling.seed is None:
        return sampling
    return Sampling(**{**vars(sampling), "seed": sampling.seed + index})


def _capacity(ids: Ids, max_new_tokens: int, cache_length: int | None, window: Window | None) -> int:
    """Return how many tokens a prompt needs a cache for."""
    if max_new_tokens < 1:
        raise GenerationError(f"`max_new_tokens` is {max_new_tokens}; at least 1")
    if window is not None:
        return window.capacity
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
