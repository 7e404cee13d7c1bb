"""One sequence being generated, what comes of it, and the stream of its text."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass, field

import numpy as np

from expe_edge.errors import GenerationError
from expe_edge.runtime.cache import Cache
from expe_edge.runtime.constraint import Matcher
from expe_edge.runtime.logprobs import TokenLogprobs, token_logprobs
from expe_edge.runtime.lookup import PromptLookup
from expe_edge.runtime.request import Request
from expe_edge.runtime.sampling import Sampler
from expe_edge.runtime.session import Ids, Logits
from expe_edge.runtime.streaming import TextStream


@dataclass
class Completion:
    """What was generated for one prompt.

    Attributes:
        text: the new text, without the prompt. tokens: the new ids, the closing one included.
        finish_reason: `length`, `end_of_text`, `stop` (a text or a token), `constraint` (nothing may follow) or
            `callback`; None until the text is complete.
        reused_tokens: of the prompt's, those that a context had read before.
        drafted_tokens: proposed by prompt lookup. accepted_tokens: of these, those that were chosen.
        logprobs: of every token, where they were asked for. prompt_logprobs: of every token of the prompt, None of the
            first, where they were asked for.
    """

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    prompt_tokens: int = 0
    finish_reason: str | None = None
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    reused_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None

    @property
    def prefill_speed(self) -> float:
        """Tokens of the prompt read in a second, those that had been read before left out."""
        return (self.prompt_tokens - self.reused_tokens) / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_speed(self) -> float:
        """Tokens generated in a second, behind the first, which comes with the prompt; 0 where there are none."""
        return (len(self.tokens) - 1) / self.decode_seconds if self.decode_seconds else 0.0


class Row:
    """One sequence being generated: its sampler, its text, its completion.

    Args:
        ids: of the prompt, (T,) int64.
        index: among the rows of one call, which its callback is told.
        end_of_text: the id that ends the sequence, or None.
        matcher: of the request's constraint.

    Attributes:
        prefix: a cache of one row that may have read the beginning of the prompt; None for none. goes_on: whether that
            has read all of it, some of which it may have dropped.
        lookup: drafts tokens where the row decodes alone; None for none.
        finish_reason: why no token follows the last; None where one does.
        failure: what has ended it too early; its completion is then of no use.
    """

    prefix: Cache | None = None
    goes_on = False
    finish_reason: str | None = None
    failure: GenerationError | None = None

    def __init__(
        self,
        ids: Ids,
        request: Request,
        sampler: Sampler,
        text: TextStream,
        *,
        index: int = 0,
        end_of_text: int | None,
        matcher: Matcher | None = None,
    ) -> None:
        self.ids, self.request, self.sampler, self.text = ids, request, sampler, text
        self.index, self.end_of_text, self.matcher = index, end_of_text, matcher
        self.stop_tokens = frozenset(request.stop_tokens)
        self.lookup = PromptLookup(ids) if request.prompt_lookup else None
        self.completion = Completion(
            prompt_tokens=len(ids),
            logprobs=None if request.logprobs is None else [],
            prompt_logprobs=None if request.prompt_logprobs is None else [None],
        )
        self.began = 0.0  # when it was first decoded, by `time.perf_counter`
        self._open: Ids | None = None  # the ids that end no text

    def has_read(self, rest: int) -> None:
        """Tell whoever looks on that all but `rest` tokens of the prompt have been read."""
        if self.request.on_prefill is not None and self.index % self.request.n == 0:
            self.request.on_prefill(self.completion.prompt_tokens - rest, self.completion.prompt_tokens)

    @property
    def ended(self) -> bool:
        """Whether no token follows the last."""
        return self.finish_reason is not None or self.failure is not None

    def require_no_failure(self) -> None:
        """Raise what has ended the row too early."""
        if self.failure is not None:
            raise self.failure

    def score(self, begin: int, logits: Logits) -> None:
        """Note what the tokens behind `begin` of the prompt were given by `logits` (T, V), of those from there on."""
        known, count = self.completion.prompt_logprobs, self.request.prompt_logprobs
        if known is not None and count is not None:
            pairs = zip(logits, self.ids[begin + 1 :].tolist(), strict=False)
            known += [token_logprobs(self.text.tokenizer, each, token, count) for each, token in pairs]

    def accept(self, logits: Logits) -> str:
        """Choose the next token from `logits` (V,); return the text that is now certain."""
        token = self.sampler.choose(logits, self._allowed(len(logits)))
        completion, request = self.completion, self.request
        completion.tokens.append(token)
        if completion.logprobs is not None and request.logprobs is not None:
            completion.logprobs.append(token_logprobs(self.text.tokenizer, logits, token, request.logprobs))
        if self.lookup is not None:
            self.lookup.push(token)
        piece = "" if token in self.stop_tokens else self.text.push(token)
        completion.text += piece
        if self.matcher is not None and token != self.end_of_text:
            self.matcher.accept(token)
        self.finish_reason = self._why_ended(token)
        if request.callback is not None and request.callback(self.index, completion) and self.finish_reason is None:
            self.finish_reason = "callback"
        return piece

    def _allowed(self, vocab_size: int) -> Ids | None:
        """The ids to choose from; None for all."""
        if self.matcher is not None:
            return self.matcher.allowed()
        if len(self.completion.tokens) >= self.request.min_new_tokens:
            return None
        if self._open is None:
            closing = [token for token in (self.end_of_text, *self.stop_tokens) if token is not None]
            self._open = np.setdiff1d(np.arange(vocab_size, dtype=np.int64), closing)
        return self._open

    def _why_ended(self, token: int) -> str | None:
        """Why no token follows this one; None where one does."""
        if self.text.stopped or token in self.stop_tokens:
            return "stop"
        if token == self.end_of_text:
            return "end_of_text"
        if self.matcher is not None and self.matcher.complete:
            return "constraint"
        return "length" if len(self.completion.tokens) >= self.request.max_new_tokens else None

    def finish(self) -> str:
        """Note why the sequence ended; return the text held back to the end."""
        self.completion.finish_reason = self.finish_reason
        piece = self.text.finish()
        self.completion.text += piece
        return piece


class Stream(Iterator[str]):
    """The text that follows a prompt, piece by piece, never part of a character. Asking for a piece decodes it.

    pieces: what a batch of one row adds to its text.

    Attributes:
        completion: what has been generated so far; complete once iteration has ended.
    """

    def __init__(self, pieces: Generator[str, None, None], completion: Completion) -> None:
        self.completion = completion
        self._pieces = pieces

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """Decode no further and free the cache; the completion stays as it is."""
        self._pieces.close()
