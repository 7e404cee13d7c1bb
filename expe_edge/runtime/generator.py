"""Text generation from a package: prompts to completions, or to a stream of text."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from expe_edge.errors import GenerationError, PackageError, reason_of
from expe_edge.package.reference import reference_package
from expe_edge.package.tokenizer import open_tokenizer
from expe_edge.runtime.batch import Batch, run_row
from expe_edge.runtime.cache import Cache
from expe_edge.runtime.constraint import Constraint, Vocabulary
from expe_edge.runtime.context import Context
from expe_edge.runtime.decoding import Completion, Row, Stream
from expe_edge.runtime.graph_cache import cache_at
from expe_edge.runtime.history import Ids
from expe_edge.runtime.prompts import Prompt, encode_prompt
from expe_edge.runtime.request import Callback, Progress, Request
from expe_edge.runtime.sampling import Sampler, Sampling
from expe_edge.runtime.session import PackageSession
from expe_edge.runtime.streaming import TextStream
from expe_edge.runtime.window import Window

if TYPE_CHECKING:
    from tokenizers import Tokenizer

#: Prompts that `generate` completes at once, where it is not told how many.
BATCH_SIZE = 16


class Generator:
    """Generates text from an opened package."""

    def __init__(self, session: PackageSession, *, prefill_chunk: int | None = None) -> None:
        self.session, self.prefill_chunk = session, prefill_chunk
        self.tokenizer = _load_tokenizer(session)
        self.end_of_text = session.package.manifest.model.get("eos_token_id")

    @classmethod
    def load(
        cls,
        path: str | Path | None = None,
        *,
        threads: int | None = None,
        device: str = "cpu",
        graph_cache: str | Path | None = None,
        kernels: str | Path | None = None,
    ) -> Generator:
        """Open the package at `path`, by default `reference_package()`; the rest as for `PackageSession.load`.

        graph_cache: the directory in which optimised graphs are kept for the next time, or `off`; None for what
            `EXPE_EDGE_GRAPH_CACHE` says, or else one among the user's caches.
        """
        chosen = reference_package() if path is None else path
        cache = cache_at(graph_cache)
        return cls(PackageSession.load(chosen, threads=threads, device=device, cache=cache, kernels=kernels))

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
        min_new_tokens: int = 0,
        sampling: Sampling | None = None,
        stop: str | Sequence[str] = (),
        stop_tokens: Sequence[int] = (),
        constraint: Constraint | None = None,
        logprobs: int | None = None,
        cache_length: int | None = None,
        context: Context | None = None,
        window: Window | None = None,
        prompt_lookup: bool = False,
        callback: Callback | None = None,
        on_prefill: Progress | None = None,
    ) -> Stream:
        """Return the text that follows `prompt`, to be read piece by piece, and its completion.

        Args:
            prompt: all of the text, whatever a context has read of it; None to go on behind what it has read.
            min_new_tokens: tokens before which neither end-of-text nor one of `stop_tokens` is chosen.
            stop: a string that ends the text, or several; themselves left out.
            stop_tokens: ids that end the text; their own text is left out.
            constraint: what the text must be.
            logprobs: how many of the likeliest tokens to give log probabilities of, beside the chosen one's; None for
                none at all.
            cache_length: tokens that the cache may hold; None for as many as prompt and new tokens need.
            context: what was read before. What it shares with the beginning of the prompt is not read again; what
                differs is taken back. Then it holds all but the last token of prompt and completion.
            window: what is kept of text of any length; None for all of it, or as the context has it, whose it must be.
            prompt_lookup: whether to verify several tokens at once where text repeats itself. The tokens are the same;
                with int8-dynamic, whose runs share one range of activations, nearly.
            callback: called after every token with the row's index, here 0, and the completion so far; what is true
                ends the text.
            on_prefill: called after every chunk of the prompt with the tokens that have been read, and all there are.

        Raises:
            GenerationError: a prompt that `encode` refuses, a cache that cannot hold it and what is to follow, a window
                for keys that carry positions, a context in use, an argument out of range or at odds with another, a
                constraint that nothing can meet.
        """
        request = Request(
            sampling=sampling or Sampling(),
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
            stop=stop,
            stop_tokens=stop_tokens,
            constraint=constraint,
            logprobs=logprobs,
            cache_length=cache_length,
            prompt_lookup=prompt_lookup,
            callback=callback,
            on_prefill=on_prefill,
        )
        if context is None:
            if prompt is None:
                raise GenerationError("there is nothing to go on from; give a `prompt` or a `context`")
            row = self.row(self.encode(prompt), request)
            capacity = request.capacity(len(row.ids), window)
            cache = self.session.new_cache(1, capacity, window)
        else:
            self._require_own(context, window)
            row, cache = self.row(self._going_on(prompt, context), request), context.cache
            row.prefix, row.goes_on = cache, prompt is None
            row.completion.prompt_tokens = len(context) if prompt is None else len(row.ids)
            capacity = request.capacity(len(row.ids), cache.window)
            self.session.require_within_reach(capacity)
        self.session.require_memory(capacity, chunk=self.prefill_chunk, held=cache.nbytes)
        return Stream(run_row(Batch(self.session, cache, self.prefill_chunk), row, context), row.completion)

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        n: int = 1,
        max_new_tokens: int = 256,
        min_new_tokens: int = 0,
        sampling: Sampling | None = None,
        stop: str | Sequence[str] = (),
        stop_tokens: Sequence[int] = (),
        constraint: Constraint | None = None,
        logprobs: int | None = None,
        cache_length: int | None = None,
        context: Context | None = None,
        window: Window | None = None,
        prompt_lookup: bool = False,
        batch_size: int = BATCH_SIZE,
        callback: Callback | None = None,
        on_prefill: Progress | None = None,
    ) -> list[Completion]:
        """Complete all `prompts`: each is read by itself, then they decode together, one step for all.

        With int8-dynamic the activations' range is shared by the batch, so that a completion can differ from the
        one the same prompt gets alone. Arguments and errors as for `stream`; row i samples with seed + i.

        Args:
            n: samples of every prompt, which is read once for all of them; rows are those of the first prompt, of the
                second and so on.
            context: whose beginning prompts may share; it stays as it is. prompt_lookup: used by the last one left.
            batch_size: the most that run at once; the next joins where one has ended.
        """
        if isinstance(prompts, str):
            prompts = [prompts]
        if not prompts:
            return []
        if batch_size < 1:
            raise GenerationError(f"`batch_size` is {batch_size}; at least 1")
        request = Request(
            sampling=sampling or Sampling(),
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
            n=n,
            stop=stop,
            stop_tokens=stop_tokens,
            constraint=constraint,
            logprobs=logprobs,
            cache_length=cache_length,
            prompt_lookup=prompt_lookup,
            callback=callback,
            on_prefill=on_prefill,
        )
        if context is not None:
            self._require_own(context, window)
            window = context.cache.window
        all_ids = [ids for ids in map(self.encode, prompts) for _ in range(n)]
        capacity = max(request.capacity(len(ids), window) for ids in all_ids)
        rows = [self.row(ids, request, index=index) for index, ids in enumerate(all_ids)]
        places = min(batch_size, len(rows))
        cache = self.session.new_cache(places, capacity, window)
        self.session.require_memory(capacity, rows=places, chunk=self.prefill_chunk, held=cache.nbytes)
        batch = Batch(self.session, cache, self.prefill_chunk)
        at_once = len(rows) if n == 1 else max(1, batch_size // n) * n
        with nullcontext() if context is None else context.used():
            for begin in range(0, len(rows), at_once):
                self._complete(batch, rows[begin : begin + at_once], None if context is None else context.cache)
        return [row.completion for row in rows]

    def _complete(self, batch: Batch, rows: Sequence[Row], prefix: Cache | None) -> None:
        """Run rows to their ends. Samples of one prompt, which stand together, begin with what the first has read."""
        reused: dict[Row, int] = {}
        read = prefix
        for row in rows:
            if row.request.n > 1 and row.index % row.request.n == 0:
                read, reused[row] = self._read_once(row, batch.cache, prefix)
            row.prefix = read
            batch.add(row)
        while not batch.idle:
            for row, _ in batch.step():
                row.require_no_failure()
        for row, count in reused.items():
            row.completion.reused_tokens = count

    def _read_once(self, row: Row, like: Cache, prefix: Cache | None) -> tuple[Cache, int]:
        """Return a cache that has read all of a row's prompt but the last token, and how many others had read."""
        began, cache = time.perf_counter(), self.session.new_cache(1, like.capacity, like.window)
        cache.begin_with(prefix, row.ids)
        rest = cache.reuse(row.ids)
        reused = len(row.ids) - len(rest)
        for _ in self.session.prefill(cache, rest[:-1], self.prefill_chunk, last=True):
            row.has_read(len(row.ids) - cache.read)
        row.completion.prefill_seconds = time.perf_counter() - began
        return cache, reused

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The tokenizer as constraints need it.

        Raises:
            GenerationError: llguidance is not installed, or the model has no end-of-text token.
        """
        return Vocabulary(self.tokenizer, self.session.contract.vocab_size, self.end_of_text)

    def row(self, ids: Sequence[int] | Ids, request: Request | None = None, *, index: int = 0) -> Row:
        """Return a row that completes `ids` (T,) once a `Batch` runs it. index: among a call's rows, added to the seed.

        Raises:
            GenerationError: a request for tokens outside the vocabulary, or a constraint that nothing can meet.
        """
        request = request or Request()
        vocab_size = self.session.contract.vocab_size
        request.require_within(vocab_size, self.end_of_text)
        ids = np.asarray(ids, dtype=np.int64)
        return Row(
            ids,
            request,
            Sampler(_seeded(request.sampling, index), ids, vocab_size),
            TextStream(self.tokenizer, request.stop),
            index=index,
            end_of_text=self.end_of_text,
            matcher=None if request.constraint is None else self.vocabulary.matcher(request.constraint),
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
    return replace(sampling, seed=sampling.seed + index)


def _load_tokenizer(session: PackageSession) -> Tokenizer:
    from tokenizers import Tokenizer

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
